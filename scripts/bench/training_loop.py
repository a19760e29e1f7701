"""The training loop against a bare PyTorch loop: same tensors, model, optimiser, order of rows; one thread.

    python scripts/bench/training_loop.py [--repeats 7] [--rows 30000]

The two take turns (A B B A …) and the medians of their times are compared, so that a noisy machine hurts both alike;
where other processes want the CPU as well, CPU time says more than wall time.
Fashion-MNIST from Debian's dataset-fashion-mnist where it is installed, else random pixels of the same shape.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from distill.objectives.soft_cross_entropy import SoftCrossEntropy
from distill.records import InputSpec, TransferSet, one_hot
from distill.students.lenet import LeNet
from distill.training import Recipe, Trainer

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SPEC = InputSpec("image", (28, 28, 1))


class Terminal(io.StringIO):
    """Takes what a bar draws, so that its cost is counted wherever this runs."""

    def isatty(self) -> bool:
        return True


def load(rows: int) -> tuple[str, np.ndarray, np.ndarray]:
    if FASHION_MNIST.is_dir():
        images = gzip.decompress((FASHION_MNIST / "train-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((FASHION_MNIST / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
        columns = np.frombuffer(images, np.uint8).reshape(-1, 28, 28, 1), np.frombuffer(labels, np.uint8)
        return "Fashion-MNIST", columns[0][:rows].copy(), columns[1][:rows].astype(np.int64)
    rng = np.random.default_rng(0)
    return "random pixels", rng.integers(0, 256, (rows, 28, 28, 1), dtype=np.uint8), rng.integers(0, 10, rows)


def bare(module: torch.nn.Module, images: torch.Tensor, posteriors: torch.Tensor, batch_size: int, epochs: int) -> None:
    """What one would write by hand, without a schedule, a log or a bar."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, fused=True)
    module.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):
            loss = F.cross_entropy(module(images[rows]), posteriors[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    name, images, labels = load(options.rows)
    objective = SoftCrossEntropy()
    targets = objective.prepare(TransferSet(np.arange(len(labels)), one_hot(labels, 10)))
    student = LeNet(width=options.width)
    features = student.encode(images, SPEC)
    recipe = Recipe(
        epochs=options.epochs, batch_size=options.batch_size, optimizer="sgd", lr=0.05, momentum=0.9, log_steps=50
    )
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    times: dict[tuple[str, str], list[float]] = {(loop, clock): [] for loop in ("bare", "distill") for clock in clocks}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "metrics.jsonl").open("w") as metrics:
        sys.stderr = Terminal()
        trainer = Trainer(device="cpu", progress=True, log=lambda row: print(json.dumps(row), file=metrics))
        for repeat in range(-1, options.repeats):
            for loop in ("bare", "distill") if repeat % 2 else ("distill", "bare"):
                module = trainer.build(student, SPEC, 10, seed=0)
                started = {clock: read() for clock, read in clocks.items()}
                if loop == "bare":
                    pixels = torch.from_numpy(images)
                    bare(module, pixels, targets["posteriors"], options.batch_size, options.epochs)
                else:
                    place = Path(folder)
                    trainer.fit(module, features, targets, objective, recipe, seed=0, name="student", directory=place)
                if repeat >= 0:  # the first turn warms up
                    for clock, read in clocks.items():
                        times[loop, clock].append(read() - started[clock])
        drawn = sys.stderr.tell()
        sys.stderr = sys.__stderr__
    steps = recipe.steps(len(labels))
    table = Table(title=f"LeNet (width {options.width}), {name}, {steps} steps of {options.batch_size}, one thread")
    for column in ("loop", "clock", "median s", "least s", "most s", "ms/step"):
        table.add_column(column, justify="right")
    for (loop, clock), seconds in times.items():
        middle = statistics.median(seconds)
        values = (middle, min(seconds), max(seconds), 1000 * middle / steps)
        table.add_row(loop, clock, *(f"{value:.3f}" for value in values))
    console = Console()
    console.print(table)
    for clock in clocks:
        ratios = [a / b for a, b in zip(times["distill", clock], times["bare", clock], strict=True)]
        of_medians = statistics.median(times["distill", clock]) / statistics.median(times["bare", clock])
        console.print(
            f"{clock} time: ratio of medians {of_medians:.3f}, of pairs {statistics.median(ratios):.3f} (median), "
            f"{min(ratios):.3f} to {max(ratios):.3f}, n={len(ratios)}; at most 1.05 is asked for"
        )
    console.print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs; the bar drew {drawn} characters")


if __name__ == "__main__":
    main()
