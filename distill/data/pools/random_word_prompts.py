from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.data import assets
from distill.data.pools.fitting import check_size
from distill.errors import DistillError
from distill.language import Prompts, Task
from distill.randomness import generator


class RandomWordPrompts:
    """Nonsense as questions: words drawn independently, as often as they are in a text.

    Paper: Krishna, Tomar, Parikh, Papernot and Iyyer, "Thieves on Sesame Street! Model Extraction of BERT-based APIs",
    ICLR 2020 (its RANDOM queries, whose words come from WikiText-103 by frequency).
    Threat model: the attacker knows words of the teacher's language, and no prompts. Chats of one user message.

    Args:
        path: A text in UTF-8; null: the words of the task's held-out prompts.
        size: Number of prompts.
        seed: Which prompts.
        min_words, max_words: Every length between them is equally likely.
    """

    def __init__(
        self,
        path: str | None = None,
        size: int = 10_000,
        seed: int = 0,
        min_words: int = 10,
        max_words: int = 60,
    ) -> None:
        if not 1 <= min_words <= max_words:
            raise DistillError(f"min_words ({min_words}) must be at least 1 and at most max_words ({max_words})")
        self.path, self.size, self.seed = path, check_size(size), seed
        self.min_words, self.max_words = min_words, max_words

    def load_prompts(self, task: Task) -> Prompts:
        """Raises `MissingAsset` without the text, `DistillError` when it is not UTF-8 or has fewer than two words."""
        words = self._words(task)
        if len(set(words)) < 2:
            raise DistillError(f"{len(set(words))} words make no prompts; state a longer text", "pool.path")
        rng = generator(self.seed, "pool", "random_word_prompts")
        ends = np.cumsum(rng.integers(self.min_words, self.max_words + 1, size=self.size))
        drawn = np.array(words, dtype=object)[rng.integers(len(words), size=ends[-1])]
        questions = [" ".join(part) for part in np.split(drawn, ends[:-1])]
        return Prompts.of_users(questions, name="random_word_prompts")

    def _words(self, task: Task) -> list[str]:
        if self.path is None:
            prompts = task.held_out
            return [
                word
                for row in range(len(prompts))
                for message in prompts.messages(row)
                for word in message["content"].split()
            ]
        file = assets.find("a text", root=self.path, key="pool.path")
        assert isinstance(file, Path)  # a stated path is used or refused
        try:
            return file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise DistillError(f"{file} can't be read as UTF-8 text ({error})", "pool.path") from error
