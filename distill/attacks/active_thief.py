from __future__ import annotations

import numpy as np

from distill.attacks._active import ActiveAttack, deepfool, entropies, highest, k_centre, posteriors_of
from distill.contracts import Apprentice
from distill.records import Examples, TransferSet

STRATEGIES = ("uncertainty", "k_center", "dfal", "dfal_k_center")


class ActiveThief(ActiveAttack):
    """Active learning against a provider: ask what the student of the answers so far finds hard, or has not covered.

    Paper: ActiveThief: Model Extraction Using Active Learning and Unannotated Public Data, Pal et al., AAAI 2020.
    Threat model: a pool of natural inputs, no knowledge of the teacher; works with any profile.

    Strategies, each of which looks at the student alone: `uncertainty` asks the highest entropies of its posteriors;
    `k_center` asks, one after the other, the row whose posterior is farthest (L2) from those of all rows asked so far
    (Sener and Savarese, ICLR 2018); `dfal` asks where the smallest change of the input by which DeepFool changes the
    student's label is smallest (Ducoffe and Precioso 2018), by its L2 norm in pixel space; `dfal_k_center` lets the
    k-centre choose among the first of dfal's.

    Departs from the paper: no share of the budget is set apart for validation, because what a recipe holds out
    (`training.validation_share`; 0.2 in the paper) counts among the queries anyway; students are trained by the run's
    recipe; DeepFool looks at the five most probable classes; a smaller `entropy_share` spares most of its work.

    Args:
        strategy: One of the above.
        rounds: All of them, the random one included.
        first_share: Of the budget, asked at random in the first round.
        growth: Of the rounds after it: equal, or geometric (each multiplies what was asked by the same factor).
        entropy_share: Of what is left, the other strategies look only at the share with the highest entropies, and at
            twice as many rows as they choose at least.
        prefilter: `dfal_k_center`: how many times the rows of a round dfal leaves to the k-centre.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        strategy: str = "uncertainty",
        rounds: int = 10,
        first_share: float = 0.1,
        growth: str = "equal",
        entropy_share: float = 1.0,
        prefilter: float = 10.0,
    ) -> None:
        super().__init__(rounds, first_share, growth)
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy is one of {', '.join(STRATEGIES)}, not {strategy!r}")
        if not 0 < entropy_share <= 1:
            raise ValueError(f"entropy_share is more than 0 and at most 1, not {entropy_share}")
        if not prefilter >= 1:
            raise ValueError(f"prefilter is at least 1, not {prefilter}")
        self.strategy, self.entropy_share, self.prefilter = strategy, entropy_share, prefilter
        if "dfal" in strategy:  # a text has no gradient
            self.inputs = ("image", "table")  # type: ignore[misc]

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
        learner = student.fit(asked, pool)
        posteriors = posteriors_of(learner, pool.take(left).inputs)
        uncertain = highest(entropies(posteriors), n if self.strategy == "uncertainty" else self._looked_at(left, n))
        left, posteriors = left[uncertain], posteriors[uncertain]
        if "dfal" in self.strategy:
            kept = n if self.strategy == "dfal" else round(self.prefilter * n)
            near = highest(-deepfool(learner, pool.take(left).inputs), kept)
            left, posteriors = left[near], posteriors[near]
        if "k_center" in self.strategy:
            left = left[k_centre(posteriors, posteriors_of(learner, pool.take(asked.rows).inputs), n)]
        return left

    def _looked_at(self, left: np.ndarray, n: int) -> int:
        return max(2 * n, round(self.entropy_share * len(left)))
