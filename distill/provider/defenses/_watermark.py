"""What the watermarks of text start from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import torch

from distill.errors import DistillError
from distill.provider.defenses._language import Unchanged
from distill.watermarking import first_of, in_chunks, last_windows, marks, repeated, seeds

WORDS = 1 << 17  # that are marked at once: they stay in the processor's cache


class Marked(Unchanged):
    """A watermark whose tokens are marked by a keyed hash (`distill.watermarking`).

    Args:
        width: How many tokens before a token decide how it is marked.
        scheme: How they do (`distill.watermarking.seeds`).
        key: The secret.
    """

    def __init__(self, width: int, scheme: str, key: int) -> None:
        if width < 1:
            raise DistillError(f"must be at least 1, not {width}", "defense.width")
        self.width, self.scheme, self.key = width, scheme, key
        seeds(np.zeros((0, width), np.int64), key, scheme)  # raises where the scheme is unknown

    def marks(self, windows: np.ndarray, tokens: np.ndarray, key: int | None = None) -> np.ndarray:
        """(n,) int64: all that `evidence` looks at."""
        key = self.key if key is None else key
        return in_chunks(
            lambda some, these: marks(seeds(some, key, self.scheme), these, key, self.scheme), windows, tokens, np.int64
        )

    def countable(self, windows: np.ndarray, tokens: np.ndarray, key: int | None = None) -> np.ndarray:
        return first_of(self.marks(windows, tokens, key))

    def evidence(self, windows: np.ndarray, tokens: np.ndarray, key: int | None = None) -> np.ndarray:
        key = self.key if key is None else key
        return in_chunks(
            lambda some, these: self.shown(marks(seeds(some, key, self.scheme), these, key, self.scheme)),
            windows,
            tokens,
            np.float64,
        )

    @abstractmethod
    def shown(self, marks: np.ndarray) -> np.ndarray:
        """(n,) the evidence of tokens with these marks."""

    @abstractmethod
    def log10_p_value(self, evidence: np.ndarray) -> float:
        """The logarithm of `p_value` to base 10, right where that is too small for a float64."""

    def p_value(self, evidence: np.ndarray) -> float:
        return 10 ** self.log10_p_value(evidence)

    def _rows(self, tokens: list[list[int]], fresh: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(m,) the rows that have a whole window (with `fresh`, one that did not occur before), (m, 1) their seeds."""
        rows, windows = last_windows(tokens, self.width)
        if fresh:
            first = np.array([not repeated(tokens[row], self.width) for row in rows], bool)
            rows, windows = rows[first], windows[first]
        return torch.from_numpy(rows), torch.from_numpy(seeds(windows, self.key, self.scheme))[:, None]

    def _marks(self, seeds: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return marks(seeds.to(tokens.device), tokens, self.key, self.scheme)

    def _over_vocabulary(
        self, seeds: torch.Tensor, logits: torch.Tensor, show: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """(m, vocabulary) what `show` makes of the marks of all tokens of the logits after each seed."""
        tokens = torch.arange(logits.shape[1], device=logits.device)
        parts = seeds.split(max(1, WORDS // len(tokens)))
        return torch.cat([show(self._marks(some, tokens)) for some in parts])
