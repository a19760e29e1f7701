from __future__ import annotations

from typing import ClassVar

import numpy as np

from distill.attacks._active import ActiveAttack, entropies, entropy_slopes, highest, nearest_squares, posteriors_of
from distill.contracts import Apprentice
from distill.records import Examples, TransferSet


class Marich(ActiveAttack):
    """Ask what is uncertain, of many kinds, and like what the student has wrong: three filters, one after the other.

    Paper: Marich: A Query-efficient Distributionally Equivalent Model Extraction Attack, Karmakar and Basu, NeurIPS
    2023, sec. 4 (algorithm 1). Threat model: a pool of natural inputs, no knowledge of the teacher; works with any
    profile.

    To ask n rows in a round, the first filter keeps the ``n / (gradient_share * loss_share)`` rows with the highest
    entropy of the student's posterior. The second clusters the gradients of that entropy with respect to the input
    (k-means, as many clusters as classes) and keeps the share `gradient_share` of them: those nearest to the centre of
    their cluster, of all clusters alike. The third takes, of all answers so far, as many as there are classes on which
    the student's cross-entropy is highest, and keeps the share `loss_share`: those whose posteriors are nearest (L2) to
    the student's posteriors of these. It asks the highest entropies first.

    Written from memory of the paper and not checked against it, the shares of 0.8 included. Known to differ, or not
    known to agree: gradients and posteriors stand for the embeddings that the paper's code may use for texts, which
    have no gradient here; clusters take turns in the second filter; rounds are those of `ActiveAttack`, where the
    paper's grow by a power; students are trained from fresh weights, not further.

    Args:
        rounds: All of them, the random one included.
        first_share: Of the budget, asked at random in the first round.
        growth: Of the rounds after it: equal, or geometric (each multiplies what was asked by the same factor).
        gradient_share: What the second filter keeps (the paper's gamma 1).
        loss_share: What the third filter keeps (the paper's gamma 2).

    Raises:
        ValueError: An option is out of its range.
    """

    inputs: ClassVar[tuple[str, ...]] = ("image", "table")

    def __init__(
        self,
        rounds: int = 10,
        first_share: float = 0.1,
        growth: str = "equal",
        gradient_share: float = 0.8,
        loss_share: float = 0.8,
    ) -> None:
        super().__init__(rounds, first_share, growth)
        for name, value in (("gradient_share", gradient_share), ("loss_share", loss_share)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} is more than 0 and at most 1, not {value}")
        self.gradient_share, self.loss_share = gradient_share, loss_share

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
        kept = highest(entropies(posteriors), round(n / (self.gradient_share * self.loss_share)))
        slopes = entropy_slopes(learner, pool.take(left[kept]).inputs)
        seed = int(rng.integers(2**31))
        kept = kept[of_all_kinds(slopes, asked.classes, min(len(kept), round(n / self.loss_share)), seed)]
        own = posteriors_of(learner, pool.take(asked.rows).inputs)
        wrong = own[highest(losses(own, asked.posteriors), asked.classes)]
        return left[kept[np.sort(highest(-nearest_squares(posteriors[kept], wrong), n))]]


def losses(posteriors: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """(n,) float64: cross-entropy of a student's posteriors with respect to the answers, in nats."""
    return -(answers * np.log(np.maximum(posteriors.astype(np.float64), 1e-300))).sum(axis=1)


def of_all_kinds(points: np.ndarray, clusters: int, n: int, seed: int) -> np.ndarray:
    """(n,) sorted indices of points: the nearest to each cluster's centre, the second nearest to each, and so on."""
    from sklearn.cluster import KMeans

    means = KMeans(min(clusters, len(points)), n_init=1, random_state=seed).fit(points)
    away = means.transform(points)[np.arange(len(points)), means.labels_]
    order = np.lexsort((away, means.labels_))
    starts = np.searchsorted(means.labels_[order], means.labels_[order])
    place = np.arange(len(points)) - starts  # in its cluster, from 0
    return np.sort(order[np.lexsort((away[order], place))[:n]])
