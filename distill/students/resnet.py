"""A small residual network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from distill.records import Inputs, InputSpec
from distill.students import _inputs
from distill.training import Features


class ResNet:
    """The residual networks for CIFAR: 6n+2 layers in three stages of `width`, 2·`width` and 4·`width` channels.

    Paper: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (shortcuts
    without parameters, option A).

    Args:
        depth: 8, 14, 20, 32, 44, 56, …
        width: Channels of the first stage; 16 in the paper.
        norm: "batch" as in the paper, or "group" (Wu and He, "Group Normalization", ECCV 2018; at most 8 groups), with
            which training doesn't depend on how a batch is divided between processes and micro-batches.
    """

    def __init__(self, depth: int = 8, width: int = 16, norm: str = "batch") -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is 6n+2 (8, 14, 20, …), not {depth}")
        if width < 1:
            raise ValueError(f"width is at least 1, not {width}")
        if norm not in ("batch", "group"):
            raise ValueError(f"norm is batch or group, not {norm!r}")
        self.depth, self.width, self.norm = depth, width, norm

    def build(self, spec: InputSpec, classes: int) -> nn.Module:
        """Raises `DistillError` for tables and texts."""
        _inputs.need("ResNet", spec, "image")
        return _Network(spec.shape[2], classes, (self.depth - 2) // 6, self.width, self.norm)

    def encode(self, inputs: Inputs, spec: InputSpec) -> Features:
        """``inputs``: (n, height, width, channels) uint8 or float32 in [0, 1]."""
        return _inputs.array_features(inputs, spec)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(8, channels), channels)


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int, norm: str) -> None:
        super().__init__()
        self.stride, self.added = stride, after - before
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        if self.stride > 1 or self.added:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        x = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(x)) + shortcut)


class _Network(nn.Module):
    def __init__(self, channels: int, classes: int, blocks: int, width: int, norm: str) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            _norm(norm, width),
            nn.ReLU(),
        ]
        before = width
        for stage in range(3):
            for block in range(blocks):
                after = width * 2**stage
                layers.append(_Block(before, after, 2 if stage > 0 and block == 0 else 1, norm))
                before = after
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(_inputs.normalised(inputs)).mean(dim=(2, 3)))
