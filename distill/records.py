"""What is passed around: columns of inputs, queries, answers and transfer sets, and the typed result of a run.

Everything here is numpy and plain Python; no torch is loaded. Collections are columns, never one object a row.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distill.errors import DistillError, nearest

RESULT_SCHEMA = 1
ROWS_AT_ONCE = 65_536  # how many rows are held in memory where a whole column might not fit


# --- inputs ---------------------------------------------------------------------------------------------------------


class Inputs(Protocol):
    """A column of n inputs. A numpy array is one; so is anything that reads its rows from disk when asked.

    Images are uint8 (rows, height, width, channels) pixels, or float32 in [0, 1] where an attack made them; tables are
    float32 (rows, features); texts are object arrays (rows,) of `str`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """The rows at an integer array or a slice, as one numpy array."""
        ...


@dataclass(frozen=True)
class InputSpec:
    """What one input is. `shape`: (height, width, channels) of an image, (features,) of a table, () of a text."""

    kind: str
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("image", "table", "text"):
            raise ValueError(f"kind is image, table or text, not {self.kind!r}")


def content_keys(inputs: np.ndarray) -> np.ndarray:
    """The content hash of each row: (n,) of dtype ``S16``. Equal inputs have equal keys, whatever pool they lie in."""
    if inputs.dtype == object:
        digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in inputs]
    else:
        head = f"{inputs.dtype.str}{inputs.shape[1:]}".encode()
        rows = np.ascontiguousarray(inputs).reshape(len(inputs), -1)
        digests = [hashlib.blake2b(row.data, digest_size=16, key=head[:64]).digest() for row in rows]
    return np.array(digests, dtype="S16")


def file_hash(path: Path) -> str:
    """The content hash of a file: 32 hexadecimal digits (blake2b)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@dataclass(frozen=True)
class Examples:
    """A column of inputs, with labels where they are known.

    Args:
        inputs: n inputs.
        spec: What one input is.
        labels: (n,) int64 in ``range(len(class_names))``, or None.
        class_names: The meaning of the labels.
        name: For messages and cards.
        stated_fingerprint: A content hash that the source vouches for. Left out, it is computed from every row.
    """

    inputs: Inputs
    spec: InputSpec
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    name: str = ""
    stated_fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: np.ndarray) -> Examples:
        """The examples at these rows, in this order (a lazy view where the inputs are lazy)."""
        inputs = self.inputs[rows] if isinstance(self.inputs, np.ndarray) else Rows(self.inputs, rows)
        labels = None if self.labels is None else self.labels[rows]
        stated = self.stated_fingerprint
        if stated is not None:
            stated = hashlib.blake2b(stated.encode() + np.asarray(rows, np.int64).tobytes(), digest_size=16).hexdigest()
        return replace(self, inputs=inputs, labels=labels, stated_fingerprint=stated)

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the inputs and labels, in order."""
        if self.stated_fingerprint is not None:
            return self.stated_fingerprint
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), ROWS_AT_ONCE):
            digest.update(content_keys(self.inputs[start : start + ROWS_AT_ONCE]).tobytes())
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, dtype=np.int64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Rows:
    """Some rows of another column, read when they are asked for."""

    source: Inputs
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        return self.source[self.rows[index]]


@dataclass(frozen=True)
class Dataset:
    """A classification data set, as the provider and the evaluation see it.

    `train` is the victim's; `held_out` is a disjoint part of the same distribution that an attacker may hold (empty
    unless ``victim_share`` < 1); `test` is seen by the evaluation alone.
    """

    name: str
    spec: InputSpec
    class_names: tuple[str, ...]
    train: Examples
    test: Examples
    held_out: Examples

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def test_labels(self) -> np.ndarray:
        """(n,) int64. Raises `DistillError` where the test rows have none."""
        if self.test.labels is None:
            raise DistillError(f"the test rows of {self.name} have no labels to measure against", "data")
        return self.test.labels


# --- queries and answers --------------------------------------------------------------------------------------------


class Reveals(enum.IntEnum):
    """How much an answer says, poorest first. Of a language model: the text, the k most probable tokens at each
    position too, whole distributions, the hidden states and output matrix behind them, or all weights (white-box)."""

    LABEL = 1
    TEXT = 1
    TOP_K = 2
    PROBS = 3
    LOGITS = 4
    WEIGHTS = 5


@dataclass(frozen=True)
class InterfaceProfile:
    """What an answer reveals, ``label < top_k < probs < logits``, and what a request may ask.

    Args:
        reveals: How much an answer says.
        top_k: How many of the most probable tokens (classes) it names, with `Reveals.TOP_K` alone.
        logit_bias: Of language models: a request may add numbers to the logits of tokens that it names.
        prompt_logprobs: Of language models: log-probabilities of given tokens are told too, not those of answers alone.
    """

    reveals: Reveals
    top_k: int | None = None
    logit_bias: bool = False
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        if (self.reveals is Reveals.TOP_K) != (self.top_k is not None):
            raise DistillError("top_k is stated exactly when the profile is 'top_k'", "access.top_k")
        if self.top_k is not None and self.top_k < 1:
            raise DistillError(f"top_k is at least 1, not {self.top_k}", "access.top_k")

    @classmethod
    def parse(
        cls, name: str, top_k: int | None = None, logit_bias: bool = False, prompt_logprobs: bool = False
    ) -> InterfaceProfile:
        """From a config's words; the top 0 are the label (or text) alone. Raises `DistillError` for an unknown name."""
        known = {level.lower(): value for level, value in Reveals.__members__.items()}
        if name not in known:
            raise DistillError(f"no profile '{name}'.{nearest(name, known)}", "access.profile")
        if known[name] is Reveals.TOP_K and top_k == 0:
            return cls(Reveals.LABEL, None, logit_bias, prompt_logprobs)
        return cls(known[name], top_k, logit_bias, prompt_logprobs)

    def __str__(self) -> str:
        extra = "+bias" * self.logit_bias + "+prompt_logprobs" * self.prompt_logprobs
        if self.top_k is None:
            return self.reveals.name.lower() + extra
        return f"top_{'all' if self.top_k == sys.maxsize else self.top_k}{extra}"

    def meet(self, other: InterfaceProfile) -> InterfaceProfile:
        """The poorer of the two: what is left when both apply."""
        poorer = self if self.reveals <= other.reveals else other
        if self.reveals is other.reveals is Reveals.TOP_K:
            poorer = self if (self.top_k or 0) <= (other.top_k or 0) else other
        prompt_logprobs = self.prompt_logprobs and other.prompt_logprobs
        if poorer.reveals is Reveals.TOP_K:  # whole distributions of given tokens are cut like those of answers
            prompt_logprobs = self.scores and other.scores
        return replace(poorer, logit_bias=self.logit_bias and other.logit_bias, prompt_logprobs=prompt_logprobs)

    @property
    def scores(self) -> bool:
        """Of language models: given tokens can be scored. Whole distributions are told of any text."""
        return self.reveals >= Reveals.PROBS or (self.prompt_logprobs and self.reveals is Reveals.TOP_K)

    def truncate(self, answers: Answers) -> Answers:
        """The answers with everything removed that this profile does not reveal; what is left is a distribution."""
        if self.reveals >= Reveals.LOGITS:
            return answers
        if self.reveals is Reveals.PROBS:
            return Answers(answers.posteriors)
        if self.reveals is Reveals.LABEL:
            return Answers(one_hot(answers.labels, answers.classes))
        assert self.top_k is not None
        return Answers(keep_top_k(answers.posteriors, self.top_k))


# Every log-probability at every position, but neither states nor weights: what can be told of a language model whose
# distributions were changed.
EVERY_LOGPROB = InterfaceProfile(Reveals.TOP_K, sys.maxsize, logit_bias=True, prompt_logprobs=True)


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """(n, classes) float32 with a one at each label."""
    rows = np.zeros((len(labels), classes), dtype=np.float32)
    rows[np.arange(len(labels)), labels] = 1.0
    return rows


def keep_top_k(posteriors: np.ndarray, k: int) -> np.ndarray:
    """The `k` largest entries of each row, renormalised; the first of equal entries is kept."""
    if k >= posteriors.shape[1]:
        return posteriors
    order = np.argsort(-posteriors, axis=1, kind="stable")[:, :k]
    kept = np.zeros_like(posteriors)
    np.put_along_axis(kept, order, np.take_along_axis(posteriors, order, axis=1), axis=1)
    return kept / kept.sum(axis=1, keepdims=True)


def keep_label(posteriors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Break ties towards `labels`: where the first largest entry of a row is another one, its label's entry becomes the
    largest by one float32 step."""
    lost = np.flatnonzero(posteriors.argmax(axis=1) != labels)
    if len(lost):
        posteriors = posteriors.copy()
        posteriors[lost, labels[lost]] = np.nextafter(posteriors[lost].max(axis=1), np.float32(2))
    return posteriors


@dataclass(frozen=True)
class Queries:
    """n inputs to ask about.

    Args:
        source: The column that the inputs are taken from.
        rows: (n,) int64, which of its rows, in the order of asking.
        from_pool: True where `source` is the attacker's pool (the transfer set then stores rows, not inputs).
    """

    source: Inputs
    rows: np.ndarray
    from_pool: bool

    @classmethod
    def of_pool(cls, pool: Examples, rows: np.ndarray) -> Queries:
        return cls(pool.inputs, np.asarray(rows, dtype=np.int64), from_pool=True)

    @classmethod
    def made(cls, inputs: np.ndarray) -> Queries:
        """Inputs that the attack itself made."""
        return cls(inputs, np.arange(len(inputs), dtype=np.int64), from_pool=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Queries:
        return replace(self, rows=self.rows[part])

    def inputs(self) -> np.ndarray:
        return self.source[self.rows]


@dataclass(frozen=True)
class Answers:
    """n answers of a classifier.

    Args:
        posteriors: (n, classes) float32; every row is non-negative and sums to one.
        logits: (n, classes) float32 with ``softmax(logits) == posteriors``, where they are revealed.
    """

    posteriors: np.ndarray
    logits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.posteriors)

    @property
    def classes(self) -> int:
        return self.posteriors.shape[1]

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64: the first largest entry of each row."""
        return self.posteriors.argmax(axis=1)

    def __getitem__(self, part: Any) -> Answers:
        return Answers(self.posteriors[part], None if self.logits is None else self.logits[part])

    @classmethod
    def join(cls, parts: list[Answers]) -> Answers:
        if len(parts) == 1:
            return parts[0]
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(
            np.concatenate([part.posteriors for part in parts]),
            np.concatenate(logits) if len(logits) == len(parts) else None,
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise softmax, computed in float64, as float32."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)


# --- budget and cost ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What an attacker may spend. None means no bound; at least one bound is set. Tokens are those of language models,
    prompts and answers together."""

    queries: int | None = None
    usd: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.queries is None and self.usd is None and self.tokens is None:
            raise DistillError("set budget.queries, budget.usd or, for text, budget.tokens", "budget")
        if self.tokens is not None and self.tokens <= 0:
            raise DistillError(f"must be at least 1, not {self.tokens}", "budget.tokens")
        if self.queries is not None and self.queries <= 0:
            raise DistillError(f"must be at least 1, not {self.queries}", "budget.queries")
        if self.usd is not None and not (self.usd > 0 and math.isfinite(self.usd)):
            raise DistillError(f"must be more than 0, not {self.usd}", "budget.usd")


@dataclass(frozen=True)
class Cost:
    """What was spent. `queries` and `usd` are what the attacker is billed; the rest is what it took."""

    queries: int = 0
    usd: float = 0.0
    teacher_forwards: int = 0  # rows that really went through the teacher in this process
    seconds: float = 0.0
    # Of language models: what the attacker is billed for, and what was really generated and paid for in this process.
    tokens_in: int = 0
    tokens_out: int = 0
    teacher_tokens: int = 0
    spent_usd: float = 0.0
    defense_tokens: int = 0  # that went through further models of a defense in this process


# --- the transfer set -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransferSet:
    """What an attacker holds after asking: n queries and the answers to them, in the order of asking.

    Args:
        rows: (n,) int64 rows of the pool; -1 where the attack made the input.
        posteriors: (n, classes) float32, the answers as they were returned (or labels, one-hot, in a control).
        made: (m, ...) the inputs of those queries that the attack made, in order; None where all are pool rows.
        logits: (n, classes) float32 where the interface reveals them.
        targets: (n, classes) float32, what a student is trained on: set by a recovery.
        groups: (n,) int64: queries of one group were asked as one (repeats and variants of an input); None where each
            stands for itself.
        pool: Fingerprint of the pool.
        profile: What the answers reveal, as text.
        note: One line on where it comes from, for the card.
    """

    rows: np.ndarray
    posteriors: np.ndarray
    made: np.ndarray | None = None
    logits: np.ndarray | None = None
    targets: np.ndarray | None = None
    groups: np.ndarray | None = None
    pool: str = ""
    profile: str = ""
    note: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def classes(self) -> int:
        return self.posteriors.shape[1]

    def head(self, n: int) -> TransferSet:
        """The first n queries: what the attacker held when the budget was n."""
        made = None if self.made is None else self.made[: int((self.rows[:n] < 0).sum())]
        return replace(
            self,
            rows=self.rows[:n],
            posteriors=self.posteriors[:n],
            made=made,
            logits=None if self.logits is None else self.logits[:n],
            targets=None if self.targets is None else self.targets[:n],
            groups=None if self.groups is None else self.groups[:n],
        )

    def take(self, rows: np.ndarray) -> TransferSet:
        """These queries, in this order."""
        made = self.made
        if made is not None:
            place = np.cumsum(self.rows < 0) - 1  # of a query's input in `made`
            made = made[place[rows][self.rows[rows] < 0]]
        logits, targets, groups = (
            None if column is None else column[rows] for column in (self.logits, self.targets, self.groups)
        )
        return replace(
            self,
            rows=self.rows[rows],
            posteriors=self.posteriors[rows],
            made=made,
            logits=logits,
            targets=targets,
            groups=groups,
        )

    def inputs(self, pool: Examples) -> Inputs:
        """The column of all n inputs. Raises `DistillError` if `pool` is not the pool that was asked from."""
        if (self.rows >= 0).any() and pool.fingerprint != self.pool:
            raise DistillError("this transfer set was made from another pool", "pool")
        if self.made is None:
            return Rows(pool.inputs, self.rows)
        if (self.rows < 0).all():
            return self.made
        inputs = np.empty((len(self), *self.made.shape[1:]), dtype=self.made.dtype)
        inputs[self.rows < 0] = self.made
        drawn = pool.inputs[self.rows[self.rows >= 0]]
        pixels_differ = drawn.dtype == np.uint8 and self.made.dtype == np.float32  # 0 … 255 and [0, 1]
        inputs[self.rows >= 0] = drawn / np.float32(255) if pixels_differ else drawn
        return inputs


# --- the result -----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """`result.json`: everything that a run measured. Written last and atomically; its presence means "done".

    `accuracy` and `calibration` hold one entry for each of teacher, defended_teacher and student; `fidelity` compares
    the student, and `utility` the returned answers, with the undefended teacher. `curve` has one row for each
    intermediate budget. `tracks` tells two students apart: "A" was trained from fresh weights on the transfer set (is
    the set good?), and everything else here is about it; "B" is the attack's own (is the attack good?), with a curve of
    its own. Where its ``own`` is false, the attack trains as track A does. Numbers under ``seconds`` and ``latency``
    are wall-clock and differ from run to run.
    """

    run_id: str
    query_id: str
    choices: dict[str, str]
    config: dict[str, Any]
    seed: int
    profile: str
    fingerprints: dict[str, str]
    classes: int = 0  # 0 for a language model
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    calibration: dict[str, dict[str, float]] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)
    utility: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    tracks: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, dict[str, float | None]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    ownership: dict[str, Any] = field(default_factory=dict)
    detection: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    test_rows: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    schema: int = RESULT_SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a `result.json`. Raises `DistillError` for a damaged file or another schema."""
        try:
            values = json.loads(path.read_text())
            schema = values["schema"]
            if schema != RESULT_SCHEMA:
                raise DistillError(f"{path} has result schema {schema}; this version reads {RESULT_SCHEMA}")
            known = {f.name for f in fields(cls)}
            return cls(**{name: value for name, value in values.items() if name in known})
        except (ValueError, KeyError, TypeError) as error:
            raise DistillError(f"{path} is not a result of this program ({error})") from None
