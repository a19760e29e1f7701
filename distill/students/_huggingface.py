"""What the students from the Hugging Face hub share: finding the files, loading, and the module around the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.errors import DistillError, MissingAsset


def folder(model: str, revision: str | None) -> str:
    """The folder with a model's files, downloaded once. Raises `MissingAsset` where it is nowhere to be found."""
    from huggingface_hub import snapshot_download

    if Path(model).expanduser().is_dir():
        return str(Path(model).expanduser())
    try:
        # One request answers whether the hub and the model are there; transformers would ask for each file.
        return snapshot_download(
            model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]
        )
    except Exception as error:  # the hub's own errors and those of the HTTP library beneath it
        raise MissingAsset(
            f"'{model}' is neither a folder nor on the hub nor in its cache ({type(error).__name__}); give a folder, "
            f"or run `hf download {model}` where there is a network",
            "student.model",
        ) from error


def load(auto_model: Any, path: str, classes: int, pretrained: bool) -> Any:
    """A classifier for `classes`; a head of another size is replaced by a fresh one.

    Raises:
        DistillError: The files are not such a model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, num_labels=classes)
        if pretrained:
            network = auto_model.from_pretrained(path, config=config, ignore_mismatched_sizes=True, dtype=torch.float32)
        else:
            network = auto_model.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise DistillError(f"{path} can't be loaded: {' '.join(str(error).split())[:300]}", "student.model") from error
    return network.float()


class Logits(nn.Module):
    """A Hugging Face classifier that returns its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **features: torch.Tensor) -> torch.Tensor:
        return self.network(**features).logits
