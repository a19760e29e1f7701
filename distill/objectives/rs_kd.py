"""Forward Kullback-Leibler divergence from sampled tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.objectives._divergences import forward_kl
from distill.objectives._fused import Term, fused, on_labels
from distill.records import Reveals


class RSKD:
    """Σ_v w_v ln(p_v / q_v) at each position, w an unbiased estimate of p from few tokens: random sampling KD.

    Paper: Anshumann, Zaidi, Kedia, Ahn, Kwon, Lee, Lee and Lee, "Sparse Logit Sampling: Accelerating Knowledge
    Distillation in LLMs", ACL 2025, section 4. Loss and gradient (q − w) are those of forward KL in expectation where
    w is, which top-k signals can't offer; the loss of one draw may be negative.

    Tokens are drawn at the teacher's temperature, so there is none here.

    Args:
        label_weight: Share of the cross-entropy with the teacher's tokens.

    Raises:
        ValueError: The weight is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.PROBS

    def __init__(self, label_weight: float = 0.0) -> None:
        if not 0 <= label_weight <= 1:
            raise ValueError(f"label_weight lies between 0 and 1, not {label_weight}")
        self.label_weight = label_weight

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        """A scalar in nats, summed over the positions. `labels`: (n,) int64.

        Raises:
            DistillError: The signal was not sampled.
        """
        if not isinstance(signal, Sparse) or signal.weights is None:
            raise DistillError(
                "needs a signal of sampled tokens with their weights; store one with signal=rs_kd", "objective"
            )
        terms = [Term(signal, forward_kl, 1 - self.label_weight)]
        if self.label_weight:
            terms.append(on_labels(labels, self.label_weight))
        return fused(student, *terms)
