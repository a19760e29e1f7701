from __future__ import annotations

from typing import ClassVar

import numpy as np

from distill.attacks.rounds import random_rows
from distill.contracts import Apprentice, Oracle
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import Examples, Reveals, TransferSet, one_hot


class GroundTruthLabels:
    """Control: the true labels of the very rows that the random attacks ask about. The teacher is never asked.

    What a student reaches beyond this is what the teacher's answers were worth.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("image", "table", "text")

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """Raises `DistillError` where the pool has no labels, or those of other classes."""
        if pool.labels is None or pool.class_names != student.class_names:
            raise DistillError(
                "this control needs a pool that is labelled with the teacher's classes, such as pool=held_out", "attack"
            )
        rows = random_rows(pool, oracle.affordable(), generator(seed, "attack"))
        return TransferSet(
            rows=np.asarray(rows, dtype=np.int64),
            posteriors=one_hot(pool.labels[rows], oracle.classes),
            pool=pool.fingerprint,
            profile="label",
            note=f"ground-truth labels of {pool.name}",
        )
