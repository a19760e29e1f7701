from __future__ import annotations

from pathlib import Path

import numpy as np

from distill import records
from distill.data import assets
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
        if not 1 <= min_words <= max_words:
            raise DistillError(f"min_words ({min_words}) must be at least 1 and at most max_words ({max_words})")
        self.path, self.size, self.seed = path, check_size(size), seed
        self.min_words, self.max_words = min_words, max_words

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises `DistillError` when the victim takes no texts or there is no vocabulary."""
        if data.spec.kind != "text":
            raise DistillError(f"random_words makes texts, but the victim takes {data.spec.kind}s", "pool")
        vocabulary = np.array(sorted(self._words(data)), dtype=object)
        if len(vocabulary) < 2:
            raise DistillError(
                f"a vocabulary of {len(vocabulary)} words makes no texts; state a longer one", "pool.path"
            )
        rng = generator(self.seed, "pool", "random_words")
        ends = np.cumsum(rng.integers(self.min_words, self.max_words + 1, size=self.size))
        words = vocabulary[rng.integers(len(vocabulary), size=ends[-1])]
        texts = np.empty(self.size, dtype=object)
        texts[:] = [" ".join(part) for part in np.split(words, ends[:-1])]
        return records.Examples(texts, data.spec, name="random_words")

    def _words(self, data: records.Dataset) -> set[str]:
        if self.path is not None:
            file = assets.find("a vocabulary", root=self.path, key="pool.path")
            assert isinstance(file, Path)  # a stated path is used or refused
            try:
                return set(file.read_text(encoding="utf-8").split())
            except (OSError, UnicodeDecodeError) as error:
                raise DistillError(f"{file} can't be read as UTF-8 text ({error})", "pool.path") from error
        if len(data.held_out) == 0:
            raise DistillError(
                "which words? Set pool.path to a vocabulary, or leave texts to take them from with "
                "data.victim_share=0.5",
                "pool.path",
            )
        return {word for text in data.held_out.inputs[:] for word in text.split()}
