from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from distill.attacks._made import Asked, bisect, column_ranges, halvings
from distill.attacks.rounds import random_rows
from distill.contracts import Apprentice, Oracle
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import Examples, Inputs, Queries, Reveals, TransferSet

SHOWN = 10  # points of its own curve


class TreePaths:
    """Find the leaves of a decision tree: from a point in a leaf, bisect each column for the leaf's two edges.

    Paper: Stealing Machine Learning Models via Prediction APIs, Tramèr et al., USENIX Security 2016, sec. 4.2
    (path-finding, for columns of numbers). Threat model: whole posteriors, by which one leaf is told from another, and
    a pool that tells the range of each column. Just across each edge lies a point of another leaf, which is explored
    next; when there is none left, rows of the pool are asked, and one that lies in no known leaf begins anew. It ends
    early where the pool ends. A leaf takes two questions for each column, and ``log2(1 / tolerance)`` for each edge
    inside the ranges; one thinner than the tolerance may be missed. Leaves of equal posteriors blur, as in the paper,
    which needs them to differ. Noise in the answers makes every point a leaf of its own.

    Its own student is the leaves (`Leaves`).

    Args:
        tolerance: How exactly an edge is found, as a share of the column's range. The paper names none.
        rows_at_once: Rows of the pool that are asked when nothing is left to explore.

    Raises:
        DistillError: An option is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.PROBS
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("table",)

    def __init__(self, tolerance: float = 0.001, rows_at_once: int = 16) -> None:
        if rows_at_once < 1:
            raise DistillError(f"rows_at_once is at least 1, not {rows_at_once}")
        self.tolerance, self.steps, self.rows_at_once = tolerance, halvings(tolerance), rows_at_once

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. Rows of the pool, and points float32 (m, features) between them."""
        asked, ranges = Asked(oracle, pool), column_ranges(pool)
        slack = self.tolerance * (ranges[1] - ranges[0])
        leaves, shown = Leaves.none(pool.spec.shape[0], oracle.classes), 0
        rows = random_rows(pool, len(pool), generator(seed, "attack", "tree_paths"))
        for start in range(0, len(rows), self.rows_at_once):
            answers = asked.ask(Queries.of_pool(pool, rows[start : start + self.rows_at_once]))
            points = pool.inputs[rows[start : start + len(answers)]]
            waiting = deque(zip(points, answers.posteriors, strict=True))
            while waiting:
                point, posterior = waiting.popleft()
                if leaves.hold(point, posterior, slack):
                    continue
                low, high, beyond = self._edges(asked, point, posterior, ranges)
                leaves = leaves.with_one(low, high, posterior)
                waiting.extend(beyond)
                if len(asked) * SHOWN // asked.total > shown and oracle.affordable():
                    shown = len(asked) * SHOWN // asked.total
                    student.show(leaves, len(asked))
            if not oracle.affordable():
                break
        student.show(leaves, len(asked))
        return asked.transfer_set(f"TreePaths ({len(leaves)} leaves)")

    def _edges(
        self, asked: Asked, point: np.ndarray, posterior: np.ndarray, ranges: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """The (features,) lower and upper edges of the leaf that a point lies in, and a point and its posterior across
        each. An edge that no question was left for is at the point itself."""
        at_end = np.stack(ranges) == point  # where there is nothing to ask
        edges = np.where(at_end, [[-np.inf], [np.inf]], point)
        side, column = np.nonzero(~at_end)
        ends = np.tile(point, (len(column), 1))
        ends[np.arange(len(column)), column] = np.stack(ranges)[side, column]
        answers = asked.ask(Queries.made(ends)).posteriors
        within = (answers == posterior).all(axis=1)
        inside, out = np.flatnonzero(within), np.flatnonzero(~within)
        edges[side[inside], column[inside]] = np.where(side[inside], np.inf, -np.inf)
        across = {tuple(ends[i]): answers[i] for i in out}  # what was answered outside of the leaf

        def as_point(middles: np.ndarray) -> np.ndarray:
            given = asked.ask(Queries.made(middles)).posteriors
            same = (given == posterior).all(axis=1)
            across.update({tuple(middles[i]): given[i] for i in np.flatnonzero(~same)})
            return same

        inner, outer = bisect(as_point, np.tile(point, (len(out), 1)), ends[out], self.steps)
        of_out = np.arange(len(out)), column[out]
        edges[side[out], column[out]] = (inner[of_out].astype(np.float64) + outer[of_out]) / 2
        return edges[0], edges[1], [(place, across[tuple(place)]) for place in outer]


@dataclass(frozen=True)
class Leaves:
    """Boxes with an answer each; a point outside of all of them gets that of the nearest, in the sum of the columns.

    Args:
        low, high: (m, features) float64 edges.
        posteriors: (m, classes) float32.
    """

    low: np.ndarray
    high: np.ndarray
    posteriors: np.ndarray

    @classmethod
    def none(cls, columns: int, classes: int) -> Leaves:
        return cls(np.empty((0, columns)), np.empty((0, columns)), np.empty((0, classes), dtype=np.float32))

    def __len__(self) -> int:
        return len(self.low)

    def with_one(self, low: np.ndarray, high: np.ndarray, posterior: np.ndarray) -> Leaves:
        """One more."""
        return Leaves(np.vstack([self.low, low]), np.vstack([self.high, high]), np.vstack([self.posteriors, posterior]))

    def hold(self, point: np.ndarray, posterior: np.ndarray, slack: np.ndarray) -> bool:
        """Whether a point lies in a leaf with this posterior, give or take `slack` in each column."""
        inside = ((self.low - slack <= point) & (point <= self.high + slack)).all(axis=1)
        return bool((inside & (self.posteriors == posterior).all(axis=1)).any())

    def predict(self, inputs: Inputs) -> np.ndarray:
        """(n, classes) float32 logarithms of the posteriors; a probability of 0 counts as 1e-12."""
        table = inputs[: len(inputs)].astype(np.float64)
        nearest, best = np.full(len(table), np.inf), np.zeros(len(table), dtype=np.int64)
        for leaf, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            away = np.maximum(np.maximum(low - table, table - high), 0).sum(axis=1)
            closer = away < nearest
            nearest[closer], best[closer] = away[closer], leaf
        return np.log(np.maximum(self.posteriors[best], 1e-12)).astype(np.float32)
