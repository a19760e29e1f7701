"""Any image classifier of the Hugging Face hub as a student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distill.errors import DistillError
from distill.records import Inputs, InputSpec
from distill.students import _huggingface, _inputs
from distill.training import Features


class HFImageClassifier:
    """Any `AutoModelForImageClassification`, fine-tuned or trained from fresh weights.

    The sizes and constants are those of the model's own image processor, but resizing and normalisation happen inside
    the module, so that gradients and bounds are in pixel space; interpolation is torch's with antialiasing, which
    differs from Pillow's by its rounding to 8 bits. Grey images are repeated for a model that reads colours.

    Args:
        model: An id on the Hugging Face hub, or a folder.
        revision: A branch, tag or commit on the hub.
        pretrained: False for fresh weights of the same architecture.
    """

    def __init__(self, model: str, revision: str | None = None, pretrained: bool = True) -> None:
        self.model, self.revision, self.pretrained = model, revision, pretrained

    def build(self, spec: InputSpec, classes: int) -> nn.Module:
        """Raises `DistillError` for tables and texts, and `MissingAsset` where the model can't be found."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        _inputs.need("HFImageClassifier", spec, "image")
        path = _huggingface.folder(self.model, self.revision)
        try:
            # The backend that needs no torchvision: only its constants are read.
            processor = AutoImageProcessor.from_pretrained(path, backend="pil").to_dict()
        except (OSError, ValueError, ImportError) as error:
            raise DistillError(f"{self.model} has no image processor", "student.model") from error
        network = _huggingface.load(AutoModelForImageClassification, path, classes, self.pretrained)
        channels = network.config.num_channels
        if spec.shape[2] not in (1, channels):
            raise DistillError(f"{self.model} reads {channels} channels, not {spec.shape[2]}", "student.model")
        return _Network(network, processor, spec.shape, channels)

    def encode(self, inputs: Inputs, spec: InputSpec) -> Features:
        """``inputs``: (n, height, width, channels) uint8 or float32 in [0, 1], as they are."""
        return _inputs.array_features(inputs, spec)


class _Network(nn.Module):
    """The model's processor, on tensors, and the model."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, network: nn.Module, processor: Mapping[str, Any], shape: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.network = network
        self.channels = channels
        self.resized = _resized(processor, shape)
        self.mode = "bicubic" if processor.get("resample") == 3 else "bilinear"
        self.cropped = None
        if processor.get("do_center_crop"):
            self.cropped = (processor["crop_size"]["height"], processor["crop_size"]["width"])
        constants = (processor["image_mean"], processor["image_std"]) if processor.get("do_normalize") else (0.0, 1.0)
        mean, deviation = (torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in constants)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        pixels = _inputs.scaled(inputs)
        pixels = pixels.expand(-1, self.channels, -1, -1)
        if pixels.shape[2:] != self.resized:
            pixels = F.interpolate(pixels, self.resized, mode=self.mode, antialias=True).clamp(0, 1)
        if self.cropped is not None:
            rows, columns = self.cropped
            top, left = (pixels.shape[2] - rows) // 2, (pixels.shape[3] - columns) // 2
            pixels = F.pad(pixels, (-left, columns - pixels.shape[3] + left, -top, rows - pixels.shape[2] + top))
        return self.network(pixel_values=(pixels - self.mean) / self.deviation).logits


def _resized(processor: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width after the processor's resizing, before its cropping."""
    size = processor.get("size") or {}
    if not processor.get("do_resize"):
        return shape[0], shape[1]
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    if "shortest_edge" in size:
        factor = size["shortest_edge"] / min(shape[:2])
        return round(shape[0] * factor), round(shape[1] * factor)
    raise DistillError(f"its image processor resizes in a way that is not known here: {dict(size)}", "student.model")
