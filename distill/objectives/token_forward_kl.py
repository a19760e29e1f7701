"""Forward Kullback-Leibler divergence at each token."""

from __future__ import annotations

from distill.objectives._divergences import forward_kl
from distill.objectives._token_level import TokenLevel


class TokenForwardKL(TokenLevel):
    """Σ_v p_v ln(p_v / q_v) at each position: word-level knowledge distillation.

    Paper: Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, section 3.1; temperature and T²: Hinton,
    Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, 2015. Their cross-entropy
    Σ p ln q differs from this by the teacher's entropy, which has no gradient.

    Args:
        temperature: T > 0, of teacher and student alike.
        t_squared: Multiply by T².
        label_weight: Share of the cross-entropy with the teacher's tokens.
        missing: What a top-k signal does not list is "tail" (one outcome) or "zero" (the rest is renormalised).

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        t_squared: bool = False,
        label_weight: float = 0.0,
        missing: str = "tail",
    ) -> None:
        super().__init__(forward_kl, temperature, t_squared, label_weight, missing)
