"""What the attacks share that rank the pool with students of their own: the rounds, and the rankings themselves."""

from __future__ import annotations

import numpy as np
import torch

from distill.attacks._own import numbers
from distill.attacks.rounds import History, PoolAttack, random_rows
from distill.contracts import Apprentice, Learner, Predictor
from distill.records import Examples, Inputs, TransferSet, softmax

ROWS_OF_PIXELS = 512  # whose gradients are held in memory at once
CHUNK = 256  # rows of a block of distances
NEAREST_CLASSES = 5  # DeepFool looks at so many of the most probable classes; its authors' code takes 10
OVERSHOOT = 0.02  # how far past a boundary DeepFool steps, so as to see the other side


class ActiveAttack(PoolAttack):
    """A random round first; in each later one, a student is trained on all answers so far and ranks what is left.

    The students are trained from fresh weights by the run's recipe. Rows that it holds out for validation are among
    those that were paid for. Nothing is trained where no choice is left.

    Args:
        rounds: All of them, the random one included.
        first_share: Of the budget, asked at random.
        growth: Of the rounds after it: "equal" ones, or "geometric", so that each multiplies what was asked by the same
            factor, and most students are trained on few answers.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(self, rounds: int, first_share: float, growth: str) -> None:
        super().__init__(rounds)
        if not 0 < first_share <= 1:
            raise ValueError(f"first_share is more than 0 and at most 1, not {first_share}")
        if growth not in ("equal", "geometric"):
            raise ValueError(f"growth is equal or geometric, not {growth!r}")
        self.first_share, self.growth = first_share, growth

    def ends(self, total: int) -> np.ndarray:
        """The first round has two queries at least, so that a recipe can hold one of them out."""
        if self.rounds == 1 or total == 0:
            return np.array([total])
        first = min(total, max(2, round(self.first_share * total)))
        spaced = np.linspace if self.growth == "equal" else np.geomspace
        return spaced(first, total, self.rounds).round().astype(int)

    def select(
        self, pool: Examples, history: History, n: int, student: Apprentice, rng: np.random.Generator
    ) -> np.ndarray:
        """(n,) rows of the pool that were not asked yet: those that `choose` ranks highest, the first one first."""
        left = random_rows(pool, len(pool), rng)  # shuffled, so that ties are broken at random
        left = left[~np.isin(left, history.rows)]
        if not len(history) or len(left) <= n:
            return left[:n]
        return self.choose(pool, left, history.transfer_set(pool), n, student, rng)

    def choose(
        self,
        pool: Examples,
        left: np.ndarray,
        asked: TransferSet,
        n: int,
        student: Apprentice,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """(n,) of the rows in `left`, of which there are more than n, given what was answered so far."""
        raise NotImplementedError


# --- scores of posteriors ---------------------------------------------------------------------------------------------


def posteriors_of(learner: Predictor, inputs: Inputs) -> np.ndarray:
    """(n, classes) float32."""
    return softmax(learner.predict(inputs))


def entropies(posteriors: np.ndarray) -> np.ndarray:
    """(n,) float64, in nats."""
    p = posteriors.astype(np.float64)
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)


def highest(scores: np.ndarray, n: int) -> np.ndarray:
    """(n,) indices of the largest scores, largest first; of equal ones the first."""
    return np.argsort(-scores, kind="stable")[:n]


# --- k-centre ---------------------------------------------------------------------------------------------------------


def k_centre(candidates: np.ndarray, centres: np.ndarray, n: int) -> np.ndarray:
    """(n,) indices of candidates, each the farthest (in L2) from all centres and those chosen before it.

    Greedy 2-approximation of the k-centre problem (Gonzalez 1985). Each step costs one column of distances: a
    candidate's distance to its nearest centre is kept and lowered.

    Args:
        candidates: (m, d), of which m >= n.
        centres: (c, d), c >= 1.
        n: How many to choose.
    """
    points = candidates.astype(np.float64)
    nearest = nearest_squares(points, centres.astype(np.float64))
    squares = (points**2).sum(axis=1)
    chosen = np.empty(n, dtype=np.int64)
    for i in range(n):
        chosen[i] = best = nearest.argmax()
        np.minimum(nearest, squares - 2 * (points @ points[best]) + squares[best], out=nearest)
        nearest[best] = -np.inf  # where all others coincide with a centre, it is not chosen twice
    return chosen


def nearest_squares(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n,) squared L2 distance of each of (n, d) points to the nearest of (c, d) centres."""
    lifted = np.concatenate([-2 * centres, (centres**2).sum(axis=1, keepdims=True)], axis=1).T
    blocks = [
        (np.concatenate([block, np.ones((len(block), 1))], axis=1) @ lifted).min(axis=1) + (block**2).sum(axis=1)
        for block in np.split(points, range(CHUNK, len(points), CHUNK))
    ]
    return np.maximum(np.concatenate(blocks), 0)


# --- gradients of a student's inputs ----------------------------------------------------------------------------------


def deepfool(learner: Learner, inputs: Inputs, steps: int = 50) -> np.ndarray:
    """(n,) float32: the L2 length of the smallest change that DeepFool finds to change each label; infinite where it
    finds none.

    Paper: DeepFool: a simple and accurate method to fool deep neural networks, Moosavi-Dezfooli et al., CVPR 2016, alg.
    2. In units of pixels in [0, 1], or of a table's columns. Nothing is clipped: it is a distance to a boundary, not an
    image to ask about. All rows that are still on their side of it take each step at once.
    """
    learner.module.eval()
    return np.concatenate(
        [
            _deepfool(learner, numbers(inputs[start : start + ROWS_OF_PIXELS], learner.device), steps)
            for start in range(0, len(inputs), ROWS_OF_PIXELS)
        ]
    )


def _deepfool(learner: Learner, start: torch.Tensor, steps: int) -> np.ndarray:
    with torch.no_grad():
        classes = learner.logits(start).sort(dim=1, descending=True, stable=True).indices[:, :NEAREST_CLASSES]
    moved = torch.zeros_like(start)
    active = torch.arange(len(start), device=start.device)
    for _ in range(steps):
        at = start[active] + (1 + OVERSHOOT) * moved[active]
        with torch.no_grad():
            still = learner.logits(at).argmax(dim=1) == classes[active, 0]
        active, at = active[still], at[still].requires_grad_()
        if not len(active):
            break
        ahead = learner.logits(at).gather(1, classes[active])
        ahead = ahead[:, 1:] - ahead[:, :1]
        others = ahead.shape[1]
        slopes = torch.stack(
            [
                torch.autograd.grad(ahead[:, k].sum(), at, retain_graph=k + 1 < others)[0].flatten(1)
                for k in range(others)
            ],
            dim=1,
        )
        lengths = slopes.norm(dim=2).clamp_min(1e-12)
        gaps = ahead.detach().abs()
        nearest = (gaps / lengths).argmin(dim=1, keepdim=True)
        share = (gaps.gather(1, nearest) + 1e-6) / lengths.gather(1, nearest).square()
        step = share * slopes.take_along_dim(nearest[:, :, None], dim=1)[:, 0]
        moved[active] += step.view(-1, *start.shape[1:])
    else:
        moved[active] = torch.inf
    return moved.flatten(1).norm(dim=1).cpu().numpy()


def entropy_slopes(learner: Learner, inputs: Inputs) -> np.ndarray:
    """(n, d) float32: how the entropy of each row's posterior changes with its pixels, or its columns."""
    learner.module.eval()
    slopes = []
    for start in range(0, len(inputs), ROWS_OF_PIXELS):
        at = numbers(inputs[start : start + ROWS_OF_PIXELS], learner.device).requires_grad_()
        log_p = learner.logits(at).log_softmax(dim=1)
        slopes.append(torch.autograd.grad(-(log_p.exp() * log_p).sum(), at)[0].flatten(1).cpu().numpy())
    return np.concatenate(slopes)
