from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.records import Reveals
from distill.signals import _rows
from distill.signals._distributions import largest


class TopK:
    """The `k` most probable tokens of each position, or the fewest that have the mass `mass`, and the mass of the rest.

    Paper: with `mass`, the set is that of Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020
    (equation 2). How it is coded is this project's own: see `distill.signals._rows`.

    What is decoded lists the same tokens; each log-probability is within `step` + 0.006 nats of what it was (within
    `step` / 2 before all are scaled to the stored mass), and the log-odds of the mass of the others within 0.006.
    Log-probabilities are under the whole vocabulary; where two become equal, which one was larger is lost. Tokens more
    than 65,535 steps below the first are not listed.

    Args:
        k: How many tokens a position lists at most.
        mass: List no more tokens than it takes to have this mass, at most `k`; None for always `k`.
        step: How finely log-probabilities are told apart, in nats.

    Raises:
        DistillError: A number is out of its range (at the first position, `k` more than the vocabulary).
    """

    requires = Reveals.TOP_K

    def __init__(self, k: int = 50, mass: float | None = None, step: float = 0.1) -> None:
        if k < 1:
            raise DistillError(f"must be at least 1, not {k}", "signal.k")
        if mass is not None and not 0 < mass <= 1:
            raise DistillError(f"must be more than 0 and at most 1, not {mass}", "signal.mass")
        if not 1e-4 <= step <= 1:
            raise DistillError(f"must be from 0.0001 to 1, not {step}", "signal.step")
        self.k, self.mass, self.step = k, mass, step
        self.identity: dict[str, Any] = {"signal": "top_k", "k": k, "mass": mass, "step": step}

    def fit(self, first: Head | Sparse, vocabulary: int) -> dict[str, np.ndarray]:
        ids, depths, _ = self._rounded(first)
        return _rows.fit(ids, depths, None, vocabulary)

    def codec(self, shared: dict[str, np.ndarray]) -> _Codec:
        return _Codec(self, _rows.RowCoder(shared, self.k))

    def _rounded(self, distributions: Head | Sparse) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and depths (n, k), and the mass that is not listed (n,)."""
        ids, logprobs = largest(distributions, self.k)
        if self.mass is not None:
            p = np.exp(logprobs, dtype=np.float64)
            enough = np.cumsum(p, axis=1) - p >= self.mass  # what comes before has the mass already
            ids = np.where(enough, -1, ids)
        return _rows.rounded(ids, logprobs, self.step)


class _Codec:
    def __init__(self, signal: TopK, coder: _rows.RowCoder) -> None:
        self._signal, self._coder = signal, coder

    def encode(self, distributions: Head | Sparse, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._coder.encode(*self._signal._rounded(distributions), None)

    def decode(self, data: np.ndarray, lengths: np.ndarray) -> Sparse:
        ids, depths, tail, _ = self._coder.decode(data, lengths)
        return Sparse(torch.from_numpy(ids), torch.from_numpy(_rows.restored(ids, depths, tail, self._signal.step)))
