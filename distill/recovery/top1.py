from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from distill.records import TransferSet, one_hot


class Top1:
    """Only the label of each answer is believed; it undoes every perturbation that keeps the arg-max.

    Paper: Prediction Poisoning: Towards Defenses Against DNN Model Stealing Attacks, Orekondy et al., ICLR 2020
    (the "argmax" attacker of sec. 5.3).
    """

    knows: ClassVar[str] = "nothing"

    def targets(self, transfer_set: TransferSet, knowledge: Mapping[str, Any]) -> TransferSet:
        """`targets` = one-hot of the first largest entry, (n, classes); logits are dropped."""
        labels = transfer_set.posteriors.argmax(axis=1)
        return replace(transfer_set, targets=one_hot(labels, transfer_set.classes), logits=None)
