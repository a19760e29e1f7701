"""Networks that are trained once and kept under the cache: teachers, and what defenses and recoveries need besides.

Their place in the cache is a hash of all that determines them. Several processes that need the same one wait for the
one that trains it; a killed training goes on from its last checkpoint; weights that were damaged on disk are noticed
and trained anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from safetensors.torch import load_model, save_model

from distill.config import digest
from distill.contracts import Loss, Student
from distill.errors import DistillError
from distill.randomness import derive
from distill.records import Examples, Inputs, InputSpec, file_hash
from distill.training import Recipe, Trainer, measure

log = logging.getLogger(__name__)

SCHEMA = 1  # raised when a change of code changes what the same description trains


@dataclass(frozen=True)
class Kept:
    """A network that is ready to answer.

    Attributes:
        module: In evaluation mode, on the trainer's device.
        fingerprint: Content hash of its weights and of the way it reads inputs.
        record: What was written beside its weights: parameters, flops_per_query, history.
    """

    module: torch.nn.Module
    architecture: Student
    spec: InputSpec
    outputs: int
    trainer: Trainer
    fingerprint: str
    record: Mapping[str, Any]

    def predict(self, inputs: Inputs) -> np.ndarray:
        """(n, outputs) float32 logits."""
        if not len(inputs):
            return np.zeros((0, self.outputs), dtype=np.float32)
        return self.trainer.predict(self.module, self.architecture.encode(inputs, self.spec))


def train_once(
    architecture: Student,
    spec: InputSpec,
    outputs: int,
    inputs: Inputs,
    targets: Mapping[str, torch.Tensor],
    objective: Loss,
    recipe: Recipe,
    *,
    trainer: Trainer,
    cache: Path,
    seed: int,
    name: str,
    key: str,
    content: str | None = None,
) -> Kept:
    """A network trained from fresh weights by all processes of `trainer`, or the one that was trained before.

    Args:
        architecture: Keeps each option of its constructor as an attribute of that name.
        spec: What one input is.
        outputs: How many outputs the network has.
        inputs: n inputs.
        targets: Tensors of n rows.
        objective: The loss; its plain attributes are part of its identity.
        recipe: How it is trained.
        trainer: The engine.
        cache: Where networks are kept.
        seed: Of initialisation and training.
        name: What is trained, for the log, such as "teacher".
        key: The config key of the architecture, for messages.
        content: What identifies inputs and targets; left out, it is computed from every row.

    Raises:
        DistillError: The architecture does not keep its options or read such inputs.
    """
    module = trainer.build(architecture, spec, outputs, derive(seed, name))
    facts = {
        "schema": SCHEMA,
        "architecture": describe(architecture, key),
        "weights": {weight: list(value.shape) for weight, value in module.state_dict().items()},
        "objective": _options(objective),
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "name": name,
        "precision": trainer.precision,
        "content": content or _content(inputs, spec, targets),
        "spec": dataclasses.asdict(spec),
        "outputs": outputs,
    }
    folder = cache / "networks" / digest(facts, length=16)

    def train() -> dict[str, Any]:
        log.info("training the %s on %d rows; it is kept in %s", name, len(inputs), folder)
        training = folder.with_name(f"{folder.name}-training")
        features = architecture.encode(inputs, spec)
        history = trainer.fit(
            module, features, targets, objective, recipe, seed=derive(seed, name), name=name, directory=training
        )
        record: dict[str, Any] = {}
        if trainer.is_main:
            partial = folder.with_name(f"{folder.name}-partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save_model(module, str(partial / "model.safetensors"))
            size = measure(module, architecture.encode(inputs[:1], spec))
            weights = file_hash(partial / "model.safetensors")
            record = {
                "fingerprint": digest(
                    {"weights": weights, **{part: facts[part] for part in ("architecture", "spec")}}, 32
                ),
                "parameters": int(size["parameters"]),
                "flops_per_query": size["flops_per_query"],
                "weights": weights,
                "history": history,
                "facts": facts,
            }
            (partial / "network.json").write_text(json.dumps(record, indent=1) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
            shutil.rmtree(training, ignore_errors=True)
        return trainer.broadcast(record)

    with held(folder, name) if trainer.is_main else contextlib.nullcontext():
        # All ranks must do the same, so one looks. The others hold no lock: this one does until all are done.
        record = trainer.broadcast(find(folder, "network.json", name) if trainer.is_main else None)
        if record is None:
            record = train()
        else:
            load_model(module, folder / "model.safetensors")
            log.info("the %s is the one trained before: %s", name, folder)
        trainer.wait()
    module.to(trainer.device).eval()
    return Kept(module, architecture, spec, outputs, trainer, record["fingerprint"], record)


def untrained(
    architecture: Student, spec: InputSpec, outputs: int, *, trainer: Trainer, seed: int, name: str, key: str
) -> Kept:
    """The same network before any training. Its record is empty."""
    module = trainer.build(architecture, spec, outputs, derive(seed, name)).to(trainer.device).eval()
    facts = {
        "architecture": describe(architecture, key),
        "spec": dataclasses.asdict(spec),
        "outputs": outputs,
        "seed": seed,
        "name": name,
    }
    return Kept(module, architecture, spec, outputs, trainer, digest(facts, length=32), {})


def describe(architecture: Student, key: str) -> dict[str, Any]:
    """The class and the options of an architecture, JSON-able; an option may be an architecture itself.

    Raises:
        DistillError: It does not keep its options.
    """
    kind = type(architecture)
    name = f"{kind.__module__}.{kind.__qualname__}"
    options: dict[str, Any] = {}
    try:
        for option in inspect.signature(kind).parameters:
            value = vars(architecture)[option]
            nested = callable(vars(type(value)).get("build"))
            options[option] = describe(value, key) if nested else value
        json.dumps(options)
    except (KeyError, TypeError) as error:
        raise DistillError(
            f"{name} must keep each option of its constructor as a plain attribute of that name ({error}), so that "
            "networks made of it can be told from others",
            key,
        ) from None
    return {"class": name, **options}


def weights_hash(module: torch.nn.Module) -> str:
    """32 hexadecimal digits of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _options(objective: Loss) -> dict[str, Any]:
    kind = type(objective)
    plain = {name: value for name, value in vars(objective).items() if isinstance(value, (bool, int, float, str))}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **plain}


def _content(inputs: Inputs, spec: InputSpec, targets: Mapping[str, torch.Tensor]) -> str:
    hashed = hashlib.blake2b(Examples(inputs, spec).fingerprint.encode(), digest_size=16)
    for name, tensor in sorted(targets.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


@contextlib.contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """Held by one process on this machine at a time; the system frees it when its holder is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("waiting for the process that is training this %s (%s)", name, folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def find(folder: Path, record_name: str, name: str) -> dict[str, Any] | None:
    """The record of whole weights, or None. What is damaged is named in a warning."""
    if not folder.exists():
        return None
    try:
        record = json.loads((folder / record_name).read_text())
        if file_hash(folder / "model.safetensors") == record["weights"]:
            return record
        damaged = "model.safetensors"
    except (OSError, ValueError, KeyError, TypeError):
        damaged = record_name
    log.warning("%s is damaged; the %s is trained anew", folder / damaged, name)
    return None
