from __future__ import annotations

from distill.data.pools._words import check_lengths, nonsense, words_of
from distill.data.pools.fitting import check_size
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
        check_lengths(min_words, max_words)
        self.path, self.size, self.seed = path, check_size(size), seed
        self.lengths = min_words, max_words

    def load_prompts(self, task: Task) -> Prompts:
        """Raises `MissingAsset` without the text, `DistillError` when it is not UTF-8 or has fewer than two words."""
        rng = generator(self.seed, "pool", "random_word_prompts")
        questions = nonsense(self._words(task), self.size, self.lengths, rng)
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
        return words_of(self.path, "a text")
