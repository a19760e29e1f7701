from __future__ import annotations

import base64
import hashlib
import json
import logging
import random
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import httpx
import numpy as np

from distill.errors import BadAnswer, DistillError, nearest
from distill.provider.teachers._remote import (
    address,
    excerpt,
    is_loopback,
    is_passing,
    key_from,
    pause_s,
    retry_after_s,
    write_note,
)
from distill.records import Dataset, Reveals, one_hot

if TYPE_CHECKING:
    from distill.training import Trainer

log = logging.getLogger(__name__)

FIELDS = {"probs": "posteriors", "logits": "logits", "label": "labels"}  # what an answer calls each output
FIRST_WAIT_S = 0.5  # before the second attempt; doubled before each further one
SUM_TOLERANCE = 1e-3  # how far the sum of a posterior may be from one


class HTTP:
    """A classifier behind an HTTP endpoint.

    One request holds up to `batch_size` inputs, ``POST url`` with the JSON body ::

        {"inputs": [...], "model": "..."}                                          "model" only where it is set

    An input is a string (text), a list of numbers (table), or (image) an object ``{"data": "...", "shape": [height,
    width, channels], "dtype": "uint8"}`` whose data is the base64 of the raw row-major pixels: ``uint8`` in 0…255 or
    little-endian ``float32`` in 0…1. The answer has one row for each input, in their order; its field is that of
    `output` ::

        {"posteriors": [[0.9, 0.1], ...]}      {"logits": [[2.2, 0.0], ...]}      {"labels": [0, ...]}

    Each request carries an ``Idempotency-Key`` made from its content, the same in every attempt and in every process,
    so a server can recognise what it has answered before. Status 408, 429 and 5xx, cut connections, timeouts and
    bodies that are no JSON are tried again, after the time that ``Retry-After`` asks for or else an exponential,
    jittered wait. A well-formed answer of the wrong shape is not: the same question would be billed again for it.
    Answered requests are noted on disk the moment they arrive, so a run that is killed does not pay for them twice.

    Args:
        url: Where to post, http or https. No user name or password in it.
        output: What the answers hold: ``probs``, ``logits`` or ``label``.
        authorized: Your statement that the terms of the endpoint allow querying it to train another model. Needed for
            every address that is not this machine's own (``localhost``, 127.0.0.0/8, ::1).
        api_key_env: Name of the environment variable that holds the key, sent as ``Authorization: Bearer``. The key
            itself is neither logged nor stored.
        model: Sent along, for servers that hold several.
        version: Anything that names the version of the remote weights. They can't be hashed, so when you know that
            they changed, change this: stored answers of another version are not reused.
        usd_per_query: What one answer costs you.
        batch_size: Inputs per request.
        concurrency: Requests under way at once.
        timeout_s: Longest silence of the server while connecting or answering.
        max_attempts: Attempts at one request before giving up.

    Raises:
        DistillError: A bad option, no `authorized`, a missing key, a refusal by the server, or no answer in time.
        BadAnswer: The endpoint answered something else than the above.
    """

    remote: ClassVar[bool] = True
    parameters: ClassVar[None] = None
    flops_per_query: ClassVar[None] = None

    def __init__(
        self,
        url: str,
        output: str = "probs",
        authorized: bool = False,
        api_key_env: str | None = None,
        model: str | None = None,
        version: str | None = None,
        usd_per_query: float = 0.0,
        batch_size: int = 32,
        concurrency: int = 4,
        timeout_s: float = 30.0,
        max_attempts: int = 6,
    ) -> None:
        if output not in FIELDS:
            raise DistillError(f"no output '{output}'.{nearest(output, FIELDS)}", "teacher.output")
        if not usd_per_query >= 0:
            raise DistillError(f"must be at least 0, not {usd_per_query}", "teacher.usd_per_query")
        for name, value in {"batch_size": batch_size, "concurrency": concurrency, "max_attempts": max_attempts}.items():
            if value < 1:
                raise DistillError(f"must be at least 1, not {value}", f"teacher.{name}")
        if not timeout_s > 0:
            raise DistillError(f"must be more than 0, not {timeout_s}", "teacher.timeout_s")
        parts = address(url, authorized)
        self._own = is_loopback(parts.hostname or "")
        self.url, self.model = url, model
        self.output = Reveals[output.upper()]
        self.usd_per_query = usd_per_query
        self.batch_size, self.concurrency = batch_size, concurrency
        self.timeout_s, self.max_attempts = timeout_s, max_attempts
        self.rows_at_once = batch_size * concurrency  # what `predict` is best handed: one round of requests
        self.fingerprint = hashlib.blake2b(
            json.dumps(["http", url, model, version, output]).encode(), digest_size=16
        ).hexdigest()
        self._where = f"{parts.scheme}://{parts.netloc}{parts.path}"  # for messages: a query string may hold secrets
        self._field = FIELDS[output]
        self._api_key_env = api_key_env
        self._api_key = ""
        self._jitter = random.Random()  # of its own: waits must not disturb anybody's random stream

    def prepare(self, data: Dataset, trainer: Trainer, cache: Path) -> None:
        """Read the key. Nothing is asked. Raises `DistillError` if the key's variable is not set."""
        self._api_key = key_from(self._api_key_env)
        self._classes = data.classes
        self._kind = data.spec.kind
        self._answered = cache / "teachers" / "http" / self.fingerprint
        self._answered.mkdir(parents=True, exist_ok=True)
        self._stale: list[Path] = []
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            timeout=self.timeout_s,
            limits=httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            trust_env=not self._own,  # a proxy from the environment can't reach this machine's own servers
        )

    def latency_s(self, one: np.ndarray) -> float | None:
        """None: nothing is asked that no attack asks for."""
        return None

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """(n, classes) float32 in the form that `output` says.

        Where one request fails for good, those under way are finished and noted, the rest is not sent, and the
        failure is raised.
        """
        for path in self._stale:  # the caller has stored what the call before this one returned
            path.unlink(missing_ok=True)
        self._stale = []
        if not len(inputs):
            return np.zeros((0, self._classes), dtype=np.float32)
        give_up = threading.Event()
        batches = [inputs[start : start + self.batch_size] for start in range(0, len(inputs), self.batch_size)]
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="teacher-http") as threads:
            requests = [threads.submit(self._answer, batch, give_up) for batch in batches]
            try:
                for request in as_completed(requests):
                    request.result()
            except BaseException:
                give_up.set()
                threads.shutdown(cancel_futures=True)
                raise
        answers = [request.result() for request in requests]
        self._stale = [note for _, note in answers]
        return np.concatenate([rows for rows, _ in answers])

    def _answer(self, batch: np.ndarray, give_up: threading.Event) -> tuple[np.ndarray, Path]:
        """The rows of one request, from the note of an interrupted run or from the endpoint; and where it is noted."""
        question: dict[str, Any] = {"inputs": self._encode(batch)}
        if self.model is not None:
            question["model"] = self.model
        try:
            body = json.dumps(question, allow_nan=False).encode()
        except ValueError:
            raise DistillError("an input holds NaN or infinity, which JSON can't carry", "teacher") from None
        key = hashlib.blake2b(self.fingerprint.encode() + body, digest_size=16).hexdigest()
        note = self._answered / f"{key}.json"
        try:
            rows = self._decode(json.loads(note.read_bytes()), len(batch))
        except (FileNotFoundError, ValueError, BadAnswer):
            answer = self._post(body, key, give_up)
            rows = self._decode(answer, len(batch))
            write_note(note, json.dumps({self._field: answer[self._field]}))
        return rows, note

    def _encode(self, batch: np.ndarray) -> list[Any]:
        if self._kind != "image":
            return batch.tolist()
        if batch.dtype != np.uint8:
            batch = batch.astype("<f4")
        return [
            {
                "data": base64.b64encode(image.tobytes()).decode(),
                "shape": list(image.shape),
                "dtype": image.dtype.name,
            }
            for image in batch
        ]

    def _decode(self, answer: Any, n: int) -> np.ndarray:
        """(n, classes) float32. Raises `BadAnswer`."""
        if not isinstance(answer, Mapping) or self._field not in answer:
            raise BadAnswer(f"{self._where} answered without '{self._field}'", "teacher.output")
        try:
            with np.errstate(over="ignore"):  # what float32 can't hold is found to be infinite below
                values = np.array(answer[self._field], dtype=np.float32)
        except (ValueError, TypeError, OverflowError):
            raise BadAnswer(f"{self._where} answered '{self._field}' that are not rows of numbers", "teacher") from None
        expected = (n,) if self.output is Reveals.LABEL else (n, self._classes)
        if values.shape != expected:
            raise BadAnswer(
                f"{self._where} answered '{self._field}' of shape {values.shape}; {n} inputs and {self._classes} "
                f"classes make {expected}",
                "teacher",
            )
        if self.output is Reveals.LABEL:
            if not np.isin(values, np.arange(self._classes)).all():
                raise BadAnswer(f"{self._where} answered labels outside of 0…{self._classes - 1}", "teacher")
            return one_hot(values.astype(np.int64), self._classes)
        if not np.isfinite(values).all():
            raise BadAnswer(f"{self._where} answered NaN or infinite numbers", "teacher")
        # Checked here although the provider will: what is noted on disk must be an answer that it accepts.
        if self.output is Reveals.PROBS and (
            (values < 0).any() or (np.abs(values.sum(axis=1, dtype=np.float64) - 1) > SUM_TOLERANCE).any()
        ):
            raise BadAnswer(f"{self._where} answered posteriors that are negative or do not sum to one", "teacher")
        return values

    def _post(self, body: bytes, key: str, give_up: threading.Event) -> Any:
        """The JSON that the endpoint answers. Raises `DistillError` after the last attempt or a refusal."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        error: type[DistillError] = DistillError
        for attempt in range(1, self.max_attempts + 1):
            wait_s = None
            try:
                response = self._client.post(self.url, content=body, headers=headers)
            except (httpx.TransportError, httpx.DecodingError) as failure:
                error, problem = DistillError, f"{type(failure).__name__}: {failure}".rstrip(": ")
            else:
                if response.is_success:
                    try:
                        return response.json()
                    except ValueError:
                        error, problem = BadAnswer, "the answer is not JSON"
                else:
                    said = excerpt(response.text, self._api_key)
                    error, problem = DistillError, f"status {response.status_code}{said}"
                    if not is_passing(response.status_code):
                        remedy = "; check the key in api_key_env" if response.status_code in (401, 403) else ""
                        raise DistillError(f"{self._where} refused: {problem}{remedy}", "teacher")
                    wait_s = retry_after_s(response.headers.get("Retry-After"), time.time())
            if attempt == self.max_attempts or give_up.is_set():
                break
            wait_s = pause_s(wait_s, attempt, FIRST_WAIT_S, self._jitter, self._where)
            log.info("%s: %s; attempt %d in %.1f s", self._where, problem, attempt + 1, wait_s)
            give_up.wait(wait_s)
        raise error(
            f"{self._where} gave no answer in {attempt} attempts (the last: {problem}); the same command continues",
            "teacher",
        )
