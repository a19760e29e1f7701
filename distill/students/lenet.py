"""A small convolutional network."""

from __future__ import annotations

import torch
from torch import nn

from distill.errors import DistillError
from distill.records import Inputs, InputSpec
from distill.students import _inputs
from distill.training import Features


class LeNet:
    """LeNet-5 for images of any size from 8×8: two convolutions with pooling, three linear layers.

    Paper: LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", Proceedings of
    the IEEE, 1998. Departs from it as everyone does now: ReLU, max pooling, full connections, padded convolutions.

    Args:
        width: Multiplies the paper's 6 and 16 channels and 120 and 84 units.
        dropout: Before the last linear layer.
    """

    def __init__(self, width: int = 1, dropout: float = 0.0) -> None:
        if width < 1:
            raise ValueError(f"width is at least 1, not {width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is at least 0 and less than 1, not {dropout}")
        self.width, self.dropout = width, dropout

    def build(self, spec: InputSpec, classes: int) -> nn.Module:
        """Raises `DistillError` for tables, texts and images below 8×8."""
        _inputs.need("LeNet", spec, "image")
        if min(spec.shape[:2]) < 8:
            raise DistillError(f"LeNet takes images from 8×8, not {spec.shape[0]}×{spec.shape[1]}", "student")
        return _Network(spec.shape, classes, self.width, self.dropout)

    def encode(self, inputs: Inputs, spec: InputSpec) -> Features:
        """``inputs``: (n, height, width, channels) uint8 or float32 in [0, 1]."""
        return _inputs.array_features(inputs, spec)


class _Halved(nn.Module):
    """The largest of each 2×2 pixels: `nn.MaxPool2d`, which on a CPU takes longer than the convolutions do. Where no
    gradient is wanted, whole rows and columns are compared instead, with the same result."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return nn.functional.max_pool2d(images, 2)
        height, width = (length // 2 * 2 for length in images.shape[2:])
        images = images[:, :, :height, :width]
        rows = torch.maximum(images[:, :, ::2], images[:, :, 1::2])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


class _Network(nn.Module):
    def __init__(self, shape: tuple[int, ...], classes: int, width: int, dropout: float) -> None:
        super().__init__()
        rows, columns, channels = shape
        self.features = nn.Sequential(  # a ReLU after pooling gives the same and has less to do
            nn.Conv2d(channels, 6 * width, 5, padding=2),
            _Halved(),
            nn.ReLU(),
            nn.Conv2d(6 * width, 16 * width, 5, padding=2),
            _Halved(),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * width * (rows // 4) * (columns // 4), 120 * width),
            nn.ReLU(),
            nn.Linear(120 * width, 84 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(84 * width, classes),
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(_inputs.normalised(inputs)))
