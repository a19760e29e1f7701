from __future__ import annotations

import numpy as np

from distill.errors import DistillError
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals, keep_label


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
        rounded = np.round(answers.posteriors.astype(np.float64), self.decimals)
        rounded[rounded.sum(axis=1) == 0] = 1.0
        rounded /= rounded.sum(axis=1, keepdims=True)
        return Answers(keep_label(rounded.astype(np.float32), answers.labels))
