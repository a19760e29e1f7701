"""A causal language model in this process: its identity, tokens, answers and distributions, teacher or student."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from jinja2 import TemplateError
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from distill.decoding import PREFILL_TOKENS, Decoder, Guided, Network, Processor, padded, processed
from distill.errors import DistillError
from distill.heads import Head
from distill.language import Completions, Prompts, Sampling, texts
from distill.randomness import KeyedRandom, derive


class Tokenizing:
    """How prompts become tokens: what every teacher does whose tokenizer is here."""

    tokenizer: Any
    context_tokens: int | None

    def count_tokens(self, prompts: Prompts, sampling: Sampling) -> np.ndarray:
        """(n,) int64: the tokens of each prompt, template included.

        Raises:
            DistillError: A prompt is empty, leaves no room for `sampling.max_tokens`, or is a chat where there is no
                chat template.
        """
        return np.array([len(tokens) for tokens in self.prompt_tokens(prompts, sampling)], dtype=np.int64)

    def prompt_tokens(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        """The tokens that each prompt becomes, template and generation prompt included. Raises as `count_tokens`."""
        for row in range(len(prompts)):
            if not prompts.messages(row)[-1]["content"].strip():
                raise DistillError(f"prompt {row} of {prompts.name or 'these prompts'} is empty; leave it out", "pool")
        if not len(prompts):
            return []
        written = [self._write(prompts, sampling, row) for row in range(len(prompts))]
        tokens = self.tokenizer(written, add_special_tokens=not prompts.chat).input_ids
        for row, some in enumerate(tokens):
            if not some:
                raise DistillError(f"prompt {row} of {prompts.name or 'these prompts'} has no tokens", "pool")
            if self.context_tokens is not None and len(some) + sampling.max_tokens > self.context_tokens:
                raise DistillError(
                    f"{sampling.max_tokens} tokens do not fit behind the {len(some)} of prompt {row} in a context of "
                    f"{self.context_tokens}; shorten the answers or leave out such prompts of the pool",
                    "sampling.max_tokens",
                )
        return tokens

    def _write(self, prompts: Prompts, sampling: Sampling, row: int) -> str:
        """One prompt as the text that is tokenized."""
        if not prompts.chat:
            return prompts.column[row]
        if self.tokenizer.chat_template is None:
            raise DistillError(
                "this model has no chat template, so chats can't be put to it; give one, or a pool of plain texts",
                "teacher.chat_template",
            )
        try:
            return self.tokenizer.apply_chat_template(
                sampling.conversation(prompts, row), add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise DistillError(f"the template refuses chat {row}: {error}", "teacher.chat_template") from error


class CausalLM(Tokenizing):
    """A causal language model in memory. A subclass finds or trains it and hands it to `hold`.

    Args:
        batch_size: How many requests are answered at once. More are faster until memory or the processor is full.

    Raises:
        DistillError: The batch is empty.
    """

    remote: ClassVar[bool] = False
    usd_per_mtok_in: ClassVar[float] = 0.0
    usd_per_mtok_out: ClassVar[float] = 0.0
    top_k: ClassVar[int | None] = None
    requests_at_once: ClassVar[int] = 256

    fingerprint: str
    parameters: int | None
    flops_per_token: float | None
    speaking: Sequence[Processor | Guided] = ()  # what changes the logits of all of its answers

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise DistillError(f"must be at least 1, not {batch_size}", "teacher.batch_size")
        self.batch_size = batch_size

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling,
        repeats: np.ndarray,
        top_k: int = 0,
        processors: Sequence[Processor | Guided] = (),
    ) -> Completions:
        """Clean answers, each with its tokens; see `distill.decoding.Decoder.generate`.

        The number that decides token t of a drawn answer depends on (sampling.seed, prompt, repeat, t) alone, so that
        an answer differs from one batch to another by what floating-point noise does to the distributions only.

        Args:
            prompts: n prompts.
            sampling: How to draw.
            repeats: (n,) int64.
            top_k: How many log-probabilities to tell at each position (at most the vocabulary); 0 for none.
            processors: Change the logits while an answer is decoded.

        Raises:
            DistillError: As `count_tokens`; or the logits are not finite.
        """
        tokens = self.prompt_tokens(prompts, sampling)
        uniforms = None
        if not sampling.greedy:
            random = KeyedRandom(derive(sampling.seed, "generation"), prompts.keys, repeats)
            uniforms = random.uniform(sampling.max_tokens)
        return self._decoder.generate(tokens, sampling, uniforms, top_k, [*self.speaking, *processors])

    @torch.no_grad()
    def heads(self, sequences: list[list[int]], starts: list[int], layers: Sequence[int] = ()) -> list[Head]:
        """For each sequence the distributions of its tokens from `starts` on (at least 1). All share one weight.

        `layers`: Whose hidden states come with them, numbered as in `Network.hidden`.
        """
        heads: list[Head | None] = [None] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
        while order:
            many = max(1, PREFILL_TOKENS // len(sequences[order[0]]))
            rows, order = order[:many], order[many:]
            hidden = self._network.hidden(padded([sequences[row] for row in rows]), layers)
            for place, row in enumerate(rows):
                part = slice(starts[row] - 1, len(sequences[row]) - 1)
                last, *inner = (states[place, part] for states in hidden)
                heads[row] = replace(self._network.head(last), layers=tuple(inner))
        return [head for head in heads if head is not None]

    @torch.no_grad()
    def scored(
        self,
        sequences: list[list[int]],
        starts: list[int],
        sampling: Sampling,
        processors: Sequence[Processor | Guided],
        top_k: int,
    ) -> Completions:
        """Given tokens with the log-probabilities that `generate` with these processors would tell of them: those of
        each sequence from its start (at least 1) on, as an answer to what is before.

        Args:
            sequences: n lists of tokens.
            starts: n numbers.
            sampling: As a request would ask, for `sampling.logit_bias`.
            processors: Change the logits.
            top_k: How many log-probabilities to tell at each position, at least 1.
        """
        guides = [network for each in processors if isinstance(each, Guided) for network in each.networks]
        told: list[torch.Tensor] = []
        for sequence, start, head in zip(sequences, starts, self.heads(sequences, starts), strict=True):
            theirs = []
            for network in guides:
                hidden = network.hidden(torch.tensor([sequence]))[0][0, start - 1 : -1]
                network.tokens_read += len(sequence)
                theirs.append(network.head(hidden).logits())
            before = [sequence[:end] for end in range(start, len(sequence))]
            told.append(processed(head.logits(), before, sampling, processors, theirs).log_softmax(dim=-1).cpu())
        logprobs = torch.cat(told)
        given = [sequence[start:] for sequence, start in zip(sequences, starts, strict=True)]
        tokens = np.array([token for some in given for token in some], dtype=np.int64)
        top = logprobs.topk(min(top_k, logprobs.shape[1]), dim=-1)
        return Completions(
            texts([self.tokenizer.decode(some, skip_special_tokens=True) for some in given]),
            texts(["length"] * len(given)),
            np.array(starts, dtype=np.int64),
            np.array([len(some) for some in given], dtype=np.int64),
            offsets=np.cumsum([0, *map(len, given)]),
            token_ids=tokens.astype(np.int32),
            logprobs=logprobs[torch.arange(len(tokens)), torch.from_numpy(tokens)].numpy(),
            top_ids=top.indices.numpy().astype(np.int32),
            top_logprobs=top.values.numpy(),
        )

    def hold(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """Take a model with its tokenizer into use."""
        model.eval().requires_grad_(False)
        self.tokenizer, self.network = tokenizer, model
        self._network = Network(model)
        told = model.config.get_text_config().to_dict()
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        every = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        self._decoder = Decoder(
            self._network, tokenizer, {end for end in every if end is not None}, batch_size=self.batch_size
        )
        self.context_tokens = told.get("max_position_embeddings") or told.get("n_positions")
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.tensor([[1]], device=self._network.device), use_cache=False)
        self.flops_per_token = float(counter.get_total_flops())
        self.fingerprint = _fingerprint(model, told, tokenizer)


def _fingerprint(model: PreTrainedModel, config: dict[str, Any], tokenizer: Any) -> str:
    """Of the weights as loaded, so that it doesn't depend on the format of the files or on where they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    told = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        vocabulary = [tokenizer.get_vocab(), tokenizer.init_kwargs]
        digest.update(json.dumps(vocabulary, sort_keys=True, default=str).encode())
    digest.update(f"{tokenizer.chat_template}".encode())
    return digest.hexdigest()
