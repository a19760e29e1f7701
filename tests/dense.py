"""A small student and real digits for the tests of teachers; as a script, one process that trains the teacher."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from distill.provider.teachers.torch_classifier import TorchClassifier
from distill.records import Dataset, Examples, InputSpec
from distill.training import Recipe, TensorFeatures, Trainer

RECIPE = Recipe(epochs=8, batch_size=128, lr=0.01, checkpoint_steps=1)


@dataclass
class Dense:
    """A student as small as can be; `SLOW_S` seconds are slept in each forward pass of training."""

    hidden: int = 32

    def build(self, spec: InputSpec, classes: int) -> torch.nn.Module:
        return DenseModule(int(np.prod(spec.shape)), self.hidden, classes)

    def encode(self, inputs: Any, spec: InputSpec) -> TensorFeatures:
        return TensorFeatures({"pixels": torch.from_numpy(inputs[:])})


class DenseModule(torch.nn.Module):
    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(features, hidden), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(hidden, classes)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(float(os.environ.get("SLOW_S", "0")))
        return self.layers(pixels.flatten(1).float() / 255)


def dataset(inputs: np.ndarray, labels: np.ndarray, spec: InputSpec, class_names: tuple[str, ...]) -> Dataset:
    """Two thirds to train on, one third to test on."""
    examples = Examples(inputs, spec, labels.astype(np.int64), class_names)
    train, test = np.split(np.arange(len(examples)), [2 * len(examples) // 3])
    return Dataset("toy", spec, class_names, examples.take(train), examples.take(test), examples.take(train[:0]))


def digits() -> Dataset:
    data = load_digits()
    pixels = np.round(data.images / 16 * 255).astype(np.uint8)[..., None]
    return dataset(pixels, data.target, InputSpec("image", (8, 8, 1)), tuple("0123456789"))


def main(cache: Path) -> None:
    from dense import Dense  # the class by the name that the tests know it by, not as part of __main__

    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    teacher = TorchClassifier(Dense(), RECIPE)
    teacher.prepare(digits(), Trainer(device="cpu"), cache)
    print("FINGERPRINT", teacher.fingerprint)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
