from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.contracts import Defense, NetworkDefense, StatefulDefense, Teacher, TensorDefense
from distill.errors import DistillError
from distill.randomness import KeyedRandom
from distill.records import Answers, Dataset, InterfaceProfile


class Chain:
    """Several defenses, one after the other: each perturbs what the one before it returned.

    Threat model: that of its members. It exposes the poorest of what they expose, keeps the label and is deterministic
    if all of them do and are, and moves an answer by at most the sum of their budgets.
    (n, classes) posteriors in and out. Each member draws its own noise, remembers its own answers and has its own
    networks; members that train the teacher differently do so in turn.

    Args:
        members: The defenses, in order.
    """

    def __init__(self, members: Sequence[Defense]) -> None:
        if not members:
            raise DistillError("needs at least one defense", "defense.members")
        self.members = list(members)
        self.exposes = reduce(InterfaceProfile.meet, [member.exposes for member in members])
        self.keeps_argmax = all(member.keeps_argmax for member in members)
        self.deterministic = all(member.deterministic for member in members)
        budgets = [member.l1_budget for member in members if member.l1_budget is not None]
        self.l1_budget = min(2.0, sum(budgets)) if len(budgets) == len(members) else None

    @property
    def fingerprint(self) -> str:
        """Those of the members that have networks, in order."""
        return "-".join(member.fingerprint for member in self.members if isinstance(member, NetworkDefense))

    def prepare(self, teacher: Teacher, data: Dataset, trainer: Any, cache: Path, seed: int) -> Teacher:
        """Each member gets the teacher that the one before it returned."""
        for member in self.members:
            if isinstance(member, NetworkDefense):
                teacher = member.prepare(teacher, data, trainer, cache, seed)
        return teacher

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        """(n, members + their columns): how many columns each member has, then those columns.

        `perturb` may run in a process that only ever sees cached information, so it has to say itself how it is cut.
        """
        infos = [member.query_info(inputs) for member in self.members]
        if all(info is None for info in infos):
            return None
        columns = [np.empty((len(inputs), 0), np.float32) if info is None else info for info in infos]
        widths = np.tile(np.array([column.shape[1] for column in columns], np.float32), (len(inputs), 1))
        return np.concatenate([widths, *columns], axis=1)

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        for i, (member, known) in enumerate(zip(self.members, self._cut(info), strict=True)):
            answers = member.perturb(answers, known, rng.child(str(i)))
        return answers

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        """Raises `DistillError` where a member has no formula in torch."""
        for member, known in zip(self.members, self._cut(info), strict=True):
            if not isinstance(member, TensorDefense):
                raise DistillError(f"{type(member).__name__} cannot be trained through", "defense.members")
            posteriors = member.transform(posteriors, known)
        return posteriors

    def state(self) -> dict[str, np.ndarray]:
        """What the members remember, each under its place in the chain."""
        stateful = [(i, member) for i, member in enumerate(self.members) if isinstance(member, StatefulDefense)]
        return {f"{i}/{name}": array for i, member in stateful for name, array in member.state().items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        for i, member in enumerate(self.members):
            if isinstance(member, StatefulDefense):
                own = f"{i}/"
                member.restore({name.removeprefix(own): state[name] for name in state if name.startswith(own)})

    def _cut(self, info: Any) -> list[Any]:
        """What each member needs to know of the queries, out of an array or a tensor of `query_info`."""
        if info is None or not len(info):
            return [None] * len(self.members)
        parts: list[Any] = []
        start = len(self.members)
        for width in info[0, : len(self.members)].tolist():
            end = start + int(width)
            parts.append(info[:, start:end] if width else None)
            start = end
        return parts
