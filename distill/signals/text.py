from __future__ import annotations

from typing import Any

import numpy as np

from distill.heads import Head, Sparse
from distill.records import Reveals


class Text:
    """No signal but the tokens themselves: nothing is stored, and training falls back on the text.

    Paper: Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016 (section 3.2).
    """

    requires = Reveals.LABEL

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {"signal": "text"}

    def fit(self, first: Head | Sparse, vocabulary: int) -> dict[str, np.ndarray]:
        return {}

    def codec(self, shared: dict[str, np.ndarray]) -> _Nothing:
        return _Nothing()


class _Nothing:
    def encode(self, distributions: Head | Sparse, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.empty(0, np.uint8), np.zeros(len(distributions), np.int64)

    def decode(self, data: np.ndarray, lengths: np.ndarray) -> None:
        return None
