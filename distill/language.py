"""What is passed around in the generation domain: prompts, how an answer is drawn, completions, synthetic data sets.

Everything here is numpy and plain Python; no torch is loaded. Collections are columns, never one object a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from distill.errors import DistillError
from distill.records import content_keys

Messages = list[dict[str, str]]  # as everywhere: [{"role": "user", "content": "…"}, …]
ROLES = ("system", "user", "assistant")


def texts(values: Sequence[str]) -> np.ndarray:
    """(n,) object array of `str`."""
    column = np.empty(len(values), dtype=object)
    column[:] = list(values)
    return column


def encode_messages(messages: Sequence[Mapping[str, str]]) -> str:
    """One chat as one line of canonical JSON, so that equal chats are equal texts. Raises `DistillError`."""
    for message in messages:
        if set(message) != {"role", "content"} or message["role"] not in ROLES:
            raise DistillError(f"a message has a role ({', '.join(ROLES)}) and a content, not {dict(message)}", "pool")
        if not isinstance(message["content"], str):
            raise DistillError(f"a message's content is a text, not {message['content']!r}", "pool")
    if not messages or messages[-1]["role"] == "assistant":
        raise DistillError("a chat to be answered ends with a message of the user", "pool")
    return json.dumps([dict(message) for message in messages], ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class Prompts:
    """A column of n prompts.

    Args:
        column: (n,) object array of `str`: chats as `encode_messages` writes them, or plain texts to be continued.
        chat: Which of the two.
        references: (n,) object array of `str`: a right answer, written as a teacher would write it; for controls and
            overlap metrics. None where none is known.
        entries: (n,) object array of `str`: what the task's checker needs to know of each prompt. None without a task.
        name: For messages and cards.
    """

    column: np.ndarray
    chat: bool = True
    references: np.ndarray | None = None
    entries: np.ndarray | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for other in (self.references, self.entries):
            if other is not None and len(other) != len(self.column):
                raise ValueError("references and entries have one row for each prompt")

    @classmethod
    def of_users(cls, questions: Sequence[str], **others: Any) -> Prompts:
        """Chats of one user message each."""
        return cls(texts([encode_messages([{"role": "user", "content": q}]) for q in questions]), chat=True, **others)

    def __len__(self) -> int:
        return len(self.column)

    def take(self, rows: Any) -> Prompts:
        """The prompts at these rows (integers, a slice or a mask), in this order."""
        part: Any = {name: None if value is None else value[rows] for name, value in self._columns().items()}
        return replace(self, column=self.column[rows], **part)

    def messages(self, row: int) -> Messages:
        """The messages of one chat; a plain text is one message of the user."""
        if self.chat:
            return json.loads(self.column[row])
        return [{"role": "user", "content": self.column[row]}]

    @cached_property
    def keys(self) -> np.ndarray:
        """(n,) ``S16``: the content hash of each prompt."""
        return content_keys(self.column)

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the prompts, references and entries, in order."""
        digest = hashlib.blake2b(f"prompts chat={self.chat}".encode(), digest_size=16)
        digest.update(self.keys.tobytes())
        for name, value in self._columns().items():
            if value is not None:
                digest.update(name.encode() + content_keys(value).tobytes())
        return digest.hexdigest()

    def _columns(self) -> dict[str, np.ndarray | None]:
        return {"references": self.references, "entries": self.entries}


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: part of what identifies a request.

    Args:
        max_tokens: Longest answer.
        temperature: 0 for the most probable token each time.
        top_p: Smallest set of tokens with this mass is drawn from.
        system_prompt: Put before chats that have no system message of their own; None for none.
        stop: Texts that end an answer; they are not part of it.
        seed: With the prompt and the repeat, what a drawn answer depends on.
        logit_bias: Pairs of a token and what is added to its logit, where the API takes them. A defense sees the sum.

    Raises:
        DistillError: A value is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    system_prompt: str | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise DistillError(f"must be at least 1, not {self.max_tokens}", "sampling.max_tokens")
        if not 0 <= self.temperature < float("inf"):
            raise DistillError(f"must be at least 0, not {self.temperature}", "sampling.temperature")
        if not 0 < self.top_p <= 1:
            raise DistillError(f"must be more than 0 and at most 1, not {self.top_p}", "sampling.top_p")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "logit_bias", tuple((int(token), float(bias)) for token, bias in self.logit_bias))
        if "" in self.stop:
            raise DistillError("an empty text ends every answer before it begins; leave it out", "sampling.stop")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits."""
        facts = {name: value for name, value in asdict(self).items() if name != "logit_bias" or value}
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()

    def request_keys(self, prompts: Prompts, repeats: np.ndarray) -> np.ndarray:
        """(n,) ``S16``: what identifies a request to one teacher: prompt, sampling and how often it was made before.

        The repeat of a greedy request says nothing: its answer is always the same.
        """
        facts = [
            f"{self.digest} {prompts.chat} {0 if self.greedy else repeat} ".encode() + key
            for key, repeat in zip(prompts.keys.tolist(), repeats.tolist(), strict=True)
        ]
        return np.array([hashlib.blake2b(fact, digest_size=16).digest() for fact in facts], dtype="S16")

    def conversation(self, prompts: Prompts, row: int) -> Messages:
        """The messages of one chat with the system prompt in its place."""
        messages = prompts.messages(row)
        if self.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


@dataclass(frozen=True)
class Completions:
    """n answers of a language model, as columns. Those of tokens are flat: answer i has ``offsets[i]:offsets[i + 1]``.

    Args:
        column: (n,) object array of `str`.
        finish: (n,) object array of `str`: "stop" where the model ended the answer, "length" where `max_tokens` did.
        prompt_tokens: (n,) int64, as billed.
        completion_tokens: (n,) int64, as billed.
        offsets: (n + 1,) int64, or None where the teacher does not tell its tokens.
        token_ids: (t,) int32: the tokens of the answers, each with the end-of-answer token where `finish` is "stop".
            -1 where an API names tokens only by their text.
        logprobs: (t,) float32: the log-probability of each of them, before temperature; None where it is not told.
        top_ids: (t, k) int32: the k most probable tokens at each position, -1 pads; None where they are not told.
        top_logprobs: (t, k) float32.
    """

    column: np.ndarray
    finish: np.ndarray
    prompt_tokens: np.ndarray
    completion_tokens: np.ndarray
    offsets: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.column)

    @property
    def top_k(self) -> int:
        """How many tokens of each position are told (0: none)."""
        return 0 if self.top_ids is None else self.top_ids.shape[1]

    def take(self, rows: Any) -> Completions:
        """The answers at these rows (integers, a slice or a mask), in this order."""
        whole = {name: getattr(self, name)[rows] for name in WHOLE}
        if self.offsets is None:
            return Completions(**whole)
        starts, ends = self.offsets[:-1][rows], self.offsets[1:][rows]
        offsets = np.concatenate([[0], np.cumsum(ends - starts)])
        flat = np.repeat(starts - offsets[:-1], ends - starts) + np.arange(offsets[-1])
        taken: Any = {name: None if column is None else column[flat] for name, column in self.flat().items()}
        return Completions(**whole, offsets=offsets, **taken)

    def flat(self) -> dict[str, np.ndarray | None]:
        """The columns of tokens."""
        return {name: getattr(self, name) for name in FLAT}

    def tokens(self, row: int) -> np.ndarray:
        """The token ids of one answer. Raises `DistillError` where they are not told."""
        if self.offsets is None or self.token_ids is None:
            raise DistillError("the answers come without token ids", "access")
        return self.token_ids[self.offsets[row] : self.offsets[row + 1]]

    def without_tokens(self) -> Completions:
        """Text, finish reasons and usage alone."""
        return Completions(**{name: getattr(self, name) for name in WHOLE})

    def with_top(self, k: int) -> Completions:
        """At most the k most probable tokens at each position; with 0, not even the drawn token's log-probability."""
        if k == 0:
            return replace(self, logprobs=None, top_ids=None, top_logprobs=None)
        if self.top_ids is None or self.top_logprobs is None or self.top_k <= k:
            return self
        return replace(self, top_ids=self.top_ids[:, :k], top_logprobs=self.top_logprobs[:, :k])

    @classmethod
    def join(cls, parts: Sequence[Completions]) -> Completions:
        """One after the other. All have the same columns and the same k."""
        if len(parts) == 1:
            return parts[0]
        whole = {name: np.concatenate([getattr(part, name) for part in parts]) for name in WHOLE}
        if any(part.offsets is None for part in parts):
            return cls(**whole)
        lengths = np.concatenate([np.diff(part.offsets) for part in parts if part.offsets is not None])
        flat: dict[str, Any] = {}
        for name in FLAT:
            columns = [getattr(part, name) for part in parts]
            flat[name] = None if any(column is None for column in columns) else np.concatenate(columns)
        return cls(**whole, offsets=np.concatenate([[0], np.cumsum(lengths)]), **flat)

    @classmethod
    def none(cls) -> Completions:
        """No answers."""
        return cls(texts([]), texts([]), np.empty(0, np.int64), np.empty(0, np.int64))


FLAT = tuple(f.name for f in fields(Completions) if f.name in ("token_ids", "logprobs", "top_ids", "top_logprobs"))
WHOLE = tuple(f.name for f in fields(Completions) if f.name not in FLAT and f.name != "offsets")

# A task's checker: prompts and the answers to them, (n,) object array of `str`, to (n,) float64 in [0, 1].
Checker = Callable[[Prompts, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Task:
    """A generation task, as the provider and the evaluation see it (what `Dataset` is for classification).

    Args:
        name: For messages and tables.
        train: What a teacher that is trained here learns from; empty where teachers come trained.
        held_out: Prompts that an attacker may hold.
        test: Seen by the evaluation alone.
        check: The task's own checker; None where answers can't be checked.
        held_out_text: Real text for perplexity, (m,) object array of `str`; None for none.
    """

    name: str
    train: Prompts
    held_out: Prompts
    test: Prompts
    check: Checker | None = None
    held_out_text: np.ndarray | None = None


@dataclass(frozen=True)
class SyntheticSet:
    """The transfer set of the generation domain: n prompts and the answers that were returned, in the order of asking.

    Args:
        prompts: n prompts; one that was asked several times stands here several times.
        completions: n answers.
        repeats: (n,) int64, how often the same prompt was asked before with this sampling.
        sampling: How the answers were drawn; None for ground truth and the like.
        usd: (n,) float64, what each answer was billed.
        teacher: Fingerprint of the teacher as the API states it, or "".
        profile: What the answers reveal, as text.
        weights: (n,) float32, how much each answer counts in training; None for all alike. Set by a recovery.
        rows: (n,) int64, which answers of the set that was paid for these are; None for all of them, in order.
        dropped: How many answers each filter of the recovery dropped.
        note: One line on where it comes from, for the card.
    """

    prompts: Prompts
    completions: Completions
    repeats: np.ndarray
    sampling: Sampling | None
    usd: np.ndarray
    teacher: str = ""
    profile: str = ""
    weights: np.ndarray | None = None
    rows: np.ndarray | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    note: str = ""

    def __len__(self) -> int:
        return len(self.completions)

    def head(self, n: int) -> SyntheticSet:
        """The first n answers: what the attacker held when the budget was n."""
        return self.take(slice(0, n))

    def take(self, rows: Any) -> SyntheticSet:
        """The answers at these rows (integers, a slice or a mask), in this order."""
        return replace(
            self,
            prompts=self.prompts.take(rows),
            completions=self.completions.take(rows),
            repeats=self.repeats[rows],
            usd=self.usd[rows],
            weights=None if self.weights is None else self.weights[rows],
            rows=(np.arange(len(self)) if self.rows is None else self.rows)[rows],
        )

    def followed_by(self, other: SyntheticSet) -> SyntheticSet:
        """These answers and then those of another set, as texts: what tokens either came with is left out."""

        def weights(part: SyntheticSet) -> np.ndarray:
            return np.ones(len(part), np.float32) if part.weights is None else part.weights

        def both(name: str) -> Any:
            mine, theirs = getattr(self.prompts, name), getattr(other.prompts, name)
            return None if mine is None or theirs is None else np.concatenate([mine, theirs])

        parts = [self.completions.without_tokens(), other.completions.without_tokens()]
        return replace(
            self,
            prompts=replace(
                self.prompts,
                column=np.concatenate([self.prompts.column, other.prompts.column]),
                references=both("references"),
                entries=both("entries"),
            ),
            completions=Completions.join(parts),
            repeats=np.concatenate([self.repeats, other.repeats]),
            usd=np.concatenate([self.usd, other.usd]),
            weights=None
            if self.weights is None and other.weights is None
            else np.concatenate([weights(self), weights(other)]),
            rows=None,
        )

    @classmethod
    def without_teacher(cls, prompts: Prompts, answers: np.ndarray, note: str) -> SyntheticSet:
        """Answers, (n,) object array of `str`, that nobody was asked for and that cost nothing."""
        n = len(prompts)
        nothing = np.zeros(n, dtype=np.int64)
        completions = Completions(answers, texts(["stop"] * n), nothing, nothing)
        return cls(prompts, completions, nothing, None, np.zeros(n), profile="text", note=note)

    def keep(self, mask: np.ndarray, filter_name: str) -> SyntheticSet:
        """The answers where `mask` holds, with the count of the others under the filter's name."""
        return replace(self.take(mask), dropped=self.dropped | {filter_name: int((~mask).sum())})


class Speaker(Protocol):
    """A language model at hand: what the evaluation needs of teacher and student alike.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
    """

    tokenizer: Any

    def prompt_tokens(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        """The tokens that each prompt becomes, template and generation prompt included."""
        ...

    def generate(self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray) -> Completions:
        """Its answers, those of an adapted student as it gives them; see `distill.contracts.LanguageTeacher`."""
        ...

    def heads(self, sequences: list[list[int]], starts: list[int]) -> list[Any]:
        """For each sequence the distributions (`distill.heads.Head`) of its tokens from `starts` on."""
        ...


@dataclass(frozen=True)
class Evidence:
    """What the metrics of the generation domain look at. `who` is teacher, defended_teacher, student or untrained.

    Args:
        prompts: The test prompts.
        sampling: How they were answered.
        answers: By `who`, an answer to each test prompt.
        check: The task's checker, or None.
        text: (m,) object array of `str` for perplexity, or None.
        speakers: By `who`, the models whose distributions can be computed here; a teacher behind an API is not among
            them, nor is one whose tokens are not the student's.
        watermark: The provider's (`distill.contracts.Watermark`), where its defense is one.
        learnt: What the student was trained on, as it was returned.
    """

    prompts: Prompts
    sampling: Sampling
    answers: Mapping[str, Completions]
    check: Checker | None
    text: np.ndarray | None
    speakers: Mapping[str, Speaker]
    watermark: Any = None
    learnt: SyntheticSet | None = None
