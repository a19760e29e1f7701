from __future__ import annotations

from dataclasses import replace

import numpy as np

from distill.attacks._active import ActiveAttack, entropies, highest, posteriors_of
from distill.contracts import Apprentice
from distill.records import Examples, TransferSet

MEASURES = ("vote_entropy", "kl")


class Disagreement(ActiveAttack):
    """Query by committee: ask where several students of the answers so far disagree most.

    Papers: Query by Committee, Seung, Opper and Sompolinsky, COLT 1992; Employing EM and Pool-Based Active Learning for
    Text Classification, McCallum and Nigam, ICML 1998 (mean divergence to the consensus); Query Learning Strategies
    Using Boosting and Bagging, Abe and Mamitsuka, ICML 1998 (members that saw different data). Threat model: a pool of
    natural inputs, no knowledge of the teacher; works with any profile.

    Measures: `kl` is the mean divergence of the members' posteriors from their average, `vote_entropy` the entropy of
    the members' labels (Dagan and Engelson, ICML 1995), both in nats.

    Departs from the papers: each member is trained on a random share of the answers without repetition, because answers
    that occur twice would be averages to some recoveries; all members have the same initialisation.

    Args:
        rounds: All of them, the random one included.
        first_share: Of the budget, asked at random in the first round.
        growth: Of the rounds after it: equal, or geometric (each multiplies what was asked by the same factor).
        members: Students of a committee.
        member_share: Of the answers, what each member is trained on; of a bootstrap sample 63 % are distinct.
        measure: One of the above.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        rounds: int = 10,
        first_share: float = 0.1,
        growth: str = "equal",
        members: int = 3,
        member_share: float = 0.63,
        measure: str = "kl",
    ) -> None:
        super().__init__(rounds, first_share, growth)
        if members < 2:
            raise ValueError(f"members is at least 2, not {members}")
        if not 0 < member_share < 1:
            raise ValueError(f"member_share is more than 0 and less than 1, not {member_share}")
        if measure not in MEASURES:
            raise ValueError(f"measure is one of {', '.join(MEASURES)}, not {measure!r}")
        self.members, self.member_share, self.measure = members, member_share, measure

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
        committee = []
        for _ in range(self.members):
            # Two at least, where there are two: a recipe may hold one out.
            part = np.sort(rng.permutation(len(asked))[: max(2, round(self.member_share * len(asked)))])
            committee.append(posteriors_of(student.fit(answers_of(asked, part), pool), pool.take(left).inputs))
        return left[highest(disagreement(np.stack(committee), self.measure), n)]


def answers_of(asked: TransferSet, part: np.ndarray) -> TransferSet:
    """Some of the answers to queries that are all rows of the pool."""
    logits = None if asked.logits is None else asked.logits[part]
    return replace(asked, rows=asked.rows[part], posteriors=asked.posteriors[part], logits=logits)


def disagreement(posteriors: np.ndarray, measure: str) -> np.ndarray:
    """(n,) float64, of (members, n, classes) posteriors. See `Disagreement`."""
    if measure == "vote_entropy":
        votes = posteriors.argmax(axis=2)[:, :, None] == np.arange(posteriors.shape[2])
        return entropies(votes.mean(axis=0))
    # The mean divergence from the average is the average's entropy less the mean entropy.
    return entropies(posteriors.mean(axis=0, dtype=np.float64)) - np.mean(
        [entropies(one) for one in posteriors], axis=0
    )
