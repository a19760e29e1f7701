from __future__ import annotations

import math

import numpy as np

from distill.errors import DistillError
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals, keep_label


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
        posteriors = answers.posteriors.astype(np.float64)
        # Relative to the largest entry, so that no temperature overflows; the power of 0 is 0.
        scaled = (posteriors / posteriors.max(axis=1, keepdims=True)) ** (1.0 / self.temperature)
        scaled /= scaled.sum(axis=1, keepdims=True)
        return Answers(keep_label(scaled.astype(np.float32), answers.labels))
