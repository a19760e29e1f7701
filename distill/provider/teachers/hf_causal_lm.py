from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill.errors import DistillError, MissingAsset
from distill.language import Task
from distill.provider.teachers.huggingface import find
from distill.speaker import CausalLM
from distill.training import Trainer

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HFCausalLM(CausalLM):
    """Any causal language model of the Hugging Face hub, or of a folder, as it is.

    Args:
        model: An id on the hub, or a folder.
        revision: Branch, tag or commit on the hub; None for the newest.
        dtype: "auto" (as the weights were saved), "float32", "bfloat16" or "float16".
        device_map: As of transformers ("auto" spreads the layers over the GPUs); None for the trainer's device.
        adapter: A PEFT adapter (an id on the hub, or a folder), merged into the weights; None for none.
        chat_template: A Jinja template, or the path of one that ends in ``.jinja``; None for the model's own.
        batch_size: How many requests are answered at once. More are faster until memory or the processor is full.

    Raises:
        DistillError: See `prepare`.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        device_map: str | dict[str, Any] | None = None,
        adapter: str | None = None,
        chat_template: str | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__(batch_size)
        if dtype not in DTYPES:
            raise DistillError(f"is one of {', '.join(DTYPES)}, not '{dtype}'", "teacher.dtype")
        self.model, self.revision, self.dtype, self.device_map = model, revision, dtype, device_map
        self.adapter, self.chat_template = adapter, chat_template

    def prepare(self, task: Task, trainer: Trainer, cache: Path) -> None:
        """Load the model.

        Raises:
            MissingAsset: It, or its adapter, is neither a folder nor in reach.
            DistillError: It can't be loaded, lacks weights, does not fit, or is an architecture that can't be decoded.
        """
        where, options = self._find(cache)
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
            model, loading = cast(Any, AutoModelForCausalLM).from_pretrained(
                where,
                dtype=DTYPES[self.dtype],
                device_map=self.device_map,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
            if self.adapter is not None:
                model = self._adapted(model, self.adapter)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            problem = " ".join(str(error).split())[:300]
            raise DistillError(f"{self.model} can't be loaded: {problem}", "teacher.model") from error
        if loading["missing_keys"] or loading["mismatched_keys"]:
            fresh = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
            raise DistillError(
                f"{self.model} is not a trained causal language model: it has no weights for {', '.join(fresh[:3])}",
                "teacher.model",
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise DistillError(f"{self.model} does not fit in memory with {self.device_map!r}", "teacher.device_map")
        if self.chat_template is not None:
            tokenizer.chat_template = self._own_template(self.chat_template)
        self.hold(model if self.device_map is not None else model.to(trainer.device), tokenizer)

    def _find(self, cache: Path) -> tuple[str, dict[str, Any]]:
        """Where the model is loaded from, and with which options."""
        return find(self.model, self.revision)

    def _adapted(self, model: PreTrainedModel, adapter: str) -> Any:
        try:
            from peft import PeftModel
        except ImportError:
            raise DistillError("an adapter needs peft; pip install peft", "teacher.adapter") from None
        try:
            where, options = find(adapter, None)
        except MissingAsset:
            raise MissingAsset(
                f"'{adapter}' is neither a folder nor in the Hugging Face cache, and not on the hub or the hub "
                "can't be reached; give a folder",
                "teacher.adapter",
            ) from None
        try:
            options.pop("local_files_only", None)
            return PeftModel.from_pretrained(model, where, **options).merge_and_unload()
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            problem = " ".join(str(error).split())[:300]
            raise DistillError(f"{adapter} can't be put on {self.model}: {problem}", "teacher.adapter") from error

    @staticmethod
    def _own_template(template: str) -> str:
        if not template.endswith(".jinja"):
            return template
        try:
            return Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DistillError(f"{template} can't be read ({error})", "teacher.chat_template") from None
