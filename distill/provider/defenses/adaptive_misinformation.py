from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.contracts import Pool, Student, Teacher, TrainableTeacher
from distill.errors import DistillError
from distill.kept import Kept, describe, train_once
from distill.provider.defenses._networks import OUTLIER, logits_of, with_outliers
from distill.provider.defenses._tensors import through
from distill.randomness import KeyedRandom
from distill.records import Answers, Dataset, InterfaceProfile, Reveals, softmax
from distill.training import Recipe


class AdaptiveMisinformation:
    """Answers queries that the teacher is unsure of with the posterior of a network that was trained to be wrong.

    Paper: Defending Against Model Stealing Attacks with Adaptive Misinformation (Kariyappa and Qureshi, CVPR 2020):
    ``(1 - a) y + a f_mis(x)`` with ``a = 1 / (1 + exp(nu (max y - tau)))``, where `f_mis` minimises ``-log(1 - p)`` of
    the true label on the teacher's data and of the teacher's label on outliers.
    Threat model: a black-box attacker whose queries are unlike the teacher's data. A teacher that is surer of its own
    data than of others makes the defense: where its architecture is here, it is trained anew with outlier exposure
    (Hendrycks, Mazeika and Dietterich, ICLR 2019), that is with `exposure` times the cross-entropy between the uniform
    distribution and its answers to outliers; any other teacher stays as it is.
    (n, classes) posteriors in and out; of each query it needs f_mis(x), (n, classes). The label may change.
    Departs from the authors' code, in which f_mis follows the teacher while both are trained and `nu` is 10,000: here
    the teacher is trained first. Outliers are as many as training rows, as there.

    Args:
        architecture: Of f_mis.
        recipe: How f_mis is trained. (The teacher has its own.)
        outliers: A pool of inputs that are not the teacher's.
        tau: The confidence from which on an answer is mostly the teacher's. It is to be chosen for each data set:
            ModelGuard's code has 0.25 on Caltech256, 0.3 on CUB200, 0.4 on CIFAR-100 and 0.7 on CIFAR-10, the authors'
            code 0.99 on MNIST.
        nu: Steepness of the change from one to the other.
        exposure: Weight of outlier exposure.

    Raises:
        DistillError: The data has no labels, or the architecture can't read it.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = False
    deterministic = True
    l1_budget: float | None = None
    fingerprint = ""  # until `prepare`

    def __init__(
        self,
        architecture: Student,
        recipe: Recipe,
        outliers: Pool,
        tau: float = 0.5,
        nu: float = 1000.0,
        exposure: float = 1.0,
    ) -> None:
        if not 0 <= tau <= 1:
            raise DistillError(f"must be between 0 and 1, not {tau}", "defense.tau")
        if not (nu > 0 and math.isfinite(nu)):
            raise DistillError(f"must be more than 0, not {nu}", "defense.nu")
        if not (exposure >= 0 and math.isfinite(exposure)):
            raise DistillError(f"must be at least 0, not {exposure}", "defense.exposure")
        describe(architecture, "defense.architecture")
        self.architecture, self.recipe, self.outliers = architecture, recipe, outliers
        self.tau, self.nu, self.exposure = tau, nu, exposure

    def prepare(self, teacher: Teacher, data: Dataset, trainer: Any, cache: Path, seed: int) -> Teacher:
        """The teacher with outlier exposure, where it can be trained; else the same one."""
        inputs, labels = with_outliers(data, self.outliers)
        if isinstance(teacher, TrainableTeacher):
            teacher = teacher.retrained(
                _OutlierExposure(self.exposure), inputs, {"labels": labels}, "teacher with outlier exposure", cache
            )
        told = torch.from_numpy(logits_of(teacher, inputs.second, cache).argmax(axis=1))
        self._wrong: Kept = train_once(
            self.architecture,
            data.spec,
            data.classes,
            inputs,
            {"labels": torch.cat([labels[labels != OUTLIER], told])},
            _Misinformation(),
            self.recipe,
            trainer=trainer,
            cache=cache,
            seed=seed,
            name="misinformation",
            key="defense.architecture",
        )
        self.fingerprint = self._wrong.fingerprint
        return teacher

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        """(n, classes) posteriors of f_mis."""
        return softmax(self._wrong.predict(inputs))

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return through(self.transform, answers, info, self.keeps_argmax)

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        """See `distill.contracts.TensorDefense`."""
        assert info is not None  # what `query_info` gave
        # torch.sigmoid rounds a number differently by its place in the batch; beyond ±700 exp would overflow.
        share = 1 / (1 + torch.exp((self.nu * (posteriors.amax(dim=1, keepdim=True) - self.tau)).clamp(-700, 700)))
        return (1 - share) * posteriors + share * info.to(posteriors)


class _OutlierExposure:
    def __init__(self, exposure: float) -> None:
        self.exposure = exposure

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        log, labels = output.log_softmax(dim=1), targets["labels"]
        outlier = labels == OUTLIER
        known = log[~outlier].gather(1, labels[~outlier, None]).sum()
        return -2 * (known + self.exposure * log[outlier].mean(dim=1).sum())

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["labels"])


class _Misinformation:
    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # 1 - p as the probability of all other classes, which is exact where p is almost 1.
        others = output.scatter(1, targets["labels"][:, None], -torch.inf)
        return (output.logsumexp(dim=1) - others.logsumexp(dim=1)).sum()

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["labels"])
