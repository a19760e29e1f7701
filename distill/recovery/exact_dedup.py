from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill.errors import DistillError, nearest
from distill.language import SyntheticSet
from distill.records import content_keys

OF = ("pair", "prompt", "answer")


class ExactDedup:
    """Of equal examples the first is kept.

    Paper: Deduplicating Training Data Makes Language Models Better, Lee et al., ACL 2022 (sec. 4.1, on whole examples).

    Args:
        of: What has to be equal: the pair of prompt and answer, the prompt or the answer.

    Raises:
        DistillError: There is no such part.
    """

    knows: ClassVar[str] = "nothing"

    def __init__(self, of: str = "pair") -> None:
        if of not in OF:
            raise DistillError(f"of has no '{of}'.{nearest(of, OF)}")
        self.of = of

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """The first of each, in the order of asking; the others count as `exact_dedup`."""
        columns = {"prompt": [synthetic.prompts.keys], "answer": [content_keys(synthetic.completions.column)]}
        columns["pair"] = columns["prompt"] + columns["answer"]
        keys = np.stack(columns[self.of], axis=1)
        mask = np.zeros(len(synthetic), dtype=bool)
        mask[np.unique(keys, axis=0, return_index=True)[1]] = True
        return synthetic.keep(mask, "exact_dedup")
