from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill.errors import DistillError
from distill.language import SyntheticSet


class MajorityVote:
    """Of the answers to one prompt those are kept whose conclusion most of them share.

    Paper: Self-Consistency Improves Chain of Thought Reasoning in Language Models, Wang et al., ICLR 2023. Works with
    several samples of each prompt (of one sample, that one); of conclusions with equally many votes the first wins.

    Args:
        separator: The conclusion is what follows the last of these, such as "####" or "."; where there is none the
            answer has no vote. Null: the conclusion is the whole answer. White space around it does not count.
        min_share: A prompt whose winner has fewer than this share of its answers is dropped altogether.

    Raises:
        DistillError: The share is out of range, or the separator is empty.
    """

    knows: ClassVar[str] = "nothing"

    def __init__(self, separator: str | None = None, min_share: float = 0.0) -> None:
        if separator == "":
            raise DistillError("separator must not be empty; null takes the whole answer")
        if not 0 <= min_share <= 1:
            raise DistillError(f"min_share must be between 0 and 1, not {min_share}")
        self.separator, self.min_share = separator, min_share

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """What is left, with counts of `no_conclusion`, `minority` and `no_majority`."""
        keys = synthetic.prompts.keys.tolist()
        pairs = [(key, self._conclusion(text)) for key, text in zip(keys, synthetic.completions.column, strict=True)]
        asked = Counter(keys)
        votes: defaultdict[bytes, Counter[str]] = defaultdict(Counter)
        for key, conclusion in pairs:
            if conclusion is not None:
                votes[key][conclusion] += 1
        winners = {key: counter.most_common(1)[0] for key, counter in votes.items()}  # of equals the first counted
        rules = {
            "no_conclusion": [conclusion is not None for _, conclusion in pairs],
            "minority": [key in winners and winners[key][0] == conclusion for key, conclusion in pairs],
            "no_majority": [key in winners and winners[key][1] >= self.min_share * asked[key] for key in keys],
        }
        left = np.ones(len(synthetic), dtype=bool)
        for name, rule in rules.items():
            mask = np.array(rule, dtype=bool)
            synthetic = synthetic.keep(mask[left], name)
            left &= mask
        return synthetic

    def _conclusion(self, answer: str) -> str | None:
        if self.separator is None:
            return answer.strip()
        _, found, conclusion = answer.rpartition(self.separator)
        return conclusion.strip() if found else None
