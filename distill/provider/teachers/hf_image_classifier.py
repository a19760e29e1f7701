from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from distill.errors import DistillError
from distill.provider.teachers.huggingface import HFClassifier
from distill.records import Dataset


class HFImageClassifier(HFClassifier):
    """Any `AutoModelForImageClassification` with its own image processor, as it is.

    Images are handed to the processor as 8-bit pixels (those that an attack made are rounded, as in an image file)
    and resized by Pillow on every machine. Grey images are repeated for a model that reads colours.

    Args:
        model: An id on the Hugging Face hub, or a folder.
        revision: A branch, tag or commit on the hub.
        batch_size: Images at once.
        class_map: The data's class for the model's ``{model's name: data's name}``, where the names differ by more
            than case and punctuation. Classes of the model that are left out are dropped before the softmax.

    Raises:
        DistillError: See `prepare`.
    """

    kind: ClassVar[str] = "image"
    auto_model: ClassVar[Any] = AutoModelForImageClassification

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        batch_size: int = 32,
        class_map: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(model, revision, batch_size, class_map)

    def _load_reader(self, where: str, options: dict[str, Any], config: dict[str, Any], data: Dataset) -> str:
        # torchvision's resizing gives other pixels than Pillow's, and may or may not be installed
        self._processor = AutoImageProcessor.from_pretrained(where, backend="pil", trust_remote_code=False, **options)
        self._channels: int = config.get("num_channels", 3)
        if data.spec.shape[-1] not in (1, self._channels):
            raise DistillError(
                f"{self.model} reads {self._channels} channels; {data.name} has {data.spec.shape[-1]}", "teacher.model"
            )
        return self._processor.to_json_string()

    def _encode(self, inputs: np.ndarray) -> dict[str, torch.Tensor]:
        pixels = inputs if inputs.dtype == np.uint8 else np.rint(np.clip(inputs, 0, 1) * 255).astype(np.uint8)
        if pixels.shape[-1] != self._channels:
            pixels = np.repeat(pixels, self._channels, axis=-1)
        values = self._processor(list(pixels), return_tensors="np", input_data_format="channels_last")["pixel_values"]
        return {"pixel_values": torch.from_numpy(np.asarray(values, dtype=np.float32))}
