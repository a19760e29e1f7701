"""What the objectives on next-token distributions share: their options, and what fits them."""

from __future__ import annotations

from typing import ClassVar

import torch

from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.objectives._divergences import Divergence
from distill.objectives._fused import Term, fused, on_labels
from distill.records import Reveals


class TokenLevel:
    """(1 − w) D(p, q) − w ln q_y over positions: a divergence D of student q from teacher p, and labels y.

    Args:
        divergence: D.
        temperature: T > 0: D sees softmax(z / T) of both sides. Labels are always met at T = 1.
        t_squared: D is multiplied by T², which keeps the size of its gradients when T changes (Hinton et al., 2015).
        label_weight: w in [0, 1].
        missing: What is made of the mass that a top-k signal does not list. "tail": one more outcome, any other token,
            for both sides. "zero": nothing; the listed tokens are taken for the teacher's whole distribution, which
            teaches the student to be too sure of them.

    A top-k signal is tempered as p_v^(1/T), its tail as if its n tokens were equally probable, n (p_tail / n)^(1/T).
    This is exact at T = 1 and for a flat tail; else the tail is an upper bound for T > 1 and a lower one for T < 1.

    Raises:
        ValueError: An option is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.TOP_K

    def __init__(
        self,
        divergence: Divergence,
        temperature: float = 1.0,
        t_squared: bool = False,
        label_weight: float = 0.0,
        missing: str = "tail",
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is more than 0, not {temperature}")
        if not 0 <= label_weight <= 1:
            raise ValueError(f"label_weight lies between 0 and 1, not {label_weight}")
        if missing not in ("tail", "zero"):
            raise ValueError(f"missing is tail or zero, not {missing!r}")
        self.divergence = divergence
        self.temperature = temperature
        self.factor = temperature**2 if t_squared else 1.0
        self.label_weight = label_weight
        self.tail = missing == "tail"

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        """A scalar in nats, summed over the positions. `labels`: (n,) int64.

        Raises:
            DistillError: There is no signal, or one that was sampled for RS-KD.
        """
        if signal is None:
            raise DistillError(
                "needs the teacher's next-token distributions; with text alone use objective=sequence_kd", "objective"
            )
        if isinstance(signal, Sparse) and signal.weights is not None:
            raise DistillError("the signal lists sampled tokens, not the top k; use objective=rs_kd", "objective")
        weight = self.factor * (1 - self.label_weight)
        terms = [Term(signal, self.divergence, weight, self.temperature, self.tail)]
        if self.label_weight:
            terms.append(on_labels(labels, self.label_weight))
        return fused(student, *terms)
