"""Skew reverse Kullback-Leibler divergence at each token."""

from __future__ import annotations

from distill.objectives._divergences import skew_reverse_kl
from distill.objectives._token_level import TokenLevel


class TokenSkewReverseKL(TokenLevel):
    """KL(q ‖ (1 − α)p + αq) at each position: reverse KL that stays finite where p vanishes.

    Paper: Ko, Kim, Chen and Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024,
    section 3.1. The gradient flows through both places of q.

    Args:
        alpha: Share of the student in the mixture, in (0, 1).
        temperature: T > 0, of teacher and student alike.
        t_squared: Multiply by T².
        label_weight: Share of the cross-entropy with the teacher's tokens.
        missing: What a top-k signal does not list is "tail" (one outcome) or "zero" (the rest is renormalised).

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        temperature: float = 1.0,
        t_squared: bool = False,
        label_weight: float = 0.0,
        missing: str = "tail",
    ) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"alpha lies between 0 and 1 (0 is objective=token_reverse_kl), not {alpha}")
        super().__init__(skew_reverse_kl(alpha), temperature, t_squared, label_weight, missing)
        self.alpha = alpha
