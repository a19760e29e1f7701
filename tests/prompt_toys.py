"""A provider of text without a model: it answers from a function, counts, and ends with its budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import BudgetExceeded, DistillError
from distill.language import Completions, Prompts, Sampling, SyntheticSet, texts
from distill.records import Cost, InterfaceProfile, Reveals

PLENTY = 1 << 40


class FakeOracle:
    """`distill.contracts.LanguageOracle`, whose teacher is ``reply(what the user said last, repeat)``.

    Args:
        reply: The teacher.
        queries: The budget in answers; None for no bound.
        tokens: A second budget, in tokens; an answer has one for each character.
        tokenizer: The teacher's.
    """

    profile = InterfaceProfile(Reveals.LABEL)

    def __init__(
        self,
        reply: Callable[[str, int], str],
        queries: int | None = None,
        tokens: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.reply, self.queries, self.tokens, self.tokenizer = reply, queries, tokens, tokenizer
        self.asked: list[tuple[str, Sampling | None]] = []
        self.used_tokens = 0
        self.repeats: Counter[tuple[str, Sampling | None]] = Counter()

    def ask(
        self, prompts: Prompts, sampling: Sampling | None = None, samples: int = 1, *, partial: bool = False
    ) -> SyntheticSet:
        if len(prompts) == 0:
            raise DistillError("nothing to ask", "pool")
        rows = np.repeat(np.arange(len(prompts)), samples)
        answers, repeats = [], []
        for n, row in enumerate(rows):
            request = (prompts.column[row], sampling)
            answer = self.reply(prompts.messages(row)[-1]["content"], self.repeats[request])
            if n >= self.affordable() or (
                self.tokens is not None and self.used_tokens + sum(map(len, answers)) + len(answer) > self.tokens
            ):
                if not partial:
                    raise BudgetExceeded(len(rows), n, "the test's budget")
                break
            repeats.append(self.repeats[request])
            self.repeats[request] += 1
            answers.append(answer)
        self.asked += [(prompts.column[row], sampling) for row in rows[: len(answers)]]
        self.used_tokens += sum(map(len, answers))
        return answered(prompts.take(rows[: len(answers)]), answers, sampling, repeats)

    def affordable(self) -> int:
        return PLENTY if self.queries is None else self.queries - len(self.asked)

    def spent(self) -> Cost:
        return Cost(queries=len(self.asked))


def answered(
    prompts: Prompts,
    answers: list[str],
    sampling: Sampling | None = None,
    repeats: list[int] | None = None,
    **more: Any,
) -> SyntheticSet:
    """A synthetic set with a token for each character (its code point), and an end token of 0."""
    lengths = np.array([len(answer) + 1 for answer in answers], dtype=np.int64)
    ids = np.array([ord(letter) for answer in answers for letter in (*answer, "\0")], dtype=np.int32)
    completions = Completions(
        texts(answers),
        texts(["stop"] * len(answers)),
        np.array([len(text) for text in prompts.column], dtype=np.int64),
        lengths,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        ids,
    )
    given = np.zeros(len(answers), np.int64) if repeats is None else np.array(repeats, dtype=np.int64)
    options: Mapping[str, Any] = {"teacher": "fake", "profile": "text"} | more
    return SyntheticSet(prompts, completions, given, sampling, np.full(len(answers), 0.25), **options)


def chats(n: int, references: bool = True) -> Prompts:
    """Questions that are far apart in their words."""
    questions = [f"{word} {word}er number {i}?" for i, word in enumerate(_words(n))]
    answers = texts([f"Answer {i}." for i in range(n)]) if references else None
    return Prompts.of_users(questions, references=answers, entries=answers, name="toy")


def _words(n: int) -> list[str]:
    letters = np.random.default_rng(0).integers(97, 123, size=(n, 7))
    return ["".join(map(chr, row)) for row in letters]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
