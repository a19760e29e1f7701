"""Skew forward Kullback-Leibler divergence at each token."""

from __future__ import annotations

from distill.objectives._divergences import skew_forward_kl
from distill.objectives._token_level import TokenLevel


class TokenSkewForwardKL(TokenLevel):
    """KL(p ‖ αp + (1 − α)q) at each position: forward KL whose gradient stays bounded where q vanishes.

    Paper: Ko, Kim, Chen and Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024,
    section 3.1.

    Args:
        alpha: Share of the teacher in the mixture, in [0, 1). 0 is forward KL.
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
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha is at least 0 and less than 1, not {alpha}")
        super().__init__(skew_forward_kl(alpha), temperature, t_squared, label_weight, missing)
        self.alpha = alpha
