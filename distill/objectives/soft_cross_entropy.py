"""Cross-entropy with the teacher's posteriors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from distill.records import Reveals, TransferSet


class SoftCrossEntropy:
    """−Σ_k t_k log q_k: the usual extraction loss. Its gradient is that of KL(t ‖ q), its least value the entropy of t.

    Paper: Orekondy, Schiele and Fritz, "Knockoff Nets: Stealing Functionality of Black-Box Models", CVPR 2019.

    The targets are those that a recovery set, or the answers as they were returned; a one-hot target (a label-only
    API) makes this the ordinary cross-entropy.
    """

    requires = Reveals.LABEL

    def prepare(self, transfer_set: TransferSet) -> dict[str, torch.Tensor]:
        """``posteriors``: (n, classes) float32."""
        targets = transfer_set.posteriors if transfer_set.targets is None else transfer_set.targets
        return {"posteriors": torch.tensor(targets)}

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Summed over rows, in nats. `output`: (n, classes) logits."""
        return F.cross_entropy(output, targets["posteriors"], reduction="sum")

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["posteriors"])
