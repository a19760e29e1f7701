from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from distill.contracts import Defense
from distill.errors import DistillError
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile


class Chain:
    """Several defenses, one after the other: each perturbs what the one before it returned.

    Threat model: that of its members. It exposes the poorest of what they expose, keeps the label and is deterministic
    if all of them do and are, and moves an answer by at most the sum of their budgets.
    (n, classes) posteriors in and out. Each member draws its own noise.

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
        infos: list[np.ndarray | None] = [None] * len(self.members)
        if info is not None and len(info):
            ends = len(self.members) + np.cumsum(info[0, : len(self.members)].astype(int))
            infos = [
                info[:, start:end] if end > start else None
                for start, end in zip([len(self.members), *ends[:-1]], ends, strict=True)
            ]
        for i, (member, known) in enumerate(zip(self.members, infos, strict=True)):
            answers = member.perturb(answers, known, rng.child(str(i)))
        return answers
