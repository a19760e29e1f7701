"""A small Llama from fresh weights."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from distill.errors import DistillError
from distill.records import Reveals


class Llama:
    """A Llama-architecture language model of a chosen size, with the teacher's tokenizer.

    Paper: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023: pre-normalisation (RMSNorm),
    SwiGLU of width 8/3 of the model's, rotary positions, no biases. Grouped-query attention is of Ainslie et al.,
    "GQA", EMNLP 2023. Tied embeddings are of Press and Wolf, EACL 2017, and matter here: with SmolLM2's 49,152 tokens
    and a width of 256 one matrix has 12.6 M parameters, and four layers together have 3.1 M.

    Args:
        width: Of the residual stream.
        layers: Decoder layers.
        heads: Query heads; `width` is an even multiple of them.
        kv_heads: Key and value heads, a divisor of `heads`; None for as many.
        mlp_ratio: Width of the SwiGLU over `width`, rounded to a multiple of 8.
        tied: The output matrix is the embedding.
        context: Longest prompt and answer together.
        initializer_range: Standard deviation of the first weights.

    Raises:
        ValueError: A value is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.TEXT

    def __init__(
        self,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        kv_heads: int | None = None,
        mlp_ratio: float = 2.6667,
        tied: bool = True,
        context: int = 2048,
        initializer_range: float = 0.02,
    ) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        least = {"width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads, "context": context}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")
        if width % (2 * heads):
            raise ValueError(f"width is an even multiple of heads, not {width} for {heads}")
        if heads % kv_heads:
            raise ValueError(f"kv_heads is a divisor of heads, not {kv_heads} for {heads}")
        for name, number in {"mlp_ratio": mlp_ratio, "initializer_range": initializer_range}.items():
            if not number > 0:
                raise ValueError(f"{name} is more than 0, not {number}")
        self.width, self.layers, self.heads, self.kv_heads = width, layers, heads, kv_heads
        self.mlp_width = max(8, 8 * round(width * mlp_ratio / 8))
        self.tied, self.context, self.initializer_range = tied, context, initializer_range

    def tokenizer(self, teachers: Any) -> Any:
        """The teacher's. Raises `DistillError` where it is not public."""
        if teachers is None:
            raise DistillError(
                "Llama takes the teacher's tokenizer and this teacher's is not public; choose causal_lm, which brings "
                "its own",
                "student",
            )
        return teachers

    def build_language(self, tokenizer: Any) -> nn.Module:
        """A `LlamaForCausalLM` in float32."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            initializer_range=self.initializer_range,
            tie_word_embeddings=self.tied,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
        return LlamaForCausalLM(config)
