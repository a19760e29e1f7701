"""What the architectures share: which inputs they take, and how pixels become numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from distill.errors import DistillError
from distill.records import Inputs, InputSpec
from distill.training import Features, LazyFeatures, TensorFeatures

# Columns larger than this are encoded batch by batch.
EAGER_BYTES = 1024**3


def need(student: str, spec: InputSpec, *kinds: str) -> None:
    """Raises `DistillError` where the inputs are of another kind."""
    if spec.kind not in kinds:
        raise DistillError(f"{student} takes {' or '.join(f'{kind}s' for kind in kinds)}, not {spec.kind}s", "student")


def as_features(inputs: Inputs, encode: Callable[[np.ndarray], dict[str, torch.Tensor]], row_bytes: int) -> Features:
    """The encoded column, in memory where it fits. `row_bytes`: what one encoded row takes."""
    if len(inputs) * row_bytes <= EAGER_BYTES:
        return TensorFeatures(encode(inputs[:]))
    return LazyFeatures(inputs, encode)


def encode_array(inputs: np.ndarray) -> dict[str, torch.Tensor]:
    """Images and tables go into the module as they are."""
    # Torch shares memory with an array, and warns where it may not write to it.
    return {"inputs": torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())}


def array_features(inputs: Inputs, spec: InputSpec) -> Features:
    # A float32 column is the larger of the two that an image may be.
    return as_features(inputs, encode_array, 4 * int(np.prod(spec.shape)))


def scaled(images: torch.Tensor) -> torch.Tensor:
    """(n, height, width, channels) uint8 pixels, or float32 in [0, 1], as (n, channels, height, width) in [0, 1]."""
    # Copied, because convolutions and DDP run slower where the layout is only permuted.
    pixels = images.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    return pixels.float() / 255 if images.dtype == torch.uint8 else pixels


def normalised(images: torch.Tensor) -> torch.Tensor:
    """As `scaled`, but in [-1, 1]: statistics of the victim's data are not known to a student."""
    return scaled(images) * 2 - 1
