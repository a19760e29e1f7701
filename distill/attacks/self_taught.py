from __future__ import annotations

from dataclasses import replace

import numpy as np

from distill.attacks._relabelled import OwnExamples
from distill.contracts import Apprentice, Attack
from distill.errors import DistillError
from distill.records import Examples, TransferSet, one_hot, softmax


class SelfTaught(OwnExamples):
    """Control: self-training without a teacher on the very queries of another attack.

    Paper: Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks, Lee, ICML
    2013 workshop on challenges in representation learning, eq. (1) to (3), in rounds. A student learns from a few
    labelled examples; in each round it labels the queries, and a fresh one learns from the examples and from the
    queries of whose labels the last one was confident. The last one's posteriors are the answers. It stands for an
    attacker who has the inputs, the student and a few labels; `weaker_model_labels` is the same without any round.

    Departs from the paper: labels are made anew once a round and not at each step, only confident ones are learnt
    from, and those count as much as the examples.

    Args:
        attack: The other attack: ``attack@attack.attack=active_thief``.
        examples: Labelled rows of the pool, none of which is asked about.
        rounds: How often a fresh student learns from what the one before was confident of.
        threshold: A label counts as confident where its probability is at least this.

    Raises:
        DistillError: As `WeakerModelLabels`.
    """

    def __init__(self, attack: Attack, examples: int = 100, rounds: int = 3, threshold: float = 0.95) -> None:
        super().__init__(attack, examples)
        if rounds < 1:
            raise DistillError(f"rounds is at least 1, not {rounds}")
        if not 0 < threshold <= 1:
            raise DistillError(f"threshold is more than 0 and at most 1, not {threshold}")
        self.rounds, self.threshold = rounds, threshold

    def posteriors(self, asked: TransferSet, pool: Examples, student: Apprentice, seed: int) -> np.ndarray:
        """The last student's."""
        own, inputs = self.own(asked, pool, student, seed), asked.inputs(pool)
        guesses = softmax(student.fit(own, pool).predict(inputs))
        for _ in range(self.rounds):
            confident = np.flatnonzero(guesses.max(axis=1) >= self.threshold)
            believed = asked.take(confident)
            labels = np.concatenate([own.posteriors, one_hot(guesses[confident].argmax(axis=1), asked.classes)])
            grown = replace(
                believed,
                rows=np.concatenate([own.rows, believed.rows]),
                posteriors=labels,
                targets=labels,
                logits=None,
                groups=None,
                pool=pool.fingerprint,
            )
            guesses = softmax(student.fit(grown, pool).predict(inputs))
        return guesses
