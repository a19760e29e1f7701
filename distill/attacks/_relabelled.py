"""What the controls share: the very queries of another attack, with answers that are not the teacher's."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from distill.attacks.rounds import PoolAttack
from distill.contracts import Apprentice, Attack, Learner, Oracle, Predictor, of_language
from distill.errors import BudgetExceeded, DistillError
from distill.randomness import generator
from distill.records import Answers, Cost, Examples, Queries, Reveals, TransferSet, one_hot


class Relabelled:
    """Another attack, whose answers are replaced; a subclass says by what with `posteriors`.

    Where the other attack does not adapt, nothing is asked. Where it does, what it asks depends on real answers: they
    are asked for and billed, and then thrown away. Students that it would hand in learnt from them and are dropped.

    Args:
        attack: The other attack.
    """

    # Of an instance: those of the other attack.
    requires: Reveals = Reveals.LABEL
    adapts: bool = False
    inputs: tuple[str, ...] = ("image", "table", "text")
    uses_teacher: bool = False  # True of one whose other attack adapts
    profile: ClassVar[str] = "label"  # what the answers in their place reveal

    def __init__(self, attack: Attack) -> None:
        check_attack(attack)
        if isinstance(attack, Relabelled):
            raise DistillError(f"attack asks a teacher; {type(attack).__name__} is a control itself")
        self.attack, self.uses_teacher = attack, attack.adapts
        self.requires, self.adapts, self.inputs = attack.requires, attack.adapts or self.adapts, attack.inputs

    def check(self, oracle: Oracle, pool: Examples, student: Apprentice) -> None:
        """Raises `DistillError`, before anything is asked, where there can be no answers."""

    def posteriors(self, asked: TransferSet, pool: Examples, student: Apprentice, seed: int) -> np.ndarray:
        """(n, classes) float32 in the place of the n answers."""
        raise NotImplementedError

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """The queries of the other attack, in its order, with the answers of `posteriors`."""
        self.check(oracle, pool, student)
        handle = self.handle(oracle if self.uses_teacher else Silent(oracle))
        asked = self.attack.extract(handle, pool, Unshown(student), seed)
        return replace(
            asked,
            posteriors=self.posteriors(asked, pool, student, seed),
            logits=None,
            profile=self.profile,
            note=f"{type(self).__name__} in the place of answers to {asked.note}",
        )

    def handle(self, oracle: Oracle) -> Oracle:
        """What the other attack is handed."""
        return oracle


class OwnExamples(Relabelled):
    """A control whose answers come from what some labelled examples teach: the first rows that the other attack does
    not ask about, in an order that depends on the seed alone.

    Args:
        attack: The other attack.
        examples: How many.
    """

    adapts: bool = True  # what it brings home depends on students
    profile: ClassVar[str] = "probs"

    def __init__(self, attack: Attack, examples: int) -> None:
        super().__init__(attack)
        if examples < 1:
            raise DistillError(f"examples is at least 1, not {examples}")
        self.examples = examples

    def check(self, oracle: Oracle, pool: Examples, student: Apprentice) -> None:
        """The pool has labels and, where all queries are rows of it, enough rows besides."""
        true_labels(pool, student)
        if isinstance(self.attack, PoolAttack):
            self._check_left(len(pool) - min(oracle.affordable(), len(pool)), pool)

    def _check_left(self, left: int, pool: Examples) -> None:
        if left < self.examples:
            raise DistillError(
                f"leaves {left} of {len(pool)} pool rows unasked, but the control learns from {self.examples} of them "
                "(attack.examples)",
                "budget",
            )

    def own(self, asked: TransferSet, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """The labelled examples, with `targets`."""
        order = generator(seed, "own examples").permutation(len(pool))
        rows = order[~np.isin(order, asked.rows)]
        self._check_left(len(rows), pool)
        rows = np.sort(rows[: self.examples])
        truth = one_hot(true_labels(pool, student)[rows], asked.classes)
        return TransferSet(rows, truth, targets=truth, pool=pool.fingerprint, profile="label")


def check_attack(attack: Attack) -> None:
    """Raises `DistillError` where what should be wrapped is no attack on a classifier."""
    if attack is None or isinstance(attack, (str, dict)) or of_language("attack", type(attack)):
        raise DistillError(f"attack is another attack on a classifier (attack@attack.attack=copycat), not {attack}")


def true_labels(pool: Examples, student: Apprentice) -> np.ndarray:
    """(n,) int64. Raises `DistillError` where the pool has no labels, or those of other classes."""
    if pool.labels is None or pool.class_names != student.class_names:
        raise DistillError(
            "this control needs a pool that is labelled with the teacher's classes, such as pool=held_out", "attack"
        )
    return pool.labels


class Silent:
    """An oracle that holds every class for equally likely, and bills nothing.

    Args:
        oracle: Whose budget and words it has. It is never asked.
    """

    def __init__(self, oracle: Oracle) -> None:
        self.profile, self.classes, self._left = oracle.profile, oracle.classes, oracle.affordable()

    def affordable(self) -> int:
        return self._left

    def spent(self) -> Cost:
        return Cost()

    def ask(self, queries: Queries, *, partial: bool = False) -> Answers:
        """See `distill.contracts.Oracle`."""
        if len(queries) > self._left and not partial:
            raise BudgetExceeded(len(queries), self._left, "budget")
        n = min(len(queries), self._left)
        self._left -= n
        logits = np.zeros((n, self.classes), dtype=np.float32)
        return self.profile.truncate(Answers(np.full_like(logits, 1 / self.classes), logits))


class Unshown:
    """An apprentice that takes no student: what the other attack hands in has heard the teacher, or nothing at all."""

    def __init__(self, student: Apprentice) -> None:
        self.student, self.class_names = student, student.class_names

    def fit(self, transfer_set: TransferSet, pool: Examples) -> Learner:
        return self.student.fit(transfer_set, pool)

    def fresh(self, number: int = 0) -> Learner:
        return self.student.fresh(number)

    def show(self, own: Predictor, queries: int) -> None:
        """It is dropped."""
