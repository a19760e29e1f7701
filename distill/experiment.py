"""Everything that a configuration names, built and checked against one another before any query is spent."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_model, save_model

from distill.config import build, cache_dir, digest, identity, options_that
from distill.contracts import Attack, Defense, Metric, Objective, Recovery, Student, Teacher
from distill.errors import DistillError
from distill.launch import write_atomically
from distill.provider.ledger import Ledger
from distill.provider.provider import Provider
from distill.randomness import derive
from distill.records import (
    Budget,
    Dataset,
    Examples,
    Inputs,
    InputSpec,
    InterfaceProfile,
    Reveals,
    TransferSet,
    file_hash,
)
from distill.training import Recipe, Trainer

log = logging.getLogger(__name__)


@dataclass
class TrainedStudent:
    """A module with its way of reading inputs (`distill.contracts.Predictor`)."""

    module: Any
    student: Student
    spec: InputSpec
    trainer: Trainer
    history: dict[str, Any]

    def predict(self, inputs: Inputs) -> np.ndarray:
        """(n, classes) float32 logits."""
        return self.trainer.predict(self.module, self.student.encode(inputs, self.spec))


@dataclass
class StudentTrainer:
    """Trains fresh students on transfer sets (`distill.contracts.Apprentice`). It knows nothing of the provider."""

    student: Student
    recovery: Recovery
    objective: Objective
    recipe: Recipe
    trainer: Trainer
    spec: InputSpec
    class_names: tuple[str, ...]
    seed: int
    knowledge: dict[str, Any]

    def untrained(self) -> TrainedStudent:
        """The initialisation, which depends on the seed alone: runs over several defenses are paired."""
        module = self.trainer.build(self.student, self.spec, len(self.class_names), derive(self.seed, "student"))
        return TrainedStudent(module, self.student, self.spec, self.trainer, {})

    def save(self, trained: TrainedStudent, folder: Path) -> None:
        """Write weights and history. `student.json` comes last: its presence means that the weights are whole."""
        folder.mkdir(exist_ok=True)
        partial = folder / ".model.safetensors"
        save_model(trained.module, str(partial))
        partial.replace(folder / "model.safetensors")
        record = {"weights": file_hash(folder / "model.safetensors"), "history": trained.history}
        write_atomically(folder / "student.json", json.dumps(record, indent=1) + "\n")

    def load(self, folder: Path) -> TrainedStudent | None:
        """What `save` wrote, or None where nothing whole is there; damage is named in a warning."""
        if not (folder / "student.json").exists():
            return None
        record, weights = json.loads((folder / "student.json").read_text()), folder / "model.safetensors"
        if not weights.exists() or file_hash(weights) != record["weights"]:
            log.warning("%s is damaged", weights)
            return None
        trained = self.untrained()
        load_model(trained.module, weights)
        trained.history = record["history"]
        return trained

    def fit(
        self, transfer_set: TransferSet, pool: Examples, name: str = "interim", directory: Path | None = None
    ) -> TrainedStudent:
        """A student from fresh weights. With a `directory`, an interrupted training goes on from there."""
        fresh = self.untrained()
        recovered = self.recovery.targets(transfer_set, self.knowledge)
        fresh.history = self.trainer.fit(
            fresh.module,
            self.student.encode(recovered.inputs(pool), self.spec),
            self.objective.prepare(recovered),
            self.objective,
            self.recipe,
            seed=derive(self.seed, "training"),
            name=name,
            directory=directory,
        )
        return fresh


@dataclass
class Experiment:
    """Both sides of an experiment. `teacher` and `defense` belong to the provider and to the evaluation."""

    config: Any
    trainer: Trainer
    data: Dataset
    pool: Examples
    teacher: Teacher
    defense: Defense
    profile: InterfaceProfile
    budget: Budget
    attack: Attack
    students: StudentTrainer
    metrics: dict[str, Metric]
    choices: dict[str, str]
    queries: Path

    @classmethod
    def build(cls, config: Any, trainer: Trainer, choices: dict[str, str], queries: Path) -> Experiment:
        """Raises `DistillError` for whatever does not fit together. The teacher is trained here if it has to be.

        `queries` is the folder of the query stage, where the provider keeps its log.
        """
        budget = Budget(config.budget.queries, config.budget.usd)
        Ledger(budget, config.access.usd_per_query)  # a price that does not fit is told before a teacher is trained
        if any(not 0 < share < 1 for share in config.curve):
            raise DistillError("shares of the budget between 0 and 1, such as [0.1,0.3]", "curve")
        teacher: Teacher = build(config.teacher, "teacher")
        defense: Defense = build(config.defense, "defense")
        attack: Attack = build(config.attack, "attack")
        recovery: Recovery = build(config.recovery, "recovery")
        objective: Objective = build(config.objective, "objective")
        student: Student = build(config.student, "student")
        recipe: Recipe = build(config.training, "training")
        metrics: dict[str, Metric] = build(config.metric, "metric")
        if recovery.knows == "the defense's code":
            knowledge = {"defense": build(config.defense, "defense")}
        else:
            knowledge = {"defense": choices["defense"]} if recovery.knows == "the defense's name" else {}

        data: Dataset = build(config.data, "data").load()
        profile = (
            InterfaceProfile.parse(config.access.profile, config.access.top_k)
            .meet(defense.exposes)
            .meet(InterfaceProfile(teacher.output))
        )
        if profile.top_k is not None and profile.top_k > data.classes:
            key = "access.top_k" if config.access.top_k == profile.top_k else "defense.k"
            raise DistillError(f"{profile.top_k} is more than the {data.classes} classes of {data.name}", key)
        _check_profile("attack", choices, attack.requires, profile)
        _check_profile("objective", choices, objective.requires, profile)
        pool: Examples = build(config.pool, "pool").load(data)
        if len(pool) == 0:
            raise DistillError("the pool is empty", "pool")
        student.build(data.spec, data.classes)  # an architecture that can't read these inputs is told now
        teacher.prepare(data, trainer, cache_dir())
        return cls(
            config=config,
            trainer=trainer,
            data=data,
            pool=pool,
            teacher=teacher,
            defense=defense,
            profile=profile,
            budget=budget,
            attack=attack,
            students=StudentTrainer(
                student, recovery, objective, recipe, trainer, data.spec, data.class_names, config.seed, knowledge
            ),
            metrics=metrics,
            choices=choices,
            queries=queries,
        )

    @cached_property
    def provider(self) -> Provider:
        """The provider of this experiment, for the attack and for the evaluation."""
        return Provider(
            self.teacher,
            self.defense,
            spec=self.data.spec,
            classes=self.data.classes,
            access=InterfaceProfile.parse(self.config.access.profile, self.config.access.top_k),
            usd_per_query=self.config.access.usd_per_query,
            budget=self.budget,
            seed=self.config.seed,
            cache=cache_dir(),
            log=self.queries / "provider_log",
            defense_id=digest(identity(self.config.defense)),
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes of what the configuration only names."""
        return {
            "teacher": self.teacher.fingerprint,
            "train": self.data.train.fingerprint,
            "test": self.data.test.fingerprint,
            "pool": self.pool.fingerprint,
        }


def make_trainer(config: Any, log_row: Callable[[dict[str, Any]], None] | None = None) -> Trainer:
    """The training loop's engine, on the device that the configuration names."""
    if config.run.threads is not None:
        import torch

        if config.run.threads < 1:
            raise DistillError(f"must be at least 1, not {config.run.threads}", "run.threads")
        torch.set_num_threads(config.run.threads)
    return Trainer(
        device=config.run.device,
        workers=config.run.workers,
        progress=config.run.progress,
        precision=config.precision,
        log=log_row,
    )


def _check_profile(group: str, choices: dict[str, str], requires: Reveals, profile: InterfaceProfile) -> None:
    if profile.reveals >= requires:
        return
    fits = options_that(group, lambda method: method.requires <= profile.reveals)
    raise DistillError(
        f"{choices[group]} requires {requires.name.lower()}, but defense={choices['defense']} behind "
        f"access={choices['access']} reveals {profile} only; compatible: {', '.join(fits)}",
        group,
    )
