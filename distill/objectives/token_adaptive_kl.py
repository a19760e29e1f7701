"""Adaptive Kullback-Leibler divergence at each token."""

from __future__ import annotations

from distill.objectives._divergences import adaptive_kl
from distill.objectives._token_level import TokenLevel


class TokenAdaptiveKL(TokenLevel):
    """w KL(p ‖ q) + (1 − w) KL(q ‖ p) at each position, w = the share of Σ_v |p_v − q_v| on the head of p.

    Paper: Wu, Tao, Wang, Yang, Zhao and Wong, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
    Large Language Models", COLING 2025, section 4. The head are the fewest most probable tokens of the teacher with a
    mass of at least μ. w is a constant for the gradient; ½ where p = q.

    A top-k signal's tail is one outcome: from a teacher that is zero outside of its list, KL(q ‖ p) is infinite.

    Args:
        head_mass: μ in (0, 1).
        temperature: T > 0, of teacher and student alike.
        t_squared: Multiply by T².
        label_weight: Share of the cross-entropy with the teacher's tokens.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        head_mass: float = 0.5,
        temperature: float = 1.0,
        t_squared: bool = False,
        label_weight: float = 0.0,
    ) -> None:
        if not 0 < head_mass < 1:
            raise ValueError(f"head_mass lies between 0 and 1, not {head_mass}")
        super().__init__(adaptive_kl(head_mass), temperature, t_squared, label_weight)
        self.head_mass = head_mass
