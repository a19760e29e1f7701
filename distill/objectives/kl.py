"""Kullback-Leibler divergence at a temperature."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from distill.records import Reveals, TransferSet


class KL:
    """T² · KL(t_T ‖ q_T): knowledge distillation with softened targets.

    Paper: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, 2015. The factor
    T² keeps the size of the gradients when T changes (section 2). The paper adds a term for true labels; an attacker
    has none, so there is none here.

    Only posteriors need to be known: t_T = t^(1/T) / Σ_k t_k^(1/T) is what softmax(z / T) would be of the teacher's
    logits z, because t is proportional to exp(z). A target that is zero stays zero and adds nothing.

    Args:
        temperature: T > 0, for the targets and for the student alike.

    Raises:
        ValueError: The temperature is not positive.
    """

    requires = Reveals.PROBS

    def __init__(self, temperature: float = 4.0) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is more than 0, not {temperature}")
        self.temperature = temperature

    def prepare(self, transfer_set: TransferSet) -> dict[str, torch.Tensor]:
        """``tempered``: (n, classes) float32, the targets at this temperature."""
        targets = transfer_set.posteriors if transfer_set.targets is None else transfer_set.targets
        # The largest entry becomes one, so that a low temperature does not underflow a whole row.
        powers = torch.tensor(targets, dtype=torch.float64)
        powers = (powers / powers.amax(dim=1, keepdim=True)) ** (1 / self.temperature)
        return {"tempered": (powers / powers.sum(dim=1, keepdim=True)).float()}

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Summed over rows, in nats. `output`: (n, classes) logits, not yet tempered."""
        log_q = F.log_softmax(output / self.temperature, dim=1)
        return self.temperature**2 * F.kl_div(log_q, targets["tempered"], reduction="sum")

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["tempered"])
