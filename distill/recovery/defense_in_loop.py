from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from distill.contracts import Knowledge, Lesson, Loss, Objective, TensorDefense
from distill.errors import DistillError
from distill.recovery._simulated import SimulatedApi
from distill.records import Reveals, TransferSet

FLOOR = 1e-6  # what counts as zero in an answer


class DefenseInLoop:
    knows: ClassVar[str] = "the defense's code"
    extra_outputs: ClassVar[int] = 0

    def __init__(self, label_weight: float = 0.1) -> None:
        self.label_weight = label_weight

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        return replace(transfer_set, targets=transfer_set.posteriors)

    def lesson(self, transfer_set: TransferSet, objective: Objective, knowledge: Knowledge) -> Lesson:
        api = SimulatedApi.of(knowledge.defense, transfer_set, knowledge)
        targets = {**objective.prepare(transfer_set), "query": torch.arange(len(transfer_set))}
        weight = self.label_weight if knowledge.defense.keeps_argmax else 0.0
        targets["label"] = torch.from_numpy(transfer_set.posteriors.argmax(axis=1))
        return Lesson(transfer_set.inputs(knowledge.pool), targets, ThroughDefense(api, objective, weight))


class ThroughDefense:
    """An objective that compares what the defense makes of the student's posterior with the answers."""

    def __init__(self, api: SimulatedApi, objective: Loss, label_weight: float) -> None:
        self.api, self.objective, self.label_weight = api, objective, label_weight
        self.info = None if api.info is None else torch.from_numpy(api.info)

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Summed over rows. `output`: (n, classes) logits."""
        loss = self.objective.loss(self.returned(output.double(), targets["query"]).to(output.dtype), targets)
        if self.label_weight:
            loss = loss + self.label_weight * F.cross_entropy(output, targets["label"], reduction="sum")
        return loss

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return self.objective.positions(targets)

    def returned(self, logits: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """(n, classes) float64 in and out: logits of what the defense makes of these logits' softmax."""
        log_own = logits.log_softmax(dim=1)
        floor = log_own + (math.log(FLOOR) - log_own).detach()
        if isinstance(self.api.defense, TensorDefense) and self.api.profile.reveals >= Reveals.PROBS:
            info = None if self.info is None else self.info.to(logits.device)[queries]
            answers = self.api.defense.transform(log_own.exp(), info)
            return torch.where(answers > FLOOR, answers.clamp(min=FLOOR).log(), floor)
        answers = self.api.answers(log_own.detach().exp().float().cpu().numpy(), queries.cpu().numpy())
        answers = torch.from_numpy(answers).to(logits).clamp(min=FLOOR)
        return log_own + (answers.log() - log_own).detach()
