"""Reverse Kullback-Leibler divergence at each token."""

from __future__ import annotations

from distill.objectives._divergences import reverse_kl
from distill.objectives._token_level import TokenLevel


class TokenReverseKL(TokenLevel):
    """Σ_v q_v ln(q_v / p_v) at each position: the student is to avoid what the teacher finds improbable.

    Paper: Gu, Dong, Wei and Huang, "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024: the exact
    inner sum of the reverse divergence at each token (its single-step part), on whatever text is given.

    A top-k signal's tail is one outcome: from a teacher that is zero outside of its list, the divergence is infinite.

    Args:
        temperature: T > 0, of teacher and student alike.
        t_squared: Multiply by T².
        label_weight: Share of the cross-entropy with the teacher's tokens.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        t_squared: bool = False,
        label_weight: float = 0.0,
    ) -> None:
        super().__init__(reverse_kl, temperature, t_squared, label_weight)
