"""A million answers through oracle, ledger, journal and transfer-set writing, the clean answers cached.

    python scripts/bench/answers.py [--rows 1000000] [--classes 10] [--runs 3]

The target (K=10, one core): under 60 s and under 1.5 GiB resident. Also how many one-row questions are answered in a
second. The teacher is a table of random logits: nothing of a model is timed.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from distill import transfer
from distill.provider.defenses.none import NoDefense
from distill.provider.defenses.rounding import Rounding
from distill.provider.oracle import serve
from distill.provider.provider import Provider
from distill.records import Budget, Examples, InputSpec, InterfaceProfile, Queries, Reveals, TransferSet

FEATURES = 16


class TableTeacher:
    """Answers with numbers made from the input; costs next to nothing."""

    output = Reveals.LOGITS
    usd_per_query = 0.0
    remote = False
    rows_at_once = 4096
    parameters: int | None = None
    flops_per_query: float | None = None

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.fingerprint = f"table-{classes}"

    def prepare(self, data: object, trainer: object, cache: Path) -> None:
        pass

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return np.resize(inputs.T, (self.classes, len(inputs))).T * np.float32(3)


def provide(folder: Path, classes: int, run: int, defense: NoDefense | Rounding) -> Provider:
    return Provider(
        TableTeacher(classes),
        defense,
        spec=InputSpec("table", (FEATURES,)),
        classes=classes,
        access=InterfaceProfile(Reveals.PROBS),
        usd_per_query=0.001,
        budget=Budget(queries=10_000_000),
        seed=0,
        cache=folder / "cache",
        log=folder / f"provider_log_{type(defense).__name__}_{run}",
        defense_id=type(defense).__name__,
    )


def stage(folder: Path, pool: Examples, classes: int, run: int, defense: NoDefense | Rounding) -> float:
    """Seconds of one query stage, from opening the caches to the renamed transfer set."""
    started = time.perf_counter()
    rows = np.random.default_rng(run).permutation(len(pool))
    provider = provide(folder, classes, run, defense)
    with serve(provider) as oracle:
        answers = oracle.ask(Queries.of_pool(pool, rows))
    transfer.save(TransferSet(rows, answers.posteriors, pool="bench", profile="probs"), folder / f"transfer_set_{run}")
    seconds = time.perf_counter() - started
    print(
        f"  {type(defense).__name__:10} run {run}: {seconds:6.2f} s   teacher rows {provider.cost().teacher_forwards}"
    )
    return seconds


def small_asks(folder: Path, pool: Examples, classes: int, asks: int, cached: bool) -> float:
    """One-row questions a second, oracle and journal included; opening the cache is not."""
    fresh = Examples(pool.inputs[: asks + 1] + np.float32(0 if cached else 1), pool.spec)
    with serve(provide(folder, classes, -1 - cached, NoDefense())) as oracle:
        oracle.ask(Queries.of_pool(fresh, np.array([asks])))
        started = time.perf_counter()
        for row in range(asks):
            oracle.ask(Queries.of_pool(fresh, np.array([row])))
        return asks / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    pool_rows = np.random.default_rng(0).normal(size=(options.rows, FEATURES)).astype(np.float32)
    pool = Examples(pool_rows, InputSpec("table", (FEATURES,)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        provide(folder, options.classes, 0, NoDefense()).clean(pool.inputs)
        print(f"filling the cache: {time.perf_counter() - started:.2f} s")
        for defense in (NoDefense(), Rounding()):
            seconds = [stage(folder, pool, options.classes, run, defense) for run in range(options.runs)]
            print(
                f"{type(defense).__name__}: {options.rows} answers, K={options.classes}, n={options.runs} runs: "
                f"median {np.median(seconds):.2f} s, slowest {max(seconds):.2f} s, "
                f"{options.rows / np.median(seconds):,.0f} answers/s"
            )
        for cached in (True, False):
            rate = small_asks(folder, pool, options.classes, min(2_000, options.rows - 1), cached)
            print(f"one-row questions, {'cached' if cached else 'not cached'}: {rate:,.0f}/s (n=1 run of 2,000)")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak resident memory: {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
