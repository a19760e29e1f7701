"""Who gets which rows: limits, a test share, and the victim's and the attacker's disjoint halves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill.errors import DistillError
from distill.randomness import generator
from distill.records import Dataset, Examples


@dataclass(frozen=True)
class Splits:
    """How every data set is cut. Nothing here depends on the run's seed, so runs with other seeds share their rows.

    Args:
        victim_share: How much of the training rows is the victim's; the rest is what an attacker may hold. In
            (0, 1]; at 1 `held_out` is empty. Stratified by label.
        split_seed: The seed of every shuffle.
        train_rows: Keep this many training rows (before they are shared out), drawn at random; None keeps all. Fewer
            rows are a prefix of more.
        test_rows: The same for the test rows.

    Raises:
        DistillError: A number is out of range.
    """

    victim_share: float = 1.0
    split_seed: int = 0
    train_rows: int | None = None
    test_rows: int | None = None

    def __post_init__(self) -> None:
        # No key: `build` knows where this node lies (data, or pool.source).
        if not 0 < self.victim_share <= 1:
            raise DistillError(f"victim_share must be above 0 and at most 1, not {self.victim_share}")
        for name, rows in (("train_rows", self.train_rows), ("test_rows", self.test_rows)):
            if rows is not None and (rows < 1 or rows != int(rows)):
                raise DistillError(f"{name} must be a whole number above 0, or null for all, not {rows}")

    def apply(self, name: str, train: Examples, test: Examples | None, test_share: float = 0.2) -> Dataset:
        """The data set. Without `test`, a stratified `test_share` of `train` becomes the test rows.

        Raises:
            DistillError: It can't serve: no rows, one class, labels out of range, features that are no numbers,
                train and test of different shapes.
        """
        check(name, train)
        if test is None:
            kept = stratified(_labels(train), 1.0 - test_share, self.split_seed, "test")
            train, test = train.take(np.flatnonzero(kept)), train.take(np.flatnonzero(~kept))
        check(name, test)
        if train.spec != test.spec or train.class_names != test.class_names:
            raise DistillError(
                f"the training rows of {name} are {train.spec} with {len(train.class_names)} classes, "
                f"but the test rows are {test.spec} with {len(test.class_names)}",
                "data",
            )
        train = self._limit(train, self.train_rows, "train_rows")
        test = self._limit(test, self.test_rows, "test_rows")
        if len(np.unique(_labels(train))) < 2:
            raise DistillError(f"{name} has one class only in its training rows; a classifier needs two", "data")
        victim = stratified(_labels(train), self.victim_share, self.split_seed, "victim")
        if not victim.any():
            raise DistillError(
                f"a share of {self.victim_share} of {len(train)} rows leaves the victim none; raise it",
                "data.victim_share",
            )
        return Dataset(
            name=name,
            spec=train.spec,
            class_names=train.class_names,
            train=train if victim.all() else train.take(np.flatnonzero(victim)),
            test=test,
            held_out=train.take(np.flatnonzero(~victim)),
        )

    def _limit(self, examples: Examples, rows: int | None, option: str) -> Examples:
        if rows is None:
            return examples
        if rows > len(examples):
            raise DistillError(
                f"there are only {len(examples)} rows, not {rows}; lower it or set null", f"data.{option}"
            )
        order = generator(self.split_seed, "split", option).permutation(len(examples))
        return examples.take(order[:rows])


def stratified(labels: np.ndarray, share: float, seed: int, stream: str) -> np.ndarray:
    """(n,) bool: a random ``floor(share * n)`` of the rows, within one row of `share` of every class."""
    order = generator(seed, "split", stream).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    # The i-th row of this order is taken when the running total of shares passes a whole number.
    totals = np.floor(np.arange(len(labels) + 1) * share + 1e-9)
    chosen = np.empty(len(labels), dtype=bool)
    chosen[order] = np.diff(totals) > 0
    return chosen


def check(name: str, examples: Examples, key: str = "data") -> None:
    """Raises `DistillError` where the rows can't be what they claim to be."""
    spec, inputs = examples.spec, examples.inputs
    if len(examples) == 0:
        raise DistillError(f"{name} has no rows", key)
    if isinstance(inputs, np.ndarray):
        dtype = {"image": np.dtype(np.uint8), "table": np.dtype(np.float32), "text": np.dtype(object)}[spec.kind]
        if inputs.shape[1:] != spec.shape or inputs.dtype != dtype:
            raise DistillError(f"{name} holds {inputs.dtype} {inputs.shape[1:]}, which is not {spec}", key)
        if spec.kind == "table" and not np.isfinite(inputs).all():
            row, column = np.argwhere(~np.isfinite(inputs))[0]
            raise DistillError(
                f"{name} has a missing or infinite value in row {row}, feature {column}; fill it or drop the row", key
            )
    if examples.labels is None:
        return
    labels = examples.labels
    if len(labels) != len(examples):
        raise DistillError(f"{name} has {len(labels)} labels for {len(examples)} rows", key)
    bad = np.flatnonzero((labels < 0) | (labels >= len(examples.class_names)))
    if len(bad):
        raise DistillError(
            f"{name} has label {labels[bad[0]]} in row {bad[0]}, outside of its {len(examples.class_names)} classes",
            key,
        )


def _labels(examples: Examples) -> np.ndarray:
    if examples.labels is None:
        raise DistillError(f"{examples.name} has no labels; a data set needs them (a pool does not)", "data")
    return examples.labels


def check_share(test_share: float) -> float:
    """A share of rows for the test: strictly between 0 and 1."""
    if not 0 < test_share < 1:
        raise DistillError(f"test_share must be between 0 and 1, not {test_share}")
    return test_share
