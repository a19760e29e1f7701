from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from distill.contracts import Knowledge
from distill.randomness import generator
from distill.recovery._restorer import at_least, restored
from distill.recovery._simulated import SimulatedApi
from distill.records import TransferSet

FLOOR = 1e-3  # the least parameter of a Dirichlet distribution


class DDAEPlus:
    knows: ClassVar[str] = "the defense's code"

    def __init__(self, samples: int = 1_000_000, concentration: float = 8.0, epochs: int = 200) -> None:
        at_least(samples=(samples, 2), epochs=(epochs, 1))
        self.samples, self.concentration, self.epochs = samples, concentration, epochs

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """`targets` = the restored answers, (n, classes); logits are dropped."""
        received = transfer_set.posteriors
        parameters = np.maximum(self.concentration * transfer_set.classes * received.astype(np.float64), FLOOR)
        drawn = generator(knowledge.seed, "ddae_plus").standard_gamma(
            parameters[np.arange(self.samples) % len(received)]
        )
        drawn = (drawn / drawn.sum(axis=1, keepdims=True)).astype(np.float32)
        simulated = SimulatedApi.of(knowledge.defense, transfer_set, knowledge).answers(drawn)
        targets = restored(received, simulated, drawn, knowledge, self.epochs)
        return replace(transfer_set, targets=targets, logits=None)
