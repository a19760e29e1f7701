"""The network that a provider trains to stand in for the attacker's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.contracts import Student, Teacher
from distill.kept import Kept, train_once
from distill.provider.defenses._networks import logits_of
from distill.records import Dataset, softmax
from distill.training import Recipe, Trainer

NAME = "surrogate"
KEY = "defense.architecture"


def imitator(
    teacher: Teacher,
    data: Dataset,
    architecture: Student,
    recipe: Recipe,
    *,
    trainer: Trainer,
    cache: Path,
    seed: int,
) -> Kept:
    """A network that was trained on the inputs of `data.train` with the teacher's posteriors as targets.

    Its cost: the teacher is asked about each of these inputs, once.
    """
    inputs = data.train.inputs
    targets = {"posteriors": torch.from_numpy(softmax(logits_of(teacher, inputs, cache)))}
    return train_once(
        architecture,
        data.spec,
        data.classes,
        inputs,
        targets,
        _Imitation(),
        recipe,
        trainer=trainer,
        cache=cache,
        seed=seed,
        name=NAME,
        key=KEY,
    )


class _Imitation:
    """Cross-entropy with the teacher's posteriors."""

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output, targets["posteriors"], reduction="sum")

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["posteriors"])


class AlongOnes(torch.nn.Module):
    """The derivative of a classifier's log-posteriors along the direction of its weights that is one everywhere."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        """(n, classes)."""
        weights = {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}
        ones = {name: torch.ones_like(weight) for name, weight in weights.items()}

        def log_posteriors(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(self.network, weights, kwargs=batch).log_softmax(dim=1)

        device = next(iter(weights.values())).device.type
        # Fused attention has no forward mode, and lower precision does not mix with it.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device, enabled=False):
            return torch.func.jvp(log_posteriors, (weights,), (ones,))[1]
