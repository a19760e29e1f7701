"""A multilayer perceptron for images and tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from distill.records import Inputs, InputSpec
from distill.students import _inputs
from distill.training import Features, Standardise


class MLP:
    """Linear layers with ReLU in between, on flattened pixels or on the columns of a table.

    The columns of a table are standardised with the mean and deviation of the rows that the network is trained on: the
    statistics of the victim's data are not known to a student, and those of a batch would differ between processes.

    Args:
        hidden: Width of each hidden layer.
        dropout: After each hidden layer.
    """

    def __init__(self, hidden: Sequence[int] = (256, 128), dropout: float = 0.0) -> None:
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden is a list of widths of at least 1, not {list(hidden)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is at least 0 and less than 1, not {dropout}")
        self.hidden, self.dropout = tuple(hidden), dropout

    def build(self, spec: InputSpec, classes: int) -> nn.Module:
        """Raises `DistillError` for texts."""
        _inputs.need("MLP", spec, "image", "table")
        size = int(np.prod(spec.shape))
        layers: list[nn.Module] = [_Pixels() if spec.kind == "image" else Standardise("inputs", size)]
        width = size
        for hidden in self.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(self.dropout)]
            width = hidden
        return _Network(*layers, nn.Linear(width, classes))

    def encode(self, inputs: Inputs, spec: InputSpec) -> Features:
        """``inputs``: (n, height, width, channels) uint8 or float32, or (n, features) float32."""
        return _inputs.array_features(inputs, spec)


class _Network(nn.Sequential):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs)


class _Pixels(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _inputs.normalised(inputs).flatten(1)
