"""Small worlds for attacks: a provider of 8×8 images, tables or texts, and an apprentice that really trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from toys import FEATURES, ToyTeacher, a_provider

from distill.experiment import StudentTrainer
from distill.objectives.soft_cross_entropy import SoftCrossEntropy
from distill.provider.oracle import serve
from distill.provider.provider import Provider
from distill.records import Budget, Examples, InputSpec, TransferSet
from distill.recovery.as_returned import AsReturned
from distill.students.mlp import MLP
from distill.students.text_encoder import TextEncoder
from distill.training import Recipe, Trainer

CLASSES = 4
NAMES = tuple("abcd")
IMAGE, TABLE, TEXT = InputSpec("image", (8, 8, 1)), InputSpec("table", (FEATURES,)), InputSpec("text")
SPECS = {spec.kind: spec for spec in (IMAGE, TABLE, TEXT)}
WORDS = ("red", "green", "blue", "cold", "warm", "north", "south", "river", "stone", "bird", "cloud", "seven")


class ToyTeacherOf(ToyTeacher):
    """A fixed random linear softmax model over images or texts, as `ToyTeacher` is one over tables."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__(CLASSES, **options)
        self.kind, self.fingerprint = kind, f"{self.fingerprint}-{kind}"
        size = {"image": 64, "table": FEATURES, "text": len(WORDS)}[kind]
        self.weights = np.random.default_rng(7).normal(size=(size, CLASSES)) * (1 if kind == "table" else 2)

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return super().predict(numbers(inputs, self.kind))


def numbers(inputs: np.ndarray, kind: str) -> np.ndarray:
    """(n, m) float64: centred pixels, columns, or counts of the words."""
    if kind == "text":
        return np.array([[text.split().count(word) for word in WORDS] for text in inputs], dtype=np.float64)
    if kind == "image":
        pixels = inputs / 255 if inputs.dtype == np.uint8 else inputs
        return pixels.reshape(len(inputs), -1).astype(np.float64) - 0.5
    return inputs.astype(np.float64)


def a_labelled_pool(kind: str, rows: int, seed: int = 0) -> Examples:
    """Inputs with the toy teacher's own labels, as a pool that is labelled with its classes."""
    random = np.random.default_rng(seed)
    if kind == "image":
        inputs = random.integers(0, 256, (rows, *IMAGE.shape)).astype(np.uint8)
    elif kind == "table":
        inputs = random.normal(size=(rows, FEATURES)).astype(np.float32)
    else:
        inputs = np.empty(rows, dtype=object)
        inputs[:] = [" ".join(random.choice(WORDS, random.integers(3, 9))) for _ in range(rows)]
    labels = ToyTeacherOf(kind).predict(inputs).argmax(axis=1)
    return Examples(inputs, SPECS[kind], labels, NAMES, f"toy {kind}s")


def a_toy_provider(folder: Path, kind: str, queries: int, defense: Any = None, **changes: Any) -> Provider:
    """Whose `teacher.forwards` counts the rows that it was asked."""
    teacher = changes.pop("teacher", None) or ToyTeacherOf(kind)
    return a_provider(folder, teacher, defense, **({"spec": SPECS[kind], "budget": Budget(queries=queries)} | changes))


def an_apprentice(kind: str, seed: int = 0, epochs: int = 2, **changes: Any) -> StudentTrainer:
    """The real one, with a small student that learns for a moment."""
    student = TextEncoder(buckets=64, width=8) if kind == "text" else MLP(hidden=(16,))
    parts: dict[str, Any] = {
        "student": student,
        "recovery": AsReturned(),
        "objective": SoftCrossEntropy(),
        "recipe": Recipe(epochs=epochs, batch_size=16, lr=1e-2),
        "trainer": Trainer(device="cpu", progress=False),
        "spec": SPECS[kind],
        "class_names": NAMES,
        "seed": seed,
    }
    return StudentTrainer(**(parts | changes))


def extracted(
    attack: Any, folder: Path, kind: str, queries: int, pool: Examples, seed: int = 0, **changes: Any
) -> tuple[TransferSet, Provider, StudentTrainer]:
    """What an attack brings home, the provider that it asked, and the apprentice with what it was shown."""
    provider, student = a_toy_provider(folder, kind, queries, **changes), an_apprentice(kind, seed)
    with serve(provider) as oracle:
        return attack.extract(oracle, pool, student, seed), provider, student
