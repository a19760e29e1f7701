from __future__ import annotations

from typing import ClassVar

import numpy as np

from distill.attacks._made import Asked
from distill.attacks.rounds import random_rows
from distill.contracts import Apprentice, Oracle
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import Examples, Queries, Reveals, TransferSet


class PerturbedSentences:
    """Ask about texts of the pool some of whose words are replaced, left out, or trade places.

    Paper: Thieves on Sesame Street! Model Extraction of BERT-based APIs, Krishna et al., ICLR 2020 (queries that need
    not make sense); EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification Tasks, Wei
    and Zou, EMNLP 2019 (the edits, and a tenth of the words for each). Threat model: a few texts, from which it makes
    as many queries as it pays for; any profile. Departs from EDA, which makes one kind of edit at a time and replaces
    words by synonyms, in making all three and in drawing the new words as often as they come in the pool.

    Texts are taken in random order, and anew when all were taken. Of n words, ``max(1, round(share * n))`` are edited
    in each way whose share is not 0 (two at least trade places), no word twice, while there are any; one word always
    stays.

    Args:
        replaced, dropped, swapped: Shares of a text's words; together at most 1.

    Raises:
        DistillError: The shares are out of their range, or the pool has only one word to replace others by.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self, replaced: float = 0.1, dropped: float = 0.1, swapped: float = 0.1) -> None:
        for name, share in (("replaced", replaced), ("dropped", dropped), ("swapped", swapped)):
            if not 0 <= share <= 1:
                raise DistillError(f"{name} lies between 0 and 1, not {share}")
        if not 0 < replaced + dropped + swapped <= 1:
            raise DistillError(f"replaced, dropped and swapped make {replaced + dropped + swapped}, not 0 to 1 in all")
        self.replaced, self.dropped, self.swapped = replaced, dropped, swapped

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. All inputs are made: (n,) `str`. A smaller budget asks the first ones."""
        asked, rng = Asked(oracle, pool), generator(seed, "attack", "perturbed_sentences")
        texts = [text.split() for text in pool.inputs[: len(pool)]]
        words = np.array([word for text in texts for word in text], dtype=object)
        if self.replaced and len(set(words)) < 2:
            raise DistillError("its texts have only one word, and none to replace it by", "pool")
        made = np.empty(asked.total, dtype=object)
        for start in range(0, asked.total, len(pool)):
            order = random_rows(pool, asked.total - start, rng)
            made[start : start + len(order)] = [" ".join(self._edited(texts[row], words, rng)) for row in order]
        asked.ask(Queries.made(made))
        return asked.transfer_set("PerturbedSentences")

    def _edited(self, text: list[str], words: np.ndarray, rng: np.random.Generator) -> list[str]:
        edited, places = list(text), rng.permutation(len(text))
        replaced, dropped, swapped = (
            max(1, round(share * len(text))) if share else 0 for share in (self.replaced, self.dropped, self.swapped)
        )
        for place in places[:replaced]:
            while edited[place] == text[place]:
                edited[place] = words[rng.integers(len(words))]
        places = places[replaced:]
        trading = places[dropped : dropped + max(2, swapped)] if swapped else places[:0]
        for place, other in zip(trading, np.roll(trading, 1), strict=True):
            edited[place] = text[other]
        gone = set(places[: min(dropped, len(text) - 1)].tolist())
        return [word for place, word in enumerate(edited) if place not in gone]
