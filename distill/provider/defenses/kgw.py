from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from distill.decoding import Processor
from distill.errors import DistillError
from distill.language import Sampling
from distill.provider.defenses._watermark import Marked
from distill.watermarking import green, log10_binomial_tail, permuted_list

LISTS = 4096  # of the permutation scheme that are kept: a vocabulary of bytes each


class KGW(Marked):
    """Adds `delta` to the logits of a green list that a keyed hash of the tokens before draws anew for each token.

    Paper: A Watermark for Large Language Models (Kirchenbauer et al., ICML 2023), algorithm 2; schemes as in On the
    Reliability of Watermarks for Large Language Models (Kirchenbauer et al., ICLR 2024). The test is the chance
    P(Bin(T, gamma) >= green tokens) with each mark counted once, as in Three Bricks to Consolidate Watermarks for Large
    Language Models (Fernandez et al., WIFS 2023), in place of z.
    Threat model: text is trained on, or passed on, by somebody who may know all of this but the key.
    A token before which there are fewer than `width`, the prompt's included, is drawn unmarked. With `delta` 0 nothing
    changes. Greedy answers are marked too. Log-probabilities are told with the mark in them.
    Departs from the paper: the green list has a share `gamma` of the vocabulary on average and not exactly, as each
    token is on it by a hash of its own; scheme "permutation" has the paper's lists. As these have one length, green
    tokens after one window spread a little less than the binomial that they are tested against.

    Args:
        gamma: Share of green tokens, between 0 and 1.
        delta: What is added to their logits, at least 0.
        width: How many tokens before a token seed its list.
        scheme: How (`distill.watermarking.seeds`); or "permutation", the paper's own code (of width 1), which costs a
            permutation of the vocabulary for each new token before (`distill.watermarking.permuted_list`).
        key: The secret.
        vocabulary: How many logits the teacher has; for "permutation" only, whose lists depend on it.

    Raises:
        DistillError: An option is out of its range.
    """

    def __init__(
        self,
        gamma: float = 0.25,
        delta: float = 2.0,
        width: int = 1,
        scheme: str = "left",
        key: int = 15485863,
        vocabulary: int | None = None,
    ) -> None:
        permuted = scheme == "permutation"
        super().__init__(width, "left" if permuted else scheme, key)
        if not 0 < gamma < 1:
            raise DistillError(f"must be between 0 and 1, not {gamma}", "defense.gamma")
        if not 0 <= delta < float("inf"):
            raise DistillError(f"must be at least 0 and finite, not {delta}", "defense.delta")
        if permuted and width != 1:
            raise DistillError(f"scheme=permutation looks at 1 token before, not {width}", "defense.width")
        if permuted != (vocabulary is not None):
            raise DistillError("scheme=permutation needs it, and no other does", "defense.vocabulary")
        if permuted and (vocabulary is None or int(gamma * vocabulary) < 1):
            raise DistillError(f"no token of {vocabulary} is green at gamma={gamma}", "defense.vocabulary")
        self.gamma, self.delta, self.vocabulary = gamma, delta, vocabulary
        self._listed = lru_cache(LISTS)(self._permuted)

    def logits_processor(self, sampling: Sampling) -> Processor | None:
        return self._change if self.delta else None

    def _change(self, tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        rows, seeds = self._rows(tokens)
        if self.vocabulary is None:
            listed = self._over_vocabulary(seeds, logits, lambda marks: green(marks, self.gamma))
        elif self.vocabulary == logits.shape[1]:
            lists = [self._listed(tokens[row][-1], self.key) for row in rows.tolist()]
            listed = torch.from_numpy(np.array(lists, bool).reshape(-1, self.vocabulary)).to(logits.device)
        else:
            raise DistillError(f"the teacher has {logits.shape[1]} logits, not {self.vocabulary}", "defense.vocabulary")
        return logits.index_add(0, rows.to(logits.device), listed * torch.tensor(self.delta, dtype=logits.dtype))

    def shown(self, marks: np.ndarray) -> np.ndarray:
        return green(marks, self.gamma)

    def evidence(self, windows: np.ndarray, tokens: np.ndarray, key: int | None = None) -> np.ndarray:
        """(n,) 1 where the token is green."""
        if self.vocabulary is None:
            return super().evidence(windows, tokens, key)
        key = self.key if key is None else key
        scored = np.empty(len(tokens))
        order = np.argsort(windows[:, 0])
        before, starts = np.unique(windows[order, 0], return_index=True)
        for window, these in zip(before.tolist(), np.split(order, starts[1:]), strict=False):
            scored[these] = self._listed(window, key)[tokens[these]]
        return scored

    def log10_p_value(self, evidence: np.ndarray) -> float:
        share = self.gamma if self.vocabulary is None else int(self.gamma * self.vocabulary) / self.vocabulary
        return log10_binomial_tail(int(evidence.sum()), len(evidence), share)

    def _permuted(self, window: int, key: int) -> np.ndarray:
        return permuted_list(window, key, self.gamma, self.vocabulary or 0)
