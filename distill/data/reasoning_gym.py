from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from distill.errors import DistillError, MissingAsset, nearest
from distill.language import Prompts, Task, texts
from distill.randomness import derive

TRIES = 10  # questions made for each that is wanted: the others were there before


class ReasoningGym:
    """Any of the hundred generators of `reasoning-gym`, with its own scorer as the checker.

    Paper: Reasoning Gym: Reasoning Environments for Reinforcement Learning with Verifiable Rewards, Stojanovski et al.,
    NeurIPS 2025. Chats of one user message; the reference is the bare answer. Of an answer with ``<answer>`` tags what
    lies between the last ones is scored, else all of it. Many scorers give a little (0.01 or so) for a wrong answer.

    Args:
        generator: The generator, such as chain_sum or gsm_symbolic.
        train_rows, held_out_rows, test_rows: See `StraightLine`. No two questions are equal.
        options: The generator's own options, such as ``{max_terms: 3}``.
        split_seed: Which questions.

    Raises:
        DistillError: A number is out of range.
    """

    def __init__(
        self,
        generator: str = "chain_sum",
        train_rows: int = 10_000,
        held_out_rows: int = 5_000,
        test_rows: int = 500,
        options: dict[str, Any] | None = None,
        split_seed: int = 0,
    ) -> None:
        self.generator, self.options, self.split_seed = generator, options or {}, split_seed
        self.rows = {"test": test_rows, "held_out": held_out_rows, "train": train_rows}
        for part, rows in self.rows.items():
            if rows < 1:
                raise DistillError(f"{part}_rows must be at least 1, not {rows}")

    def load(self) -> Task:
        """Raises `MissingAsset` without the package, `DistillError` for an unknown generator or option of it."""
        if importlib.util.find_spec("reasoning_gym") is None:
            raise MissingAsset("the package reasoning-gym is not installed: pip install reasoning-gym", "data")
        from reasoning_gym.factory import DATASETS, create_dataset

        if self.generator not in DATASETS:
            raise DistillError(f"no generator '{self.generator}'.{nearest(self.generator, DATASETS)}", "data.generator")
        sources = {}
        for part, rows in self.rows.items():
            seed = derive(self.split_seed, "reasoning_gym", part) >> 32
            try:
                sources[part] = create_dataset(self.generator, **self.options, seed=seed, size=rows * TRIES)
            except (TypeError, ValueError, AssertionError) as error:
                raise DistillError(f"{self.generator} refuses them ({error})", "data.options") from error
        seen: set[str] = set()
        test, held_out, train = (self._draw(part, source, seen) for part, source in sources.items())
        return Task(f"reasoning_gym/{self.generator}", train, held_out, test, _Scorer(sources))

    def _draw(self, part: str, source: Any, seen: set[str]) -> Prompts:
        """Questions that are not in `seen`, which grows by them; an entry says where its question came from."""
        questions: list[str] = []
        answers: list[str] = []
        entries: list[str] = []
        for i in range(len(source)):
            if len(questions) == self.rows[part]:
                break
            row = source[i]
            if row["question"] not in seen:
                seen.add(row["question"])
                questions.append(row["question"])
                answers.append("" if row["answer"] is None else str(row["answer"]))
                entries.append(f"{part} {i}")
        if len(questions) < self.rows[part]:
            raise DistillError(
                f"{self.generator} makes only {len(questions)} new questions in {len(source)}; lower it, or make the "
                "questions more varied with data.options",
                f"data.{part}_rows",
            )
        name = f"{self.generator}/{part}"
        return Prompts.of_users(questions, references=texts(answers), entries=texts(entries), name=name)


class _Scorer:
    """The checker: the generator's own score of each answer, in [0, 1]."""

    def __init__(self, sources: dict[str, Any]) -> None:
        self.sources = sources

    def __call__(self, prompts: Prompts, answers: np.ndarray) -> np.ndarray:
        from reasoning_gym.utils import extract_answer

        if prompts.entries is None:
            raise DistillError(
                f"{prompts.name} are no prompts of this task, so answers to them can't be checked", "data"
            )
        scores = np.empty(len(answers))
        for row, (entry, answer) in enumerate(zip(prompts.entries, answers, strict=True)):
            part, i = entry.split()
            tagged = extract_answer(answer)
            question = self.sources[part][int(i)]
            scores[row] = self.sources[part].score_answer(answer.strip() if tagged is None else tagged, question)
        return scores
