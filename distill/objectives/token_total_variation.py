"""Total variation distance at each token."""

from __future__ import annotations

from distill.objectives._divergences import total_variation
from distill.objectives._token_level import TokenLevel


class TokenTotalVariation(TokenLevel):
    """½ Σ_v |p_v − q_v| at each position, in [0, 1]: how often the two can not be made to draw the same token.

    Paper: Wen, Li, Du and Mou, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023,
    section 2.3.

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
        super().__init__(total_variation, temperature, t_squared, label_weight, missing)
