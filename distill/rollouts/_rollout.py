"""What rollouts are where they don't say otherwise: without memory, without a look at validation, without credit."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from distill.errors import DistillError
from distill.heads import Head
from distill.language import Sampling
from distill.records import Reveals


class Plain:
    """A rollout that writes, remembers nothing and adds nothing to the loss."""

    requires: ClassVar[Reveals] = Reveals.TOP_K
    writes: ClassVar[bool] = True
    needs_validation: ClassVar[bool] = False

    def state(self, width: int) -> nn.Module | None:
        """Nothing."""
        return None

    def validated(self, loss: float) -> None:
        """It does not matter."""

    def credit(self, student: Head, teacher: Head, labels: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor | None:
        """Nothing."""
        return None


def sampling_of(max_tokens: int, temperature: float = 1.0, top_p: float = 1.0) -> Sampling:
    """How a student writes. Raises `DistillError` that names the rollout's option."""
    try:
        return Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    except DistillError as error:
        option = (error.key or "").replace("sampling", "rollout")
        raise DistillError(str(error).partition(": ")[2], option) from error
