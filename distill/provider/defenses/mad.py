from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from distill.contracts import Student, Teacher
from distill.errors import DistillError
from distill.kept import Kept, untrained
from distill.provider.defenses._surrogate import KEY, NAME, imitator
from distill.provider.defenses._tensors import through
from distill.randomness import KeyedRandom
from distill.records import Answers, Dataset, InterfaceProfile, Reveals, softmax
from distill.training import Recipe, Trainer

ROWS = 256  # rows whose candidates are compared at once: what a processor's cache holds


class MAD:
    """Maximising Angular Deviation: turns the gradient that an answer gives the attacker as far as the budget allows.

    Paper: Prediction Poisoning: Towards Defenses Against DNN Model Stealing Attacks (Orekondy, Schiele and Fritz, ICLR
    2020), equations 3 to 7. The attacker's gradient is ``Gᵀy`` with G the Jacobian of ``log F(x; w)`` for a surrogate
    F. Of the one-hot answers the one is chosen whose gradient makes the largest angle with that of the clean answer,
    and the clean answer y moves towards it: ``(1 - a) y + a y*`` with ``a = min(1, l1_budget / ‖y - y*‖₁)``.

    In closed form: for the last layer's weights row k of G is ``(e_k - p) ⊗ h``, with p the surrogate's softmax and h
    its features, so ``Gᵀy = (y - p) ⊗ h``, h cancels, and the angle is that of ``y* - p`` and ``y - p`` in R^K.

    Threat model: a black-box attacker who trains on the answers by gradient descent. One who takes the top-1 label
    loses little where the label survives; one who knows the code can invert it, since a surrogate that was never
    trained has nearly the same p for each query.
    (n, classes) posteriors in and out; the query information is p, (n, classes). The label may change: from a budget of
    1 on, that of almost every sure answer does. A vertex at p itself (to 1e-6) has no angle and is passed over; where y
    is p, all are as good and the first is taken. The paper holds that the optimum is at a vertex; with normalised
    gradients that is not always so, but the vertices are what it searches. Departs from it in that the Jacobian is
    never computed.

    Args:
        architecture: Of the surrogate. In yaml: any option of `student`.
        recipe: How the surrogate is trained, where it is.
        l1_budget: How far an answer may move, in L1 (the paper's ε): more than 0, at most 2.
        trained: False for random weights, which work best in the paper; True for a surrogate that is trained on
            ``data.train`` with the teacher's answers.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = False
    deterministic = True
    l1_budget: float | None = 1.0
    fingerprint = ""  # until `prepare`

    def __init__(self, architecture: Student, recipe: Recipe, l1_budget: float = 1.0, trained: bool = False) -> None:
        if not 0 < l1_budget <= 2:
            raise DistillError(f"must be more than 0 and at most 2, not {l1_budget}", "defense.l1_budget")
        self.architecture, self.recipe, self.trained = architecture, recipe, trained
        self.l1_budget = self._budget = l1_budget

    def prepare(self, teacher: Teacher, data: Dataset, trainer: Trainer, cache: Path, seed: int) -> Teacher:
        """Make the surrogate. Raises `DistillError` where its architecture does not read such inputs."""
        self._surrogate: Kept
        if self.trained:
            self._surrogate = imitator(
                teacher, data, self.architecture, self.recipe, trainer=trainer, cache=cache, seed=seed
            )
        else:
            self._surrogate = untrained(
                self.architecture, data.spec, data.classes, trainer=trainer, seed=seed, name=NAME, key=KEY
            )
        self.fingerprint = self._surrogate.fingerprint
        return teacher

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        """(n, classes): the surrogate's posteriors."""
        return softmax(self._surrogate.predict(inputs))

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return through(self.transform, answers, info, self.keeps_argmax)

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        assert info is not None
        with torch.no_grad():
            pairs = zip(posteriors.split(ROWS), info.to(posteriors).split(ROWS), strict=True)
            vertices = torch.cat([self._vertices(y, p) for y, p in pairs])
        distance = (posteriors - vertices).abs().sum(dim=1, keepdim=True)
        share = self._budget / distance.clamp(min=self._budget)
        return (1 - share) * posteriors + share * vertices

    def _vertices(self, posteriors: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
        """The answer to move towards: (n, classes)."""
        along, squared = parts(posteriors, surrogate)
        return torch.nn.functional.one_hot(cosine(along, 1 + squared, 1).argmin(dim=1), posteriors.shape[1])


def parts(posteriors: torch.Tensor, surrogate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What class k adds, for u that is uniform on s classes, to ``s (u - p)·(y - p)`` and to ``s ‖u - p‖² - 1``."""
    clean = posteriors - surrogate
    along = clean - (surrogate * clean).sum(dim=1, keepdim=True)
    squared = surrogate.square().sum(dim=1, keepdim=True) - 2 * surrogate
    return along, squared


def cosine(along: torch.Tensor, squared: torch.Tensor, size: int | torch.Tensor) -> torch.Tensor:
    """Orders uniform answers as the cosine of ``u - p`` and ``y - p`` does: its square with its sign, times ‖y - p‖²;
    infinite where u is p.

    Args:
        along: ``s (u - p)·(y - p)``.
        squared: ``s ‖u - p‖²``.
        size: s, the number of classes that u is uniform on.
    """
    squared = squared * size
    return torch.where(squared > 1e-12, along * along.abs() / squared, torch.inf)
