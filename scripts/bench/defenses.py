"""What answering from cached posteriors costs, for every defense; and the exact solvers against plain ones.

    python scripts/bench/defenses.py [--runs 3] [--only WORD]

One thread, CPU seconds (best of `--runs` for ours), because other processes may want the core. Every option of
`defense` answers rows that are drawn once; what it needs to know of each query (a surrogate's posteriors and the like)
is drawn too, so that no network is timed. Asked: 50,000 rows/s at K=10 and 5,000 rows/s at K=100.

The contests compare with one row at a time, written straight from the paper, on fewer rows; both sides are in CPU
seconds, and their answers are compared. To add one, add a function that returns a `Contest` to `CONTESTS`; to add a
bound on a rate alone, leave `theirs` out.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from scipy.optimize import linprog

from distill.config import CONFIG_DIR, build
from distill.contracts import Defense
from distill.provider.defenses.modelguard_s import ModelGuardS
from distill.provider.defenses.modelguard_w import ModelGuardW
from distill.randomness import KeyedRandom, generator
from distill.records import Answers, InterfaceProfile, Reveals, content_keys
from distill.recovery._bayes import SLACK, draw, estimated, shared
from distill.recovery._simulated import SimulatedApi

ROWS = {10: 65_536, 100: 16_384}
ASKED = {10: 50_000, 100: 5_000}
INFORMED = ("adaptive_misinformation", "edm", "grad2", "mad", "mad_argmax")  # (n, classes) of each query


def posteriors(classes: int, rows: int, seed: int = 0) -> np.ndarray:
    """Those of a classifier that is sure of some rows and not of others."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, classes)) * random.uniform(0.5, 5.0, size=(rows, 1))
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)


def cpu_s(work: Callable[[], object], runs: int = 1) -> float:
    """The fewest CPU seconds of some runs."""
    seconds = []
    for _ in range(runs):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def made(option: str) -> Defense:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return build(compose("train", overrides=[f"defense={option}"]).defense, "defense")


def answer(option: str, classes: int, runs: int) -> float:
    """Rows a second."""
    clean = Answers(posteriors(classes, ROWS[classes]))
    rng = KeyedRandom(0, content_keys(clean.posteriors), np.zeros(len(clean), np.int64))
    info = posteriors(classes, len(clean), seed=1) if option in INFORMED else None
    defenses = iter([made(option) for _ in range(runs)])  # fresh ones: some remember
    return len(clean) / cpu_s(lambda: next(defenses).perturb(clean, info, rng), runs)


@dataclass(frozen=True)
class Contest:
    """Two ways to answer, or one way and a rate.

    Args:
        name: What is compared.
        asked: How fast `ours` is asked to be, in words; empty where nothing is.
        rows: How many rows `ours` answers.
        ours: Answers them.
        their_rows: How many rows `theirs` answers.
        theirs: Answers these.
        difference: How far the two are apart on the rows that both answer, in the units of what is optimised.
    """

    name: str
    asked: str
    rows: int
    ours: Callable[[], object]
    their_rows: int = 0
    theirs: Callable[[], object] | None = None
    difference: Callable[[], float] | None = None


def modelguard_w(classes: int) -> Contest:
    """Against HiGHS, through scipy, one linear program for each row."""
    clean = posteriors(classes, ROWS[classes] // 2).astype(np.float64)
    clean /= clean.sum(axis=1, keepdims=True)
    few = clean[: 5_000 // classes]
    costs = np.log(few + 1e-6)
    eye, ones = np.eye(classes), np.ones((1, classes))

    def one(row: np.ndarray, cost: np.ndarray) -> float:
        ahead = np.delete(eye, row.argmax(), axis=0)
        ahead[:, row.argmax()] -= 1
        solved = linprog(
            np.concatenate([cost, np.zeros(classes)]),
            A_ub=np.block([[eye, -eye], [-eye, -eye], [0 * ones, ones], [ahead, 0 * ahead]]),
            b_ub=np.concatenate([row, -row, [1.0], np.full(classes - 1, -1e-4)]),
            A_eq=np.concatenate([ones, 0 * ones], axis=1),
            b_eq=[1.0],
            method="highs",
        )
        return solved.fun

    def answers(rows: np.ndarray) -> np.ndarray:
        return ModelGuardW(l1_budget=1.0).transform(torch.from_numpy(rows), None).numpy()

    least: list[float] = []
    return Contest(
        f"ModelGuard-W, K={classes}: HiGHS for each row",
        "100 times",
        len(clean),
        lambda: answers(clean),
        len(few),
        lambda: least.extend(one(row, cost) for row, cost in zip(few, costs, strict=True)),
        lambda: float(np.abs((answers(few) * costs).sum(axis=1) - least).max()),
    )


def modelguard_s() -> Contest:
    """With 5,000 codewords, against one row at a time."""
    clean = posteriors(10, 60_000)
    defense, codewords = ModelGuardS(l1_budget=0.15), 5_000
    begun, fed = defense.state(), 0
    while len(begun["codewords"]) < codewords:
        defense.perturb(Answers(clean[fed : fed + 10]), None, NO_NOISE)
        begun, fed = defense.state(), fed + 10
    begun = {"codewords": begun["codewords"][:codewords]}
    defense.restore(begun)
    answered, few = clean[fed : fed + 20_000], clean[fed : fed + 500]
    books = [[row for row in begun["codewords"] if row.argmax() == label] for label in range(10)]
    plain: list[np.ndarray] = []

    def one_by_one() -> None:
        for row in few:
            book = books[row.argmax()]
            for codeword in book:
                if np.abs(codeword.astype(np.float64) - row).sum() <= 0.15:
                    plain.append(codeword)
                    break
            else:
                book.append(row)
                plain.append(row)

    def ours(rows: np.ndarray) -> np.ndarray:
        defense.restore(begun)
        return defense.perturb(Answers(rows), None, NO_NOISE).posteriors

    return Contest(
        "ModelGuard-S, K=10, from 5,000 codewords: one by one",
        "20,000 rows/s",
        len(answered),
        lambda: ours(answered),
        len(few),
        one_by_one,
        lambda: float(np.abs(ours(few) - plain).max()),
    )


def mad_argmax() -> Contest:
    """Against all sets of classes that hold the label, one after the other."""
    clean, info = (posteriors(10, ROWS[10] // 2, seed) for seed in (0, 1))
    defense, few = made("mad_argmax"), 100
    plain: list[np.ndarray] = []

    def one(y: np.ndarray, p: np.ndarray) -> np.ndarray:
        label, least, best = int(y.argmax()), np.inf, y
        others = [k for k in range(len(y)) if k != label]
        for size in range(len(y)):
            for more in combinations(others, size):
                uniform = np.zeros(len(y))
                uniform[[label, *more]] = 1 / (size + 1)
                cosine = (uniform - p) @ (y - p) / np.linalg.norm(uniform - p)
                if cosine < least:
                    least, best = cosine, uniform
        best = best / best.max()
        best[label] += 1e-5
        best /= best.sum()
        share = min(1.0, 1.0 / np.abs(y - best).sum())
        return (1 - share) * y + share * best

    def ours(rows: int) -> np.ndarray:
        return defense.perturb(Answers(clean[:rows]), info[:rows], NO_NOISE).posteriors

    pairs = [(y.astype(np.float64), p.astype(np.float64)) for y, p in zip(clean[:few], info[:few], strict=True)]
    return Contest(
        "MAD-argmax, K=10: all 512 sets for each row",
        "100 times",
        len(clean),
        lambda: ours(len(clean)),
        few,
        lambda: plain.extend(one(y, p) for y, p in pairs),
        lambda: float(np.abs(ours(few) - plain).max()),
    )


def grad2(classes: int) -> Contest:
    """Against HiGHS, through scipy, one linear program for each row."""
    clean = posteriors(classes, ROWS[classes])
    scores = np.random.default_rng(1).normal(size=clean.shape).astype(np.float32)
    defense, few = made("grad2"), 2_000 // classes
    eye, ones = np.eye(classes), np.ones((1, classes))

    def one(row: np.ndarray, score: np.ndarray) -> float:
        solved = linprog(
            np.concatenate([-score, np.zeros(classes)]),
            A_ub=np.block([[eye, -eye], [-eye, -eye], [0 * ones, ones]]),
            b_ub=np.concatenate([row, -row, [1.0]]),
            A_eq=np.concatenate([ones, 0 * ones], axis=1),
            b_eq=[row.sum(dtype=np.float64)],
            method="highs",
        )
        return -solved.fun

    def ours(rows: int) -> np.ndarray:
        return defense.perturb(Answers(clean[:rows]), scores[:rows], NO_NOISE).posteriors

    most: list[float] = []
    return Contest(
        f"GRAD2, K={classes}: HiGHS for each row",
        "",
        len(clean),
        lambda: ours(len(clean)),
        few,
        lambda: most.extend(one(row, score) for row, score in zip(clean[:few], scores[:few], strict=True)),
        lambda: float(np.abs((ours(few) * scores[:few].astype(np.float64)).sum(axis=1) - most).max()),
    )


def pbayes() -> Contest:
    """10,000 answers of a reverse sigmoid looked up in a table of 1,000,000, drawing and answering it included."""
    classes, n = 10, 10_000
    clean, defense = posteriors(classes, n), made("reverse_sigmoid")
    keys = content_keys(np.arange(n, dtype=np.float32)[:, None])
    api = SimulatedApi(defense, InterfaceProfile(Reveals.PROBS), keys, None, {}, 0)
    received = api.answers(clean, np.arange(n))
    drawn = draw(8.0 * classes * (0.99 * received[None].astype(np.float64) + 0.01 / classes), 100, generator(0))
    simulated, few = api.answers(drawn, np.tile(np.arange(n), 100)), 20

    def scan() -> np.ndarray:
        means = []
        for answer in received[:few].astype(np.float64):
            away = np.abs(simulated - answer).sum(axis=1)
            away[simulated.argmax(axis=1) != answer.argmax()] = np.inf
            means.append(drawn[away <= max(0.01, away.min()) + SLACK].astype(np.float64).mean(axis=0))
        return np.array(means)

    return Contest(
        "pBayes, K=10, a table of 1,000,000: a scan for each row",
        "167 rows/s",
        n,
        lambda: estimated(api, received, received[None], 1_000_000, 8.0, 0.01, generator(0)),
        few,
        scan,
        lambda: float(np.abs(shared(received, simulated, drawn, 0.01)[:few] - scan()).max()),
    )


NO_NOISE = KeyedRandom(0, np.zeros(0, "S16"), np.zeros(0, np.int64))
CONTESTS: list[Callable[[], Contest]] = [
    lambda: modelguard_w(10),
    lambda: modelguard_w(100),
    modelguard_s,
    mad_argmax,
    lambda: grad2(10),
    lambda: grad2(100),
    pbayes,
]


def told(rate: float, asked: float) -> str:
    if rate > 1e9:
        return "hands on what it got"
    return f"{rate:,.0f}" if rate >= asked else f"{rate:,.0f} (asked {asked:,})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="of the defenses and contests, those with this in their name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)

    table = Table("defense", *(f"K={classes}, rows/s" for classes in ROWS), title="answers from cached posteriors")
    for option in sorted(path.stem for path in (CONFIG_DIR / "defense").glob("*.yaml")):
        if arguments.only in option:
            rates = {classes: answer(option, classes, arguments.runs) for classes in ROWS}
            cells = [told(rate, ASKED[classes]) for classes, rate in rates.items()]
            table.add_row(option, *cells)
    console.print(table)

    columns = ("ours: rows", "CPU s", "rows/s", "theirs: rows", "CPU s", "rows/s", "times", "asked", "difference")
    table = Table("contest", *columns, title="against one row at a time")
    for make in CONTESTS:
        contest = make()
        if arguments.only.lower() not in contest.name.lower().replace("-", "_"):
            continue
        seconds = cpu_s(contest.ours, arguments.runs)
        rate = contest.rows / seconds
        cells = [f"{contest.rows:,}", f"{seconds:.2f}", f"{rate:,.0f}"]
        if contest.theirs is None:
            cells += [""] * 4
        else:
            theirs = cpu_s(contest.theirs)
            other = contest.their_rows / theirs
            cells += [f"{contest.their_rows:,}", f"{theirs:.2f}", f"{other:,.0f}", f"{rate / other:,.0f}"]
        difference = "" if contest.difference is None else f"{contest.difference():.1g}"
        table.add_row(contest.name, *cells, contest.asked, difference)
    console.print(table)


if __name__ == "__main__":
    main()
