from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals

if TYPE_CHECKING:
    import torch


class NoDefense:
    """Every answer as the teacher gives it: the undefended arm of a comparison.

    Threat model: none. Posteriors (n, classes) and logits pass through unchanged.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = True
    deterministic = True
    l1_budget: float | None = 0.0

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return answers

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        return posteriors
