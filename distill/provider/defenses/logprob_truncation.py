from __future__ import annotations

from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling
from distill.provider.defenses._language import Unchanged
from distill.randomness import KeyedRandom
from distill.records import InterfaceProfile


class LogprobTruncation(Unchanged):
    """Tells the `k` most probable tokens of each position with their log-probabilities; with 0, text alone.

    Paper: Stealing Part of a Production Language Model (Carlini et al., ICML 2024), section 4, which takes five from an
    API of that time. The interface of every provider that tells log-probabilities is one of these.
    Threat model: a black-box attacker who sees the answers; knows `k`.
    The drawn token's own log-probability is told too, whether or not it is among the `k`. Nothing is renormalised: what
    is told are probabilities under the whole vocabulary.

    Args:
        k: How many tokens are told at each position, at least 0.

    Raises:
        DistillError: `k` is negative.
    """

    def __init__(self, k: int = 5) -> None:
        if k < 0:
            raise DistillError(f"must be at least 0, not {k}", "defense.k")
        self.k = k
        self.exposes = InterfaceProfile.parse("top_k", k, logit_bias=True, prompt_logprobs=k > 0)

    def release(self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom) -> Completions:
        return completions.with_top(self.k)
