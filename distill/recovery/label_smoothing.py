from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from distill.contracts import Knowledge
from distill.errors import DistillError
from distill.records import TransferSet, one_hot


class LabelSmoothing:
    """Back off from the returned scores to a smoothed label: the top-1 class gets ``1 - alpha``, the others the rest.

    Paper: Rethinking the Inception Architecture for Computer Vision, Szegedy et al., CVPR 2016, section 7, for the
    targets. Like `Top1` it believes an answer's label only, but its student is not driven to certainty, which the
    teacher does not have either. Departs from the paper, which spreads its share over all classes, in spreading
    `alpha` over the others only: ``alpha / (K - 1)`` each.

    Args:
        alpha: What the other classes get together, between 0 and 1; the label keeps the most where it is below
            ``1 - 1/K``.
    """

    knows: ClassVar[str] = "nothing"

    def __init__(self, alpha: float = 0.1) -> None:
        if not 0 < alpha < 1:
            raise DistillError(f"alpha lies between 0 and 1, not {alpha}")
        self.alpha = alpha

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """`targets` = the smoothed first largest entry, (n, classes); logits are dropped."""
        label = one_hot(transfer_set.posteriors.argmax(axis=1), transfer_set.classes)
        others = np.float32(self.alpha / (transfer_set.classes - 1))
        return replace(transfer_set, targets=np.where(label == 1, np.float32(1 - self.alpha), others), logits=None)
