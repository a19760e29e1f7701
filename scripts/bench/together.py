"""Several students of one architecture trained together (`torch.func`, vmap), against one after the other; one thread.

    python scripts/bench/together.py [--students 3 8] [--repeats 3] [--epochs 2] [--only lenet]

As in a grid over defenses: the same queries, initialisation and order of rows, other targets for each. *grad* is
``vmap(grad(loss))``; *sum* takes the gradient of the sum of all losses through a vmapped forward pass, which is the
same for each; *own rows* is *sum* where each student has queries of its own, as in a grid over seeds. All take fused
steps of the recipe's optimiser over stacked weights. "One after the other" is `Trainer.fit`, with all that it does
besides. Ratios are of CPU seconds, in turns, apart ÷ together: more than 1 says that together is quicker. The largest
relative difference of an epoch's mean loss says whether they learn the same.

What came out (AMD EPYC, two busy cores, torch 2.13, one thread, 2 epochs, seed 1; n = 3, median (least … most)):

    architecture, data      k   batch   apart, s   grad                 sum                  own rows
    lenet, Fashion-MNIST    3   64      2.31       0.86 (0.77 … 1.18)   0.83 (0.81 … 1.11)   0.80 (0.73 … 1.15)
    lenet, Fashion-MNIST    8   64      5.29       0.82 (0.81 … 0.89)   0.85 (0.84 … 0.93)   0.75 (0.72 … 0.79)
    mlp, digits             3   32      0.10       0.98 (0.95 … 0.98)   1.12 (1.12 … 1.16)   1.13 (0.90 … 1.16)
    mlp, digits             8   32      0.30       1.84 (1.73 … 1.85)   1.93 (1.89 … 1.96)   1.96 (1.93 … 2.00)
    mlp, letters            3   32      0.37       0.96 (0.94 … 1.13)   1.17 (0.97 … 1.59)   1.13 (0.85 … 1.49)
    mlp, letters            8   32      0.95       1.86 (1.55 … 2.07)   1.95 (1.85 … 2.19)   2.01 (1.87 … 2.21)
    bag of words, R8        3   32      3.13       0.67 (0.59 … 0.68)   0.71 (0.64 … 0.78)   0.97 (0.96 … 1.13)
    bag of words, R8        8   32      8.48       0.43 (0.42 … 0.43)   0.36 (0.34 … 0.38)   0.72 (0.66 … 0.76)

On a CPU, one after the other is kept: only networks so small that calling torch is what they cost gain. On a GPU it was
not run. Losses agree to 3e-7, but LeNet's to 7e-5: single precision, amplified by Adam (in double precision they agree
to 1e-7, as far as their sums tell). After 20 epochs two such students disagree on 1 % of the test rows (k = 2), so a
student that was trained in company is not the one that its configuration makes alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from distill.data.digits import Digits
from distill.data.fashion_mnist import FashionMNIST
from distill.data.letters import Letters
from distill.data.reuters_r8 import ReutersR8
from distill.errors import DistillError
from distill.objectives.soft_cross_entropy import SoftCrossEntropy
from distill.randomness import generator
from distill.records import Dataset, one_hot
from distill.students.lenet import LeNet
from distill.students.mlp import MLP
from distill.students.text_encoder import TextEncoder
from distill.training import Recipe, Standardise, TensorFeatures, Trainer

QUICK = Recipe(epochs=20, batch_size=64, lr=2e-3)
SMALL = Recipe(epochs=60, batch_size=32, lr=1e-3)
SEED = 1
# An architecture, its data, how many rows it learns from, its recipe.
TASKS = {
    "lenet, Fashion-MNIST": (LeNet(), FashionMNIST(), 2_000, QUICK),
    "mlp, digits": (MLP(), Digits(), 500, SMALL),
    "mlp, letters": (MLP(), Letters(), 2_000, SMALL),
    "bag of words, R8": (TextEncoder(), ReutersR8(), 2_000, SMALL),
}


@dataclass(frozen=True)
class Task:
    """k students: modules of the same weights, n rows of features, and (k, n, classes) targets."""

    modules: list[torch.nn.Module]
    features: TensorFeatures
    targets: torch.Tensor
    recipe: Recipe

    def epochs(self) -> list[tuple[torch.Tensor, ...]]:
        """The rows of each batch of each epoch, as `Trainer.fit` takes them."""
        rows = torch.arange(len(self.features))
        orders = (generator(SEED, "student", "order", e).permutation(len(rows)) for e in range(self.recipe.epochs))
        return [rows[torch.from_numpy(order)].split(self.recipe.batch_size) for order in orders]


@cache
def loaded(option: str) -> Dataset:
    return TASKS[option][1].load()


def make(option: str, students: int, epochs: int, trainer: Trainer) -> Task:
    student, _, rows, recipe = TASKS[option]
    data = loaded(option)
    spec, classes, train = data.spec, data.classes, data.train.take(np.arange(rows))
    assert train.labels is not None
    noise = np.random.default_rng(0).dirichlet(np.ones(classes), (students, rows))
    targets = 0.7 * one_hot(train.labels, classes)[None] + 0.3 * noise
    features = student.encode(train.inputs, spec)
    assert isinstance(features, TensorFeatures)
    modules = [trainer.build(student, spec, classes, SEED) for _ in range(students)]
    return Task(modules, features, torch.from_numpy(targets.astype(np.float32)), replace(recipe, epochs=epochs))


def apart(task: Task, trainer: Trainer) -> np.ndarray:
    """(epochs, k) mean losses."""
    losses = []
    for module, targets in zip(task.modules, task.targets, strict=True):
        given = {"posteriors": targets}
        fitted = trainer.fit(module, task.features, given, SoftCrossEntropy(), task.recipe, seed=SEED, name="student")
        losses.append([row["loss"] for row in fitted["curve"]])
    return np.array(losses).T


def together(task: Task, method: str) -> np.ndarray:
    """(epochs, k) mean losses."""
    for part in (part for module in task.modules for part in module.modules()):
        if isinstance(part, Standardise):
            part.observe(task.features, torch.arange(len(task.features)))
    weights, buffers = stack_module_state(task.modules)
    optimizer = task.recipe.build_optimizer(weights.values(), torch.device("cpu"))
    objective, architecture, k = SoftCrossEntropy(), task.modules[0], len(task.modules)
    own_rows = 0 if method == "own rows" else None

    def loss(weights: dict, buffers: dict, inputs: dict, targets: torch.Tensor) -> torch.Tensor:
        output = functional_call(architecture, (weights, buffers), (), inputs)
        return objective.loss(output, {"posteriors": targets}) / len(targets)

    each: Callable = loss if method != "grad" else grad_and_value(loss)
    step = vmap(each, in_dims=(0, 0, own_rows, 0))
    epochs, number, means = task.epochs(), 0, []
    steps = sum(map(len, epochs))
    for epoch, batches in enumerate(epochs):
        total = torch.zeros(k)
        for rows in batches:
            for group in optimizer.param_groups:
                group["lr"] = task.recipe.learning_rate(number, steps, epoch)
            inputs = task.features[rows]
            if own_rows is not None:
                inputs = {name: value.expand(k, *value.shape).contiguous() for name, value in inputs.items()}
            found = step(weights, buffers, inputs, task.targets[:, rows])
            if method == "grad":
                gradients, losses = found
                for name, weight in weights.items():
                    weight.grad = gradients[name].contiguous()  # fused steps take another layout for this one
            else:
                losses = found
                losses.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            total += losses.detach() * len(rows)
            number += 1
        means.append((total / len(task.features)).numpy())
    return np.array(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--only", default="", help="tasks whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer(device="cpu", progress=False)
    methods = ["grad", "sum", "own rows"]
    table = Table("architecture, data", "k", "batch", "apart, s", *(f"{m}: ratio" for m in methods), "loss differs by")
    for option in TASKS:
        if arguments.only not in option:
            continue
        for k in arguments.students:
            try:
                apart(make(option, k, 1, trainer), trainer)  # what the first call pays for
            except DistillError as error:
                print(f"{option}: left out ({error})")
                break
            seconds: dict[str, list[float]] = {name: [] for name in ["apart", *methods]}
            differences = []
            for repeat in range(arguments.repeats):
                losses = {}
                for name in sorted(seconds, reverse=repeat % 2 == 1):
                    task = make(option, k, arguments.epochs, trainer)
                    started = time.process_time()
                    losses[name] = apart(task, trainer) if name == "apart" else together(task, name)
                    seconds[name].append(time.process_time() - started)
                differences += [np.abs(losses[m] / losses["apart"] - 1).max() for m in methods]
            ratios = [[a / b for a, b in zip(seconds["apart"], seconds[m], strict=True)] for m in methods]
            shown = [f"{statistics.median(r):.2f} ({min(r):.2f} … {max(r):.2f})" for r in ratios]
            batch = TASKS[option][3].batch_size
            apart_s = statistics.median(seconds["apart"])
            table.add_row(option, str(k), str(batch), f"{apart_s:.2f}", *shown, f"{max(differences):.0e}")
    Console(width=150).print(table)
    print(f"n = {arguments.repeats}: median (least … most); load {os.getloadavg()[0]:.1f}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
