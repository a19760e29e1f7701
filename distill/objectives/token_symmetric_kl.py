"""Symmetric Kullback-Leibler divergence at each token."""

from __future__ import annotations

from distill.objectives._divergences import symmetric_kl
from distill.objectives._token_level import TokenLevel


class TokenSymmetricKL(TokenLevel):
    """(1 − s) KL(p ‖ q) + s KL(q ‖ p) at each position; with s = ½, half of Jeffreys' divergence.

    Paper: Jeffreys, "An Invariant Form for the Prior Probability in Estimation Problems", Proceedings of the Royal
    Society A, 1946.

    A top-k signal's tail is one outcome: from a teacher that is zero outside of its list, KL(q ‖ p) is infinite.

    Args:
        reverse_share: s in [0, 1].
        temperature: T > 0, of teacher and student alike.
        t_squared: Multiply by T².
        label_weight: Share of the cross-entropy with the teacher's tokens.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        reverse_share: float = 0.5,
        temperature: float = 1.0,
        t_squared: bool = False,
        label_weight: float = 0.0,
    ) -> None:
        if not 0 <= reverse_share <= 1:
            raise ValueError(f"reverse_share lies between 0 and 1, not {reverse_share}")
        super().__init__(symmetric_kl(reverse_share), temperature, t_squared, label_weight)
        self.reverse_share = reverse_share
