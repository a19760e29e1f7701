"""Small stand-ins for the generation domain: a teacher that answers at once, and a query stage that a test can kill."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, texts
from distill.provider.language_provider import LanguageProvider
from distill.provider.ledger import Prices
from distill.provider.oracle import serve_text
from distill.records import Budget, InterfaceProfile, Reveals

VOCABULARY = 50


class Parrot:
    """Answers each request with letters that are drawn from its hash; writes how many it was asked to a file."""

    usd_per_mtok_in, usd_per_mtok_out = 1.0, 2.0
    parameters = flops_per_token = context_tokens = tokenizer = None

    def __init__(
        self,
        top_k: int | None = 20,
        tally: Path | None = None,
        seconds_per_call: float = 0.0,
        fails_after: int | None = None,
        requests_at_once: int = 4,
    ) -> None:
        self.remote, self.requests_at_once, self.top_k = True, requests_at_once, top_k
        self.fingerprint = "parrot"
        self.tally, self.seconds_per_call, self.fails_after = tally, seconds_per_call, fails_after
        self.asked = 0

    def prepare(self, task: Any, trainer: Any, cache: Path) -> None:
        pass

    def count_tokens(self, prompts: Prompts, sampling: Sampling) -> np.ndarray:
        lengths = np.array([len(prompts.messages(row)[-1]["content"]) for row in range(len(prompts))], dtype=np.int64)
        if (lengths == 0).any():
            raise DistillError(f"prompt {int(lengths.argmin())} is empty", "pool")
        return lengths

    def generate(self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray, top_k: int = 0) -> Completions:
        if self.fails_after is not None and self.asked + len(prompts) > self.fails_after:
            raise DistillError("the API is down", "teacher")
        self.asked += len(prompts)
        if self.tally is not None:
            with self.tally.open("a") as file:
                file.write(f"{len(prompts)}\n")
        time.sleep(self.seconds_per_call)
        drawn = [
            np.frombuffer(hashlib.blake2b(key, digest_size=32).digest(), np.uint8)
            for key in sampling.request_keys(prompts, repeats).tolist()
        ]
        lengths = np.array([1 + int(some[0]) % sampling.max_tokens for some in drawn], dtype=np.int64)
        ids = [np.resize(some, n).astype(np.int32) % VOCABULARY for some, n in zip(drawn, lengths, strict=True)]
        offsets, flat = np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(ids)
        top = None
        if top_k:
            top = (flat[:, None] + np.arange(top_k, dtype=np.int32)) % VOCABULARY
        return Completions(
            column=texts(["".join(chr(97 + i % 26) for i in some) for some in ids]),
            finish=texts(["stop" if n < sampling.max_tokens else "length" for n in lengths]),
            prompt_tokens=self.count_tokens(prompts, sampling),
            completion_tokens=lengths,
            offsets=offsets,
            token_ids=flat,
            logprobs=np.full(len(flat), -0.5, np.float32) if top_k else None,
            top_ids=top,
            top_logprobs=None if top is None else np.tile(-0.5 - np.arange(top_k, dtype=np.float32), (len(flat), 1)),
        )


def questions(n: int) -> Prompts:
    return Prompts.of_users([f"question {i}" for i in range(n)], name="toy")


SAMPLING = Sampling(max_tokens=9, temperature=1.0)


def a_text_provider(cache: Path, teacher: Parrot | None = None, **changes: Any) -> LanguageProvider:
    options: dict[str, Any] = {
        "access": InterfaceProfile(Reveals.LABEL),
        "prices": Prices(),
        "budget": Budget(queries=1_000_000),
        "sampling": SAMPLING,
        "cache": cache,
    }
    return LanguageProvider(teacher or Parrot(), **(options | changes))


def asked_in_all(tally: Path) -> int:
    return sum(map(int, tally.read_text().split())) if tally.exists() else 0


def query_stage(folder: Path, seconds_per_call: float) -> None:
    """What a test runs in a process of its own and kills."""
    prompts = questions(40)
    slow = Parrot(tally=folder / "tally", seconds_per_call=seconds_per_call, requests_at_once=1)
    with serve_text(a_text_provider(folder / "cache", slow)) as oracle:
        for start in range(0, 40, 8):
            oracle.ask(prompts.take(slice(start, start + 8)))
