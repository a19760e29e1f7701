"""Nonsense: words drawn independently of one another, in texts of random length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill.data import assets
from distill.errors import DistillError


def check_lengths(min_words: int, max_words: int) -> None:
    """Raises `DistillError` where no text has such a length."""
    if not 1 <= min_words <= max_words:
        raise DistillError(f"min_words ({min_words}) must be at least 1 and at most max_words ({max_words})")


def words_of(path: str, title: str) -> list[str]:
    """The words of a file, in its order. Raises `MissingAsset` without it, `DistillError` when it is not UTF-8."""
    file = assets.find(title, root=path, key="pool.path")
    assert isinstance(file, Path)  # a stated path is used or refused
    try:
        return file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DistillError(f"{file} can't be read as UTF-8 text ({error})", "pool.path") from error


def nonsense(words: Sequence[str], size: int, lengths: tuple[int, int], rng: np.random.Generator) -> list[str]:
    """`size` texts of these words, each of them as likely as it is often there, and each length as likely as another.

    Raises `DistillError` where all words are the same.
    """
    if len(set(words)) < 2:
        raise DistillError(f"{len(set(words))} words make no texts; state a longer file", "pool.path")
    ends = np.cumsum(rng.integers(lengths[0], lengths[1] + 1, size=size))
    drawn = np.array(words, dtype=object)[rng.integers(len(words), size=ends[-1])]
    return [" ".join(part) for part in np.split(drawn, ends[:-1])]
