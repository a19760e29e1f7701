"""Cross-entropy with the teacher's label."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from distill.records import Reveals, TransferSet


class HardCrossEntropy:
    """−log q_y with y the first largest entry of the target: all that a label-only API allows.

    Paper: Correia-Silva, Berriel, Badue, de Souza and Oliveira-Santos, "Copycat CNN: Stealing Knowledge by Persuading
    Confession with Random Non-Labeled Data", IJCNN 2018.
    """

    requires = Reveals.LABEL

    def prepare(self, transfer_set: TransferSet) -> dict[str, torch.Tensor]:
        """``labels``: (n,) int64."""
        targets = transfer_set.posteriors if transfer_set.targets is None else transfer_set.targets
        return {"labels": torch.tensor(targets.argmax(axis=1))}

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Summed over rows, in nats. `output`: (n, classes) logits."""
        return F.cross_entropy(output, targets["labels"], reduction="sum")

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["labels"])
