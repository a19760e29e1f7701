from __future__ import annotations

import numpy as np

from distill.errors import DistillError
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals


class RandomRedirect:
    """Moves a share of every posterior to one other class, drawn at random: the "random" baseline of GRAD².

    Paper: How to Steer Your Adversary: Targeted and Efficient Model Stealing Defenses with Gradient Redirection
    (Mazeika, Li and Forsyth, ICML 2022): ``ỹ = (1 - ε/2) y + (ε/2) e_j``, j uniform among the classes that are not the
    label.
    Threat model: a black-box attacker who sees the answers. A repeated query draws another class, so an attacker who
    pays for repeats can average it away.
    (n, classes) posteriors in and out. The label may change.

    Args:
        l1_budget: ε, how far an answer may move, in L1: more than 0, at most 2.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = False
    deterministic = False
    l1_budget: float | None = 1.0

    def __init__(self, l1_budget: float = 1.0) -> None:
        if not 0 < l1_budget <= 2:
            raise DistillError(f"must be more than 0 and at most 2, not {l1_budget}", "defense.l1_budget")
        self.l1_budget = self._budget = l1_budget

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        share = self._budget / 2
        moved = (1 - share) * answers.posteriors.astype(np.float64)
        others = (rng.uniform(1)[:, 0] * (answers.classes - 1)).astype(int)
        moved[np.arange(len(moved)), others + (others >= answers.labels)] += share
        return Answers(moved.astype(np.float32))
