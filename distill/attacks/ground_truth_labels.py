from __future__ import annotations

import numpy as np

from distill.attacks._relabelled import Relabelled, true_labels
from distill.contracts import Apprentice, Oracle
from distill.errors import DistillError
from distill.records import Answers, Cost, Examples, Queries, TransferSet, one_hot


class GroundTruthLabels(Relabelled):
    """Control: the true labels of the very queries of another attack.

    What the other attack's student reaches beyond this one's is what the teacher's answers were worth to somebody who
    could have had the same inputs labelled. Costs and billing: see `Relabelled`; with the random attacks nothing is
    asked.

    Args:
        attack: The other attack: ``attack@attack.attack=active_thief``.

    Raises:
        DistillError: The other attack is one on language models or a control; at the queries, the pool is not labelled
            with the teacher's classes, or the other attack makes an input, which has no true label.
    """

    def check(self, oracle: Oracle, pool: Examples, student: Apprentice) -> None:
        true_labels(pool, student)

    def handle(self, oracle: Oracle) -> Oracle:
        return OfPool(oracle)

    def posteriors(self, asked: TransferSet, pool: Examples, student: Apprentice, seed: int) -> np.ndarray:
        """One-hot."""
        return one_hot(true_labels(pool, student)[asked.rows], asked.classes)


class OfPool:
    """An oracle that is asked about rows of the pool alone."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.profile, self.classes = oracle, oracle.profile, oracle.classes

    def affordable(self) -> int:
        return self.oracle.affordable()

    def spent(self) -> Cost:
        return self.oracle.spent()

    def ask(self, queries: Queries, *, partial: bool = False) -> Answers:
        """Raises `DistillError` for the first input that the attack made."""
        if not queries.from_pool:
            raise DistillError(
                "this control needs an attack on the pool's own inputs (attack@attack.attack=knockoff_random); "
                "a made one has no true label",
                "attack",
            )
        return self.oracle.ask(queries, partial=partial)
