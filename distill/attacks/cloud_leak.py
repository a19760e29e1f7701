from __future__ import annotations

import math

import numpy as np
import torch
from scipy.spatial.distance import pdist

from distill.attacks._moves import Box, Grown, SeededAttack, as_floats, moved
from distill.attacks._options import at_least, one_of, positive
from distill.contracts import Apprentice, Learner
from distill.records import Examples, softmax

PAIRS_OF = 256  # asked inputs of a class whose distances are averaged


class CloudLeak(SeededAttack):
    """Ask about pool inputs that were pushed to where the student hesitates between two classes, the least sure first.

    Paper: CloudLeak: Large-Scale Deep Learning Models Stealing Through Adversarial Examples, Yu et al., NDSS 2020,
    FeatureFool and margin-based active learning. Each round trains a student from fresh weights on all that was asked,
    and moves random pool inputs x, each with a guide t that the oracle puts into another class, to make small

        max(|f(x') - f(t)| - |f(x') - f(x)| + M, 0),      M = alpha - mean distance of f within the class of x,

    with f the student's logits; those with the smallest difference between the student's two largest probabilities are
    asked. Threat model: a pool of inputs like the teacher's, labels alone are enough.

    Departs from the paper, where f is a hidden layer of a pretrained network and L-BFGS minimises the squared change
    plus lambda times the above: here projected gradient descent keeps the change within `epsilon`, and an input rests
    once the loss is 0. The paper's students keep pretrained layers; here the student is the run's. Box and units are
    those of `distill.attacks.jbda.JBDA`. `seeds`, `rounds`, `candidates`, `epsilon` and `steps` are of no paper.

    Args:
        seeds: Random pool rows that are asked first.
        rounds: What is left of the budget is spent in so many rounds; in more where the pool is smaller than a round.
        candidates: Inputs that are moved for each one that is asked.
        alpha: Of the margin M.
        epsilon: Radius of the ball around an input.
        steps: How many, of 2 epsilon / steps each.
        norm: "l2" or "linf".

    Raises:
        ValueError: An option is out of its range.
        DistillError: The budget or the pool is smaller than the seeds.
    """

    def __init__(
        self,
        seeds: int = 100,
        rounds: int = 10,
        candidates: int = 4,
        alpha: float = 0.5,
        epsilon: float = 2.0,
        steps: int = 20,
        norm: str = "l2",
    ) -> None:
        super().__init__(seeds)
        at_least(1, rounds=rounds, candidates=candidates, steps=steps)
        positive(alpha=alpha, epsilon=epsilon)
        one_of(("linf", "l2"), norm=norm)
        self.rounds, self.candidates, self.alpha = rounds, candidates, alpha
        self.epsilon, self.steps, self.norm = epsilon, steps, norm

    def grow(
        self, asked: Grown, pool: Examples, student: Apprentice, box: Box, budget: int, rng: np.random.Generator
    ) -> None:
        """See `SeededAttack`."""
        share = math.ceil((budget - len(asked)) / self.rounds)
        while (left := budget - len(asked)) > 0:
            n = min(share, left, len(pool))
            learner = student.fit(asked.transfer_set(), pool)
            starts = as_floats(pool.inputs[rng.permutation(len(pool))[: self.candidates * n]])
            made = self.fooling(learner, np.clip(starts, box.low, box.high), asked, box, rng)
            asked.ask(made[least_sure(learner.predict(made), n)])

    def fooling(
        self, learner: Learner, starts: np.ndarray, asked: Grown, box: Box, rng: np.random.Generator
    ) -> np.ndarray:
        """FeatureFool: (n, ...) inputs near as many starts, between the starts' classes and others."""
        sources, known, labels = learner.predict(starts), learner.predict(asked.inputs), asked.answers.labels
        classes = sources.argmax(axis=1)
        guides, margins = np.empty(len(starts), np.int64), np.empty(len(starts), np.float32)
        for label in np.unique(classes):
            mine, same = classes == label, known[labels == label][:PAIRS_OF]
            others = np.flatnonzero(labels != label)
            guides[mine] = rng.choice(others if len(others) else len(labels), int(mine.sum()))
            margins[mine] = self.alpha - (pdist(same).mean() if len(same) > 1 else 0.0)
        return moved(
            learner,
            starts,
            triplet,
            (sources, known[guides], margins),
            box,
            norm=self.norm,
            radius=self.epsilon,
            step=2 * self.epsilon / self.steps,
            steps=self.steps,
        )


def triplet(features: torch.Tensor, sources: torch.Tensor, guides: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """(n,): how much nearer than its guide, a margin added, each row is to its source; 0 where it is not."""
    nearer = torch.linalg.vector_norm(features - guides, dim=1) - torch.linalg.vector_norm(features - sources, dim=1)
    return (nearer + margins).clamp(min=0)


def least_sure(logits: np.ndarray, n: int) -> np.ndarray:
    """(n,) the rows with the smallest difference between their two largest probabilities, smallest first."""
    ordered = np.sort(softmax(logits), axis=1)
    return np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")[:n]
