"""What the defenses share that give out another text than was decoded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.contracts import LanguageTeacher
from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, Task, texts
from distill.provider.defenses._language import Unchanged
from distill.randomness import KeyedRandom
from distill.records import InterfaceProfile, Reveals
from distill.rewriting import Rewriter, pattern

# What stands behind </think>, a line of GSM8K behind its ####, or the last dot of `distill.data.straight_line`.
ANSWER = r"(?s)(?<=</think>).*\Z|####[^\n]*\Z|(?<=;)\.[^.;]+\Z"


class Released(Unchanged):
    """A defense that gives out other text than was decoded, in `written`.

    All that goes out is a function of that text: it is what a decoder would have said of it that had written it by
    itself under the same sampling. So neither the reasons why answers ended nor what is billed tells of what was
    decoded, and there are no tokens to tell: they are other tokens than those that the teacher's log-probabilities are
    of. Stop texts end what goes out and not what is decoded, or each would be a question about what is hidden.
    Log-probabilities of given text would say what was hidden, guess by guess, and biased logits would lead the model
    to write it where it is not, so neither is exposed.
    """

    exposes = InterfaceProfile(Reveals.TEXT)
    fingerprint = ""
    _tokenizer: Any

    def prepare(self, teacher: LanguageTeacher, task: Task, trainer: Any, cache: Path, seed: int) -> LanguageTeacher:
        """The same teacher, whose tokens are what answers are measured in."""
        if teacher.tokenizer is None:
            raise DistillError(
                "what is given out is measured in the teacher's tokens, which this teacher does not tell; state its "
                "tokenizer",
                "teacher.tokenizer",
            )
        self._tokenizer, self.fingerprint = teacher.tokenizer, teacher.fingerprint
        return teacher

    def sampling(self, asked: Sampling) -> Sampling:
        return replace(asked, stop=())

    def release(self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom) -> Completions:
        if not len(completions):
            return completions.without_tokens()
        column = [_before(text, sampling.stop) for text in self.written(prompts, completions.column, rng)]
        tokens = self._tokenizer(column, add_special_tokens=False).input_ids
        finish, most = [], sampling.max_tokens
        for row, some in enumerate(tokens):
            finish.append("stop" if len(some) < most else "length")
            if len(some) > most:
                column[row] = self._tokenizer.decode(some[:most], skip_special_tokens=True)
        return Completions(
            texts(column),
            texts(finish),
            completions.prompt_tokens,
            np.array([min(len(some) + 1, most) for some in tokens], dtype=np.int64),  # with the one that ends it
        )

    def written(self, prompts: Prompts, column: np.ndarray, rng: KeyedRandom) -> np.ndarray:
        """(n,) object array of `str`: the text that goes out in place of each of `column`."""
        raise NotImplementedError


class RewrittenReasoning(Released):
    """Reasoning goes out rewritten, and the answer behind it as it is; without an answer all is reasoning."""

    def __init__(self, rewriter: Rewriter, answer: str = ANSWER) -> None:
        self.rewriter, self.answer = rewriter, pattern("answer", answer)

    @property
    def tokens_read(self) -> int:
        return self.rewriter.tokens_read

    def prepare(self, teacher: LanguageTeacher, task: Task, trainer: Any, cache: Path, seed: int) -> LanguageTeacher:
        """The same teacher; the rewriter's model is loaded, or trained on `task`."""
        super().prepare(teacher, task, trainer, cache, seed)
        self.rewriter.prepare(task, trainer, cache)
        self.fingerprint += self.rewriter.fingerprint
        return teacher

    def written(self, prompts: Prompts, column: np.ndarray, rng: KeyedRandom) -> np.ndarray:
        answers = [found(text, self.answer) or "" for text in column]
        reasoning = [text[: len(text) - len(answer)] for text, answer in zip(column, answers, strict=True)]
        rewritten = self.rewriter.rewrite(texts(reasoning), prompts, rng)
        return texts([new + answer for new, answer in zip(rewritten, answers, strict=True)])


def found(text: str, answer: re.Pattern[str]) -> str | None:
    """The end of a text from where the expression first matches, or None where it does not."""
    match = answer.search(text)
    return match and text[match.start() :]


def _before(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first of the stop texts."""
    return text[: min((place for end in stop if (place := text.find(end)) >= 0), default=len(text))]
