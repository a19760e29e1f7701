"""From answers to packed rows of tokens: what a causal language model is trained on.

Several examples share a row, so that no forward pass is spent on padding. They don't see one another: positions start
at 0 in each, from which transformers derives the attention mask. Only answers are learnt, never prompts.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from distill.errors import DistillError
from distill.language import Prompts, Sampling, SyntheticSet

IGNORED = -100  # the label of a position that is not learnt, as everywhere in Hugging Face and PyTorch


# --- tokens ---------------------------------------------------------------------------------------------------------


def same_tokens(tokenizer: Any, other: Any) -> bool:
    """Whether each token id means the same to both."""
    return tokenizer is other or tokenizer.get_vocab() == other.get_vocab()


def _template(tokenizer: Any, messages: Any, **options: Any) -> str:
    """The text of one chat. Raises `DistillError` where there is no template, or where it refuses the chat."""
    if tokenizer.chat_template is None:
        raise DistillError(
            f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template; take an "
            "instruction-tuned model, or a pool of plain text",
            "student",
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates are programs and raise what they like
        raise DistillError(f"the chat template refuses a prompt: {' '.join(str(error).split())}", "student") from error


def prompt_tokens(tokenizer: Any, prompts: Prompts, sampling: Sampling | None = None) -> list[list[int]]:
    """The tokens that each prompt becomes, template, system prompt and generation prompt included.

    Raises `DistillError` for a tokenizer without a chat template (where the prompts are chats).
    """
    if not len(prompts):
        return []
    if not prompts.chat:
        return tokenizer(prompts.column.tolist()).input_ids
    chats = [
        prompts.messages(row) if sampling is None else sampling.conversation(prompts, row)
        for row in range(len(prompts))
    ]
    rendered = [_template(tokenizer, chat, add_generation_prompt=True) for chat in chats]
    return tokenizer(rendered, add_special_tokens=False).input_ids


def end_of_answer(tokenizer: Any, chat: bool) -> int:
    """The token that ends an answer: the special token that the chat template puts there, else the end of text.

    Raises `DistillError` where there is neither.
    """
    if chat:
        answer = "an answer"
        turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        after = _template(tokenizer, turns).rpartition(answer)[2]
        ids = tokenizer(after.lstrip(), add_special_tokens=False).input_ids
        if ids and ids[0] in tokenizer.all_special_ids:
            return ids[0]
    if tokenizer.eos_token_id is None:
        raise DistillError("the tokenizer has no token that ends a text (eos_token)", "student")
    return tokenizer.eos_token_id


@dataclass(frozen=True)
class Encoded:
    """n examples as tokens.

    Args:
        prompts: n lists of tokens.
        answers: n lists of tokens, each with the token that ends it where the answer was ended.
        weights: (n,) float32, or None for all alike.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.answers)


def encode(synthetic: SyntheticSet, tokenizer: Any, teachers: Any = None) -> Encoded:
    """Prompts and answers in the student's tokens.

    An answer keeps the tokens that the teacher drew where they are told and the tokenizer is the teacher's; the text of
    any other is tokenised anew, by itself, and gets the end-of-answer token where its finish reason is "stop".

    Args:
        synthetic: n prompts and answers.
        tokenizer: The student's.
        teachers: The teacher's, where it is public.

    Raises:
        DistillError: The prompts are chats and the tokenizer has no chat template, or no token that ends an answer.
    """
    completions = synthetic.completions
    answers: list[list[int]] = [[] for _ in range(len(completions))]
    drawn = np.zeros(len(completions), dtype=bool)
    if completions.token_ids is not None and teachers is not None and same_tokens(tokenizer, teachers):
        for row in range(len(completions)):
            ids = completions.tokens(row)
            drawn[row] = len(ids) > 0 and (ids >= 0).all()
            answers[row] = ids.tolist()
    retold = np.flatnonzero(~drawn)
    if len(retold):
        end = [end_of_answer(tokenizer, synthetic.prompts.chat)]
        told = tokenizer(completions.column[retold].tolist(), add_special_tokens=False).input_ids
        for row, ids in zip(retold.tolist(), told, strict=True):
            answers[row] = ids + (end if completions.finish[row] == "stop" else [])
    return Encoded(prompt_tokens(tokenizer, synthetic.prompts, synthetic.sampling), answers, synthetic.weights)


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Rows of one length, each with several examples one after the other and padding at its end.

    Args:
        input_ids: (rows, length) int32.
        position_ids: (rows, length) int32: the position in its example, from 0. Padding counts as one more example.
        labels: (rows, length) int32: the token that is to be predicted *at* this position, the next one of its example,
            where that belongs to the answer; `IGNORED` elsewhere.
        sequence: (rows, length) int32: where there is a label, which example it belongs to; -1 elsewhere.
        token: (rows, length) int32: where there is a label, which token of the answer it is, from 0; -1 elsewhere.
        weights: (rows, length) float32: where there is a label, how much it counts; None for all alike.
        examples: How many examples were packed.
        tokens: How many positions are not padding.
        truncated: How many examples had their answer cut.
        dropped: How many were left out: weight 0, no answer, or a prompt that leaves no room for one.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    sequence: np.ndarray
    token: np.ndarray
    weights: np.ndarray | None
    examples: int
    tokens: int
    truncated: int
    dropped: int

    def __len__(self) -> int:
        return len(self.labels)

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify everything that is learnt from."""
        digest = hashlib.blake2b(digest_size=16)
        for name, column in self.columns().items():
            digest.update(f"{name} {column.shape}".encode() + column.tobytes())
        return digest.hexdigest()

    def report(self) -> dict[str, float]:
        """What became of the examples. `fill` is the share of all positions that is not padding."""
        counts = {"examples": self.examples, "truncated": self.truncated, "dropped": self.dropped}
        counts |= {"rows": len(self), "tokens": self.tokens, "answer_tokens": int((self.labels != IGNORED).sum())}
        return {**counts, "fill": self.tokens / self.labels.size}


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item, (n,) int64: items from the longest, each to the first bin with room (at most 11/9 of the
    fewest bins possible, and 6/9 of a bin; Dosa, "The Tight Bound of First Fit Decreasing", ESCAPE 2007).

    Args:
        lengths: (n,) int64, each in 1 … `capacity`.
        capacity: Of each bin.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # the bins with so much room, as heaps
    first = np.full(capacity + 1, len(lengths), dtype=np.int64)  # the first of each; a number too large for none
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        room = length + int(first[length:].argmin())
        if first[room] == len(lengths):
            room, chosen, opened = capacity, opened, opened + 1
        else:
            chosen = heapq.heappop(with_room[room])
            first[room] = with_room[room][0] if with_room[room] else len(lengths)
        bins[item] = chosen
        heapq.heappush(with_room[room - length], chosen)
        first[room - length] = with_room[room - length][0]
    return bins


def pack(encoded: Encoded, max_length: int) -> Packed:
    """Rows of at most `max_length` positions, the same each time for the same examples.

    The last token of an answer is predicted and never read, so an example takes one position less than its tokens. An
    answer that does not fit is cut; an example whose prompt alone does not fit is left out.

    Raises:
        DistillError: No example is left.
    """
    weights = np.ones(len(encoded), np.float32) if encoded.weights is None else encoded.weights
    prompts = np.array([len(ids) for ids in encoded.prompts], dtype=np.int64)
    answers = np.array([len(ids) for ids in encoded.answers], dtype=np.int64)
    # Without a prompt the first token of an answer has nothing to be predicted from.
    kept = np.flatnonzero((weights > 0) & (answers > 0) & (prompts <= max_length) & (prompts + answers > 1))
    if not len(kept):
        raise DistillError(
            f"none of {len(encoded)} examples can be learnt from within {max_length} tokens (the shortest prompt has "
            f"{min(prompts, default=0)})",
            "max_length",
        )
    whole = prompts[kept] + answers[kept] - 1
    lengths = np.minimum(whole, max_length)
    bins = first_fit_decreasing(lengths, max_length)
    width = int(np.bincount(bins, weights=lengths).max())
    shape = (int(bins.max()) + 1, width)
    input_ids, position_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    labels, sequence, token = (np.full(shape, value, np.int32) for value in (IGNORED, -1, -1))
    counts = np.zeros(shape, np.float32)
    filled = np.zeros(len(labels), dtype=np.int64)
    for example, length, row in zip(kept.tolist(), lengths.tolist(), bins.tolist(), strict=True):
        ids = np.array(encoded.prompts[example] + encoded.answers[example], dtype=np.int32)
        start, end = filled[row], filled[row] + length
        input_ids[row, start:end], position_ids[row, start:end] = ids[:length], np.arange(length)
        learnt = max(int(prompts[example]), 1)  # the first token that is predicted
        here = slice(start + learnt - 1, end)
        labels[row, here], sequence[row, here] = ids[learnt : length + 1], example
        token[row, here] = np.arange(learnt, length + 1) - prompts[example]
        counts[row, here] = weights[example]
        filled[row] = end
    for row, end in enumerate(filled.tolist()):
        position_ids[row, end:] = np.arange(width - end)
    return Packed(
        input_ids=input_ids,
        position_ids=position_ids,
        labels=labels,
        sequence=sequence,
        token=token,
        weights=None if encoded.weights is None else counts,
        examples=len(kept),
        tokens=int(lengths.sum()),
        truncated=int((whole > max_length).sum()),
        dropped=len(encoded) - len(kept),
    )
