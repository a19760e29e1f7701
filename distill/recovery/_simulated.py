"""What the recoveries share that run the attacker's copy of the defense."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from distill.contracts import Defense, Knowledge, StatefulDefense, TensorDefense
from distill.randomness import KeyedRandom, derive
from distill.records import ROWS_AT_ONCE, Answers, InterfaceProfile, Reveals, TransferSet, content_keys


@dataclass(frozen=True)
class SimulatedApi:
    """The attacker's copy of the defense, behind the same access: it answers any posteriors to the attacker's queries.

    Args:
        defense: The copy. It is left as it was found.
        profile: What the answers reveal.
        keys: (n,) content keys of the queries.
        info: (n, m) what the defense knows of them, or None.
        state: What a defense that remembers knows before each block of answers.
        seed: Of the copy's noise.
    """

    defense: Defense
    profile: InterfaceProfile
    keys: np.ndarray
    info: np.ndarray | None
    state: dict[str, np.ndarray]
    seed: int

    @classmethod
    def of(
        cls, defense: Defense, transfer_set: TransferSet, knowledge: Knowledge, *, remembers: bool = True
    ) -> SimulatedApi:
        """For the queries of a transfer set.

        `remembers`: A stateful defense knows what it returned there, so what it answered there, it answers again;
        otherwise it is as it was made. (The answers are put through it once more. In a chain that is right where the
        members before the one that remembers leave the answers of the chain as they are.)
        """
        inputs = transfer_set.inputs(knowledge.pool)
        blocks = [inputs[start : start + ROWS_AT_ONCE] for start in range(0, len(inputs), ROWS_AT_ONCE)]
        infos = [info for block in blocks if (info := defense.query_info(block)) is not None]
        fresh = cls(
            defense,
            _profile(transfer_set.profile),
            np.concatenate([content_keys(block) for block in blocks]),
            np.concatenate(infos) if infos else None,
            defense.state() if isinstance(defense, StatefulDefense) else {},
            derive(knowledge.seed, "simulated defense"),
        )
        if not (remembers and isinstance(defense, StatefulDefense)):
            return fresh
        with fresh._in_state():
            fresh._perturb(transfer_set.posteriors, np.arange(len(transfer_set)), 0)
            return replace(fresh, state=defense.state())

    def answers(self, posteriors: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """What the queries would be answered if these were their clean answers.

        Args:
            posteriors: (m, classes) float32.
            queries: (m,) int64 in ``range(n)``. Of a query that comes several times, each has noise of its own.

        Returns:
            (m, classes) float32.
        """
        step, blocks = len(self.keys) if self.state else ROWS_AT_ONCE, []
        for start in range(0, len(posteriors), step):
            part = slice(start, start + step)
            with self._in_state():
                blocks.append(self._perturb(posteriors[part], queries[part], start))
        return np.concatenate(blocks)

    def transform(self, posteriors: torch.Tensor, queries: torch.Tensor) -> torch.Tensor | None:
        """As `answers`, differentiable, (m, classes) float64. None where the defense has no formula, or the access
        cuts answers that the defense would let through."""
        exposes = self.defense.exposes
        whole = self.profile.reveals >= Reveals.PROBS or self.profile.meet(exposes) == exposes
        if not (whole and isinstance(self.defense, TensorDefense)):
            return None
        info = None if self.info is None else torch.from_numpy(self.info[queries.cpu().numpy()]).to(posteriors.device)
        with self._in_state():
            return self.defense.transform(posteriors, info)

    def _perturb(self, posteriors: np.ndarray, queries: np.ndarray, first: int) -> np.ndarray:
        info = None if self.info is None else self.info[queries]
        rng = KeyedRandom(self.seed, self.keys[queries], first + np.arange(len(queries)))
        return self.profile.truncate(self.defense.perturb(Answers(posteriors), info, rng)).posteriors

    @contextmanager
    def _in_state(self) -> Iterator[None]:
        if not isinstance(self.defense, StatefulDefense):
            yield
            return
        found = self.defense.state()
        self.defense.restore(self.state)
        try:
            yield
        finally:
            self.defense.restore(found)


def code(knowledge: Knowledge) -> Defense:
    """The defense, of a recovery that knows its code."""
    if knowledge.defense is None:
        raise ValueError("this recovery knows the defense's code")
    return knowledge.defense


def _profile(told: str) -> InterfaceProfile:
    """What `str` of a profile says."""
    name, _, k = told.rpartition("_")
    return InterfaceProfile.parse("top_k", int(k)) if name == "top" else InterfaceProfile.parse(told)
