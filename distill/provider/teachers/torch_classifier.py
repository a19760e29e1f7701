from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from distill.contracts import Loss, Student
from distill.errors import DistillError
from distill.kept import Kept, describe, train_once
from distill.records import Dataset, Inputs, Reveals
from distill.training import Recipe, Trainer, measure


class TorchClassifier:
    """A classifier trained here, once, on the labels of ``data.train``, and kept under the cache (`distill.kept`).

    Args:
        architecture: Any student that keeps each option of its constructor as an attribute of that name, by which one
            teacher is told from another. In yaml: any option of `student`.
        recipe: How it is trained.
        seed: Of initialisation and training. It is the teacher's own: runs that differ in the seed of the attack
            face the same teacher.

    Raises:
        DistillError: The architecture does not keep its options or read such inputs, or the data has no labels.
    """

    output: ClassVar[Reveals] = Reveals.LOGITS
    usd_per_query: ClassVar[float] = 0.0
    remote: ClassVar[bool] = False
    rows_at_once: ClassVar[int] = 4096

    parameters: int | None
    flops_per_query: float | None

    def __init__(self, architecture: Student, recipe: Recipe, seed: int = 0) -> None:
        describe(architecture, "teacher.architecture")
        self.architecture, self.recipe, self.seed = architecture, recipe, seed

    def prepare(self, data: Dataset, trainer: Trainer, cache: Path) -> None:
        """Load the weights, or train them with all processes of `trainer`."""
        if data.train.labels is None:
            raise DistillError(f"{data.name} has no labels to train the teacher on", "data")
        self._data, self._trainer = data, trainer
        labels = torch.as_tensor(data.train.labels, dtype=torch.int64)
        inputs, content = data.train.inputs, data.train.fingerprint
        self._take(self._trained(_LabelCrossEntropy(), inputs, {"labels": labels}, "teacher", cache, content))

    def retrained(
        self, objective: Loss, inputs: Inputs, targets: Mapping[str, torch.Tensor], name: str, cache: Path
    ) -> TorchClassifier:
        """See `distill.contracts.TrainableTeacher`."""
        other = TorchClassifier(self.architecture, self.recipe, self.seed)
        other._data, other._trainer = self._data, self._trainer
        other._take(self._trained(objective, inputs, targets, name, cache))
        return other

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """(n, classes) float32 logits."""
        return self._network.predict(inputs)

    def latency_s(self, one: np.ndarray) -> float | None:
        """Of one forward pass with one row."""
        return measure(self._network.module, self.architecture.encode(one, self._data.spec))["latency_s"]

    def _trained(
        self,
        objective: Loss,
        inputs: Inputs,
        targets: Mapping[str, torch.Tensor],
        name: str,
        cache: Path,
        content: str | None = None,
    ) -> Kept:
        return train_once(
            self.architecture,
            self._data.spec,
            self._data.classes,
            inputs,
            targets,
            objective,
            self.recipe,
            trainer=self._trainer,
            cache=cache,
            seed=self.seed,
            name=name,
            key="teacher.architecture",
            content=content,
        )

    def _take(self, network: Kept) -> None:
        self._network, self.fingerprint = network, network.fingerprint
        self.parameters = network.record["parameters"]
        self.flops_per_query = network.record["flops_per_query"]


class _LabelCrossEntropy:
    """Cross-entropy with the true labels."""

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output, targets["labels"], reduction="sum")

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["labels"])
