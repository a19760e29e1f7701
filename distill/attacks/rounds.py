"""The default shape of an attack: rounds of choosing rows of the pool and asking about them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from distill.contracts import Apprentice, Oracle
from distill.randomness import generator
from distill.records import Answers, Examples, Queries, Reveals, TransferSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class History:
    """What was asked and answered so far: (n,) rows of the pool and their n answers; `answers` is None before any.
    `profile`: what the answers reveal."""

    rows: np.ndarray
    answers: Answers | None
    profile: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def transfer_set(self, pool: Examples, note: str = "") -> TransferSet:
        """Raises `ValueError` before there are answers."""
        if self.answers is None:
            raise ValueError("nothing was answered yet")
        return TransferSet(
            rows=self.rows,
            posteriors=self.answers.posteriors,
            logits=self.answers.logits,
            pool=pool.fingerprint,
            profile=self.profile,
            note=note,
        )


class PoolAttack:
    """Rounds around `select`, which a subclass overrides. An attack that makes its own inputs overrides `extract`.

    Args:
        rounds: The budget is spent in this many rounds of equal size.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("image", "table", "text")

    def __init__(self, rounds: int = 1) -> None:
        if rounds < 1:
            raise ValueError(f"rounds is at least 1, not {rounds}")
        self.rounds = rounds

    def select(
        self, pool: Examples, history: History, n: int, student: Apprentice, rng: np.random.Generator
    ) -> np.ndarray:
        """(at most n,) rows of the pool that are worth asking next; an empty array ends the attack."""
        raise NotImplementedError

    def ends(self, total: int) -> np.ndarray:
        """How many queries were asked by the end of each round, the last one `total`; a round may be empty."""
        return np.linspace(0, total, self.rounds + 1).round().astype(int)[1:]

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. Raises `BudgetExceeded` never: it asks for what is affordable."""
        rng = generator(seed, "attack")
        total = oracle.affordable()
        history = History(np.empty(0, dtype=np.int64), None, str(oracle.profile))
        for end in self.ends(min(total, len(pool))):
            if end <= len(history):
                continue
            rows = self.select(pool, history, int(end) - len(history), student, rng)
            if not len(rows):
                break
            answers = oracle.ask(Queries.of_pool(pool, rows))
            history = replace(
                history,
                rows=np.concatenate([history.rows, rows]),
                answers=answers if history.answers is None else Answers.join([history.answers, answers]),
            )
        if len(history) < total:
            log.warning("the attack ended after %d of %d affordable queries (pool: %d)", len(history), total, len(pool))
        if history.answers is None:
            history = replace(history, answers=Answers(np.empty((0, oracle.classes), dtype=np.float32)))
        return history.transfer_set(pool, f"{type(self).__name__} on {pool.name}")


def random_rows(pool: Examples, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) distinct rows of the pool, every order equally likely; fewer where the pool is smaller.

    A smaller n gives the first ones of a larger n, so budgets nest.
    """
    return rng.permutation(len(pool))[:n]
