"""Generalised Jensen-Shannon divergence at each token."""

from __future__ import annotations

from distill.objectives._divergences import forward_kl, generalised_jsd, reverse_kl
from distill.objectives._token_level import TokenLevel


class TokenJSD(TokenLevel):
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q at each position: generalised Jensen-Shannon divergence.

    Paper: Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist and Bachem, "On-Policy Distillation of Language Models:
    Learning from Self-Generated Mistakes", ICLR 2024, equation 1.

    Args:
        beta: β in [0, 1]. 0 is forward KL and 1 reverse KL.
        normalised: Divide by β(1 − β), which makes 0 and 1 the limits: without it, JSD_β vanishes towards them.
        temperature: T > 0, of teacher and student alike.
        t_squared: Multiply by T².
        label_weight: Share of the cross-entropy with the teacher's tokens.
        missing: What a top-k signal does not list is "tail" (one outcome) or "zero" (the rest is renormalised).

    Raises:
        ValueError: An option is out of its range, or β = 1 is asked for with missing=zero, where it is infinite.
    """

    def __init__(
        self,
        beta: float = 0.5,
        normalised: bool = False,
        temperature: float = 1.0,
        t_squared: bool = False,
        label_weight: float = 0.0,
        missing: str = "tail",
    ) -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"beta lies between 0 and 1, not {beta}")
        if beta == 1 and missing == "zero":
            raise ValueError("missing is tail where beta is 1: reverse KL from a teacher with zeros is infinite")
        divergence = forward_kl if beta == 0 else reverse_kl if beta == 1 else generalised_jsd(beta, normalised)
        super().__init__(divergence, temperature, t_squared, label_weight, missing)
        self.beta, self.normalised = beta, normalised
