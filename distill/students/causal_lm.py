"""Any causal language model of the Hugging Face hub as a student."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from distill.errors import DistillError
from distill.records import Reveals
from distill.students import _huggingface

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CausalLM:
    """Any `AutoModelForCausalLM` with its own tokenizer, fine-tuned or trained from fresh weights.

    Args:
        model: An id on the Hugging Face hub, or a folder.
        revision: A branch, tag or commit on the hub.
        pretrained: False for fresh weights of the same architecture.
        dtype: Of the weights: "float32", "bfloat16" or "float16".
        gradient_checkpointing: Compute each layer again in the backward pass instead of keeping what is inside it:
            about a third more time, a fraction of the memory, the same result.
    """

    requires: ClassVar[Reveals] = Reveals.TEXT

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        pretrained: bool = True,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
        self.model, self.revision, self.pretrained = model, revision, pretrained
        self.dtype, self.gradient_checkpointing = dtype, gradient_checkpointing

    def tokenizer(self, teachers: Any) -> Any:
        """Its own. Raises `MissingAsset` where the model can't be found, `DistillError` where it has none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(_huggingface.folder(self.model, self.revision))
        except (OSError, ValueError, KeyError) as error:
            raise DistillError(f"{self.model} has no tokenizer that can be loaded", "student.model") from error

    def build_language(self, tokenizer: Any) -> nn.Module:
        """Raises `MissingAsset` where the model can't be found, `DistillError` where it is not such a model."""
        from transformers import AutoConfig, AutoModelForCausalLM

        path = _huggingface.folder(self.model, self.revision)
        dtype = DTYPES[self.dtype]
        try:
            if self.pretrained:
                network = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            else:
                network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            why = " ".join(str(error).split())[:300]
            raise DistillError(f"{self.model} can't be loaded: {why}", "student.model") from error
        if len(tokenizer) > network.get_output_embeddings().weight.shape[0]:
            raise DistillError(f"{self.model} has fewer embeddings than its tokenizer has tokens", "student.model")
        if self.gradient_checkpointing:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return network
