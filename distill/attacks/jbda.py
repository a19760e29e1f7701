from __future__ import annotations

import numpy as np

from distill.attacks._moves import Augmentation, Box, away_from, moved, towards
from distill.attacks._options import at_least, positive
from distill.contracts import Learner
from distill.records import Answers


class JBDA(Augmentation):
    """Jacobian-based dataset augmentation: double what was asked, round after round, by one step along the student's
    gradient from each input.

    Paper: Practical Black-Box Attacks against Machine Learning, Papernot et al., ASIA CCS 2017, algorithm 1 and sec. 4:
    x' = clip(x + lambda_r sgn J[y](x)), with y the oracle's label of x, J[y](x) the gradient of the student's
    probability of y, and lambda_r = lambda (-1)^(r // tau) in round r; with ``reservoir``, Transferability in Machine
    Learning, Papernot et al., 2016. Threat model: a few inputs of the teacher's kind; labels alone are enough; the
    student's architecture and recipe are the run's.

    J[y] rises towards the oracle's label. Much released code, the authors' tutorial and that of Prediction Poisoning
    (Orekondy et al., ICLR 2020) included, takes the gradient of the cross-entropy or a negative lambda instead, and so
    begins away from it: ``toward_label=false``.

    Departs from the paper in clipping to the box (pixels in [0, 1]; the range of a table's columns among the seeds,
    whose standard deviations are what a step is measured in), and in training each round's student until the recipe
    ends. ``norm=l2`` moves by lambda in the L2 norm, along the gradient itself. As in the paper, an input that two
    rounds move in the same direction is asked about twice; in tables of few columns that happens.

    Args:
        seeds: Random pool rows that are asked first; 150 in the paper's MNIST experiment.
        step: lambda.
        toward_label: Whether the first rounds go up J[y].
        flip_every: tau, in rounds; None for never.
        norm: "linf" or "l2".
        reservoir: kappa: at most so many inputs are moved in a round, from round `reservoir_after` on; None for all.
        reservoir_after: sigma, counted from 0.

    Raises:
        ValueError: An option is out of its range.
        DistillError: The budget or the pool is smaller than the seeds.
    """

    def __init__(
        self,
        seeds: int = 150,
        step: float = 0.1,
        toward_label: bool = True,
        flip_every: int | None = 3,
        norm: str = "linf",
        reservoir: int | None = None,
        reservoir_after: int = 3,
    ) -> None:
        super().__init__(seeds, norm, reservoir, reservoir_after)
        positive(step=step)
        if flip_every is not None:
            at_least(1, flip_every=flip_every)
        self.step, self.toward_label, self.flip_every = step, toward_label, flip_every

    def moves(
        self,
        learner: Learner,
        starts: np.ndarray,
        answers: Answers,
        number: int,
        box: Box,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """See `Augmentation`: one step from each start."""
        turned = self.flip_every is not None and number // self.flip_every % 2 == 1
        aim = towards if self.toward_label is not turned else away_from
        return moved(
            learner, starts, aim, (answers.labels,), box, norm=self.norm, radius=self.step, step=self.step, steps=1
        )
