"""Batched decoding of a causal language model: what every teacher whose weights are here answers with.

Rows are never padded on the left and never wait for one another. Each request has a slot of one key-value cache that
all layers share the shape of, and its own position in it; a request that is done leaves its slot at once, either to one
that waits or to the last of those that run, so that a step costs what its unfinished requests cost.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from distill.errors import DistillError
from distill.heads import Head
from distill.language import Completions, Sampling, texts

# Called with the tokens of each row so far, prompt included, and (n, vocabulary) float32 logits; returns such logits.
Processor = Callable[[list[list[int]], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Guided:
    """A change of the logits that looks at what other models say of the same tokens.

    The decoder runs them in step with the teacher, each with a cache of its own, so that a token costs one forward pass
    of each and no more.

    Args:
        networks: The other models. They read the teacher's tokens.
        change: As a `Processor`, with the (n, vocabulary) float32 logits of each network as a third argument.
    """

    networks: Sequence[Network]
    change: Callable[[list[list[int]], torch.Tensor, list[torch.Tensor]], torch.Tensor]


PREFILL_TOKENS = 8192  # of prompts that are read in one forward pass, padding included: bounds the memory
REFILL = 8  # one that waits is let in when this share of the slots (one in so many) is free: it is read with others
GROWTH = 128  # columns by which the cache grows
NUCLEUS = 256  # tokens in which top-p is looked for before the whole vocabulary is sorted


class Network:
    """A causal language model, taken apart into its body and its head.

    Args:
        model: A Hugging Face causal language model in evaluation mode, with all of its weights in memory.

    Attributes:
        tokens_read: How many tokens went through it, padding not counted.

    Raises:
        DistillError: Its logits are not its head applied to its last hidden states, or it does not decode with a cache
            of keys and values. Both are tried, on a few tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._body: Any = model.base_model
        first: Any = model.get_input_embeddings()
        output: Any = model.get_output_embeddings()
        # transformers 5.24 renamed the argument.
        taken = inspect.signature(self._body.forward).parameters
        self._cache = "cache" if "cache" in taken else "past_key_values"
        told = model.config.get_text_config().to_dict()
        self.dtype: torch.dtype = output.weight.dtype
        self.device: torch.device = first.weight.device
        self._weight, self._bias = output.weight.detach(), dict(output.named_parameters()).get("bias")
        # The keys under which architectures of transformers keep them: Cohere's is a factor, Granite's a divisor.
        self._scale = float(told.get("logit_scale") or 1.0) / float(told.get("logits_scaling") or 1.0)
        self._softcap = told.get("final_logit_softcapping")
        self._window: int | None = told.get("sliding_window")
        self._layer_types = set(told.get("layer_types") or ())
        if not self._layer_types:
            self._layer_types = {"full_attention" if self._window is None else "sliding_attention"}
        self.tokens_read = 0
        if unknown := self._layer_types - {"full_attention", "sliding_attention"}:
            raise DistillError(f"{', '.join(sorted(unknown))} layers can't be decoded here", "teacher.model")
        self._try(model)

    def head(self, hidden: torch.Tensor) -> Head:
        """The distributions that (n, width) last hidden states stand for."""
        return Head(hidden.to(self._weight.device), self._weight, self._bias, self._scale, self._softcap)

    def hidden(self, tokens: torch.Tensor, layers: Sequence[int] = ()) -> list[torch.Tensor]:
        """(n, t, width) last hidden states of (n, t) tokens, then those of some layers.

        Args:
            tokens: Rows are padded on the right with anything.
            layers: 0 is the embeddings, i the output of layer i; that of the last layer is taken after the final norm.
        """
        states = self._body(input_ids=tokens.to(self.device), use_cache=False, output_hidden_states=bool(layers))
        inner = (states.hidden_states[layer].to(self._weight.device) for layer in layers)
        return [states.last_hidden_state, *inner]

    def read(self, prompts: Sequence[Sequence[int]], slots: Slots) -> torch.Tensor:
        """(n, vocabulary) float32 logits after each prompt, which takes the first free slots."""
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
        slots.admit(len(prompts), int(ends.max()) + 1)
        hidden = self._body(input_ids=padded(prompts).to(self.device), use_cache=True, **{self._cache: slots})
        last = hidden.last_hidden_state[torch.arange(len(prompts)), ends]
        self.tokens_read += sum(map(len, prompts))
        return self.head(last).logits()

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, slots: Slots) -> torch.Tensor:
        """(n, vocabulary) float32 logits after one more token of each of the n slots in use, at these positions."""
        positions = positions.to(self.device)
        columns = slots.advance(positions)
        hidden = self._body(
            input_ids=tokens.to(self.device)[:, None],
            position_ids=positions[:, None],
            attention_mask=self._mask(positions, columns),
            use_cache=True,
            **{self._cache: slots},
        )
        self.tokens_read += len(tokens)
        return self.head(hidden.last_hidden_state[:, 0]).logits()

    def _mask(self, positions: torch.Tensor, columns: int) -> Any:
        """(n, 1, 1, columns), added to the scores of attention: a row sees its own past. One for each kind of layer."""
        column, position = torch.arange(columns, device=self.device), positions[:, None]
        seen = {"full_attention": column <= position}
        if self._window is not None:
            seen["sliding_attention"] = seen["full_attention"] & (column > position - self._window)
        masks = {
            kind: torch.zeros(seen[kind].shape, dtype=self.dtype, device=self.device).masked_fill_(
                ~seen[kind], torch.finfo(self.dtype).min
            )[:, None, None]
            for kind in self._layer_types
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @torch.inference_mode()
    def _try(self, model: PreTrainedModel) -> None:
        rows = [[1, 2, 3, 4], [5, 6]]
        try:
            wanted = [model(input_ids=torch.tensor([row], device=self.device)).logits[0, -2:].float() for row in rows]
            slots = Slots(2)
            before = self.read([row[:-1] for row in rows], slots)
            after = self.step(torch.tensor([4, 6]), torch.tensor([3, 1]), slots)
            self.tokens_read = 0
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise DistillError(f"this architecture can't be decoded here ({problem})", "teacher.model") from error
        found = torch.stack([before, after], dim=1)
        apart = float((found - torch.stack(wanted).to(found.device)).abs().max())
        # In half precision two orders of the same sums differ; an unknown scale or cap differs by far more.
        allowed = {torch.float32: 1e-3, torch.float64: 1e-6}.get(self.dtype, 0.05) * max(1.0, float(found.abs().max()))
        if not apart <= allowed:
            raise DistillError(
                f"its logits are not its head applied to its last hidden states (apart by {apart:.2g}), so another "
                "architecture is needed",
                "teacher.model",
            )


class Slots(Cache):
    """Keys and values of the requests that run: slot i belongs to row i, from column 0 on.

    Args:
        rows: How many requests run at most.
    """

    def __init__(self, rows: int) -> None:
        super().__init__(layers=[])
        self._rows, self._columns = rows, 0
        self._used = 0
        self._layers: dict[int, list[torch.Tensor]] = {}  # keys and values, each (rows, heads, columns, width)
        self._positions: torch.Tensor | None = None  # (n,) of the token that is read; None while prompts are read
        self._read: slice = slice(0)  # the rows that are written
        self._seen = 0

    def admit(self, rows: int, columns: int) -> None:
        """The next `update` writes the prompts of so many more rows."""
        self._reserve(columns)
        self._positions, self._read, self._seen = None, slice(self._used, self._used + rows), columns
        self._used += rows

    def advance(self, positions: torch.Tensor) -> int:
        """The next `update` writes one token of each row. Returns how many columns are in sight."""
        self._seen = int(positions.max()) + 1
        self._reserve(self._seen)
        self._positions, self._read = positions, slice(0, len(positions))
        return self._seen

    def remove(self, row: int) -> None:
        """The last row takes the place of this one."""
        self._used -= 1
        if row != self._used:
            for pair in self._layers.values():
                for tensor in pair:
                    tensor[row] = tensor[self._used]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what a layer computed; return what it attends to. Called by the model."""
        new = (key_states, value_states)
        if layer_idx not in self._layers:
            # Zeros, because a column that was never written is masked, and what is masked must still be finite.
            self._layers[layer_idx] = [
                states.new_zeros(self._rows, states.shape[1], self._columns, states.shape[3]) for states in new
            ]
        if self._positions is None:
            for stored, states in zip(self._layers[layer_idx], new, strict=True):
                stored[self._read, :, : self._seen] = states
            return new
        keys, values = self._layers[layer_idx]
        rows = torch.arange(len(self._positions), device=keys.device)
        positions = self._positions.to(keys.device)
        keys[rows, :, positions] = key_states[:, :, 0]
        values[rows, :, positions] = value_states[:, :, 0]
        return keys[self._read, :, : self._seen], values[self._read, :, : self._seen]

    def _reserve(self, columns: int) -> None:
        if columns <= self._columns:
            return
        self._columns = -(-columns // GROWTH) * GROWTH
        for pair in self._layers.values():
            for i, old in enumerate(pair):
                pair[i] = old.new_zeros(self._rows, old.shape[1], self._columns, old.shape[3])
                pair[i][:, :, : old.shape[2]] = old


@dataclass
class _Request:
    """One request on its way."""

    row: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[np.ndarray] = field(default_factory=list)
    top_logprobs: list[np.ndarray] = field(default_factory=list)
    text: str | None = None  # set where a stop text ended it
    finish: str = ""


class Decoder:
    """Answers prompts.

    Args:
        network: The model.
        tokenizer: For texts.
        ends: The tokens that end an answer.
        batch_size: How many requests run at once.
    """

    def __init__(self, network: Network, tokenizer: Any, ends: set[int], batch_size: int) -> None:
        self._network, self._tokenizer, self._ends, self._batch_size = network, tokenizer, ends, batch_size

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        uniforms: np.ndarray | None,
        top_k: int = 0,
        processors: Sequence[Processor | Guided] = (),
    ) -> Completions:
        """The answers, in the order of the prompts.

        The tokens of an answer that a stop text ended include those of the stop text, as its text does not; log-
        probabilities are those of the logits that `processors` leave, at temperature 1 and without top-p.

        Args:
            prompts: n prompts as tokens, none empty.
            sampling: How to draw.
            uniforms: (n, max_tokens) in (0, 1): by inversion, they decide what is drawn. None for greedy decoding.
            top_k: How many log-probabilities to tell at each position; 0 for none.
            processors: Applied in this order, to the logits with `sampling.logit_bias`.

        Raises:
            DistillError: The logits are not finite.
        """
        requests = [_Request(row, prompt) for row, prompt in enumerate(prompts)]
        waiting = deque(sorted(requests, key=lambda request: -len(request.prompt)))
        running: list[_Request] = []
        guides = [network for each in processors if isinstance(each, Guided) for network in each.networks]
        models = [(network, Slots(min(self._batch_size, len(requests)))) for network in (self._network, *guides)]
        while waiting or running:
            free = self._batch_size - len(running)
            if waiting and (not running or REFILL * free >= self._batch_size):
                many = min(free, len(waiting), max(1, PREFILL_TOKENS // len(waiting[0].prompt)))
                asked = [waiting.popleft() for _ in range(many)]
                read = [request.prompt for request in asked]
                told = [network.read(read, slots) for network, slots in models]
                running += asked
            else:
                asked = running
                tokens = torch.tensor([request.tokens[-1] for request in asked])
                positions = torch.tensor([len(request.prompt) + len(request.tokens) - 1 for request in asked])
                told = [network.step(tokens, positions, slots) for network, slots in models]
            self._draw(asked, told, sampling, uniforms, top_k, processors)
            for i in reversed(range(len(running))):
                if running[i].finish:
                    for _, slots in models:
                        slots.remove(i)
                    running[i] = running[-1]
                    running.pop()
        return self._completions(requests, top_k)

    def _draw(
        self,
        requests: Sequence[_Request],
        told: list[torch.Tensor],
        sampling: Sampling,
        uniforms: np.ndarray | None,
        top_k: int,
        processors: Sequence[Processor | Guided],
    ) -> None:
        """One more token of each request. `told`: the logits of the model and of those that guide it."""
        logits, *guides = told
        if not torch.isfinite(logits.amax(dim=-1)).all():  # a NaN is the largest; -inf alone is a masked token
            raise DistillError(
                "the logits are not finite: the weights are damaged, or teacher.dtype is too narrow for them",
                "teacher.model",
            )
        if processors or sampling.logit_bias:
            tokens = [request.prompt + request.tokens for request in requests]
            logits = processed(logits, tokens, sampling, processors, guides)
        if uniforms is None:
            drawn = logits.argmax(dim=-1)
        else:
            places = [request.row for request in requests], [len(request.tokens) for request in requests]
            by = torch.from_numpy(uniforms[places]).to(logits.device)
            drawn = draw(logits / sampling.temperature, by, sampling.top_p)
        if top_k:
            logprobs = logits.log_softmax(dim=-1)
            top = logprobs.topk(min(top_k, logits.shape[1]), dim=-1)
            ids = top.indices.masked_fill(top.values == -torch.inf, -1)
            own = logprobs.gather(1, drawn[:, None])[:, 0].tolist()
            for request, value, some, values in zip(
                requests, own, ids.cpu().numpy(), top.values.cpu().numpy(), strict=True
            ):
                request.logprobs.append(value)
                request.top_ids.append(some)
                request.top_logprobs.append(values)
        for request, token in zip(requests, drawn.tolist(), strict=True):
            request.tokens.append(token)
            if token in self._ends:
                request.finish = "stop"
            elif sampling.stop and (text := self._cut(request.tokens, sampling.stop)) is not None:
                request.text, request.finish = text, "stop"
            elif len(request.tokens) == sampling.max_tokens:
                request.finish = "length"

    def _cut(self, tokens: list[int], stop: tuple[str, ...]) -> str | None:
        """The text before the first stop text, where the last token completed one."""
        # A character takes at least a token a byte at worst, so a stop text can't begin before this tail.
        tail = self._text(tokens[-max(len(text.encode()) for text in stop) - 4 :])
        if not any(text in tail for text in stop):
            return None
        whole = self._text(tokens)
        found = [place for text in stop if (place := whole.find(text)) >= 0]
        return whole[: min(found)] if found else None

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _completions(self, requests: Sequence[_Request], top_k: int) -> Completions:
        lengths = np.array([len(request.tokens) for request in requests], dtype=np.int64)
        answers = [self._text(request.tokens) if request.text is None else request.text for request in requests]
        flat: dict[str, Any] = {}
        if top_k and requests:
            flat = {
                "logprobs": np.array([value for request in requests for value in request.logprobs], np.float32),
                "top_ids": np.stack([row for request in requests for row in request.top_ids]).astype(np.int32),
                "top_logprobs": np.stack([row for request in requests for row in request.top_logprobs]),
            }
        return Completions(
            texts(answers),
            texts([request.finish for request in requests]),
            np.array([len(request.prompt) for request in requests], dtype=np.int64),
            lengths,
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            token_ids=np.array([token for request in requests for token in request.tokens], dtype=np.int32),
            **flat,
        )


def processed(
    logits: torch.Tensor,
    tokens: list[list[int]],
    sampling: Sampling,
    processors: Sequence[Processor | Guided],
    guides: Sequence[torch.Tensor],
) -> torch.Tensor:
    """(n, vocabulary) logits with the request's bias and what `processors` do to them.

    Args:
        logits: (n, vocabulary) float32 of the model.
        tokens: The n sequences before them.
        sampling: Of the request.
        processors: Applied in this order.
        guides: The logits of the networks of those that are `Guided`, in order, each as `logits`.

    Raises:
        DistillError: The bias names a token that there isn't.
    """
    if sampling.logit_bias:
        named = torch.tensor([token for token, _ in sampling.logit_bias], device=logits.device)
        if not 0 <= int(named.min()) <= int(named.max()) < logits.shape[1]:
            raise DistillError(f"the teacher has {logits.shape[1]} tokens, and one of another is named", "attack")
        bias = torch.tensor([value for _, value in sampling.logit_bias], device=logits.device, dtype=logits.dtype)
        logits = logits.index_add(1, named, bias.expand(len(logits), -1))
    rest = list(guides)
    for processor in processors:
        if isinstance(processor, Guided):
            theirs, rest = rest[: len(processor.networks)], rest[len(processor.networks) :]
            logits = processor.change(tokens, logits, theirs)
        else:
            logits = processor(tokens, logits)
    return logits


def draw(logits: torch.Tensor, uniforms: torch.Tensor, top_p: float) -> torch.Tensor:
    """(n,) tokens by inversion of the cumulative distribution, within the smallest set of tokens with mass `top_p`.

    Args:
        logits: (n, vocabulary) float32.
        uniforms: (n,) float64 in (0, 1).
        top_p: 1 for all tokens.
    """
    probs = logits.softmax(dim=-1)
    if top_p == 1:
        return _invert(probs.cumsum(dim=-1, dtype=torch.float64), uniforms)
    drawn = torch.empty(len(probs), dtype=torch.int64, device=probs.device)
    left = torch.arange(len(probs), device=probs.device)
    for k in (min(NUCLEUS, probs.shape[1]), probs.shape[1]):  # sorting all of a vocabulary takes longer than a step
        values, tokens = probs[left].topk(k, dim=-1)
        cumulated = values.cumsum(dim=-1, dtype=torch.float64)
        enough = (cumulated[:, -1] >= top_p) | torch.tensor(k == probs.shape[1], device=probs.device)
        cumulated, tokens, rows = cumulated[enough], tokens[enough], left[enough]
        # Tokens are kept until their mass reaches top_p, the one that reaches it included.
        kept = (cumulated < top_p).sum(dim=-1).clamp(max=k - 1)
        mass = cumulated.gather(1, kept[:, None])[:, 0]
        place = _invert(cumulated, uniforms[rows] * mass, total=False)
        drawn[rows] = tokens.gather(1, torch.minimum(place, kept)[:, None])[:, 0]
        left = left[~enough]
        if not len(left):
            break
    return drawn


def _invert(cumulated: torch.Tensor, uniforms: torch.Tensor, total: bool = True) -> torch.Tensor:
    """(n,) the first column whose cumulated mass exceeds each number; with `total`, a share of the row's mass."""
    wanted = uniforms * cumulated[:, -1] if total else uniforms
    place = torch.searchsorted(cumulated, wanted[:, None], right=True)[:, 0]
    return place.clamp(max=cumulated.shape[1] - 1)


def padded(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """(n, longest) int64, with zeros on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
