from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from distill.contracts import Knowledge
from distill.recovery._restorer import at_least, restored, shadow_answers
from distill.recovery._simulated import SimulatedApi
from distill.records import TransferSet


class DDAE:
    knows: ClassVar[str] = "the defense's code"

    def __init__(self, shadows: int = 20, share: float = 0.5, epochs: int = 200) -> None:
        at_least(shadows=(shadows, 2), epochs=(epochs, 1))
        self.shadows, self.share, self.epochs = shadows, share, epochs

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """`targets` = the restored answers, (n, classes); logits are dropped."""
        clean = shadow_answers(transfer_set, knowledge, self.shadows, self.share)
        simulated = SimulatedApi.of(knowledge.defense, transfer_set, knowledge).answers(clean)
        targets = restored(transfer_set.posteriors, simulated, clean, knowledge, self.epochs)
        return replace(transfer_set, targets=targets, logits=None)
