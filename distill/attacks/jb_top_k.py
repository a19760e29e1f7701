from __future__ import annotations

import numpy as np

from distill.attacks._moves import TargetedMoves
from distill.contracts import Learner


class JBTopK(TargetedMoves):
    """From each input, small steps towards each of the k classes that the student holds for the next likely.

    Paper: Prediction Poisoning: Towards Defenses Against DNN Model Stealing Attacks, Orekondy et al., ICLR 2020
    ("jbtop3"); numbers of its released code. Threat model: that of `distill.attacks.jbda.JBDA`, and its box and
    units. Each round asks about k new inputs for each one so far, and about nothing else; the runners-up are chosen
    once, at the start, the oracle's label left out.

    Departs from the released code in descending the cross-entropy of the target instead of climbing its logit, and in
    staying in the box: the code does not clip these inputs at all.

    Args:
        seeds: Random pool rows that are asked first.
        k: Runners-up, at most one less than there are classes.
        epsilon: Radius of the ball around an input.
        step: Length of a step.
        steps: How many.
        norm: "linf" or "l2".
        reservoir: At most so many inputs are moved in a round, from round `reservoir_after` on; None for all.
        reservoir_after: Counted from 0.

    Raises:
        ValueError: An option is out of its range.
        DistillError: The budget or the pool is smaller than the seeds.
    """

    def __init__(
        self,
        seeds: int = 100,
        k: int = 3,
        epsilon: float = 0.1,
        step: float = 0.01,
        steps: int = 8,
        norm: str = "linf",
        reservoir: int | None = None,
        reservoir_after: int = 3,
    ) -> None:
        super().__init__(seeds, k, epsilon, step, steps, norm, reservoir, reservoir_after)

    def preferences(self, learner: Learner, starts: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
        """The student's logits."""
        return learner.predict(starts)
