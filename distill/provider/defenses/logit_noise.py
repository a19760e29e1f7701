from __future__ import annotations

import math

import numpy as np

from distill.errors import DistillError
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals

CLIP = 1e-9  # keeps the logit of 0 and of 1 finite


class LogitNoise:
    """Adds uniform noise of a bounded length to the sigmoid logits: the random-noise baseline of MAD.

    Paper: Prediction Poisoning: Towards Defenses Against DNN Model Stealing Attacks (Orekondy, Schiele and Fritz, ICLR
    2020), section 5.1: ``ỹ ∝ sigmoid(z + d)`` with ``z = log(y / (1 - y))`` and ``‖d‖₂ <= epsilon_z``. As in its code,
    d is uniform on ``[0, 2 epsilon_z / √K]^K``, whose mean has length epsilon_z, and is shortened to the ball.
    Threat model: a black-box attacker who sees the answers. A repeated query draws new noise, so an attacker who pays
    for repeats can average it away.
    (n, classes) posteriors in and out. The label may change. Departs from the code in that y is cut to
    ``[1e-9, 1 - 1e-9]`` for the logit, which is infinite at 0 and 1.

    Args:
        epsilon_z: Longest noise, in units of the logit, at least 0. The paper varies it.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = False
    deterministic = False
    l1_budget: float | None = None

    def __init__(self, epsilon_z: float = 1.0) -> None:
        if not (epsilon_z >= 0 and math.isfinite(epsilon_z)):
            raise DistillError(f"must be at least 0, not {epsilon_z}", "defense.epsilon_z")
        self.epsilon_z = epsilon_z

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        noise = 2 / math.sqrt(answers.classes) * rng.uniform(answers.classes)
        noise *= self.epsilon_z / np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), 1)
        cut = np.clip(answers.posteriors.astype(np.float64), CLIP, 1 - CLIP)
        noisy = 1 / (1 + (1 / cut - 1) * np.exp(-noise))
        return Answers((noisy / noisy.sum(axis=1, keepdims=True)).astype(np.float32))
