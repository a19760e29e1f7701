from __future__ import annotations

import math

import numpy as np
import torch

from distill.errors import DistillError
from distill.provider.defenses._tensors import through
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals

CLIP = 1e-9  # keeps the logit of 0 and of 1 finite


class ReverseSigmoid:
    """Bends every posterior towards one half, so that many clean answers give nearly the same returned one.

    Paper: Defending Against Machine Learning Model Stealing Attacks Using Deceptive Perturbations (Lee, Edwards, Molloy
    and Su, 2018), equations 3 and 4: ``ỹ ∝ y - beta (sigmoid(gamma logit(y)) - 1/2)``, renormalised. The defaults are
    those of the Adversarial Robustness Toolbox.
    Threat model: a black-box attacker who trains on the posteriors; one who takes the top-1 label is hardly hindered.
    (n, classes) posteriors in and out. As in the toolbox, y is cut to ``[1e-9, 1 - 1e-9]`` for the logit and the
    numerator to [0, 1]; the paper has no cuts, and no value at 0 and 1. ModelGuard's code uses gamma 0.2 and a beta
    between 0.008 (256 classes) and 0.21 (10 classes).

    The label survives every answer of any number of classes exactly where ``gamma >= 1``, ``beta gamma <= 1`` and
    ``beta < 1``, and that is when it is claimed. With ``gamma < 1`` the bound on beta depends on the number of
    classes K: `largest_beta` (at gamma 0.2: 1.03 for K = 2, 0.29 for 10, 0.04 for 100).

    Args:
        beta: How much an entry moves, at least 0.
        gamma: Slope inside the sigmoid, more than 0; to be chosen for each data set.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    deterministic = True
    l1_budget: float | None = None

    def __init__(self, beta: float = 1.0, gamma: float = 0.2) -> None:
        if not (beta >= 0 and math.isfinite(beta)):
            raise DistillError(f"must be at least 0, not {beta}", "defense.beta")
        if not (gamma > 0 and math.isfinite(gamma)):
            raise DistillError(f"must be more than 0, not {gamma}", "defense.gamma")
        self.beta, self.gamma = beta, gamma
        self.keeps_argmax = beta == 0 or (gamma >= 1 and beta * gamma <= 1 and beta < 1)

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return through(self.transform, answers, info, self.keeps_argmax)

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        cut = posteriors.clamp(CLIP, 1 - CLIP)
        logits = cut.log() - (1 - cut).log()
        bent = (posteriors - self.beta * (1 / (1 + (-self.gamma * logits).exp()) - 0.5)).clamp(0, 1)
        return bent / bent.sum(dim=1, keepdim=True)


def largest_beta(gamma: float, classes: int) -> float:
    """Below this beta a defense with ``gamma < 1`` keeps the label of every answer; above it, not of every one.

    An entry becomes ``g(y) = y - beta h(y)``; the label is lost where ``g(a) <= g(b)`` for a maximum a and another b,
    that is where beta is at least ``(a - b) / (h(a) - h(b))``. h is concave below one half, convex above and odd about
    it, so this is smallest at b = 0 and either the smallest maximum there is with such a b or a = 1.
    """

    def h(y: float) -> float:
        y = min(max(y, CLIP), 1 - CLIP)
        return 1 / (1 + (1 / y - 1) ** gamma) - 0.5

    return min((a - CLIP) / (h(a) - h(CLIP)) for a in ((1 - CLIP) / (classes - 1), 1 - CLIP))
