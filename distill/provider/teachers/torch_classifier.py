from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from distill.config import digest
from distill.contracts import Student
from distill.errors import DistillError
from distill.provider.teachers.trained import find_trained, held
from distill.randomness import derive
from distill.records import Dataset, Reveals, file_hash
from distill.training import Recipe, Trainer, measure

log = logging.getLogger(__name__)

SCHEMA = 1  # raised when a change of code changes what the same description trains


class TorchClassifier:
    """A classifier trained here, once, on the labels of ``data.train``, and kept under the cache.

    Its place in the cache is a hash of all that determines it: architecture, recipe, seed, precision, training rows
    and labels. Several processes that need the same teacher wait for the one that trains it; a killed training goes
    on from its last checkpoint; weights that were damaged on disk are noticed and trained anew.

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

    def __init__(self, architecture: Student, recipe: Recipe, seed: int = 0) -> None:
        self._description = _describe(architecture)
        self.architecture, self.recipe, self.seed = architecture, recipe, seed

    def prepare(self, data: Dataset, trainer: Trainer, cache: Path) -> None:
        """Load the weights, or train them with all processes of `trainer`."""
        if data.train.labels is None:
            raise DistillError(f"{data.name} has no labels to train the teacher on", "data")
        self._spec, self._trainer, self._classes = data.spec, trainer, data.classes
        self._module = trainer.build(self.architecture, data.spec, data.classes, derive(self.seed, "teacher"))
        facts = {
            "schema": SCHEMA,
            "architecture": self._description,
            "weights": {name: list(value.shape) for name, value in self._module.state_dict().items()},
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.seed,
            "precision": trainer.precision,
            "train": data.train.fingerprint,
            "spec": dataclasses.asdict(data.spec),
            "classes": data.classes,
        }
        folder = cache / "teachers" / digest(facts, length=16)
        with held(folder) if trainer.is_main else contextlib.nullcontext():
            # All ranks must do the same, so one looks. The others hold no lock: this one does until all are done.
            record = trainer.broadcast(find_trained(folder) if trainer.is_main else None)
            if record is None:
                record = self._train(data, facts, folder)
            else:
                load_model(self._module, folder / "model.safetensors")
                log.info("the teacher is the one trained before: %s", folder)
            trainer.wait()
        self.fingerprint = _fingerprint(record["weights"], facts)
        self._module.to(trainer.device).eval()
        self.parameters, self.flops_per_query = record["parameters"], record["flops_per_query"]

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """(n, classes) float32 logits."""
        if not len(inputs):
            return np.zeros((0, self._classes), dtype=np.float32)
        return self._trainer.predict(self._module, self.architecture.encode(inputs, self._spec))

    def latency_s(self, one: np.ndarray) -> float | None:
        """Of one forward pass with one row."""
        return measure(self._module, self.architecture.encode(one, self._spec))["latency_s"]

    def _train(self, data: Dataset, facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        log.info("training the teacher on the %d rows of %s; it is kept in %s", len(data.train), data.name, folder)
        training = folder.with_name(f"{folder.name}-training")
        history = self._trainer.fit(
            self._module,
            self.architecture.encode(data.train.inputs, data.spec),
            {"labels": torch.as_tensor(data.train.labels, dtype=torch.int64)},
            _LabelCrossEntropy(),
            self.recipe,
            seed=derive(self.seed, "teacher"),
            name="teacher",
            directory=training,
        )
        record: dict[str, Any] = {}
        if self._trainer.is_main:
            partial = folder.with_name(f"{folder.name}-partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save_model(self._module, str(partial / "model.safetensors"))
            weights = file_hash(partial / "model.safetensors")
            size = measure(self._module, self.architecture.encode(data.train.inputs[:1], data.spec))
            record = {
                "parameters": int(size["parameters"]),
                "flops_per_query": size["flops_per_query"],
                "fingerprint": _fingerprint(weights, facts),
                "weights": weights,
                "history": history,
                "facts": facts,
            }
            (partial / "teacher.json").write_text(json.dumps(record, indent=1) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
            shutil.rmtree(training, ignore_errors=True)
        return self._trainer.broadcast(record)


class _LabelCrossEntropy:
    """Cross-entropy with the true labels."""

    requires: Reveals = Reveals.LABEL

    def prepare(self, transfer_set: Any) -> Mapping[str, torch.Tensor]:
        raise NotImplementedError  # a teacher learns from labels, not from answers

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output, targets["labels"], reduction="sum")

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["labels"])


def _describe(architecture: Student) -> dict[str, Any]:
    """The class and the options of an architecture, JSON-able. Raises `DistillError` where it does not keep them."""
    kind = type(architecture)
    name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        options = {option: vars(architecture)[option] for option in inspect.signature(kind).parameters}
        json.dumps(options)
    except (KeyError, TypeError) as error:
        raise DistillError(
            f"{name} must keep each option of its constructor as a plain attribute of that name ({error}), so that a "
            "teacher made of it can be told from others",
            "teacher.architecture",
        ) from None
    return {"class": name, **options}


def _fingerprint(weights: str, facts: Mapping[str, Any]) -> str:
    return digest({"weights": weights, "architecture": facts["architecture"], "spec": facts["spec"]}, length=32)
