from __future__ import annotations

from typing import ClassVar

import numpy as np

from distill.contracts import Knowledge
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import TransferSet
from distill.recovery._restorer import check, restored, simulated
from distill.recovery._simulated import code

FLOOR = 1e-3  # the least parameter of a Dirichlet distribution


class DDAEPlus:
    """D-DAE without shadow models: the restorer learns from posteriors that are drawn about the observed answers.

    Paper: ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks, Tang et al., USENIX Security
    2024 (its D-DAE+). For query i posteriors y are drawn from Dirichlet(`concentration` · K · ỹ_i) over K classes, put
    through the defense, and the restorer of `ddae` learns to turn D(y) into y. Threat model: the attacker knows the
    defense's code and options, not its randomness; it trains nothing but the restorer.

    Departs from ModelGuard's code, which centres the draws on the *clean* posteriors: no attacker has them, so the
    centres here are the answers as returned. Where a defense moves answers far (reverse sigmoid with a large beta makes
    sharp posteriors flat) the draws miss the clean ones, and `ddae` restores better. The code draws 1,000,000 rows and
    takes 200 epochs: hours for 100 classes on a laptop; set `samples` and `epochs` so for its numbers.

    Args:
        samples: How many posteriors are drawn, as many for each query, at least 2.
        concentration: See above, more than 0.
        epochs: Of the restorer.

    Raises:
        DistillError: An option is out of range.
    """

    knows: ClassVar[str] = "the defense's code"

    def __init__(self, samples: int = 100_000, concentration: float = 8.0, epochs: int = 20) -> None:
        check(samples=samples, epochs=epochs)
        if not 0 < concentration < np.inf:
            raise DistillError(f"concentration must be more than 0, not {concentration}")
        self.samples, self.concentration, self.epochs = samples, concentration, epochs

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """`targets` = the restored answers, (n, classes); logits are dropped."""
        scaled = self.concentration * transfer_set.classes * transfer_set.posteriors.astype(np.float64)
        parameters = np.maximum(scaled, FLOOR)[np.arange(self.samples) % len(transfer_set)]
        drawn = generator(knowledge.seed, "ddae_plus").standard_gamma(parameters)
        clean = (drawn / drawn.sum(axis=1, keepdims=True)).astype(np.float32)
        returned = simulated(code(knowledge), clean, transfer_set, knowledge)
        return restored(transfer_set, returned, clean, knowledge, self.epochs)
