from __future__ import annotations

import numpy as np
import torch

from distill.errors import DistillError
from distill.provider.defenses._tensors import straight_through
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals, keep_label, keep_top_k


class TopK:
    """Reveals the `k` largest entries of a posterior; the others become 0 and the rest is renormalised.

    Paper: Knockoff Nets: Stealing Functionality of Black-Box Models (Orekondy et al., CVPR 2019).
    Threat model: a black-box attacker who sees the answers; knows `k`.
    (n, classes) posteriors in and out; the first of equal entries is kept. Departs from the paper in renormalising.

    Args:
        k: How many entries an answer keeps.

    Raises:
        DistillError: `k` is less than 1 or, at the first answer, more than the number of classes.
    """

    keeps_argmax = True
    deterministic = True
    l1_budget: float | None = None

    def __init__(self, k: int = 1) -> None:
        if k < 1:
            raise DistillError(f"must be at least 1, not {k}", "defense.k")
        self.k = k
        self.exposes = InterfaceProfile(Reveals.TOP_K, k)

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        self._check(answers.classes)
        # Dividing can make equal what differed by one float32 step.
        return Answers(keep_label(keep_top_k(answers.posteriors, self.k), answers.labels))

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        self._check(posteriors.shape[1])
        order = posteriors.argsort(dim=1, descending=True, stable=True)
        kept = posteriors.scatter(1, order[:, self.k :], 0.0)
        return straight_through(kept / kept.sum(dim=1, keepdim=True), posteriors)

    def _check(self, classes: int) -> None:
        if self.k > classes:
            raise DistillError(f"must be at most {classes}, the number of classes, not {self.k}", "defense.k")
