from __future__ import annotations

import numpy as np

from distill.attacks._active import ActiveAttack, highest, posteriors_of
from distill.contracts import Apprentice
from distill.records import Examples, TransferSet


class Margin(ActiveAttack):
    """Ask where the two most probable classes of the student of the answers so far are closest.

    Paper: Active Hidden Markov Models for Information Extraction, Scheffer, Decomain and Wrobel, IDA 2001 (margin
    sampling). Threat model: a pool of natural inputs, no knowledge of the teacher; works with any profile.

    Args:
        rounds: All of them, the random one included.
        first_share: Of the budget, asked at random in the first round.
        growth: Of the rounds after it: equal, or geometric (each multiplies what was asked by the same factor).

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(self, rounds: int = 10, first_share: float = 0.1, growth: str = "equal") -> None:
        super().__init__(rounds, first_share, growth)

    def choose(
        self,
        pool: Examples,
        left: np.ndarray,
        asked: TransferSet,
        n: int,
        student: Apprentice,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """See `ActiveAttack`."""
        return left[highest(-margins(posteriors_of(student.fit(asked, pool), pool.take(left).inputs)), n)]


def margins(posteriors: np.ndarray) -> np.ndarray:
    """(n,): the largest entry of each row less the second largest."""
    top = np.partition(posteriors, -2, axis=1)
    return top[:, -1] - top[:, -2]
