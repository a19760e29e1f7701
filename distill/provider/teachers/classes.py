"""Whose class is which: a ready model has its own names and its own order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from distill.errors import DistillError, nearest


def column_order(
    theirs: Sequence[str], ours: Sequence[str], key: str, class_map: Mapping[str, str] | None = None
) -> np.ndarray:
    """(len(ours),) int64 such that ``answers[:, order]`` has the columns of the data's classes.

    Without a map the two sides must hold the same names, up to case and punctuation. With one, classes of the model
    that it leaves out are dropped: the model is then conditioned on the others.

    Args:
        theirs: The model's class names, in the order of its columns.
        ours: The data's.
        key: The config key of `class_map`, for messages.
        class_map: The data's class for each (or some) of the model's.

    Raises:
        DistillError: They can't be brought together.
    """
    if class_map is None:
        order = _match(list(theirs), list(ours)) or _match([_plain(n) for n in theirs], [_plain(n) for n in ours])
        if order is None:
            raise DistillError(
                f"the model's classes ({_some(theirs)}) are not the data's ({_some(ours)}); say which is which with "
                f"{key}={{{theirs[0] if theirs else '…'}: {ours[0]}, …}}",
                key,
            )
        return np.array(order, dtype=np.int64)
    for their_name, our_name in class_map.items():
        if their_name not in theirs:
            raise DistillError(f"the model has no class '{their_name}'.{nearest(their_name, theirs)}", key)
        if our_name not in ours:
            raise DistillError(f"the data has no class '{our_name}'.{nearest(our_name, ours)}", key)
    inverse = {our_name: their_name for their_name, our_name in class_map.items()}
    if len(inverse) < len(class_map):
        raise DistillError("it gives one class of the data to two of the model's", key)
    if missing := [name for name in ours if name not in inverse]:
        raise DistillError(f"it has none of the model's classes ({_some(theirs)}) for {_some(missing)}", key)
    return np.array([list(theirs).index(inverse[name]) for name in ours], dtype=np.int64)


def _match(theirs: list[str], ours: list[str]) -> list[int] | None:
    if len(set(theirs)) < len(theirs) or sorted(theirs) != sorted(ours):
        return None
    return [theirs.index(name) for name in ours]


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
