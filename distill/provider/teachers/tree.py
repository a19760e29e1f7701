from __future__ import annotations

import hashlib
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from distill.errors import DistillError
from distill.records import Dataset, Reveals

if TYPE_CHECKING:
    from distill.training import Trainer


class Tree:
    """A decision tree (CART, of scikit-learn) that is grown on the labels of ``data.train``, the same each time.

    An answer is the share of each class among the training rows in the query's leaf. Growing it takes seconds; it is
    not kept.

    Args:
        max_depth: Questions on the way to a leaf at most; null for no bound.
        min_samples_leaf: Training rows in a leaf at least.
        seed: Which of equally good splits is taken. It is the teacher's own.

    Raises:
        DistillError: The data are no table or have no labels, or an option is out of its range.
    """

    output: ClassVar[Reveals] = Reveals.PROBS
    usd_per_query: ClassVar[float] = 0.0
    remote: ClassVar[bool] = False
    rows_at_once: ClassVar[int] = 65_536
    flops_per_query: ClassVar[None] = None

    parameters: int | None

    def __init__(self, max_depth: int | None = 12, min_samples_leaf: int = 20, seed: int = 0) -> None:
        if max_depth is not None and max_depth < 1:
            raise DistillError(f"max_depth is at least 1, not {max_depth}")
        if min_samples_leaf < 1:
            raise DistillError(f"min_samples_leaf is at least 1, not {min_samples_leaf}")
        self.max_depth, self.min_samples_leaf, self.seed = max_depth, min_samples_leaf, seed

    def prepare(self, data: Dataset, trainer: Trainer, cache: Path) -> None:
        """Grow it. `parameters` counts its thresholds and the probabilities in its leaves."""
        from sklearn.tree import DecisionTreeClassifier

        if data.spec.kind != "table":
            raise DistillError(f"tree reads tables, and {data.name} holds {data.spec.kind}s", "teacher")
        if data.train.labels is None:
            raise DistillError(f"{data.name} has no labels to grow the tree on", "data")
        self._tree = DecisionTreeClassifier(
            max_depth=self.max_depth, min_samples_leaf=self.min_samples_leaf, random_state=self.seed
        ).fit(data.train.inputs[: len(data.train)], data.train.labels)
        self._classes = data.classes
        grown = self._tree.tree_
        leaves = int((grown.children_left < 0).sum())
        self.parameters = grown.node_count - leaves + leaves * data.classes
        digest = hashlib.blake2b(f"tree {data.classes}".encode(), digest_size=16)
        parts = (grown.children_left, grown.children_right, grown.feature, grown.threshold, grown.value)
        for array in (self._tree.classes_, *parts):
            digest.update(np.ascontiguousarray(array).tobytes())
        self.fingerprint = digest.hexdigest()

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """(n, classes) float32 posteriors; a class without training rows has 0."""
        posteriors = np.zeros((len(inputs), self._classes), dtype=np.float32)
        if len(inputs):
            posteriors[:, self._tree.classes_] = self._tree.predict_proba(inputs)
        return posteriors

    def latency_s(self, one: np.ndarray) -> float | None:
        """Of one answer."""
        seconds = []
        for _ in range(20):
            started = time.perf_counter()
            self.predict(one)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)
