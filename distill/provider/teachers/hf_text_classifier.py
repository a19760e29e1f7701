from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill.errors import DistillError
from distill.provider.teachers.huggingface import HFClassifier
from distill.records import Dataset


class HFTextClassifier(HFClassifier):
    """Any `AutoModelForSequenceClassification` with its own tokenizer, as it is.

    Every text is cut or padded to exactly `max_length` tokens, so that its answer does not depend on the longest text
    of its batch. That costs time on short texts: lower `max_length` for those.

    Args:
        model: An id on the Hugging Face hub, or a folder.
        revision: A branch, tag or commit on the hub.
        batch_size: Texts at once.
        max_length: Tokens of a text that are read, special tokens included.
        class_map: The data's class for the model's ``{model's name: data's name}``, where the names differ by more
            than case and punctuation. Classes of the model that are left out are dropped before the softmax.

    Raises:
        DistillError: See `prepare`.
    """

    kind: ClassVar[str] = "text"
    auto_model: ClassVar[Any] = AutoModelForSequenceClassification

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        batch_size: int = 32,
        max_length: int = 128,
        class_map: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(model, revision, batch_size, class_map)
        if max_length < 1:
            raise DistillError(f"must be at least 1, not {max_length}", "teacher.max_length")
        self.max_length = max_length

    def _load_reader(self, where: str, options: dict[str, Any], config: dict[str, Any], data: Dataset) -> str:
        self._tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
        longest = min(self._tokenizer.model_max_length, config.get("max_position_embeddings") or self.max_length)
        if self.max_length > longest:
            raise DistillError(f"{self.model} reads at most {longest} tokens", "teacher.max_length")
        if self._tokenizer.pad_token_id is None or config["pad_token_id"] is None:
            raise DistillError(
                f"{self.model} has no padding token; add one to its tokenizer and config", "teacher.model"
            )
        if self._tokenizer.is_fast:
            whole = self._tokenizer.backend_tokenizer.to_str()
        else:
            whole = json.dumps([self._tokenizer.get_vocab(), self._tokenizer.init_kwargs], sort_keys=True, default=str)
        return f"{type(self._tokenizer).__name__} {whole} {self.max_length}"

    def _encode(self, inputs: np.ndarray) -> dict[str, torch.Tensor]:
        tokens = self._tokenizer(
            inputs.tolist(), truncation=True, padding="max_length", max_length=self.max_length, return_tensors="pt"
        )
        return dict(tokens)
