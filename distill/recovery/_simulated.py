"""What the recoveries share that run the attacker's copy of the defense."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill.contracts import Defense, Knowledge, StatefulDefense
from distill.randomness import KeyedRandom, derive
from distill.records import ROWS_AT_ONCE, Answers, InterfaceProfile, TransferSet, content_keys


@dataclass(frozen=True)
class SimulatedApi:
    """The attacker's copy of the defense, behind the same access: it answers any posteriors to the attacker's queries.

    A defense that remembers what it answered is, before each block of posteriors, in the state that the answers which
    were really returned leave it in; so what it answered there, it answers here.

    Args:
        defense: The copy.
        profile: What the answers reveal.
        keys: (n,) content keys of the queries.
        info: (n, m) what the defense knows of them, or None.
        seed: Of the copy's noise.
    """

    defense: Defense
    profile: InterfaceProfile
    keys: np.ndarray
    info: np.ndarray | None
    seed: int

    @classmethod
    def of(cls, defense: Defense, transfer_set: TransferSet, knowledge: Knowledge) -> SimulatedApi:
        inputs = transfer_set.inputs(knowledge.pool)
        blocks = [inputs[start : start + ROWS_AT_ONCE] for start in range(0, len(inputs), ROWS_AT_ONCE)]
        infos = [info for block in blocks if (info := defense.query_info(block)) is not None]
        api = cls(
            defense,
            _profile(transfer_set.profile),
            np.concatenate([content_keys(block) for block in blocks]),
            np.concatenate(infos) if infos else None,
            derive(knowledge.seed, "simulated defense"),
        )
        if isinstance(defense, StatefulDefense):
            api._perturb(transfer_set.posteriors, np.arange(len(transfer_set)))
        return api

    def answers(self, posteriors: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """What the queries would be answered if these were their clean answers.

        Args:
            posteriors: (m, classes) float32.
            queries: (m,) int64 in ``range(n)``. Of a query that comes several times, each has noise of its own.

        Returns:
            (m, classes) float32.
        """
        state = self.defense.state() if isinstance(self.defense, StatefulDefense) else None
        step, blocks = len(self.keys) if state is not None else ROWS_AT_ONCE, []
        for start in range(0, len(posteriors), step):
            part = slice(start, start + step)
            blocks.append(self._perturb(posteriors[part], queries[part], start))
            if isinstance(self.defense, StatefulDefense) and state is not None:
                self.defense.restore(state)
        return np.concatenate(blocks)

    def _perturb(self, posteriors: np.ndarray, queries: np.ndarray, first: int = 0) -> np.ndarray:
        info = None if self.info is None else self.info[queries]
        rng = KeyedRandom(self.seed, self.keys[queries], first + np.arange(len(queries)))
        return self.profile.truncate(self.defense.perturb(Answers(posteriors), info, rng)).posteriors


def _profile(told: str) -> InterfaceProfile:
    """What `str` of a profile says."""
    name, _, k = told.rpartition("_")
    return InterfaceProfile.parse("top_k", int(k)) if name == "top" else InterfaceProfile.parse(told)
