"""What the recoveries share that learn to invert a defense: shadow models, and the restorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from distill.contracts import Defense, Knowledge, Loss
from distill.errors import DistillError
from distill.kept import Kept, train_once
from distill.randomness import derive, generator
from distill.records import Inputs, InputSpec, TransferSet, one_hot, softmax
from distill.recovery._simulated import SimulatedApi
from distill.training import Features, Recipe, TensorFeatures

BATCH = 1024
STEPS = 16  # of an epoch, at least: with fewer rows a batch is smaller


def check(*, epochs: int, share: float = 1.0, **at_least_two: int) -> None:
    """Raises `DistillError` for options out of range."""
    for name, value in at_least_two.items():
        if value < 2:
            raise DistillError(f"{name} must be at least 2, not {value}")
    if epochs < 1:
        raise DistillError(f"epochs must be at least 1, not {epochs}")
    if not 0 < share <= 1:
        raise DistillError(f"share must be more than 0 and at most 1, not {share}")


def shadow_answers(transfer_set: TransferSet, knowledge: Knowledge, shadows: int, share: float) -> np.ndarray:
    """What shadow models say of the queries.

    A shadow model is a student of the attacker's, trained on the returned labels of a random share of the queries.

    Returns:
        (shadows · n, classes) float32: the answers of one model to all n queries after those of another.
    """
    inputs, labels = transfer_set.inputs(knowledge.pool), transfer_set.posteriors.argmax(axis=1)
    labelled = replace(transfer_set, targets=one_hot(labels, transfer_set.classes), logits=None)
    answers = []
    for shadow in range(shadows):
        order = generator(knowledge.seed, "shadow", shadow).permutation(len(labels))
        student = knowledge.student.fit(labelled.take(order[: max(1, round(share * len(order)))]), knowledge.pool)
        answers.append(softmax(student.predict(inputs)))
    return np.concatenate(answers)


def simulated(
    defense: Defense, clean: np.ndarray, transfer_set: TransferSet, knowledge: Knowledge, *, remembers: bool = True
) -> np.ndarray:
    """(m, classes) float32: the answers if `clean` (m, classes) were clean ones, row i to query i mod n.

    `remembers`: as of `SimulatedApi.of`.
    """
    queries = np.arange(len(clean)) % len(transfer_set)
    return SimulatedApi.of(defense, transfer_set, knowledge, remembers=remembers).answers(clean, queries)


def restored(
    transfer_set: TransferSet, returned: np.ndarray, clean: np.ndarray, knowledge: Knowledge, epochs: int
) -> TransferSet:
    """The transfer set with targets that a restorer makes of its answers; logits are dropped.

    Args:
        transfer_set: n answers.
        returned: (m, classes) float32, what the defense makes of `clean`.
        clean: (m, classes) float32, what the restorer learns to make of that.
        knowledge: Of the attacker.
        epochs: Of the restorer.
    """
    if np.array_equal(returned, clean):  # there is nothing to undo
        return replace(transfer_set, targets=transfer_set.posteriors, logits=None)
    batch = min(BATCH, max(2, len(clean) // STEPS))
    recipe = Recipe(epochs=epochs, batch_size=batch, optimizer="sgd", lr=0.01, momentum=0.9, schedule="cosine")
    restorer = trained(
        "restorer", clean.shape[1], returned, {"posteriors": torch.from_numpy(clean)}, L1(), recipe, knowledge
    )
    return replace(transfer_set, targets=softmax(restorer.predict(transfer_set.posteriors)), logits=None)


def trained(
    name: str,
    outputs: int,
    rows: np.ndarray,
    targets: Mapping[str, torch.Tensor],
    loss: Loss,
    recipe: Recipe,
    knowledge: Knowledge,
) -> Kept:
    """A network on (m, features) float32 `rows`, trained once. Rows beyond the last whole batch are left out: batch
    normalisation can't do with a batch of one row."""
    whole = len(rows) // recipe.batch_size * recipe.batch_size or len(rows)
    return train_once(
        Restorer(),
        InputSpec("table", (rows.shape[1],)),
        outputs,
        rows[:whole],
        {key: tensor[:whole] for key, tensor in targets.items()},
        loss,
        recipe,
        trainer=knowledge.trainer,
        cache=knowledge.cache,
        seed=derive(knowledge.seed, name),
        name=name,
        key="recovery",
    )


class Restorer:
    """Two hidden layers with batch normalisation and leaky ReLU, whose width grows with the classes.

    A `distill.contracts.Student` on tables of posteriors; the softmax of its outputs is the restored posterior.
    """

    def build(self, spec: InputSpec, classes: int) -> nn.Module:
        (width,) = spec.shape
        first, second = (128, 64) if width < 100 else (1024, 512) if width < 200 else (2048, 1024)
        return _Network(
            nn.Linear(width, first),
            nn.BatchNorm1d(first),
            nn.LeakyReLU(0.2),
            nn.Linear(first, second),
            nn.BatchNorm1d(second),
            nn.LeakyReLU(0.2),
            nn.Linear(second, classes),
        )

    def encode(self, inputs: Inputs, spec: InputSpec) -> Features:
        return TensorFeatures({"inputs": torch.tensor(inputs[:])})


class _Network(nn.Sequential):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs)


class L1:
    """Σ_k |softmax(z)_k − y_k|, summed over rows."""

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (output.float().softmax(dim=1) - targets["posteriors"]).abs().sum()

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["posteriors"])
