from __future__ import annotations

import math
from dataclasses import replace

from distill.errors import DistillError
from distill.language import Sampling
from distill.provider.defenses._language import Unchanged


class BiasLimit(Unchanged):
    """A logit bias counts up to a bound, either way.

    Paper: this project's own, after the mitigations of Stealing Part of a Production Language Model (Carlini et al.,
    ICML 2024).
    Threat model: a black-box attacker who sees the answers and knows the bound. Tokens within the bound of the most
    probable ones can still be lifted among them.

    Args:
        most: The largest bias, in nats.

    Raises:
        DistillError: It is negative.
    """

    def __init__(self, most: float = 2.0) -> None:
        if not (most >= 0 and math.isfinite(most)):
            raise DistillError(f"must be at least 0, not {most}", "defense.most")
        self.most = most

    def sampling(self, asked: Sampling) -> Sampling:
        bounded = [(token, max(-self.most, min(self.most, bias))) for token, bias in asked.logit_bias]
        return replace(asked, logit_bias=tuple(bounded))
