from __future__ import annotations

import numpy as np

from distill.attacks._relabelled import OwnExamples
from distill.contracts import Apprentice, Attack
from distill.records import Examples, TransferSet, softmax


class WeakerModelLabels(OwnExamples):
    """Control: a weaker model of the attacker's own answers the very queries of another attack.

    It stands for what can be had without the teacher, such as a public model of the same task that is not as good:
    here the run's student, trained with the run's recipe and objective on a few labelled examples. What the other
    attack's student reaches beyond this one's is what a good teacher is worth beyond a poor one. The weaker model's
    answers are whole posteriors, whatever the teacher's interface reveals; no recovery is applied while it is trained.

    Args:
        attack: The other attack: ``attack@attack.attack=active_thief``.
        examples: Labelled rows of the pool, none of which is asked about, on which the weaker model is trained.

    Raises:
        DistillError: An option is out of its range, or the other attack is one on language models or a control; at the
            queries, the pool is not labelled with the teacher's classes, or the budget leaves too few rows unasked.
    """

    def __init__(self, attack: Attack, examples: int = 100) -> None:
        super().__init__(attack, examples)

    def posteriors(self, asked: TransferSet, pool: Examples, student: Apprentice, seed: int) -> np.ndarray:
        """The weaker model's."""
        learner = student.fit(self.own(asked, pool, student, seed), pool)
        return softmax(learner.predict(asked.inputs(pool)))
