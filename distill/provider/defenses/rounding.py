from __future__ import annotations

import numpy as np
import torch

from distill.errors import DistillError
from distill.provider.defenses._tensors import straight_through, through
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals


class Rounding:
    """Rounds every posterior to a number of decimals and renormalises it.

    Paper: Stealing Machine Learning Models via Prediction APIs (Tramèr et al., USENIX Security 2016); one decimal as
    in ModelGuard (Tang et al., USENIX Security 2024).
    Threat model: a black-box attacker who sees the answers; knows `decimals`.
    (n, classes) posteriors in and out. Halves go to the even digit. Rounding makes ties: they are broken towards the
    clean label, by one float32 step, so that honest users lose no accuracy. A row whose entries all round to 0 becomes
    uniform (up to that step). Departs from ModelGuard's code in renormalising.

    Args:
        decimals: How many decimals an entry keeps, at least 1.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = True
    deterministic = True
    l1_budget: float | None = None

    def __init__(self, decimals: int = 1) -> None:
        if decimals < 1:
            raise DistillError(f"must be at least 1, not {decimals}", "defense.decimals")
        self.decimals = decimals

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return through(self.transform, answers, info, self.keeps_argmax)

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        rounded = posteriors.round(decimals=self.decimals)
        rounded = torch.where(rounded.sum(dim=1, keepdim=True) == 0, 1.0, rounded)
        rounded = rounded / rounded.sum(dim=1, keepdim=True)
        label, first = posteriors.argmax(dim=1, keepdim=True), rounded.argmax(dim=1, keepdim=True)
        ahead = rounded.scatter(1, label, rounded.gather(1, first) * (1 + 2**-24))
        return straight_through(torch.where(first == label, rounded, ahead), posteriors)
