"""Small stand-ins for the provider's tests: a teacher, and a query stage that a test can kill."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from distill import transfer
from distill.contracts import Defense
from distill.provider import journal
from distill.provider.defenses.gaussian_noise import GaussianNoise
from distill.provider.defenses.none import NoDefense
from distill.provider.oracle import serve
from distill.provider.provider import Provider
from distill.records import (
    Answers,
    Budget,
    Dataset,
    Examples,
    InputSpec,
    InterfaceProfile,
    Queries,
    Reveals,
    TransferSet,
)

FEATURES = 6
SPEC = InputSpec("table", (FEATURES,))


class ToyTeacher:
    """A fixed random linear softmax model over tables; logs how many rows it was asked, in a file if given one."""

    usd_per_query = 0.0
    parameters: int | None = None
    flops_per_query: float | None = None

    def __init__(
        self,
        classes: int = 4,
        output: Reveals = Reveals.LOGITS,
        remote: bool = False,
        tally: Path | None = None,
        seconds_per_call: float = 0.0,
    ) -> None:
        self.output, self.remote = output, remote
        self.rows_at_once = 16 if remote else 4096
        self.fingerprint = f"toy-{classes}-{output.name}"
        self.weights = np.random.default_rng(7).normal(size=(FEATURES, classes))
        self.tally, self.seconds_per_call = tally, seconds_per_call
        self.forwards = 0

    def prepare(self, data: Dataset, trainer: object, cache: Path) -> None:
        pass

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        self.forwards += len(inputs)
        if self.tally is not None:
            with self.tally.open("a") as file:
                file.write(f"{len(inputs)}\n")
        time.sleep(self.seconds_per_call)
        # Row by row in a fixed order: a BLAS product may differ in its last bit from one batch size to another.
        logits = np.einsum("nf,fk->nk", inputs.astype(np.float64), self.weights, optimize=False)
        if self.output is Reveals.LOGITS:
            return logits.astype(np.float32)
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        posteriors = exponents / exponents.sum(axis=1, keepdims=True)
        if self.output is Reveals.LABEL:
            posteriors = np.eye(posteriors.shape[1])[posteriors.argmax(axis=1)]
        return posteriors.astype(np.float32)


def tallied(tally: Path) -> int:
    """How many rows all teachers that share this file were asked."""
    return sum(map(int, tally.read_text().split())) if tally.exists() else 0


def tables(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, FEATURES)).astype(np.float32)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def a_pool(rows: int, seed: int = 0) -> Examples:
    return Examples(tables(rows, seed), SPEC, name="toy")


def a_provider(folder: Path, teacher: ToyTeacher | None = None, defense: object = None, **changes: object) -> Provider:
    teacher = teacher or ToyTeacher()
    options: dict = {
        "spec": SPEC,
        "classes": teacher.weights.shape[1],
        "access": InterfaceProfile(Reveals.PROBS),
        "usd_per_query": 0.0,
        "budget": Budget(queries=1_000_000),
        "seed": 0,
        "cache": folder / "cache",
        "log": folder / "provider_log",
        "defense_id": type(defense).__name__,
    }
    return Provider(teacher, defense or NoDefense(), **(options | changes))


def collect(provider: Provider, pool: Examples, rows: np.ndarray, step: int) -> TransferSet:
    """Ask for these rows of the pool, `step` at a time."""
    with serve(provider) as oracle:
        parts = [oracle.ask(Queries.of_pool(pool, rows[i : i + step])) for i in range(0, len(rows), step)]
    posteriors = np.concatenate([part.posteriors for part in parts])
    return TransferSet(rows, posteriors, pool=pool.fingerprint, profile=str(provider.profile))


def query_stage(folder: Path, rows: int, step: int, remote: bool, seconds_per_call: float) -> None:
    """What a test runs in a process of its own and kills: half of the queries are repeats, the noise is keyed."""
    journal.FLUSH_S = 0.0  # a shard for each question, so that a kill finds some of them written
    teacher = ToyTeacher(remote=remote, tally=folder / "tally", seconds_per_call=seconds_per_call)
    provider = a_provider(folder, teacher, GaussianNoise())
    asked = np.random.default_rng(1).integers(0, rows // 2, size=rows)
    transfer.save(collect(provider, a_pool(rows), asked, step), folder / "transfer_set")


def claims_hold(defense: Defense, clean: Answers, answers: Answers) -> None:
    """What a defense made of clean answers is what its attributes say."""
    assert answers.posteriors.dtype == np.float32
    assert answers.posteriors.shape == clean.posteriors.shape
    assert np.isfinite(answers.posteriors).all()
    assert (answers.posteriors >= 0).all()
    np.testing.assert_allclose(answers.posteriors.sum(axis=1, dtype=np.float64), 1, atol=1e-5)
    if defense.keeps_argmax:
        np.testing.assert_array_equal(answers.labels, clean.labels)
    if defense.l1_budget is not None:
        moved = np.abs(answers.posteriors.astype(np.float64) - clean.posteriors).sum(axis=1)
        assert moved.max() <= defense.l1_budget + 1e-5
    if defense.exposes.top_k is not None:
        assert ((answers.posteriors > 0).sum(axis=1) <= defense.exposes.top_k).all()
    if defense.exposes.reveals is Reveals.LABEL:
        assert ((answers.posteriors == 0) | (answers.posteriors == 1)).all()
