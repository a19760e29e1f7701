"""What attacks on prompts share: spending a budget of answers on prompts of the pool and on prompts of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from distill.attacks.novelty import Novelty
from distill.contracts import LanguageOracle
from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, SyntheticSet, texts

log = logging.getLogger(__name__)


class Asking:
    """An attack's purse and notebook. Nothing raises `BudgetExceeded`: the affordable first ones are answered.

    Args:
        oracle: Whom to ask.
        samples: Answers to each prompt that a student will learn from.

    Attributes:
        over: The budget has ended.
    """

    def __init__(self, oracle: LanguageOracle, samples: int) -> None:
        self.oracle, self.samples = oracle, samples
        self.over = False
        self.parts: list[SyntheticSet] = []

    def answer(self, prompts: Prompts) -> Completions:
        """Ask for `samples` answers to each prompt, with the experiment's own sampling, and keep them."""
        if not len(prompts):
            return Completions.none()
        part = self._ask(prompts, None, self.samples)
        if len(part):
            self.parts.append(part)
        return part.completions

    def write(self, prompts: Prompts, sampling: Sampling, samples: int = 1) -> Completions:
        """Ask for answers that are not kept: new prompts, paid for like any other answer."""
        return self._ask(prompts, sampling, samples).completions

    def invent(
        self,
        write: Callable[[int, list[str]], list[str]],
        novelty: Novelty,
        *,
        at_once: int,
        cost: int,
        most: int,
        patience: int,
    ) -> list[str]:
        """Have prompts written round after round, and ask those that are new, which are returned.

        It ends with the budget, with `most` prompts, or after `patience` rounds in a row that brought nothing new.

        Args:
            write: Pays for so many requests and returns what they brought; it is also handed the prompts so far.
            novelty: Admits what is new.
            at_once: Requests in a round, at most.
            cost: Answers that one of them takes, those to its prompts included.
            most: See above.
            patience: See above.
        """
        own: list[str] = []
        idle = 0
        while idle < patience and len(own) < most:
            requests = self.room(min(at_once, most - len(own)), cost)
            if not requests:
                return own
            new = [prompt for prompt in write(requests, own) if novelty.admit(prompt)][: most - len(own)]
            own += new
            idle = 0 if new else idle + 1
            self.answer(Prompts.of_users(new))
        if idle and idle == patience:
            log.warning("the attack ended early: %d rounds in a row brought no new prompt", idle)
        return own

    def room(self, most: int, cost: int) -> int:
        """How many things at once (at most `most`, at least one) that take `cost` answers each the budget has room for.

        0 at its end: a last single answer is not spent on a prompt that nobody could answer.
        """
        left = 0 if self.over else self.oracle.affordable()
        return 0 if left < 2 else max(1, min(most, left // cost))

    def collected(self, note: str) -> SyntheticSet:
        """All answers that were kept, in the order of asking."""
        if not self.parts:
            none = np.empty(0, dtype=np.int64)
            return SyntheticSet(Prompts(texts([])), Completions.none(), none, None, np.empty(0), note=note)
        first = self.parts[0]
        prompts = [part.prompts for part in self.parts]
        return replace(
            first,
            prompts=replace(
                prompts[0],
                column=np.concatenate([each.column for each in prompts]),
                references=_join([each.references for each in prompts]),
                entries=_join([each.entries for each in prompts]),
            ),
            completions=Completions.join([part.completions for part in self.parts]),
            repeats=np.concatenate([part.repeats for part in self.parts]),
            usd=np.concatenate([part.usd for part in self.parts]),
            rows=None,
            note=note,
        )

    def _ask(self, prompts: Prompts, sampling: Sampling | None, samples: int) -> SyntheticSet:
        part = self.oracle.ask(prompts, sampling, samples, partial=True)
        self.over = self.over or len(part) < len(prompts) * samples
        return part


def _join(columns: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """None unless all are known: prompts of an attack's own have no reference, and no checker knows them."""
    known = [column for column in columns if column is not None]
    return np.concatenate(known) if len(known) == len(columns) else None


def writing(max_tokens: int, temperature: float, top_p: float) -> Sampling:
    """How an attack draws prompts of its own. Raises `DistillError` that names the attack's option."""
    try:
        return Sampling(max_tokens, temperature, top_p)
    except DistillError as error:
        raise DistillError(str(error).removeprefix("sampling.").replace(":", "", 1)) from None


def chats_only(pool: Prompts, attack: str) -> None:
    """Raises `DistillError` where the pool is plain text, or empty."""
    if not pool.chat:
        raise DistillError(f"{attack} makes new questions from old ones, but {pool.name} is plain text to continue; "
                           "choose a pool of chats", "pool")  # fmt: skip
    if not len(pool):
        raise DistillError(f"{attack} starts from the pool, and {pool.name or 'it'} is empty", "pool")


def last_message(pool: Prompts, row: int) -> str:
    """What the user says last in a chat."""
    return pool.messages(row)[-1]["content"]
