from __future__ import annotations

import math

import numpy as np

from distill.errors import DistillError
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals


class GaussianNoise:
    """Adds independent normal noise to every posterior entry, cuts it at 0 and renormalises.

    Paper: none; the Adversarial Robustness Toolbox (Nicolae et al., 2018) has it as a postprocessor, with this default.
    Threat model: a black-box attacker who sees the answers. A repeated query draws new noise, so an attacker who pays
    for repeats can average it away.
    (n, classes) posteriors in and out. A row that is cut to nothing becomes uniform. The label may change.

    Args:
        sd: Standard deviation of the noise, in units of probability.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = False
    deterministic = False
    l1_budget: float | None = None

    def __init__(self, sd: float = 0.2) -> None:
        if not (sd >= 0 and math.isfinite(sd)):
            raise DistillError(f"must be at least 0, not {sd}", "defense.sd")
        self.sd = sd

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        noisy = np.maximum(answers.posteriors + self.sd * rng.normal(answers.classes), 0.0)
        noisy[noisy.sum(axis=1) == 0] = 1.0
        return Answers((noisy / noisy.sum(axis=1, keepdims=True)).astype(np.float32))
