from __future__ import annotations

import numpy as np

from distill import records
from distill.data.pools._words import check_lengths, nonsense, words_of
from distill.data.pools.fitting import check_size
from distill.errors import DistillError
from distill.randomness import generator


class RandomWords:
    """Nonsense texts: words drawn uniformly and independently from a vocabulary.

    Paper: Krishna, Tomar, Parikh, Papernot and Iyyer, "Thieves on Sesame Street! Model Extraction of BERT-based APIs",
    ICLR 2020 (its RANDOM queries, which draw the words by their frequency in WikiText; here all are equally likely).
    Threat model: the attacker knows words of the victim's language, and no texts.

    Args:
        path: A vocabulary, words separated by white space; null: the words of the held-out texts.
        size: Number of texts.
        seed: Which texts.
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

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises `DistillError` when the victim takes no texts or there is no vocabulary."""
        if data.spec.kind != "text":
            raise DistillError(f"random_words makes texts, but the victim takes {data.spec.kind}s", "pool")
        rng = generator(self.seed, "pool", "random_words")
        texts = np.empty(self.size, dtype=object)
        texts[:] = nonsense(sorted(self._words(data)), self.size, self.lengths, rng)
        return records.Examples(texts, data.spec, name="random_words")

    def _words(self, data: records.Dataset) -> set[str]:
        if self.path is not None:
            return set(words_of(self.path, "a vocabulary"))
        if len(data.held_out) == 0:
            raise DistillError(
                "which words? Set pool.path to a vocabulary, or leave texts to take them from with "
                "data.victim_share=0.5",
                "pool.path",
            )
        return {word for text in data.held_out.inputs[:] for word in text.split()}
