"""What the defenses that train networks share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill.contracts import Features, Pool, Student, Teacher
from distill.errors import DistillError
from distill.provider.cache import RowCache
from distill.records import Dataset, Inputs, InputSpec, Reveals, content_keys

ROWS = 4096  # how many rows a teacher is asked about at once
OUTLIER = -1  # the label of a row that has none


@dataclass(frozen=True)
class Joined:
    """Two columns of inputs, one after the other, read when they are asked for.

    Pixels that are uint8 in one column and float32 in [0, 1] in the other become float32.
    """

    first: Inputs
    second: Inputs

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        rows = np.arange(len(self))[rows]
        early = rows < len(self.first)
        parts = [self.first[rows[early]], self.second[rows[~early] - len(self.first)]]
        if parts[0].dtype != parts[1].dtype:
            parts = [part.astype(np.float32) / 255 if part.dtype == np.uint8 else part for part in parts]
        joined = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
        joined[early], joined[~early] = parts
        return joined


@dataclass(frozen=True)
class Members:
    """Several networks of one architecture as one: (n, members × classes) logits, those of the first member first."""

    architecture: Student
    members: int

    def build(self, spec: InputSpec, classes: int) -> nn.Module:
        """`classes`: the outputs of all members together."""
        return MemberNetworks([self.architecture.build(spec, classes // self.members) for _ in range(self.members)])

    def encode(self, inputs: Inputs, spec: InputSpec) -> Features:
        return self.architecture.encode(inputs, spec)


class MemberNetworks(nn.Module):
    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, **features: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(**features) for network in self.networks], dim=1)


def true_labels(data: Dataset) -> torch.Tensor:
    """(n,) int64, those of the training rows. Raises `DistillError` where they have none."""
    if data.train.labels is None:
        raise DistillError(f"{data.name} has no labels to train the defense on", "data")
    return torch.tensor(data.train.labels, dtype=torch.int64)


def with_outliers(data: Dataset, outliers: Pool) -> tuple[Joined, torch.Tensor]:
    """The n training rows, then n rows of a pool (from its beginning, and again from there where it is smaller), and
    the (2n,) int64 labels, `OUTLIER` for those of the pool.

    Half of the rows are of each kind, so a mean over one kind is twice its sum over all rows.
    """
    labels, pool = true_labels(data), outliers.load(data)
    if len(pool) == 0:
        raise DistillError("the pool is empty", "defense.outliers")
    rows = np.arange(len(labels)) % len(pool)
    return Joined(data.train.inputs, pool.take(rows).inputs), torch.cat([labels, torch.full_like(labels, OUTLIER)])


def logits_of(teacher: Teacher, inputs: Inputs, cache: Path) -> np.ndarray:
    """(n, classes) float32 whose softmax is the teacher's answer; probabilities below 1e-10 count as that.

    It is asked about each input once, ever: the answers are those that the provider keeps too.
    """
    answers = RowCache(cache / "answers" / teacher.fingerprint)
    parts = []
    for start in range(0, len(inputs), ROWS):
        rows = inputs[start : start + ROWS]
        compute = partial(_predict, teacher, rows)
        parts.append(answers.get_or_compute(content_keys(rows), compute, min(teacher.rows_at_once, ROWS)))
    values = np.concatenate(parts)
    return values if teacher.output is Reveals.LOGITS else np.log(np.maximum(values, 1e-10))


def _predict(teacher: Teacher, rows: np.ndarray, missing: np.ndarray) -> np.ndarray:
    return teacher.predict(rows[missing]).astype(np.float32)
