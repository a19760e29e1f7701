from __future__ import annotations

import math
from dataclasses import replace

from distill.errors import DistillError
from distill.language import Sampling
from distill.provider.defenses._language import Unchanged


class SamplingFloors(Unchanged):
    """Draws every answer with at least this temperature and at least this much of the distribution.

    Paper: none; APIs of models that reason in writing fix both at 1, which is the default.
    Threat model: a black-box attacker who chooses how answers are drawn. A request for the most probable token each
    time is drawn at the floor too, so arg-max queries (bisection through logit bias) and the cleanest traces are gone;
    repeats with a majority vote come back to them at a price. Log-probabilities are those of the logits, as ever.

    Args:
        temperature: The least, at least 0.
        top_p: The least, more than 0 and at most 1.

    Raises:
        DistillError: A floor is out of its range.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0) -> None:
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise DistillError(f"must be at least 0, not {temperature}", "defense.temperature")
        if not 0 < top_p <= 1:
            raise DistillError(f"must be more than 0 and at most 1, not {top_p}", "defense.top_p")
        self.temperature, self.top_p = temperature, top_p

    def sampling(self, asked: Sampling) -> Sampling:
        return replace(asked, temperature=max(asked.temperature, self.temperature), top_p=max(asked.top_p, self.top_p))
