from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill.errors import DistillError, MissingAsset
from distill.language import SyntheticSet

WORD = re.compile(r"\w+")


class NearDedup:
    """Of examples whose words are nearly the same the first is kept.

    Papers: On the Resemblance and Containment of Documents, Broder, SEQUENCES 1997 (MinHash); Deduplicating Training
    Data Makes Language Models Better, Lee et al., ACL 2022, sec. 4.2 (shingles of 5 words, similarity 0.8). MinHash and
    its index (the package datasketch) propose candidates, and their Jaccard similarity |A ∩ B| / |A ∪ B| of shingle
    sets is then computed exactly, so nothing less similar is dropped; the index may miss a pair.

    Args:
        threshold: Similarity from which an example is dropped.
        shingle_words: Words of a shingle; a shorter text is one shingle.
        permutations: Hash functions of a MinHash.
        answers_only: Compare answers; else prompt and answer together.

    Raises:
        DistillError: A number is out of range.
    """

    knows: ClassVar[str] = "nothing"

    def __init__(
        self, threshold: float = 0.8, shingle_words: int = 5, permutations: int = 128, answers_only: bool = False
    ) -> None:
        if not 0 < threshold <= 1:
            raise DistillError(f"threshold must be above 0 and at most 1, not {threshold}")
        for name, count in (("shingle_words", shingle_words), ("permutations", permutations)):
            if count < 1:
                raise DistillError(f"{name} must be at least 1, not {count}")
        self.threshold, self.shingle_words, self.permutations = threshold, shingle_words, permutations
        self.answers_only = answers_only

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """The first of each, in the order of asking; the others count as `near_dedup`.

        Raises `MissingAsset` without datasketch.
        """
        if importlib.util.find_spec("datasketch") is None:
            raise MissingAsset("near_dedup needs the package datasketch: pip install datasketch", "recovery")
        from datasketch import MinHash, MinHashLSH

        # The index is cut so that a candidate at the threshold is missed rarely; false ones cost a comparison.
        index = MinHashLSH(threshold=self.threshold, num_perm=self.permutations, weights=(0.02, 0.98))
        blank = MinHash(num_perm=self.permutations, seed=1)
        mask = np.ones(len(synthetic), dtype=bool)
        for row in range(len(synthetic)):
            shingles = self._shingles(synthetic, row)
            sketch = blank.copy()
            sketch.update_batch([shingle.encode() for shingle in shingles])
            others = (self._shingles(synthetic, other) for other in index.query(sketch))
            if any(len(shingles & other) >= self.threshold * len(shingles | other) for other in others):
                mask[row] = False
            else:
                index.insert(row, sketch)
        return synthetic.keep(mask, "near_dedup")

    def _shingles(self, synthetic: SyntheticSet, row: int) -> set[str]:
        text = synthetic.completions.column[row]
        if not self.answers_only:
            text = "\n".join([*(message["content"] for message in synthetic.prompts.messages(row)), text])
        words = WORD.findall(text.lower())
        places = range(max(1, len(words) - self.shingle_words + 1))
        return {" ".join(words[place : place + self.shingle_words]) for place in places}
