from __future__ import annotations

from distill.language import Completions, Prompts, Sampling
from distill.provider.defenses._language import Unchanged
from distill.randomness import KeyedRandom


class BiasXorLogprobs(Unchanged):
    """A request may state a logit bias, or be told log-probabilities, and not both.

    Paper: Stealing Part of a Production Language Model (Carlini et al., ICML 2024), which names it among mitigations.
    Threat model: a black-box attacker who sees the answers and knows the rule. A bias still moves the text, so logits
    can be bisected from that (`leak=[argmax_logits]`), at many more queries.
    """

    def release(self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom) -> Completions:
        return completions.with_top(0) if sampling.logit_bias else completions
