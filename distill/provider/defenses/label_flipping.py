from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.contracts import LanguageTeacher
from distill.errors import DistillError
from distill.language import Prompts, Task, texts
from distill.provider.defenses._released import Released
from distill.randomness import KeyedRandom, derive
from distill.rewriting import pattern

NUMBER = r"\d+(?=\D*\Z)"


class LabelFlipping(Released):
    r"""The final answers of a share of the prompts are replaced by other ones that look right.

    Paper: DistillGuard: Evaluating Defenses Against LLM Knowledge Distillation, arXiv 2603.07835, 2026 ("data
    poisoning"; it hurts chats, not tasks). Which rate it takes was not read; 0.1 is ours.
    Threat model: the attacker reads what goes out, text alone: a log-probability would tell that another answer was
    likelier. Honest users get the same wrong answers. Repeats agree, so asking again finds nothing out, unless
    `repeats_agree` is off: then a majority of repeats is right. The reasoning before the answer stays, and still
    leads to the right one: an attacker who checks that the two fit sees the flip.

    A number becomes another one of as many digits, all equally likely; a choice becomes another choice.

    Args:
        rate: Of the prompts (or, with `repeats_agree` off, of the answers).
        answer: A regular expression; its last match in a text is what is replaced. Nothing is where it does not match.
        choices: What an answer may be, where it is no number; a text that is none of them stays.
        repeats_agree: The same prompt is flipped each time or never, and right answers that agree become wrong ones
            that agree.

    Raises:
        DistillError: The rate is out of range, the expression is none, or there is but one choice; or the teacher's
            tokens are not known.
    """

    def __init__(
        self,
        rate: float = 0.1,
        answer: str = NUMBER,
        choices: Sequence[str] = (),
        repeats_agree: bool = True,
    ) -> None:
        if not 0 <= rate <= 1:
            raise DistillError(f"rate must be at least 0 and at most 1, not {rate}")
        if len(choices) == 1 or len(set(choices)) < len(choices):
            raise DistillError("choices must be none, or two and more that differ")
        self.rate, self.answer, self.choices = rate, pattern("answer", answer), list(choices)
        self.repeats_agree = repeats_agree
        self._seed = 0

    def prepare(self, teacher: LanguageTeacher, task: Task, trainer: Any, cache: Path, seed: int) -> LanguageTeacher:
        """The same teacher. The seed decides which prompts are flipped, where repeats agree."""
        self._seed = derive(seed, "label_flipping")
        return super().prepare(teacher, task, trainer, cache, seed)

    def written(self, prompts: Prompts, column: np.ndarray, rng: KeyedRandom) -> np.ndarray:
        if self.repeats_agree:
            rng = KeyedRandom(self._seed, prompts.keys, np.zeros(len(prompts), np.int64))
        flips, turns = rng.uniform(2, "flip").T
        return texts(
            [
                self._flipped(text, turn) if flip < self.rate else text
                for text, flip, turn in zip(column, flips, turns, strict=True)
            ]
        )

    def _flipped(self, text: str, turn: float) -> str:
        """`turn`, in (0, 1), is how far the answer is turned around the circle of all answers."""
        matches = list(self.answer.finditer(text))
        if not matches:
            return text
        old = matches[-1].group()
        if self.choices:
            if old not in self.choices:
                return text
            count = len(self.choices)
            new = self.choices[(self.choices.index(old) + 1 + int(turn * (count - 1))) % count]
        elif old.isdecimal():
            first = 0 if len(old) == 1 or old[0] == "0" else 10 ** (len(old) - 1)
            count = 10 ** len(old) - first
            new = str(first + (int(old) - first + 1 + int(turn * (count - 1))) % count).zfill(len(old))
        else:
            return text
        return text[: matches[-1].start()] + new + text[matches[-1].end() :]
