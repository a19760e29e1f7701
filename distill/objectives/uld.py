"""Distance of sorted probabilities, across vocabularies."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from distill.alignment import Aligned
from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.objectives._divergences import sorted_l1
from distill.objectives._fused import Term, fused, on_labels
from distill.records import Reveals


class ULD:
    """−ln q_y + λ Σ_i |p_(i) − q_(i)| at each position, both distributions sorted: for teachers with another tokenizer.

    Paper: Boizard, El Haddad, Hudelot and Colombo, "Towards Cross-Tokenizer Distillation: the Universal Logit
    Distillation Loss for LLMs", TMLR 2025: the Wasserstein distance when moving mass between any two tokens costs the
    same. The shorter vocabulary is padded with zeros. As in the paper, position t of the teacher meets position t of
    the student, whatever text they stand for; labels are the student's tokens.

    Two sorts of the vocabulary at each position make it about eight times as slow as the other divergences on a CPU.

    Args:
        uld_weight: λ ≥ 0. Its default and that of T are those of the authors' code (llm-recipes).
        temperature: T > 0, of teacher and student alike in the second term.

    Raises:
        ValueError: An option is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.PROBS

    def __init__(self, uld_weight: float = 1.5, temperature: float = 1.0) -> None:
        if not 0 <= uld_weight < float("inf"):
            raise ValueError(f"uld_weight is at least 0, not {uld_weight}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is more than 0, not {temperature}")
        self.uld_weight, self.temperature = uld_weight, temperature

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        """A scalar in nats, summed over the positions. `labels`: (n,) int64.

        Raises:
            DistillError: The signal is not the whole distribution.
        """
        return fused(student, self._distance(signal), on_labels(labels))

    def across(self, student: Head, labels: torch.Tensor, aligned: Aligned) -> torch.Tensor:
        """The same; behind the teacher's last token the labels alone count.

        Raises:
            DistillError: The signal is not the whole distribution.
        """
        paired = aligned.pairs >= 0
        signal = aligned.signal
        if isinstance(signal, Head):
            signal = replace(signal, hidden=signal.hidden[aligned.pairs[paired]])
        distance = self._distance(signal)
        if paired.all():
            return fused(student, distance, on_labels(labels))
        both, rest = (replace(student, hidden=student.hidden[rows]) for rows in (paired, ~paired))
        return fused(both, distance, on_labels(labels[paired])) + fused(rest, on_labels(labels[~paired]))

    def _distance(self, signal: Head | Sparse | None) -> Term:
        if not isinstance(signal, Head):
            raise DistillError(
                "needs the teacher's whole next-token distributions (hidden states and head)", "objective"
            )
        return Term(signal, sorted_l1, self.uld_weight, self.temperature, paired=False)
