from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch

from distill.contracts import LanguageStudent
from distill.decoding import Guided
from distill.errors import DistillError
from distill.language import Sampling
from distill.provider.defenses._proxy import ProxyDefense, as_wide_as
from distill.training import Recipe
from distill.watermarking import first_of, green, in_chunks, last_windows, log10_binomial_tail, marks, seeds

SCHEME = "ordered"  # the window as it stands


class AntidistillationFingerprint(ProxyDefense):
    """A watermark that is put where a student would take it over: a green list, weighted by what a proxy would say.

    Paper: Antidistillation Fingerprinting (Xu et al., ICML 2026, arXiv 2602.03812): ``z'_v = z_v + lambda q_v (1[v in
    G] - q(G))`` with the logits z of the teacher, the probabilities q of the proxy and the green list G, which a keyed
    hash of the last two tokens draws. What is added is the gradient of the proxy's green mass q(G) in its logits.
    Threat model: an attacker who trains on the text and does not know the key. The provider tests the suspect's text,
    or its green mass, against the key.
    (n, vocabulary) logits in and out. A token costs one forward pass of the proxy; with lambda = 0 nothing is done.

    Departs from the authors' code in that the hash is the one of `distill.watermarking`, and in that the end of an
    answer is marked like any token, where that code does nothing while it is the teacher's most probable one. What the
    paper leaves unclear: a text of fewer than two tokens has no list here; lambda is added before the division by
    the temperature, as in the code. Tokens that the proxy's vocabulary lacks are not marked.

    Args:
        proxy: The proxy: a student.
        recipe: How it is trained.
        lambda_: Strength. The authors' runs take 4 to 1,024.
        gamma: Share of the tokens that are green, more than 0 and less than 1.
        key: The secret.
        answers: How many answers of the teacher the proxy is trained on; 0 for a student that comes trained, which is
            the paper's.
        max_tokens: Of such an answer.
        max_length: Positions of a packed row of them.

    Raises:
        DistillError: A number is out of its range, the teacher is not decoded here, or its tokens are not the proxy's.
    """

    width: ClassVar[int] = 2

    def __init__(
        self,
        proxy: LanguageStudent,
        recipe: Recipe,
        lambda_: float = 64.0,
        gamma: float = 0.5,
        key: int = 15485863,
        answers: int = 2000,
        max_tokens: int = 256,
        max_length: int = 512,
    ) -> None:
        super().__init__(proxy, recipe, answers, max_tokens, max_length)
        if not 0 <= lambda_ < math.inf:
            raise DistillError(f"must be at least 0, not {lambda_}", "defense.lambda_")
        if not 0 < gamma < 1:
            raise DistillError(f"must be more than 0 and less than 1, not {gamma}", "defense.gamma")
        self.lambda_, self.gamma, self.key = lambda_, gamma, key

    def logits_processor(self, sampling: Sampling) -> Guided | None:
        return Guided(self.networks, self._mark) if self.lambda_ else None

    def _mark(self, tokens: list[list[int]], logits: torch.Tensor, told: list[torch.Tensor]) -> torch.Tensor:
        rows, windows = last_windows(tokens, self.width)
        if not len(rows):
            return logits
        some, device = torch.from_numpy(rows).to(logits.device), logits.device
        seed = seeds(torch.from_numpy(windows).to(device), self.key, SCHEME)
        vocabulary = torch.arange(logits.shape[1], device=device)
        listed = green(marks(seed[:, None], vocabulary, self.key, SCHEME), self.gamma)
        probs = as_wide_as(logits, told[0].softmax(dim=-1), 0.0)[some]
        mass = (probs * listed).sum(dim=-1, keepdim=True)
        return logits.index_add(0, some, self.lambda_ * probs * (listed.to(probs.dtype) - mass))

    def marks(self, windows: np.ndarray, tokens: np.ndarray, key: int | None = None) -> np.ndarray:
        """(n,) int64: all that `evidence` looks at. Arguments as of `evidence`."""
        key = self.key if key is None else key
        return in_chunks(
            lambda some, these: marks(seeds(some, key, SCHEME), these, key, SCHEME), windows, tokens, np.int64
        )

    def evidence(self, windows: np.ndarray, tokens: np.ndarray, key: int | None = None) -> np.ndarray:
        """(n,) float64: 1 where a token is green."""
        return green(self.marks(windows, tokens, key), self.gamma).astype(np.float64)

    def countable(self, windows: np.ndarray, tokens: np.ndarray, key: int | None = None) -> np.ndarray:
        """(n,) bool: where a window and a token occur together for the first time."""
        return first_of(self.marks(windows, tokens, key))

    def p_value(self, evidence: np.ndarray) -> float:
        """Of a binomial distribution."""
        return 10.0 ** self.log10_p_value(evidence)

    def log10_p_value(self, evidence: np.ndarray) -> float:
        return log10_binomial_tail(round(float(evidence.sum())), len(evidence), self.gamma)
