from __future__ import annotations

from typing import ClassVar

import numpy as np

from distill.attacks.rounds import random_rows
from distill.contracts import Apprentice, Oracle
from distill.randomness import generator
from distill.records import Examples, Reveals, TransferSet


class NoTeacher:
    """Control: the same rows as the random attacks, and no answer at all: every class is equally likely.

    The student that comes out is what the pipeline gives by itself. One that scores above chance means a leak.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("image", "table", "text")

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """n uniform posteriors, n being what the budget would have afforded."""
        rows = random_rows(pool, oracle.affordable(), generator(seed, "attack"))
        return TransferSet(
            rows=np.asarray(rows, dtype=np.int64),
            posteriors=np.full((len(rows), oracle.classes), 1 / oracle.classes, dtype=np.float32),
            pool=pool.fingerprint,
            profile="label",
            note=f"{pool.name} without a teacher",
        )
