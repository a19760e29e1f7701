"""Cross-entropy with the teacher's tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from distill.heads import Head, Sparse
from distill.objectives._fused import fused, on_labels
from distill.records import Reveals


class SequenceKD:
    """−ln q_y at each position, y the teacher's token: all that a text-only API allows.

    Paper: Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, section 3.2, whose teacher answers with
    beam search. How the teacher's text was drawn is a matter of the attack here.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        """A scalar in nats, summed over the positions. `labels`: (n,) int64. A signal is not looked at.

        Raises:
            DistillError: A label is not in the student's vocabulary.
        """
        return fused(student, on_labels(labels))
