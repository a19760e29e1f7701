from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from distill.contracts import Knowledge
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import TransferSet
from distill.recovery._bayes import check, estimated, simulated_api


class PBayesOracle:
    """`PBayes` with a prior that no attacker has: centred on the clean posteriors. A bound, not an attack.

    Paper: ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks, Tang et al., USENIX Security
    2024; this is what its code does under the name pBayes. Threat model: none; whoever holds the clean answers needs
    no recovery. What it reaches beyond `PBayes` is what the prior gave away.

    Args:
        samples: Drawn posteriors in all, as many for each query.
        concentration: Posteriors are drawn from Dirichlet(concentration · K · clean posterior).
        tolerance: In L1; the nearest one counts where none is this near.

    Raises:
        DistillError: An option is out of its range.
    """

    knows: ClassVar[str] = "the clean answers"

    def __init__(self, samples: int = 1_000_000, concentration: float = 8.0, tolerance: float = 0.01) -> None:
        check(samples=samples, concentration=concentration, tolerance=tolerance)
        self.samples, self.concentration, self.tolerance = samples, concentration, tolerance

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """`targets` = the estimates, (n, classes); logits are dropped. Raises `DistillError` without clean answers."""
        if knowledge.clean is None:
            raise DistillError("the prior of pbayes_oracle is the clean answers, which were not given", "recovery")
        targets = estimated(
            simulated_api(transfer_set, knowledge),
            transfer_set.posteriors,
            knowledge.clean[None],
            self.samples,
            self.concentration,
            self.tolerance,
            generator(knowledge.seed, "pbayes_oracle"),
        )
        return replace(transfer_set, targets=targets, logits=None)
