from __future__ import annotations

from typing import ClassVar

import numpy as np

from distill.attacks.rounds import History, PoolAttack, random_rows
from distill.contracts import Apprentice
from distill.records import Examples


class KnockoffRandom(PoolAttack):
    """Ask about pool inputs drawn at random without replacement; train on the answers.

    Paper: Knockoff Nets: Stealing Functionality of Black-Box Models, Orekondy et al., CVPR 2019, sec. 4.1.1 ("random").
    Threat model: a pool of natural inputs, no knowledge of the teacher; works with any profile.
    """

    adapts: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(rounds=1)

    def select(
        self, pool: Examples, history: History, n: int, student: Apprentice, rng: np.random.Generator
    ) -> np.ndarray:
        """(n,) random rows, or all of a smaller pool."""
        return random_rows(pool, n, rng)
