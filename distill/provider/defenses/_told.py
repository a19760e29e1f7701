"""The log-probabilities that come with answers, for defenses that change them and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from distill.language import Completions


@dataclass(frozen=True)
class Told:
    """What is told at t positions: the k most probable tokens, and in a last column the drawn one if it is another.

    Args:
        ids: (t, k + 1) int32.
        logprobs: (t, k + 1) float64; -inf where nothing is told.
        drawn: (t,) the column of the drawn token.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    drawn: np.ndarray

    @classmethod
    def of(cls, given: Completions) -> Told | None:
        """None where answers come as text alone."""
        tokens, own, ids, logprobs = given.token_ids, given.logprobs, given.top_ids, given.top_logprobs
        if tokens is None or own is None or ids is None or logprobs is None:
            return None
        # Where an API doesn't number its tokens, the drawn one is known by its log-probability.
        here = (ids == tokens[:, None]) & ((tokens >= 0)[:, None] | (logprobs == own[:, None]))
        alone = ~here.any(axis=1)
        drawn = np.where(alone, ids.shape[1], here.argmax(axis=1) if ids.shape[1] else 0)
        return cls(
            np.column_stack([ids, tokens]),
            np.column_stack([logprobs, np.where(alone, own, -np.inf)]).astype(np.float64),
            drawn,
        )

    def put_into(self, given: Completions, logprobs: np.ndarray) -> Completions:
        """The answers that these are of, with changed log-probabilities, of which the k largest are listed.

        A token that has become impossible is not listed. No more than one token in a row of `logprobs` is new.
        """
        order = np.argsort(-logprobs, axis=1, kind="stable")[:, : given.top_k]
        listed = np.take_along_axis(logprobs, order, axis=1).astype(np.float32)
        ids = np.where(listed > -np.inf, np.take_along_axis(self.ids, order, axis=1), np.int32(-1))
        own = logprobs[np.arange(len(logprobs)), self.drawn].astype(np.float32)
        return replace(given, logprobs=own, top_ids=ids, top_logprobs=listed)


def mass(logprobs: np.ndarray) -> np.ndarray:
    """(t, 1): the logarithm of what all that is told at a position sums to; -inf for nothing."""
    return np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
