from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.contracts import Teacher, TrainableTeacher
from distill.errors import DistillError
from distill.provider.defenses._networks import logits_of, true_labels
from distill.randomness import KeyedRandom
from distill.records import Answers, Dataset, InterfaceProfile, Reveals


class NastyTeacher:
    """The teacher, trained anew to be right and yet as far as possible from what it would have been.

    Paper: Undistillable: Making A Nasty Teacher That CANNOT teach students (Ma et al., ICLR 2021), self-undermining
    knowledge distillation: ``CE(softmax(z), label) - omega tau² KL(softmax(z / tau) || softmax(z_A / tau))`` with the
    logits z of the nasty teacher and z_A of the undefended one, in the direction that the authors' code computes.
    Threat model: an attacker who learns from whole posteriors; the label stays right, so hard labels still teach.
    Answers are not changed after training: (n, classes) posteriors pass through. Nothing is claimed of label and
    distance, which are measured against the undefended teacher.
    Departs from the authors' code in that z_A is computed once, of inputs that are not augmented.

    Args:
        omega: Weight of the divergence. Too much of it costs accuracy, so it is to be chosen for each data set: the
            authors' ResNet-18 has 0.04 on CIFAR-10, 0.005 on CIFAR-100 and 0.01 on Tiny ImageNet.
        tau: Temperature of the divergence: 4 on CIFAR-10, 20 on the other two.

    Raises:
        DistillError: The teacher can't be trained here, or the data has no labels.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = False
    deterministic = True
    l1_budget: float | None = None
    fingerprint = ""  # until `prepare`

    def __init__(self, omega: float = 0.04, tau: float = 4.0) -> None:
        for option, value in (("omega", omega), ("tau", tau)):
            if not (value > 0 and math.isfinite(value)):
                raise DistillError(f"must be more than 0, not {value}", f"defense.{option}")
        self.omega, self.tau = omega, tau

    def prepare(self, teacher: Teacher, data: Dataset, trainer: Any, cache: Path, seed: int) -> Teacher:
        """The nasty teacher, of the seed of the undefended one."""
        if not isinstance(teacher, TrainableTeacher):
            raise DistillError(
                "trains the teacher anew, so it needs one that is trained here; use torch_classifier", "defense"
            )
        targets = {
            "labels": true_labels(data),
            "normal": torch.from_numpy(logits_of(teacher, data.train.inputs, cache)),
        }
        nasty = teacher.retrained(
            _SelfUndermining(self.omega, self.tau), data.train.inputs, targets, "nasty teacher", cache
        )
        self.fingerprint = nasty.fingerprint
        return nasty

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return answers

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        """See `distill.contracts.TensorDefense`."""
        return posteriors


class _SelfUndermining:
    def __init__(self, omega: float, tau: float) -> None:
        self.omega, self.tau = omega, tau

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        right = torch.nn.functional.cross_entropy(output, targets["labels"], reduction="sum")
        nasty, normal = ((logits / self.tau).log_softmax(dim=1) for logits in (output, targets["normal"]))
        return right - self.omega * self.tau**2 * (nasty.exp() * (nasty - normal)).sum()

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["labels"])
