from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from distill.contracts import Defense, Knowledge, Lesson, Objective
from distill.errors import DistillError, Incompatible
from distill.records import InputSpec, TransferSet
from distill.recovery._simulated import SimulatedApi, code

FLOOR = 1e-6  # what a zero in an answer counts as
TINY = 1e-30
UNSURE = 0.1  # of `label_weight`, where the defense may change labels


class DefenseInLoop:
    """The student F is trained so that the *defended* student answers as the API did: D(F(x)) is fitted to ỹ.

    Paper: none. It inverts nothing and needs no table of simulated answers: where D is one-to-one, what fits is the
    clean posterior. Threat model: the attacker knows the defense's code and options and simulates it for its own
    queries; the access policy too. The chosen objective is given log D(softmax(z)) in the place of logits.

    The gradient goes through `TensorDefense.transform`. Through a defense without one, through an access that cuts its
    answers to labels or to the top k, and through entries of D(F(x)) that are zero it goes straight, in
    log-probabilities: there the logits move along ỹ - D(F(x)), and stop where the two agree. A defense that remembers
    is in the state in which the answers left it. In each row the gradient comes out of D no longer than it went in: the
    slope of a logarithm where a codeword is 1e-5 would drown all else.

    Many students can be behind one answer (reverse sigmoid makes the same of a flat and of a sharp posterior; a
    quantiser of a whole cell), and the gradient leads to the nearest. So the cross-entropy with the label of the answer
    is added. Its weight is a compromise: on digits (719 queries, three seeds) 0.3 was better for smooth defenses; with
    1 the mean KL from the clean teacher was at most that of training on labels alone, for six of seven defenses. The
    seventh is ModelGuard-W, whose answers say which class is least likely and little else.

    Args:
        label_weight: Of the label's cross-entropy beside the objective, at least 0; a tenth of it where the defense
            does not claim to keep the label. 0 fits D(F(x)) = ỹ alone, and may not find it.

    Raises:
        DistillError: `label_weight` is negative, or, at the answers, the defense is not deterministic.
    """

    knows: ClassVar[str] = "the defense's code"
    extra_outputs: ClassVar[int] = 0

    def __init__(self, label_weight: float = 1.0) -> None:
        if not (label_weight >= 0 and math.isfinite(label_weight)):
            raise DistillError(f"label_weight must be at least 0, not {label_weight}")
        self.label_weight = label_weight

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """`targets` = `posteriors`, (n, classes): it is the student that changes."""
        return replace(transfer_set, targets=transfer_set.posteriors)

    def check(self, spec: InputSpec, defense: Defense) -> None:
        """Raises `Incompatible` for a defense that is not deterministic."""
        if not defense.deterministic:
            raise Incompatible(
                "defense_in_loop can't follow a defense that draws new noise for each answer; use recovery=average",
                "recovery",
            )

    def lesson(self, transfer_set: TransferSet, objective: Objective, knowledge: Knowledge) -> Lesson:
        """The queries and the answers; besides the objective's own targets there are "in_loop_query" and "…_label"."""
        defense = code(knowledge)
        self.check(knowledge.pool.spec, defense)
        weight = self.label_weight * (1.0 if defense.keeps_argmax else UNSURE)
        targets = {
            **objective.prepare(transfer_set),
            "in_loop_query": torch.arange(len(transfer_set)),
            "in_loop_label": torch.from_numpy(transfer_set.posteriors.argmax(axis=1)),
        }
        api = SimulatedApi.of(defense, transfer_set, knowledge)
        return Lesson(transfer_set.inputs(knowledge.pool), targets, ThroughDefense(api, objective, weight))


class ThroughDefense:
    """An objective between what the API would make of the student's posteriors and the answers (a `Loss`).

    Args:
        api: The simulated API.
        objective: The objective that was chosen.
        label_weight: Of the cross-entropy between the student itself and the answer's label.
    """

    def __init__(self, api: SimulatedApi, objective: Objective, label_weight: float) -> None:
        self.api, self.objective, self.label_weight = api, objective, label_weight

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Summed over rows. `output`: (n, classes) logits of the student."""
        loss = self.objective.loss(self.defended(output, targets["in_loop_query"]).to(output.dtype), targets)
        if self.label_weight == 0:
            return loss
        return loss + self.label_weight * F.cross_entropy(output, targets["in_loop_label"], reduction="sum")

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return self.objective.positions(targets)

    def defended(self, output: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """(n, classes) float64: the logarithm of what is answered to these queries where softmax(output) is clean."""
        own = output.double().log_softmax(dim=1)
        # No formula is differentiated at 0, where a root has an infinite slope.
        answers = self.api.transform(own.exp().clamp(min=TINY), queries)
        if answers is None:
            returned = self.api.answers(own.detach().exp().float().cpu().numpy(), queries.cpu().numpy())
            return _straight(torch.from_numpy(np.log(np.maximum(returned, FLOOR))).to(own), own)
        told = torch.where(answers > FLOOR, answers.clamp(min=FLOOR).log(), _straight(math.log(FLOOR), own))
        if told.requires_grad:
            _bound(told, own)
        return told


def _bound(told: torch.Tensor, own: torch.Tensor) -> None:
    """In each row the gradient of `own` will be at most as long as that of `told`, which is made of it."""
    lengths: list[torch.Tensor] = []

    def measure(gradient: torch.Tensor) -> None:
        lengths.append(gradient.norm(dim=1, keepdim=True))

    def shorten(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (lengths.pop() / gradient.norm(dim=1, keepdim=True).clamp(min=TINY)).clamp(max=1)

    told.register_hook(measure)
    own.register_hook(shorten)


def _straight(value: torch.Tensor | float, own: torch.Tensor) -> torch.Tensor:
    """`value` with the gradient of `own`."""
    return value + (own - own.detach())
