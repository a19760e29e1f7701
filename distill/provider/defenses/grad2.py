from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from distill.contracts import Student, Teacher
from distill.errors import DistillError
from distill.provider.defenses._surrogate import AlongOnes, imitator
from distill.provider.defenses._tensors import through
from distill.randomness import KeyedRandom
from distill.records import Answers, Dataset, InterfaceProfile, Reveals
from distill.training import Recipe, Trainer


class GRAD2:
    """Gradient Redirection: answers that push the attacker's weights along one fixed direction, all ones.

    Paper: How to Steer Your Adversary: Targeted and Efficient Model Stealing Defenses with Gradient Redirection
    (Mazeika, Li and Forsyth, ICML 2022): the "all-ones" direction, the same for each query ("coordinated defense"), and
    a surrogate of the attacker that was trained for 10 epochs. The answer ỹ maximises ``⟨Gᵀỹ, v⟩ = s·ỹ`` among the
    distributions within the budget, where G is the Jacobian of the surrogate's log-posteriors, v is all ones and
    ``s = G v``. Gᵀỹ is the *ascent* direction of the attacker's likelihood, so each step of gradient descent on its
    loss moves its weights along +v; minimising along -v is the same. The optimum of this linear program: a mass
    ``min(1 - y_b, l1_budget / 2)`` moves to the class b of the largest s, from the classes in order of increasing s.

    Threat model: a black-box attacker who trains on the answers by gradient descent; taking the top-1 label is a way
    around it where the label survives.
    (n, classes) posteriors in and out; the query information is s, (n, classes). The label may change.
    Departs from the paper's code in that s is one forward-mode derivative and not a double backward pass, and in that
    the surrogate learns from ``data.train``.

    Args:
        architecture: Of the surrogate. In yaml: any option of `student`.
        recipe: How the surrogate is trained on ``data.train`` with the teacher's answers.
        l1_budget: How far an answer may move, in L1 (the paper's ε): more than 0, at most 2.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = False
    deterministic = True
    l1_budget: float | None = 1.0
    fingerprint = ""  # until `prepare`

    def __init__(self, architecture: Student, recipe: Recipe, l1_budget: float = 1.0) -> None:
        if not 0 < l1_budget <= 2:
            raise DistillError(f"must be more than 0 and at most 2, not {l1_budget}", "defense.l1_budget")
        self.architecture, self.recipe = architecture, recipe
        self.l1_budget = self._budget = l1_budget

    def prepare(self, teacher: Teacher, data: Dataset, trainer: Trainer, cache: Path, seed: int) -> Teacher:
        """Train the surrogate. Raises `DistillError` where its architecture does not read such inputs."""
        self._surrogate = imitator(
            teacher, data, self.architecture, self.recipe, trainer=trainer, cache=cache, seed=seed
        )
        self._derivative = AlongOnes(self._surrogate.module)
        self.fingerprint = self._surrogate.fingerprint
        return teacher

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        """(n, classes): how fast the surrogate's log-posteriors rise along v."""
        kept = self._surrogate
        return kept.trainer.predict(self._derivative, kept.architecture.encode(inputs, kept.spec))

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return through(self.transform, answers, info, self.keeps_argmax)

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        assert info is not None
        order = info.to(posteriors.device).argsort(dim=1, stable=True)
        givers, taker = posteriors.gather(1, order).tensor_split([-1], dim=1)
        up_to = givers.cumsum(dim=1)
        mass = up_to[:, -1:].clamp(max=self._budget / 2)
        given = torch.minimum((mass - (up_to - givers)).clamp(min=0), givers)
        moved = torch.cat([givers - given, taker + mass], dim=1)
        return torch.zeros_like(posteriors).scatter(1, order, moved)
