from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill.errors import DistillError
from distill.language import SyntheticSet


class LengthFilter:
    """Answers that are too short, too long, or were cut by `max_tokens` are dropped.

    Args:
        min_characters, max_characters: Bounds of an answer without the white space around it; null: no bound.
        keep_cut: Keep answers that did not end by themselves.

    Raises:
        DistillError: No length is between the bounds.
    """

    knows: ClassVar[str] = "nothing"

    def __init__(self, min_characters: int = 1, max_characters: int | None = None, keep_cut: bool = False) -> None:
        if max_characters is not None and max_characters < min_characters:
            raise DistillError(f"max_characters must be at least {min_characters} (min_characters) or null")
        self.min_characters, self.max_characters, self.keep_cut = min_characters, max_characters, keep_cut

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """What is left, with counts of `cut`, `too_short` and `too_long`."""
        if not self.keep_cut:
            synthetic = synthetic.keep(np.asarray(synthetic.completions.finish != "length", dtype=bool), "cut")
        synthetic = synthetic.keep(_lengths(synthetic) >= self.min_characters, "too_short")
        if self.max_characters is not None:
            synthetic = synthetic.keep(_lengths(synthetic) <= self.max_characters, "too_long")
        return synthetic


def _lengths(synthetic: SyntheticSet) -> np.ndarray:
    return np.array([len(answer.strip()) for answer in synthetic.completions.column], dtype=np.int64)
