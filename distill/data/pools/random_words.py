from __future__ import annotations

import numpy as np

from distill import contracts, records
from distill.data.pools._words import check_lengths, nonsense, words_of
from distill.data.pools.fitting import check_size
from distill.errors import DistillError
from distill.randomness import generator


class RandomWords:
    """Nonsense texts: words drawn independently, each as likely as another, or as often as they come in a corpus.

    Paper: Krishna, Tomar, Parikh, Papernot and Iyyer, "Thieves on Sesame Street! Model Extraction of BERT-based APIs",
    ICLR 2020 (its RANDOM queries: words of WikiText-103, drawn uniformly for SST2 and MNLI and by frequency for SQuAD
    and BoolQ). Threat model: the attacker knows words of the victim's language, and no texts of the victim's.

    Args:
        path: A vocabulary or a corpus, words separated by white space; null: the words of `source`.
        size: Number of texts.
        seed: Which texts.
        min_words, max_words: Every length between them is equally likely.
        source: A data set of texts, whose training rows are the corpus: ``+data@pool.source=newsgroups``; null: the
            held-out texts are.
        by_frequency: Draw words as often as they come in the corpus.
    """

    def __init__(
        self,
        path: str | None = None,
        size: int = 10_000,
        seed: int = 0,
        min_words: int = 10,
        max_words: int = 60,
        source: contracts.Data | None = None,
        by_frequency: bool = False,
    ) -> None:
        check_lengths(min_words, max_words)
        if path is not None and source is not None:
            raise DistillError("path is one place to take words from, and source is another; set one of them")
        if isinstance(source, (str, dict, list)):
            raise DistillError(f"source is an option of the group data (+data@pool.source=newsgroups), not {source!r}")
        self.path, self.size, self.seed = path, check_size(size), seed
        self.lengths, self.source, self.by_frequency = (min_words, max_words), source, by_frequency

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises `DistillError` when the victim takes no texts or there is no vocabulary."""
        if data.spec.kind != "text":
            raise DistillError(f"random_words makes texts, but the victim takes {data.spec.kind}s", "pool")
        rng = generator(self.seed, "pool", "random_words")
        words = self._words(data)
        texts = np.empty(self.size, dtype=object)
        texts[:] = nonsense(words if self.by_frequency else sorted(set(words)), self.size, self.lengths, rng)
        return records.Examples(texts, data.spec, name="random_words")

    def _words(self, data: records.Dataset) -> list[str]:
        if self.path is not None:
            return words_of(self.path, "a vocabulary")
        corpus = data.held_out if self.source is None else self.source.load().train
        if len(corpus) == 0:
            raise DistillError(
                "which words? Set pool.path to a vocabulary, or leave texts to take them from with "
                "data.victim_share=0.5",
                "pool.path",
            )
        if corpus.spec.kind != "text":
            raise DistillError(f"{corpus.name} holds {corpus.spec.kind}s, which have no words", "pool.source")
        return [word for text in corpus.inputs[:] for word in text.split()]
