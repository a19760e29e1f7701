"""A character tokenizer, a tiny network, questions with answers and plain objectives, for tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.heads import Head, Sparse
from distill.language import Completions, Prompts, Sampling, SyntheticSet, texts
from distill.packing import prompt_tokens
from distill.records import Reveals

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789=+-;.? "
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def characters(template: str | None = TEMPLATE, extra: str = "") -> PreTrainedTokenizerFast:
    """One token a character; special tokens for the turns, and <|end|> after each."""
    special = ["<|pad|>", "<|text|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *CHARACTERS, *extra])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|text|>", pad_token="<|pad|>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = template
    return tokenizer


def answered(n: int, seed: int = 0, ids: Any = None, weights: Any = None, longest: int = 12) -> SyntheticSet:
    """n questions and answers of mixed lengths; with `ids`, a tokenizer, the answers come with its token ids."""
    rng = np.random.default_rng(seed)

    def words(length: int) -> str:
        return "".join(rng.choice(list(CHARACTERS), length))

    prompts = Prompts.of_users([words(rng.integers(1, longest)) for _ in range(n)])
    answers = [words(rng.integers(1, longest)) for _ in range(n)]
    finish = ["stop" if rng.random() < 0.8 else "length" for _ in range(n)]
    ones = np.ones(n, np.int64)
    completions = Completions(texts(answers), texts(finish), ones, ones)
    if ids is not None:
        end = ids.convert_tokens_to_ids("<|end|>")
        lists = [ids(text).input_ids + [end] * (why == "stop") for text, why in zip(answers, finish, strict=True)]
        offsets = np.cumsum([0, *map(len, lists)])
        completions = Completions(
            texts(answers), texts(finish), ones, ones, offsets, np.concatenate(lists).astype(np.int32)
        )
    weights = None if weights is None else np.asarray(weights, np.float32)
    return SyntheticSet(prompts, completions, 0 * ones, Sampling(), np.zeros(n), weights=weights)


def network(vocabulary: int, seed: int = 0, layers: int = 2, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, initializer_range=0.2, **{**sizes, **options})
    return LlamaForCausalLM(config).eval()


class CrossEntropy:
    """Text alone."""

    requires = Reveals.TEXT

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(student.logits(), labels, reduction="sum")


class ForwardKL:
    """Whole distributions, or some tokens as if the rest had no mass."""

    requires = Reveals.TOP_K

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        log_q = student.logits().log_softmax(1)
        if isinstance(signal, Head):
            log_p = signal.logits().log_softmax(1)
            return (log_p.exp() * (log_p - log_q)).sum()
        assert isinstance(signal, Sparse)
        p = signal.logprobs.exp()
        return -(p * log_q.gather(1, signal.ids.clamp_min(0))).sum()


class Local:
    """A local teacher: what `LocalLanguageTeacher` needs for signals."""

    fingerprint = "tiny"

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network, self.tokenizer = network, tokenizer

    def prompt_tokens(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        return prompt_tokens(self.tokenizer, prompts, sampling)

    @torch.no_grad()
    def heads(self, sequences: list[list[int]], starts: list[int], layers: Sequence[int] = ()) -> list[Head]:
        heads = []
        for ids, start in zip(sequences, starts, strict=True):
            states = self.network.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            some = [states[layer][0, start - 1 : -1] for layer in (-1, *layers)]
            heads.append(Head(some[0], self.network.lm_head.weight, layers=tuple(some[1:])))
        return heads
