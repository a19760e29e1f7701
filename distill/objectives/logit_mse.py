"""Squared error of logits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from distill.records import Reveals, TransferSet


class LogitMSE:
    """½ Σ_k (z_k − v_k)²: regression on the teacher's logits v.

    Paper: Ba and Caruana, "Do Deep Nets Really Need to be Deep?", NIPS 2014, equation 2.

    Departs from the paper: both sides are centred (their mean over the classes is taken away), because posteriors say
    nothing about a constant in the logits. Where the API reveals posteriors only, or a recovery changed them, the
    logits are recovered as v_k = log p_k − mean_j log p_j, with p clipped from below at `floor`: a zero in an answer
    becomes log(floor), so the choice of `floor` matters for rounded or sparse answers.

    Args:
        floor: Smallest posterior that is told apart from zero, in (0, 1).

    Raises:
        ValueError: The floor is out of its range.
    """

    requires = Reveals.PROBS

    def __init__(self, floor: float = 1e-6) -> None:
        if not 0 < floor < 1:
            raise ValueError(f"floor lies between 0 and 1, not {floor}")
        self.floor = floor

    def prepare(self, transfer_set: TransferSet) -> dict[str, torch.Tensor]:
        """``centred``: (n, classes) float32."""
        posteriors, targets, logits = transfer_set.posteriors, transfer_set.targets, transfer_set.logits
        if targets is None:
            targets = posteriors
        if logits is None or not np.array_equal(targets, posteriors):
            logits = np.log(np.clip(targets.astype(np.float64), self.floor, None))
        centred = logits - logits.mean(axis=1, keepdims=True)
        return {"centred": torch.tensor(centred, dtype=torch.float32)}

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Summed over rows and classes. `output`: (n, classes) logits."""
        centred = output - output.mean(dim=1, keepdim=True)
        return 0.5 * (centred - targets["centred"]).square().sum()

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["centred"])
