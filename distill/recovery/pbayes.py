from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from distill.contracts import Knowledge
from distill.randomness import generator
from distill.records import TransferSet, one_hot
from distill.recovery._bayes import check, estimated, simulated_api

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the label in a first centre: how sure the teacher was isn't known
FLOOR = 0.01  # of a centre's mass, spread evenly: an answer's zero may have been something else


class PBayes:
    """The clean posterior that the known defense would most plausibly have turned into each answer.

    Paper: ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks, Tang et al., USENIX Security
    2024 (the "pBayes" attacker). Posteriors are drawn from Dirichlet(8 K c) for each query, with an estimate c of its
    clean posterior, and sent through the defense; the mean of those whose answers come within 0.01 of the received one
    in L1, or else of the nearest, is the target.
    Threat model: the attacker knows the code and options of the defense, and runs a copy of it with noise and networks
    of its own; it asks nothing more.

    Departs from the paper's code. The prior is *observed*: c lies between the returned answer and its label, at one of
    five places in turn, where the code takes the clean posterior, which no attacker has (`PBayesOracle` does). Since c
    may lie far from the clean one, the samples are drawn in `rounds`, each but the first around what the one before it
    estimated; 1 is a single look. Samples whose answer has another label than the received one are left aside, whether
    or not the defense claims to keep labels. All queries share the samples unless the defense knows something of each
    query, and a defense that remembers is in the state that the received answers leave it in.
    Against a defense that draws noise the nearest answer says little, and averaging repeated queries does better.

    Args:
        samples: Drawn posteriors in all rounds together, as many for each query.
        concentration: The 8.
        tolerance: The 0.01.
        rounds: How often the prior is centred anew.

    Raises:
        DistillError: An option is out of its range.
    """

    knows: ClassVar[str] = "the defense's code"

    def __init__(
        self, samples: int = 1_000_000, concentration: float = 8.0, tolerance: float = 0.01, rounds: int = 3
    ) -> None:
        check(samples=samples, concentration=concentration, tolerance=tolerance, rounds=rounds)
        self.samples, self.concentration, self.tolerance, self.rounds = samples, concentration, tolerance, rounds

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """`targets` = the estimates, (n, classes); logits are dropped."""
        api, rng = simulated_api(transfer_set, knowledge), generator(knowledge.seed, "pbayes")
        received, classes = transfer_set.posteriors, transfer_set.classes
        label = one_hot(received.argmax(axis=1), classes)
        centres = np.stack([(1 - weight) * received + weight * label for weight in WEIGHTS])
        for _ in range(self.rounds):
            estimate = estimated(
                api,
                received,
                (1 - FLOOR) * centres + FLOOR / classes,
                self.samples // self.rounds,
                self.concentration,
                self.tolerance,
                rng,
            )
            centres = estimate[None]
        return replace(transfer_set, targets=estimate, logits=None)
