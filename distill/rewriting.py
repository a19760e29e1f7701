"""Saying the same in other words: what a provider does before it answers, or an attacker before a student learns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distill.contracts import LanguageTeacher
from distill.errors import DistillError
from distill.language import Prompts, Sampling, Task, texts
from distill.randomness import KeyedRandom

# Of what separates the steps of a written-out reasoning: a line, or as in `distill.data.straight_line`.
BOUNDARY = r"(?<=[;\n])"
FIELDS = re.compile(r"\{(prompt|text)\}")
INSTRUCTION = (
    "Write the text below in other words. Keep every fact, number and step, in their order; add nothing.\n\n"
    "Question:\n{prompt}\n\nText:\n{text}"
)


class Rewriter(Protocol):
    """Rewrites texts.

    Attributes:
        fingerprint: Content hash of its models; empty where it has none, and until `prepare` has returned.
        tokens_read: How many tokens its models have read or written so far.
    """

    fingerprint: str

    @property
    def tokens_read(self) -> int: ...

    def prepare(self, task: Task, trainer: Any, cache: Path) -> None:
        """Load its models; as of `distill.contracts.LanguageTeacher`."""
        ...

    def rewrite(self, column: np.ndarray, prompts: Prompts, rng: KeyedRandom) -> np.ndarray:
        """(n,) object array of `str`: text i rewritten, which depends on row i of the arguments only.

        Args:
            column: (n,) object array of `str`.
            prompts: What the n texts answer.
            rng: Of n rows.
        """
        ...


class _WithoutModels:
    """A rewriter that is a formula."""

    fingerprint = ""
    tokens_read = 0

    def prepare(self, task: Task, trainer: Any, cache: Path) -> None:
        pass


class ByRules(_WithoutModels):
    r"""Regular expressions, each with replacements of which every match draws one.

    Args:
        rules: Applied in turn. Each has ``find``, a regular expression, and ``replace``, a list of templates (``\1`` is
            the first group) that are equally likely.

    Raises:
        DistillError: A rule is none.
    """

    def __init__(self, rules: Sequence[Mapping[str, Any]]) -> None:
        self.rules: list[tuple[re.Pattern[str], list[str]]] = []
        for i, rule in enumerate(rules):
            if set(rule) != {"find", "replace"} or not rule["replace"] or isinstance(rule["replace"], str):
                raise DistillError(f"rules each have 'find' and a list 'replace'; rule {i} is {dict(rule)}")
            self.rules.append((pattern("rules", rule["find"]), list(rule["replace"])))

    def rewrite(self, column: np.ndarray, prompts: Prompts, rng: KeyedRandom) -> np.ndarray:
        for i, (find, replacements) in enumerate(self.rules):
            matches = max((len(find.findall(text)) for text in column), default=0)
            drawn = (rng.uniform(matches, f"rule {i}") * len(replacements)).astype(np.int64)
            column = texts([_replaced(text, find, replacements, row) for text, row in zip(column, drawn, strict=True)])
        return column


class EveryStep(_WithoutModels):
    """Leaves every so many-th step and drops the others.

    Args:
        every: 2 leaves the second, the fourth …
        boundary: A regular expression: a text is cut into steps where it matches, and loses what it matches.

    Raises:
        DistillError: A number is out of range, or the expression is none.
    """

    def __init__(self, every: int = 2, boundary: str = BOUNDARY) -> None:
        if every < 1:
            raise DistillError(f"every must be at least 1, not {every}")
        self.every, self.boundary = every, pattern("boundary", boundary)

    def rewrite(self, column: np.ndarray, prompts: Prompts, rng: KeyedRandom) -> np.ndarray:
        return texts(["".join(_steps(text, self.boundary)[self.every - 1 :: self.every]) for text in column])


class ReversedSteps(_WithoutModels):
    """All steps in reverse: what follows from a step is said before it.

    Paper: Information-Preserving Reformulation of Reasoning Traces for Antidistillation, arXiv 2510.11545, 2025, puts
    conclusions before what leads to them, with a model of its own; here by a formula.

    Args:
        boundary: As of `EveryStep`.

    Raises:
        DistillError: The expression is none.
    """

    def __init__(self, boundary: str = BOUNDARY) -> None:
        self.boundary = pattern("boundary", boundary)

    def rewrite(self, column: np.ndarray, prompts: Prompts, rng: KeyedRandom) -> np.ndarray:
        return texts(["".join(reversed(_steps(text, self.boundary))) for text in column])


class ByModel:
    """Any language model, told to rewrite.

    What it writes is cut at `max_tokens`; white space around a text stays, and a text of white space alone is not asked
    about. Nothing is cached: the same text costs the same tokens again.

    Args:
        model: Whose answers are the texts.
        instruction: What it is asked; ``{text}`` stands for the text and ``{prompt}`` for the last message before it.
        max_tokens: Of what it writes.
        temperature, top_p: How it is drawn; 0 for greedy decoding.

    Raises:
        DistillError: The instruction has no place for the text, or a number is out of range.
    """

    fingerprint = ""

    def __init__(
        self,
        model: LanguageTeacher,
        instruction: str = INSTRUCTION,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        if "{text}" not in instruction:
            raise DistillError("instruction must say where the text goes, with {text}")
        self.model, self.instruction = model, instruction
        self.sampling = Sampling(max_tokens, temperature, top_p)
        self._tokens_read = 0

    @property
    def tokens_read(self) -> int:
        return self._tokens_read

    def prepare(self, task: Task, trainer: Any, cache: Path) -> None:
        self.model.prepare(task, trainer, cache)
        self.fingerprint = self.model.fingerprint

    def rewrite(self, column: np.ndarray, prompts: Prompts, rng: KeyedRandom) -> np.ndarray:
        """Raises `DistillError` where a text does not fit into the model's context."""
        rows = np.array([row for row, text in enumerate(column) if text.strip()], dtype=np.int64)
        # A draw of the model depends on its prompt and on the repeat: so each row of `rng` is a repeat of its own.
        repeats = (rng.uniform(1, "repeat")[:, 0] * 2**31).astype(np.int64)
        written = column.copy()
        for start in range(0, len(rows), self.model.requests_at_once):
            some = rows[start : start + self.model.requests_at_once]
            asked = Prompts.of_users([self._ask(column[row], prompts, row) for row in some], name="texts to rewrite")
            made = self.model.generate(asked, self.sampling, repeats[some])
            self._tokens_read += int(made.prompt_tokens.sum() + made.completion_tokens.sum())
            for row, new in zip(some, made.column, strict=True):
                old = column[row]
                written[row] = old[: len(old) - len(old.lstrip())] + new.strip() + old[len(old.rstrip()) :]
        return written

    def _ask(self, text: str, prompts: Prompts, row: int) -> str:
        values = {"text": text.strip(), "prompt": prompts.messages(row)[-1]["content"]}
        return FIELDS.sub(lambda field: values[field[1]], self.instruction)


def pattern(option: str, expression: str) -> re.Pattern[str]:
    """The compiled expression. Raises `DistillError` where it is none."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise DistillError(f"{option} must be a regular expression, and {expression!r} is none: {error}") from None


def _replaced(text: str, find: re.Pattern[str], replacements: Sequence[str], drawn: np.ndarray) -> str:
    number = iter(drawn.tolist())
    return find.sub(lambda match: match.expand(replacements[next(number)]), text)


def _steps(text: str, boundary: re.Pattern[str]) -> list[str]:
    return [step for step in boundary.split(text) if step]
