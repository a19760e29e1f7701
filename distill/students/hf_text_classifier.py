"""Any text classifier of the Hugging Face hub as a student."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from distill.errors import DistillError
from distill.records import Inputs, InputSpec
from distill.students import _huggingface, _inputs
from distill.training import Features


class HFTextClassifier:
    """Any `AutoModelForSequenceClassification` with its own tokenizer, fine-tuned or trained from fresh weights.

    Every text is cut or padded to `max_length` tokens, so that its logits do not depend on the other texts of a batch.

    Args:
        model: An id on the Hugging Face hub, or a folder.
        revision: A branch, tag or commit on the hub.
        pretrained: False for fresh weights of the same architecture.
        max_length: Tokens of a text that are read, special tokens included.
    """

    def __init__(self, model: str, revision: str | None = None, pretrained: bool = True, max_length: int = 128) -> None:
        if max_length < 1:
            raise ValueError(f"max_length is at least 1, not {max_length}")
        self.model, self.revision, self.pretrained, self.max_length = model, revision, pretrained, max_length

    def build(self, spec: InputSpec, classes: int) -> nn.Module:
        """Raises `DistillError` for images and tables, and `MissingAsset` where the model can't be found."""
        from transformers import AutoModelForSequenceClassification

        _inputs.need("HFTextClassifier", spec, "text")
        path = _huggingface.folder(self.model, self.revision)
        network = _huggingface.load(AutoModelForSequenceClassification, path, classes, self.pretrained)
        longest = min(self._tokenizer.model_max_length, network.config.max_position_embeddings)
        if self.max_length > longest:
            raise DistillError(f"{self.model} reads at most {longest} tokens", "student.max_length")
        network.config.pad_token_id = self._tokenizer.pad_token_id
        return _huggingface.Logits(network)

    def encode(self, inputs: Inputs, spec: InputSpec) -> Features:
        """``input_ids``, ``attention_mask`` and what else the tokenizer makes: (n, max_length) int64."""
        return _inputs.as_features(inputs, self.tokens, 3 * 8 * self.max_length)

    def tokens(self, texts: np.ndarray) -> dict[str, torch.Tensor]:
        """(n,) texts as the model's arguments."""
        return dict(
            self._tokenizer(
                texts.tolist(), truncation=True, padding="max_length", max_length=self.max_length, return_tensors="pt"
            )
        )

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        path = _huggingface.folder(self.model, self.revision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise DistillError(f"{self.model} has no tokenizer that can be loaded", "student.model") from error
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise DistillError(f"{self.model}'s tokenizer has no padding token", "student.model")
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
