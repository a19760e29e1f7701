"""Which of an attack's own prompts are new: ROUGE-L against all that came before."""

from __future__ import annotations

import re

WORD = re.compile(r"\w+")


class Novelty:
    """The texts that were admitted so far.

    Args:
        threshold: A text is new where its ROUGE-L (F1, Lin 2004) with each of them is below this.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._known: list[list[str]] = []

    def admit(self, text: str) -> bool:
        """Whether the text is new and has a word; it is remembered if so."""
        words = WORD.findall(text.lower())
        places = _places(words)
        for other in self._known:
            # F1 = 2 L / (m + n), and the common subsequence (L) is no longer than the shorter of both.
            least = self.threshold * (len(words) + len(other)) / 2
            if min(len(words), len(other)) >= least and _common(places, len(words), other) >= least:
                return False
        if words:
            self._known.append(words)
        return bool(words)


def rouge_l(one: str, other: str) -> float:
    """F1 of the longest common subsequence of words."""
    a, b = WORD.findall(one.lower()), WORD.findall(other.lower())
    return 2 * _common(_places(a), len(a), b) / (len(a) + len(b)) if a and b else 0.0


def _places(words: list[str]) -> dict[str, int]:
    """For each word the set of its places, as bits."""
    places: dict[str, int] = {}
    for place, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << place
    return places


def _common(places: dict[str, int], length: int, other: list[str]) -> int:
    """The length of the longest common subsequence, a column of its table at a time as the bits of one number.

    Hyyrö, "Bit-Parallel LCS-length Computation Revisited", AWOCA 2004: a zero is where the column steps up.
    """
    full = column = (1 << length) - 1
    for word in other:
        matches = column & places.get(word, 0)
        column = ((column + matches) | (column - matches)) & full
    return length - column.bit_count()
