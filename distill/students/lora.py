"""A low-rank adapter on a causal language model of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from distill.errors import DistillError, MissingAsset
from distill.records import Reveals
from distill.students.causal_lm import CausalLM


class LoRA:
    """A pretrained model that stays as it is, with W x + (alpha / rank) B A x in place of some of its W x.

    Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, equation 3; the numbers are those
    for GPT-2 (table 11; rank, alpha and dropout were compared with the command for GPT-2 medium on E2E in the authors'
    repository). A is drawn at random and B is 0, so that training starts from the model itself. The network stays the
    Hugging Face one, with `peft`'s layers in it; `peft.get_peft_model_state_dict` gives the adapter alone.

    Args:
        model: An id on the Hugging Face hub, or a folder.
        revision: A branch, tag or commit on the hub.
        rank: Rows of A and columns of B.
        alpha: See above.
        dropout: On x before A.
        modules: The names of the linear layers W, or "all-linear" for all but the output matrix. The paper's: queries
            and values.
        dtype: Of the model's weights: "float32", "bfloat16" or "float16".
        gradient_checkpointing: As of `CausalLM`.

    Raises:
        ValueError: A value is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.TEXT

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        rank: int = 4,
        alpha: int = 32,
        dropout: float = 0.1,
        modules: str | Sequence[str] = ("q_proj", "v_proj"),
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank is at least 1, not {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is at least 0 and less than 1, not {dropout}")
        if "lm_head" in modules:
            raise ValueError("modules are inside the layers; the output matrix (lm_head) can't be adapted")
        self._base = CausalLM(model, revision, True, dtype, gradient_checkpointing)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.modules = modules if isinstance(modules, str) else list(modules)

    def tokenizer(self, teachers: Any) -> Any:
        """The model's own. Raises as `CausalLM.tokenizer`."""
        return self._base.tokenizer(teachers)

    def build_language(self, tokenizer: Any) -> nn.Module:
        """Raises `MissingAsset` without `peft`, `DistillError` where no layer has such a name, and as `CausalLM`."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise MissingAsset(
                "the student 'lora' needs the package peft; run `pip install peft`", "student"
            ) from error
        network = self._base.build_language(tokenizer)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.modules,
        )
        try:
            return inject_adapter_in_model(config, network)
        except ValueError as error:
            raise DistillError(
                f"{self._base.model} has no layers called {self.modules}; all-linear fits every model",
                "student.modules",
            ) from error
