"""The one door: what the attacker holds of a provider, and the thread behind it.

An `Oracle` holds a queue, and a queue leads nowhere: no attribute of it, of an answer or of an exception reaches the
provider, which lives in the frames of another thread. This keeps attacks honest; it is no sandbox for hostile code,
which can always search the interpreter (`gc`, `sys._current_frames`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import BudgetExceeded, DistillError
from distill.heads import Head, Sparse
from distill.language import Prompts, Sampling, SyntheticSet
from distill.provider.provider import Provider, no_answers
from distill.records import Answers, Cost, InputSpec, InterfaceProfile, Queries

if TYPE_CHECKING:  # loads transformers, which half of the experiments do without
    from distill.provider.language_provider import LanguageProvider

JOIN_TIMEOUT_S = 5.0  # how long an interrupted run waits for the answer that is being made; what is paid for is stored


class _Desk:
    """What the handles of both domains share: the way to the provider's thread and back."""

    def __init__(self, requests: SimpleQueue[Any]) -> None:
        self._requests: SimpleQueue[Any] | None = requests

    def affordable(self) -> int:
        """How many more answers the budget pays for."""
        return self._call("affordable")

    def spent(self) -> Cost:
        """What this attacker was billed, and the seconds that answering took. How much was cached it isn't told."""
        return self._call("spent")

    def close(self) -> None:
        """Every later call raises `DistillError`."""
        self._requests = None

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._requests is None:
            raise DistillError("this oracle is closed: its provider has gone")
        # A queue of its own for each reply: threads don't mix, and an interrupted call leaves nothing behind.
        reply: SimpleQueue[Any] = SimpleQueue()
        self._requests.put((reply, name, arguments))
        result = reply.get()
        if isinstance(result, DistillError):
            raise result
        return result


class Oracle(_Desk):
    """The attacker's handle (`distill.contracts.Oracle`). Made by `serve`.

    Attributes:
        profile: What the answers reveal.
        classes: Number of classes.
        spec: What one input is.
    """

    def __init__(
        self, requests: SimpleQueue[Any], profile: InterfaceProfile, classes: int, spec: InputSpec, rows_at_once: int
    ) -> None:
        super().__init__(requests)
        self.profile = profile
        self.classes = classes
        self.spec = spec
        self._rows_at_once = rows_at_once

    def ask(self, queries: Queries, *, partial: bool = False) -> Answers:
        """Ask, pay and receive. Row i answers query i.

        Raises:
            BudgetExceeded: The budget does not afford all; nothing was asked. With `partial`, the affordable first
                ones are answered instead.
            DistillError: The inputs are not what the teacher takes, or the provider failed.
        """
        granted = min(len(queries), self.affordable()) if partial else len(queries)
        self._call("require", granted)
        if granted == 0:
            return no_answers(self.classes, self.profile)
        parts = []
        for start in range(0, granted, self._rows_at_once):
            part = queries[start : min(granted, start + self._rows_at_once)]
            # The inputs are read here: an attack's own column must not run in the provider's thread.
            inputs = _plain(part.inputs(), self.spec)
            rows = np.array(part.rows, dtype=np.int64) if part.from_pool else np.full(len(part), -1, dtype=np.int64)
            parts.append(self._call("answer", inputs, rows))
        return Answers.join(parts)


class LanguageOracle(_Desk):
    """The attacker's handle on a provider of text (`distill.contracts.LanguageOracle`). Made by `serve_text`.

    Attributes:
        profile: What the answers reveal.
        tokenizer: The teacher's, where it is public; None otherwise.
    """

    def __init__(self, requests: SimpleQueue[Any], profile: InterfaceProfile, tokenizer: Any) -> None:
        super().__init__(requests)
        self.profile = profile
        self.tokenizer = tokenizer

    def ask(
        self, prompts: Prompts, sampling: Sampling | None = None, samples: int = 1, *, partial: bool = False
    ) -> SyntheticSet:
        """Ask, pay and receive `samples` answers to each prompt, one prompt after the other.

        Raises:
            BudgetExceeded: The budget does not afford all at their longest; nothing was asked. With `partial`, the
                affordable first ones are answered instead.
            DistillError: A prompt is empty or too long, or the provider failed.
        """
        if samples < 1:
            raise DistillError(f"is at least 1, not {samples}", "samples")
        return self._call("answer", prompts, sampling, samples, partial)

    def score(self, sequences: list[list[int]], starts: list[int]) -> list[Head] | list[Sparse]:
        """Pay for and receive the teacher's distributions at tokens that anyone wrote, or the most probable tokens
        where the API tells no more.

        Args:
            sequences: Lists of the teacher's tokens. Each is one query, and all of its tokens are prompt tokens.
            starts: For each, the first token that is scored, at least 1: row j of what comes back is for token
                ``start + j``.

        Raises:
            BudgetExceeded: The budget does not afford all; nothing was scored.
            DistillError: The API does not score tokens with whole distributions, or the provider failed.
        """
        # Plain lists: an attack's own sequence must not run in the provider's thread.
        plain = [[int(token) for token in sequence] for sequence in sequences]
        return self._call("score", plain, [int(start) for start in starts])


@contextmanager
def serve(provider: Provider) -> Iterator[Oracle]:
    """Answer an attacker's questions for the length of a ``with`` block.

    An exception on the provider's side reaches the attacker as a `DistillError` that says no more than it must, and
    every later question too; the block then ends with the exception itself, whatever the attacker made of it.
    """
    requests: SimpleQueue[Any] = SimpleQueue()
    oracle = Oracle(requests, provider.profile, provider.classes, provider.spec, provider.rows_at_once)
    with _open(provider, oracle, requests):
        yield oracle


@contextmanager
def serve_text(provider: LanguageProvider) -> Iterator[LanguageOracle]:
    """The same for a provider of text."""
    requests: SimpleQueue[Any] = SimpleQueue()
    # A copy: the teacher's own tokenizer is not the attacker's to change.
    oracle = LanguageOracle(requests, provider.profile, copy.deepcopy(provider.serving.tokenizer))
    with _open(provider, oracle, requests):
        yield oracle


@contextmanager
def _open(provider: Provider | LanguageProvider, oracle: _Desk, requests: SimpleQueue[Any]) -> Iterator[None]:
    failed: list[BaseException] = []
    thread = threading.Thread(target=_answer, args=(provider, requests, failed), name="provider", daemon=True)
    thread.start()
    timeout_s: float | None = JOIN_TIMEOUT_S
    try:
        yield
        timeout_s = None
    except Exception:
        timeout_s = None
        if not failed:
            raise
    finally:
        oracle.close()
        requests.put(None)
        thread.join(timeout_s)
    if failed:
        raise failed[0]


def _answer(provider: Provider | LanguageProvider, requests: SimpleQueue[Any], failed: list[BaseException]) -> None:
    """The provider's thread. It catches everything: an attacker who waits for a reply must get one."""
    while (request := requests.get()) is not None:
        reply, name, arguments = request
        if failed:
            reply.put(_told(failed[0]))
            continue
        try:
            result = _result(provider, name, arguments)
        except BudgetExceeded as error:
            result = BudgetExceeded(error.asked, error.affordable, error.why)
        except BaseException as error:
            failed.append(error)
            result = _told(error)
        reply.put(result)
    try:
        provider.close()
    except BaseException as error:
        failed.append(error)


def _told(error: BaseException) -> DistillError:
    """What the attacker hears. A new exception: the old one's traceback, cause and attributes lead to the teacher."""
    return DistillError(f"the provider failed: {error if isinstance(error, DistillError) else type(error).__name__}")


def _result(provider: Provider | LanguageProvider, name: str, arguments: Any) -> Any:
    match name:
        case "answer":
            # A copy: a view would lead to the array that it is a view of.
            return copy.deepcopy(provider.answer(*arguments))
        case "score" if not isinstance(provider, Provider):
            return provider.score(*arguments)
        case "require":
            return provider.ledger.require(*arguments)
        case "affordable":
            return provider.ledger.affordable()
        case "spent":
            cost = provider.cost()
            return replace(cost, teacher_forwards=0, teacher_tokens=0, spent_usd=0.0, defense_tokens=0)
        case _:
            raise DistillError(f"a provider does not answer to '{name}'")


def _plain(inputs: np.ndarray, spec: InputSpec) -> np.ndarray:
    """The inputs as a plain array. Raises `DistillError` unless they are what `spec` says."""
    inputs = np.asarray(inputs)
    dtypes = {"image": ("uint8", "float32"), "table": ("float32",), "text": ("object",)}[spec.kind]
    if inputs.dtype.name not in dtypes or inputs.shape[1:] != spec.shape:
        raise DistillError(
            f"a query is {' or '.join(dtypes)} {spec.shape} ({spec.kind}), not {inputs.dtype} {inputs.shape[1:]}",
            "attack",
        )
    if spec.kind == "text" and not all(type(text) is str for text in inputs):
        raise DistillError("a query is a text, and some of these are something else", "attack")
    # Written so that NaN fails it too.
    if inputs.dtype == np.float32 and spec.kind == "image" and not ((inputs >= 0) & (inputs <= 1)).all():
        raise DistillError("the pixels of float32 images lie in [0, 1]", "attack")
    return inputs
