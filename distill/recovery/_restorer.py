"""What the recoveries share that learn to invert a defense: shadow models, the restorer and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from distill.contracts import Knowledge
from distill.errors import DistillError
from distill.kept import train_once
from distill.randomness import derive, generator
from distill.records import Inputs, InputSpec, TransferSet, one_hot, softmax
from distill.training import Features, Recipe, TensorFeatures

BATCH = 1024
LR = 0.01


def at_least(**bounds: tuple[float, float]) -> None:
    """Raises `DistillError` for an option below its bound; each is given as (value, bound)."""
    for name, (value, bound) in bounds.items():
        if value < bound:
            raise DistillError(f"{name} must be at least {bound}, not {value}")


def shadow_answers(transfer_set: TransferSet, knowledge: Knowledge, shadows: int, share: float) -> np.ndarray:
    """(shadows * n, classes) float32: what each shadow model says of each of the n queries, one model after the other.

    A shadow model is a student of the attacker's, trained on the returned labels of a random share of the queries.
    """
    inputs = transfer_set.inputs(knowledge.pool)
    labelled = replace(
        transfer_set, targets=one_hot(transfer_set.posteriors.argmax(axis=1), transfer_set.classes), logits=None
    )
    answers = []
    for shadow in range(shadows):
        order = generator(knowledge.seed, "shadow", shadow).permutation(len(transfer_set))
        some = np.sort(order[: max(1, round(share * len(order)))])
        answers.append(softmax(knowledge.student.fit(labelled.take(some), knowledge.pool).predict(inputs)))
    return np.concatenate(answers)


def restored(
    received: np.ndarray, simulated: np.ndarray, clean: np.ndarray, knowledge: Knowledge, epochs: int
) -> np.ndarray:
    """The answers that were received, as a restorer makes them that learnt to turn `simulated` into `clean`.

    Args:
        received: (n, classes) float32.
        simulated: (m, classes) float32, what the defense makes of `clean`.
        clean: (m, classes) float32.
        knowledge: Whose trainer, cache and seed are used.
        epochs: Of the restorer.

    Returns:
        (n, classes) float32 distributions.
    """
    if np.array_equal(simulated, clean):  # the defense does nothing
        return received
    # BatchNorm can't do with one row, so the last batch is as large as the others.
    rows = len(clean) // BATCH * BATCH or len(clean)
    restorer = train_once(
        Restorer(),
        InputSpec("table", (clean.shape[1],)),
        clean.shape[1],
        simulated[:rows],
        {"posteriors": torch.from_numpy(clean[:rows])},
        L1(),
        Recipe(epochs=epochs, batch_size=BATCH, optimizer="sgd", lr=LR, momentum=0.9, schedule="cosine"),
        trainer=knowledge.trainer,
        cache=knowledge.cache,
        seed=derive(knowledge.seed, "restorer"),
        name="restorer",
        key="recovery",
    )
    return softmax(restorer.predict(received))


class Restorer:
    """Two hidden layers with batch normalisation and leaky ReLU, on posteriors; their width grows with the classes.

    `distill.contracts.Student`, on tables of posteriors; a softmax of its outputs is the restored posterior.
    """

    def build(self, spec: InputSpec, classes: int) -> nn.Module:
        first, second = (128, 64) if classes < 100 else (1024, 512) if classes < 200 else (2048, 1024)
        return _Network(
            nn.Linear(classes, first),
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
