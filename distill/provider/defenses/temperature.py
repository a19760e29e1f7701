from __future__ import annotations

import math

import numpy as np
import torch

from distill.errors import DistillError
from distill.provider.defenses._tensors import through
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals


class Temperature:
    """Flattens (above 1) or sharpens (below 1) every posterior: ``softmax(log p / temperature)``.

    Paper: Distilling the Knowledge in a Neural Network (Hinton, Vinyals and Dean, 2015), equation 1, applied by the
    provider.
    Threat model: a black-box attacker who sees the answers; knowing `temperature`, it can undo it.
    (n, classes) posteriors in and out. Zeros stay zeros. Entries that become equal in float32 are told apart in favour
    of the clean label, by one float32 step.

    Args:
        temperature: More than 0.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = True
    deterministic = True
    l1_budget: float | None = None

    def __init__(self, temperature: float = 2.0) -> None:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise DistillError(f"must be more than 0, not {temperature}", "defense.temperature")
        self.temperature = temperature

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return through(self.transform, answers, info, self.keeps_argmax)

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        positive = posteriors > 0
        logs = torch.where(positive, posteriors, 1.0).log() / self.temperature
        # Relative to the largest entry, so that no temperature overflows.
        largest = torch.where(positive, logs, -torch.inf).amax(dim=1, keepdim=True).detach()
        scaled = torch.where(positive, (logs - largest).clamp(max=0).exp(), 0.0)
        return scaled / scaled.sum(dim=1, keepdim=True)
