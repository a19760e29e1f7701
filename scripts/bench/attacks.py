"""What attacks cost besides the student's training and the teacher's answers.

    python scripts/bench/attacks.py [--only WORD]

One thread, CPU seconds, because other processes may want the core. To add something, add a function that returns its
rows to `BENCHES`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch.nn import functional

from distill.attacks._data_free import l1
from distill.attacks._generator import Generator, squash
from distill.attacks._moves import Box, as_floats
from distill.attacks.active_thief import ActiveThief
from distill.attacks.dfme import DFME
from distill.attacks.disagreement import Disagreement
from distill.attacks.jbda import JBDA
from distill.attacks.margin import Margin
from distill.attacks.marich import Marich
from distill.attacks.rounds import PoolAttack
from distill.experiment import StudentTrainer, TrainedStudent
from distill.objectives.soft_cross_entropy import SoftCrossEntropy
from distill.provider.defenses.none import NoDefense
from distill.provider.oracle import serve
from distill.provider.provider import Provider
from distill.provider.teachers.torch_classifier import TorchClassifier
from distill.records import (
    Answers,
    Budget,
    Dataset,
    Examples,
    Inputs,
    InputSpec,
    InterfaceProfile,
    Queries,
    Reveals,
    TransferSet,
    one_hot,
    softmax,
)
from distill.recovery.as_returned import AsReturned
from distill.students.lenet import LeNet
from distill.training import Recipe, Trainer

POOL, QUERIES, CLASSES = 50_000, 10_000, 10


@dataclass(frozen=True)
class Row:
    """What was measured, what was asked (empty where nothing was), and what came out."""

    what: str
    asked: str
    came_out: str


# --- choosing rows of a pool ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """Images, rows of which are told apart by their numbers."""

    images: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        return self.images[rows]


@dataclass
class Known:
    """A trained student whose logits of the whole pool are known: `fit` and `predict` cost nothing."""

    trained: TrainedStudent
    pool_logits: np.ndarray
    class_names: tuple[str, ...] = tuple("0123456789")
    module: torch.nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.module = self.trained.module

    @property
    def device(self) -> torch.device:
        return self.trained.device

    def fit(self, transfer_set: TransferSet, pool: Examples) -> Known:
        return self

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.trained.logits(inputs)

    def predict(self, inputs: Any) -> np.ndarray:
        return self.pool_logits[inputs.rows]  # of a `distill.records.Rows`


@dataclass
class Teller:
    """An oracle that answers with given posteriors of the pool."""

    posteriors: np.ndarray
    profile: InterfaceProfile = InterfaceProfile(Reveals.PROBS)
    classes: int = CLASSES

    def affordable(self) -> int:
        return QUERIES

    def ask(self, queries: Queries) -> Answers:
        return Answers(self.posteriors[queries.rows])


@cache
def world() -> tuple[Examples, Known]:
    """50,000 noisy digits of 28×28 pixels, and a LeNet that 2,000 others have taught."""
    random = np.random.default_rng(0)
    digits = load_digits()
    rows = random.integers(0, len(digits.images), POOL + 2_000)
    small = np.kron(digits.images[rows] * 16, np.ones((3, 3)))  # 24×24
    images = np.pad(small, ((0, 0), (2, 2), (2, 2))) + random.normal(0, 48, (len(rows), 28, 28))
    images = images.clip(0, 255).astype(np.uint8)[..., None]
    spec, trainer = InputSpec("image", (28, 28, 1)), Trainer(device="cpu", progress=False)
    recipe = Recipe(epochs=3)
    own = (AsReturned(), SoftCrossEntropy(), recipe, trainer, spec, tuple("0123456789"), 0)
    labels = one_hot(digits.target[rows[POOL:]], CLASSES)
    others = Examples(images[POOL:], spec)
    lesson = TransferSet(np.arange(2_000), labels, pool=others.fingerprint)
    trained = StudentTrainer(LeNet(), *own).fit(lesson, others)
    inputs: Inputs = Column(images[:POOL])
    pool = Examples(inputs, spec, name="noisy digits", stated_fingerprint="noisy digits")
    return pool, Known(trained, trained.predict(images[:POOL]))


def selections() -> list[Row]:
    """10,000 of 50,000 rows in 10 rounds, K=10, without training, scoring by students and answers."""
    pool, student = world()
    attacks: list[tuple[str, str, PoolAttack]] = [
        ("active_thief, uncertainty", "< 5 s", ActiveThief("uncertainty")),
        ("active_thief, k_center", "< 20 s", ActiveThief("k_center")),
        ("active_thief, dfal, entropy_share=0.1", "< 120 s", ActiveThief("dfal", entropy_share=0.1)),
        (
            "active_thief, dfal_k_center, entropy_share=0.1, prefilter=2",
            "",
            ActiveThief("dfal_k_center", entropy_share=0.1, prefilter=2),
        ),
        ("margin", "", Margin()),
        ("disagreement", "", Disagreement()),
        ("marich", "", Marich()),
    ]
    rows = []
    for name, asked, attack in attacks:
        oracle, began = Teller(softmax(student.pool_logits)), time.process_time()
        chosen = attack.extract(oracle, pool, student, seed=0)  # type: ignore[arg-type]
        seconds = time.process_time() - began
        if len(np.unique(chosen.rows)) != QUERIES:
            raise RuntimeError(f"{name} asked {len(np.unique(chosen.rows))} rows")
        rows.append(Row(f"selection, {name}", asked, f"{seconds:.1f} s"))
    return rows


# --- inputs made along a gradient -------------------------------------------------------------------------------------


def jbda() -> list[Row]:
    """New inputs of one round, 28×28, by a LeNet: one gradient of each, all at once and one after the other."""
    pool, student = world()
    learner, rows, few = student.trained, 4_096, 512
    starts = as_floats(pool.inputs[:rows])
    answers = Answers(softmax(student.pool_logits[:rows]))
    box, made = Box.around(pool.spec, starts), []

    def one_by_one() -> np.ndarray:
        alone = []
        for start, label in zip(starts[:few], answers.labels, strict=False):
            pixels = torch.from_numpy(start[None]).requires_grad_()
            score = learner.logits(pixels).log_softmax(dim=1)[0, int(label)]
            (gradient,) = torch.autograd.grad(score, pixels)
            alone.append((pixels.detach() + 0.1 * gradient.sign()).clamp(0, 1).numpy())
        return np.concatenate(alone)

    rates = []
    for count, work in (
        (rows, lambda: JBDA().moves(learner, starts, answers, 0, box, np.random.default_rng(0))),
        (few, one_by_one),
    ):
        began = time.process_time()
        made.append(work())
        rates.append(count / (time.process_time() - began))
    agree = float((np.abs(made[0][:few] - made[1]) < 1e-6).mean())
    return [
        Row("jbda, inputs a second, batched", "", f"{rates[0]:,.0f}"),
        Row(f"jbda, one gradient at a time (agrees in {agree:.2%} of pixels)", "", f"{rates[1]:,.0f}"),
    ]


# --- without data -----------------------------------------------------------------------------------------------------


def data_free() -> list[Row]:
    """DFME on digits against the same networks in a bare loop: no oracle, ledger, log, memory or transfer set.

    Once with the teacher's forward passes in both (the bare loop calls it directly), and once without them in either
    (it takes a constant for an answer, and the attack's seconds in the teacher are taken off). They take turns.
    """
    rows, turns, queries = [], 5, 10 * 7 * 256
    for name, batch, width in (("the paper's sizes", 256, 64), ("those of data_free_digits", 64, 16)):
        ratios = []
        for turn in range(turns + 1):
            with tempfile.TemporaryDirectory() as folder:
                attack, provider, students, pool = data_free_world(Path(folder), queries, batch, width, turn)
                own, inside = data_free_attack(attack, provider, students, pool, turn)
                with_teacher, without = (bare(attack, provider, students, queries, asks) for asks in (True, False))
            if turn:  # the first one warms up
                ratios.append((with_teacher / own, without / (own - inside)))
        for what, column in zip(("with", "without"), np.array(ratios).T, strict=True):
            came_out = f"{np.median(column):.3f} ({column.min():.3f} to {column.max():.3f})"
            rows.append(Row(f"dfme, {name}: share of the bare speed, {what} the teacher's passes", "0.9", came_out))
    return rows


def data_free_world(
    folder: Path, queries: int, batch: int, width: int, seed: int
) -> tuple[DFME, Provider, StudentTrainer, Examples]:
    """A LeNet twice as wide teaches a LeNet; its weights do not matter here."""
    names = tuple(map(str, range(CLASSES)))
    digits = load_digits()
    pool = Examples((digits.images * 15).astype(np.uint8)[..., None], InputSpec("image", (8, 8, 1)))
    data = Dataset("digits", pool.spec, names, pool.take(np.arange(64)), pool.take(np.arange(64)), pool)
    labelled = replace(data.train, labels=np.arange(64) % CLASSES, class_names=names)
    trainer = Trainer(device="cpu", progress=False)
    teacher = TorchClassifier(LeNet(width=2), Recipe(epochs=1))
    teacher.prepare(replace(data, train=labelled), trainer, folder / "cache")
    provider = Provider(
        teacher,
        NoDefense(),
        spec=pool.spec,
        classes=CLASSES,
        access=InterfaceProfile(Reveals.PROBS),
        usd_per_query=0.0,
        budget=Budget(queries=queries),
        seed=seed,
        cache=folder / "cache",
        log=folder / "log",
        defense_id="none",
    )
    students = StudentTrainer(*(LeNet(), AsReturned(), SoftCrossEntropy(), Recipe(), trainer, pool.spec, names, seed))
    return DFME(batch_size=batch, width=width), provider, students, pool


def data_free_attack(
    attack: DFME, provider: Provider, students: StudentTrainer, pool: Examples, seed: int
) -> tuple[float, float]:
    """Seconds in all, and those of them in the teacher."""
    predict, inside = provider.teacher.predict, 0.0

    def timed(inputs: np.ndarray) -> np.ndarray:
        nonlocal inside
        began = time.thread_time()
        answers = predict(inputs)
        inside += time.thread_time() - began
        return answers

    provider.teacher.predict = timed  # type: ignore[method-assign]
    with serve(provider) as oracle:
        began = time.process_time()
        attack.extract(oracle, pool, students, seed)
        seconds = time.process_time() - began
    provider.teacher.predict = predict  # type: ignore[method-assign]
    return seconds, inside


def bare(attack: DFME, provider: Provider, students: StudentTrainer, queries: int, asks: bool) -> float:
    """Seconds of the same steps of generator and student, written down as plainly as they can be."""
    own, batch, shape = students.fresh(), attack.batch_size, provider.spec.shape
    size = int(np.prod(shape))
    generator = Generator(shape, attack.latent, attack.width)
    steering = torch.optim.Adam(generator.parameters(), attack.generator_lr, fused=True)
    learning = torch.optim.SGD(own.module.parameters(), attack.student_lr, 0.9, weight_decay=5e-4, fused=True)

    def answers(pixels: torch.Tensor) -> torch.Tensor:
        if not asks:
            return torch.full((len(pixels), CLASSES), 1 / CLASSES)
        return torch.from_numpy(softmax(provider.teacher.predict(pixels.contiguous().numpy())))

    began = time.process_time()
    for _ in range(queries // (7 * batch)):
        own.module.eval()
        at = generator(torch.randn(batch, attack.latent))
        directions = functional.normalize(torch.randn(batch, size), dim=1).view_as(at)
        with torch.no_grad():
            pixels = squash(torch.cat([at, at + attack.step * directions]))
            there, moved = l1(own.logits(pixels), answers(pixels)).chunk(2)
        slopes = size * ((moved - there) / attack.step).view(-1, 1, 1, 1) * directions
        steering.zero_grad()
        (-(slopes * at).sum() / batch).backward()
        steering.step()
        with torch.no_grad():
            pixels = squash(generator(torch.randn(attack.student_steps * batch, attack.latent)))
        own.module.train()
        for part, told in zip(pixels.split(batch), answers(pixels).split(batch), strict=True):
            learning.zero_grad()
            l1(own.logits(part), told).mean().backward()
            learning.step()
    return time.process_time() - began


# ----------------------------------------------------------------------------------------------------------------------

BENCHES: list[Callable[[], list[Row]]] = [selections, jbda, data_free]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of the functions, those with this in their name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("what", "asked", "CPU")
    for bench in BENCHES:
        if arguments.only in bench.__name__:
            for row in bench():
                table.add_row(row.what, row.asked, row.came_out)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
