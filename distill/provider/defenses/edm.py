from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.config import digest
from distill.contracts import Pool, Student, Teacher
from distill.errors import DistillError
from distill.kept import Kept, describe, train_once, untrained
from distill.provider.defenses._networks import OUTLIER, Members, with_outliers
from distill.randomness import KeyedRandom
from distill.records import Answers, Dataset, InterfaceProfile, Reveals, softmax
from distill.training import Recipe


class EDM:
    """An ensemble of diverse models, one of which answers each query; which one, a hash of the input says.

    Paper: Protecting DNNs from Theft using an Ensemble of Diverse Models (Kariyappa, Prakash and Qureshi, ICLR 2021).
    The members are trained together on ``mean CE + diversity * log sum exp`` of the cosine similarities between the
    posteriors of each pair of members, a smooth maximum (the *coherence* of the ensemble), where the cross-entropy is
    of the teacher's data and the similarity of outliers. Member ``(m argmax h + floor((M max h - 1) m / (M - 1))) mod
    members`` answers, with h the posterior of a small network over M classes (the hash of D-DAE's release).
    Threat model: a black-box attacker whose queries are unlike the teacher's data, even if it sees labels alone; it
    does not know the networks.
    (n, classes) posteriors in and out; what the teacher said is replaced by what the member says of the query, so
    nothing is claimed of label and distance.
    Departs: no training code was released, so the loss is written from what the paper says that it does, and
    `diversity` is our choice. D-DAE's h is trained on another labelled data set; here it has fresh weights, and its
    logits are standardised over the outliers, so that it spreads queries on every kind of data. All members are run for
    each query, though one would do.

    Args:
        architecture: Of each member and of h.
        recipe: How the members are trained.
        outliers: A pool of inputs that are not the teacher's.
        members: How many.
        diversity: Weight of the coherence.
        hash_classes: M.
        hash_bins: m, the steps of confidence.

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
        members: int = 5,
        diversity: float = 1.0,
        hash_classes: int = 10,
        hash_bins: int = 2,
    ) -> None:
        for option, count, least in (
            ("members", members, 2),
            ("hash_classes", hash_classes, 2),
            ("hash_bins", hash_bins, 1),
        ):
            if count < least:
                raise DistillError(f"must be at least {least}, not {count}", f"defense.{option}")
        if not (diversity >= 0 and math.isfinite(diversity)):
            raise DistillError(f"must be at least 0, not {diversity}", "defense.diversity")
        describe(architecture, "defense.architecture")
        self.architecture, self.recipe, self.outliers = architecture, recipe, outliers
        self.members, self.diversity = members, diversity
        self.hash_classes, self.hash_bins = hash_classes, hash_bins

    def prepare(self, teacher: Teacher, data: Dataset, trainer: Any, cache: Path, seed: int) -> Teacher:
        """The same teacher: its answers are replaced."""
        inputs, labels = with_outliers(data, self.outliers)
        self._ensemble: Kept = train_once(
            Members(self.architecture, self.members),
            data.spec,
            self.members * data.classes,
            inputs,
            {"labels": labels},
            _Diverse(self.members, self.diversity),
            self.recipe,
            trainer=trainer,
            cache=cache,
            seed=seed,
            name="ensemble",
            key="defense.architecture",
        )
        self._hash: Kept = untrained(
            self.architecture,
            data.spec,
            self.hash_classes,
            trainer=trainer,
            seed=seed,
            name="hash",
            key="defense.architecture",
        )
        logits = self._hash.predict(inputs.second).astype(np.float64)
        self._centre, self._scale = logits.mean(axis=0), np.maximum(logits.std(axis=0), 1e-12)
        networks = [self._ensemble.fingerprint, self._hash.fingerprint, self._centre.tolist(), self._scale.tolist()]
        self.fingerprint = digest(networks, length=32)
        return teacher

    def chosen(self, inputs: np.ndarray) -> np.ndarray:
        """(n,) int64: which member answers."""
        posteriors = softmax((self._hash.predict(inputs) - self._centre) / self._scale)
        return hashed(posteriors, self.hash_bins) % self.members

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        """(n, classes) posteriors of the member that answers."""
        logits = self._ensemble.predict(inputs)
        logits = logits.reshape(len(inputs), self.members, -1)
        return softmax(logits[np.arange(len(inputs)), self.chosen(inputs)])

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        assert info is not None  # what `query_info` gave
        return Answers(info)


def hashed(posteriors: np.ndarray, bins: int) -> np.ndarray:
    """(n,) int64: ``bins argmax h + floor((M max h - 1) bins / (M - 1))`` of (n, M) posteriors."""
    classes, top = posteriors.shape[1], posteriors.max(axis=1).astype(np.float64)
    step = np.floor((classes * top - 1) * bins / (classes - 1)).astype(np.int64)
    return bins * posteriors.argmax(axis=1) + np.maximum(step, 0)  # rounding may put the maximum below 1 / M


class _Diverse:
    def __init__(self, members: int, diversity: float) -> None:
        self.members, self.diversity = members, diversity

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        log = output.unflatten(1, (self.members, -1)).log_softmax(dim=2)
        labels = targets["labels"]
        outlier = labels == OUTLIER
        right = log[~outlier].gather(2, labels[~outlier, None, None].expand(-1, self.members, 1)).mean(dim=1).sum()
        pairs = torch.triu_indices(self.members, self.members, offset=1, device=output.device)
        unit = torch.nn.functional.normalize(log[outlier].exp(), dim=2)
        similar = (unit[:, pairs[0]] * unit[:, pairs[1]]).sum(dim=2)
        return 2 * (self.diversity * similar.logsumexp(dim=1).sum() - right)

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["labels"])
