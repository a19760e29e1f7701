from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from distill.attacks._data_free import MOMENTUM, Distance, Estimating, kl
from distill.records import Reveals


class MAZE(Estimating):
    """As DFME, with the divergence in place of the difference of logits, ten directions, and replay of earlier queries.

    Paper: MAZE: Data-Free Model Stealing Attack Using Zeroth-Order Gradient Estimation, Kariyappa et al., CVPR 2021,
    alg. 1. Threat model: no data at all, probabilities, millions of queries.

    In a round the generator takes `generator_steps`, each with ``batch_size * (directions + 1)`` answers, the student
    `student_steps`, each with ``batch_size`` answers, and `replay_steps` on queries from earlier, which cost nothing.
    Rates fall to 0 along half a cosine.

    The transfer set holds the last `kept` queries, which are coupled to the state of the attack's own student: see
    `distill.attacks.dfme.DFME`.

    Departs from the paper: replayed are queries of any kind, those of the estimates too, and the last `kept` of them;
    momentum and weight decay of the student are DFME's; the end is as in `DFME`.

    Args:
        batch_size: Images of a step.
        generator_steps: N_G.
        student_steps: N_C.
        replay_steps: N_R.
        directions: m, random directions of an estimate.
        step: How far the activations are moved along each; a unit is the length of the direction.
        student_lr: SGD's rate in the beginning.
        generator_lr: SGD's rate in the beginning.
        latent: Numbers of noise an image is made of.
        width: Channels of the generator.
        kept: So many of the last queries are kept, for the transfer set and to be replayed.

    Raises:
        ValueError: An option is out of its range.
        DistillError: Images are smaller than 8×8.
    """

    def __init__(
        self,
        batch_size: int = 128,
        generator_steps: int = 1,
        student_steps: int = 5,
        replay_steps: int = 10,
        directions: int = 10,
        step: float = 1e-3,
        student_lr: float = 0.1,
        generator_lr: float = 1e-4,
        latent: int = 100,
        width: int = 64,
        kept: int = 200_000,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            generator_steps=generator_steps,
            student_steps=student_steps,
            replay_steps=replay_steps,
            directions=directions,
            step=step,
            student_lr=student_lr,
            generator_lr=generator_lr,
            latent=latent,
            width=width,
            kept=kept,
        )

    def distance(self, profile: Reveals) -> Distance:
        return kl

    def rate(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2

    def generator_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.generator_lr, MOMENTUM, fused=True)
