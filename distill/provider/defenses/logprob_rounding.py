from __future__ import annotations

import numpy as np

from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling
from distill.provider.defenses._language import Unchanged
from distill.provider.defenses._told import Told
from distill.randomness import KeyedRandom

TOLERANCE = 1e-9  # by which sums of decimals may be more than 1 in binary


class LogprobRounding(Unchanged):
    """Rounds the log-probabilities that come with a text, or the probabilities themselves, to a number of decimals.

    Paper: Stealing Machine Learning Models via Prediction APIs (Tramèr et al., USENIX Security 2016), section 7, which
    rounds the posteriors of classifiers.
    Threat model: a black-box attacker who sees the answers; knows the options.
    Each is rounded to the nearest (halves to the even digit). Where what is told at a position would then sum to more
    than 1, those that were rounded up are rounded down, from the one that rose furthest on until it fits: so it stays
    a part of a distribution. A token whose probability rounds to 0 is not told; if it was drawn, its log-probability is
    -inf. Nothing is renormalised, so every number has the decimals that it says.

    Args:
        decimals: How many decimals are left, at least 0 (for probabilities 1).
        of_probabilities: Rounds probabilities rather than their logarithms: what is rare is lost first.

    Raises:
        DistillError: There are fewer decimals than that.
    """

    def __init__(self, decimals: int = 1, of_probabilities: bool = False) -> None:
        if decimals < (least := int(of_probabilities)):
            raise DistillError(f"must be at least {least}, not {decimals}", "defense.decimals")
        self.decimals, self.of_probabilities = decimals, of_probabilities

    def release(self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom) -> Completions:
        told = Told.of(completions)
        return completions if told is None else told.put_into(completions, self._rounded(told.logprobs))

    def _rounded(self, logprobs: np.ndarray) -> np.ndarray:
        units = 10.0**self.decimals
        exact = units * (np.exp(logprobs) if self.of_probabilities else logprobs)
        nearest, below = np.round(exact), np.floor(exact)
        up = nearest > below
        risen = np.where(up, nearest - np.where(up, exact, 0.0), 0.0)
        # Of two in one interval the smaller was rounded up further; of equals the later is lowered. The order stays.
        order = np.lexsort((-np.broadcast_to(np.arange(up.shape[1]), up.shape), -risen), axis=1)
        high, low = (self._probability(counts / units) for counts in (nearest, below))
        saved = np.take_along_axis(high - low, order, axis=1)
        enough = np.cumsum(saved, axis=1) - saved >= high.sum(axis=1, keepdims=True) - 1 - TOLERANCE
        lowered = np.zeros_like(up)
        np.put_along_axis(lowered, order, ~enough, axis=1)
        counts = np.where(lowered & up, below, nearest) / units
        with np.errstate(divide="ignore"):  # the logarithm of 0
            return np.log(counts) if self.of_probabilities else np.minimum(counts, 0.0)

    def _probability(self, rounded: np.ndarray) -> np.ndarray:
        return rounded if self.of_probabilities else np.exp(rounded)
