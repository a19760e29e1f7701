"""What the attacks share that ask every query of another attack several times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from distill.attacks._relabelled import Relabelled, check_attack
from distill.contracts import Apprentice, Attack, Oracle
from distill.errors import DistillError
from distill.records import Answers, Cost, Examples, Inputs, InterfaceProfile, Queries, Reveals, TransferSet

Vary = Callable[[np.ndarray, int], np.ndarray]  # inputs and a number from 1 on -> a variant of each


class Repeats:
    """Another attack, each of whose queries is asked `times` times; a subclass says how with `variants`.

    The other attack is told the mean of the answers, and its queries are as many as the budget pays for in full: what
    is left of it is not spent.

    Args:
        attack: The other attack.
        times: Answers to each of its queries.
    """

    # Of an instance: those of the other attack.
    requires: Reveals = Reveals.LABEL
    adapts: bool = False
    inputs: tuple[str, ...] = ("image", "table", "text")
    uses_teacher: ClassVar[bool] = True

    def __init__(self, attack: Attack, times: int) -> None:
        check_attack(attack)
        if isinstance(attack, Relabelled):
            raise DistillError(f"attack asks something; {type(attack).__name__} is a control, which has no queries")
        if times < 2:
            raise DistillError(f"times is at least 2, not {times}")
        self.attack, self.times = attack, times
        self.requires, self.adapts, self.inputs = attack.requires, attack.adapts, attack.inputs

    def variants(self, pool: Examples, seed: int) -> Vary | None:
        """How the second and later queries of a group differ from the first; None where they don't."""
        raise NotImplementedError

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """All answers in the order of asking, with `groups`: those to one query of the other attack, one after the
        other, the query itself first. Raises `DistillError` where the budget does not pay for one group."""
        if (left := oracle.affordable()) < self.times:
            raise DistillError(f"pays for {left} answers, but every query takes {self.times} (attack.times)", "budget")
        repeating = Repeating(oracle, self.times, self.variants(pool, seed))
        asked = self.attack.extract(repeating, pool, student, seed)
        return repeating.transfer_set(asked, f"{type(self).__name__} ({self.times} times) of {asked.note}")


class Repeating:
    """An oracle that asks each query several times, and tells the mean of the answers in the words of its profile.

    Args:
        oracle: Whom it asks.
        times: How often.
        vary: As of `Repeats.variants`.
    """

    def __init__(self, oracle: Oracle, times: int, vary: Vary | None) -> None:
        self.oracle, self.times, self.vary = oracle, times, vary
        self.profile, self.classes = oracle.profile, oracle.classes
        self._asked: list[tuple[Queries, Inputs, Answers]] = []

    def affordable(self) -> int:
        """How many more queries the budget pays for, each asked `times` times."""
        return self.oracle.affordable() // self.times

    def spent(self) -> Cost:
        return self.oracle.spent()

    def ask(self, queries: Queries, *, partial: bool = False) -> Answers:
        """See `distill.contracts.Oracle`. Raises `BudgetExceeded`, which counts answers and not queries."""
        if partial:
            queries = queries[: self.affordable()]
        grouped = Grouped(queries, self.times, self.vary)
        if self.vary is None:
            every = Queries(queries.source, np.repeat(queries.rows, self.times), queries.from_pool)
        else:
            every = Queries(grouped, np.arange(len(grouped)), from_pool=False)
        answers = self.oracle.ask(every)
        self._asked.append((queries, grouped, answers))
        groups = answers.posteriors.reshape(-1, self.times, self.classes)
        means = groups.mean(axis=1, dtype=np.float64)
        logits = None if answers.logits is None else np.log(np.maximum(means, 1e-12)).astype(np.float32)
        return self.profile.truncate(Answers(means.astype(np.float32), logits))

    def transfer_set(self, asked: TransferSet, note: str) -> TransferSet:
        """What was asked and answered so far. Labels alone where the attack that asked kept no more of its answers.

        Args:
            asked: What that attack returned.
            note: For the card.
        """
        labels_only = asked.profile == "label"
        rows, made, answers = [np.empty(0, dtype=np.int64)], [], [_no_answers(asked)]
        for queries, grouped, told in self._asked:
            of_pool = np.zeros(len(grouped), dtype=bool)
            if queries.from_pool:
                of_pool[:: 1 if self.vary is None else self.times] = True
            rows.append(np.where(of_pool, np.repeat(queries.rows, self.times), -1))
            if not of_pool.all():
                made.append(grouped[np.flatnonzero(~of_pool)])
            answers.append(InterfaceProfile(Reveals.LABEL).truncate(told) if labels_only else told)
        every = Answers.join(answers)
        return TransferSet(
            rows=np.concatenate(rows),
            posteriors=every.posteriors,
            made=_join(made) if made else None,
            logits=every.logits,
            groups=np.arange(len(every)) // self.times,
            pool=asked.pool,
            profile=asked.profile,
            note=note,
        )


@dataclass(frozen=True)
class Grouped:
    """A column of each query followed by its variants, which are made when they are asked for."""

    queries: Queries
    times: int
    vary: Vary | None

    def __len__(self) -> int:
        return len(self.queries) * self.times

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        rows = np.arange(len(self))[rows]
        number = rows % self.times
        inputs = self.queries.source[self.queries.rows[rows // self.times]]
        if self.vary is not None:
            inputs = inputs.copy()
            for variant in set(number.tolist()) - {0}:
                inputs[number == variant] = self.vary(inputs[number == variant], variant)
        return inputs


def _no_answers(asked: TransferSet) -> Answers:
    """None, as an array."""
    return Answers(asked.posteriors[:0], None if asked.logits is None else asked.logits[:0])


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Made inputs, one after the other: bytes as floats where some pixels are floats."""
    if len({part.dtype for part in parts}) > 1:
        parts = [part / np.float32(255) if part.dtype == np.uint8 else part for part in parts]
    return np.concatenate(parts)
