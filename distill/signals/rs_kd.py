from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.randomness import KeyedRandom, derive
from distill.records import Reveals
from distill.signals import _rows
from distill.signals._distributions import logprobs_of


class RSKD:
    """Tokens drawn from the teacher's distribution: an estimate of it that is right on average, unlike its top k.

    Paper: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (Random Sampling KD),
    ACL 2025, arXiv:2503.16870. `draws` tokens are drawn from u ∝ p^exponent; a token that was drawn c times gets the
    weight c · p / u, divided by the sum of these over the row. With exponent 1 that is c / `draws`, whose expectation
    is p exactly; with another one the division leaves a bias that falls as 1 / `draws`.

    What is decoded has the same tokens, log-probabilities within `step` + 0.006 nats, and weights whose logarithms are
    within |1 - exponent| · `step`: with exponent 1 they are exact.

    Args:
        draws: How many draws a position gets, with replacement. 50 are those of the authors' talk at ACL, where they
            list about 12 tokens; of SmolLM2-135M's distributions they list about 20.
        exponent: 1 draws from the teacher's distribution, 0 from the uniform one.
        step: How finely log-probabilities are told apart, in nats.
        seed: With the key of a position, all that its draws depend on.

    Raises:
        DistillError: A number is out of its range, or the distributions are not of the whole vocabulary.
    """

    requires = Reveals.PROBS

    def __init__(self, draws: int = 50, exponent: float = 1.0, step: float = 0.1, seed: int = 0) -> None:
        if draws < 1:
            raise DistillError(f"must be at least 1, not {draws}", "signal.draws")
        if not 0 <= exponent <= 2:
            raise DistillError(f"must be from 0 to 2, not {exponent}", "signal.exponent")
        if not 1e-4 <= step <= 1:
            raise DistillError(f"must be from 0.0001 to 1, not {step}", "signal.step")
        self.draws, self.exponent, self.step, self.seed = draws, exponent, step, seed
        self.identity: dict[str, Any] = {
            "signal": "rs_kd",
            "draws": draws,
            "exponent": exponent,
            "step": step,
            "seed": seed,
        }

    def fit(self, first: Head | Sparse, vocabulary: int) -> dict[str, np.ndarray]:
        ids, depths, _, repeats = self._drawn(first, np.arange(len(first)).astype("S16"))
        return _rows.fit(ids, depths, repeats, vocabulary)

    def codec(self, shared: dict[str, np.ndarray]) -> _Codec:
        return _Codec(self, _rows.RowCoder(shared, self.draws))

    def _drawn(
        self, distributions: Head | Sparse, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ids and depths (n, draws), the mass of the others (n,) and how often each was drawn (n, draws)."""
        if isinstance(distributions, Sparse):
            raise DistillError("draws from whole distributions; take signal=top_k for lists", "signal")
        rng = KeyedRandom(derive(self.seed, "rs_kd"), keys, np.zeros(len(keys), np.int64))
        uniform = torch.from_numpy(rng.uniform(self.draws, "draws"))
        ids = np.full((len(keys), self.draws), -1, np.int64)
        values = np.full(ids.shape, -np.inf, np.float32)
        repeats = np.zeros(ids.shape, np.int64)
        for rows, logprobs in logprobs_of(distributions):
            powers = (logprobs * self.exponent).exp().where(logprobs > -torch.inf, 0)
            below = powers.cumsum(dim=1, dtype=torch.float64)
            drawn = torch.searchsorted(below, uniform[rows].to(below) * below[:, -1:], right=True)
            drawn = drawn.clamp(max=distributions.vocabulary - 1).sort(dim=1).values
            new = torch.ones_like(drawn, dtype=torch.bool)
            new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
            place = new.cumsum(dim=1) - 1
            often = torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))
            tokens = torch.zeros_like(drawn).scatter_(1, place, drawn)
            value = torch.where(often > 0, logprobs.gather(1, tokens), -torch.inf)
            value, order = value.sort(dim=1, descending=True)
            repeats[rows] = often.gather(1, order).cpu().numpy()
            ids[rows] = np.where(repeats[rows] > 0, tokens.gather(1, order).cpu().numpy(), -1)
            values[rows] = value.cpu().numpy()
        return *_rows.rounded(ids, values, self.step), repeats


class _Codec:
    def __init__(self, signal: RSKD, coder: _rows.RowCoder) -> None:
        self._signal, self._coder = signal, coder

    def encode(self, distributions: Head | Sparse, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._coder.encode(*self._signal._drawn(distributions, keys))

    def decode(self, data: np.ndarray, lengths: np.ndarray) -> Sparse:
        ids, depths, tail, repeats = self._coder.decode(data, lengths)
        logprobs = _rows.restored(ids, depths, tail, self._signal.step)
        assert repeats is not None
        # Relative to the row's largest, so that a low power of a small probability does not overflow.
        relative = np.exp((1 - self._signal.exponent) * -self._signal.step * depths)
        weights = np.where(ids >= 0, repeats * relative, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        return Sparse(torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(weights.astype(np.float32)))
