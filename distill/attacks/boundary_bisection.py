from __future__ import annotations

from typing import ClassVar

import numpy as np

from distill.attacks._made import Asked, bisect, halvings
from distill.attacks.rounds import random_rows
from distill.contracts import Apprentice, Oracle
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import Examples, Queries, Reveals, TransferSet


class BoundaryBisection:
    """Ask about points ever closer to the decision boundary, between pairs of rows with different labels.

    Paper: Stealing Machine Learning Models via Prediction APIs, Tramèr et al., USENIX Security 2016, sec. 6
    ("line-search retraining"). Threat model: labels, a pool of unlabelled rows; every probe counts. A part of the
    budget goes to random rows of the pool, whose labels it must know; the rest to halving the segments between random
    pairs of them with different labels, the last ones not to the end. Where all rows get one label, all of the pool is
    asked and there it ends. Departs from the paper, whose rows are uniform, in drawing them from the pool, and in
    keeping every probe in the transfer set, whole answers where they are given.

    Args:
        seed_share: The part of the budget that goes to rows of the pool.
        tolerance: How close to the boundary a segment ends, as a share of its length.
        pairs: Segments that are halved at once.

    Raises:
        DistillError: An option is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("table",)

    def __init__(self, seed_share: float = 0.25, tolerance: float = 0.01, pairs: int = 64) -> None:
        if not 0 < seed_share < 1:
            raise DistillError(f"seed_share lies between 0 and 1, not {seed_share}")
        if pairs < 1:
            raise DistillError(f"pairs is at least 1, not {pairs}")
        self.seed_share, self.steps, self.pairs = seed_share, halvings(tolerance), pairs

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. Rows of the pool first, then middles: float32 (m, features)."""
        rng = generator(seed, "attack", "boundary_bisection")
        asked = Asked(oracle, pool)
        rows, at_once = random_rows(pool, len(pool), rng), max(2, round(self.seed_share * asked.total))
        labels = np.empty(0, dtype=np.int64)
        while oracle.affordable() and len(labels) < len(rows) and len(np.unique(labels)) < 2:
            more = rows[len(labels) : len(labels) + at_once]
            labels = np.concatenate([labels, asked.ask(Queries.of_pool(pool, more)).labels])
        table = pool.inputs[rows[: len(labels)]]
        while (left := oracle.affordable()) and len(np.unique(labels)) > 1:
            one = rng.integers(len(labels), size=min(self.pairs, -(-left // self.steps)))
            other = np.array([rng.choice(np.flatnonzero(labels != labels[i])) for i in one])
            own = labels[one]

            def as_low(middles: np.ndarray, own: np.ndarray = own) -> np.ndarray:
                told = asked.ask(Queries.made(middles)).labels
                return told == own[: len(told)]

            bisect(as_low, table[one], table[other], self.steps)
        return asked.transfer_set("BoundaryBisection")
