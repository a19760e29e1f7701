"""What the attacks share that make queries of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from distill.contracts import Oracle
from distill.errors import DistillError
from distill.records import Answers, Examples, Queries, TransferSet

log = logging.getLogger(__name__)


class Asked:
    """What was asked and answered so far, in the order of asking: rows of the pool and made inputs.

    Args:
        oracle: Who answers.
        pool: The attacker's.
    """

    def __init__(self, oracle: Oracle, pool: Examples) -> None:
        self.oracle, self.pool, self.total = oracle, pool, oracle.affordable()
        self._asked: list[tuple[np.ndarray, np.ndarray | None, Answers]] = []

    def __len__(self) -> int:
        return sum(len(answers) for _, _, answers in self._asked)

    def ask(self, queries: Queries) -> Answers:
        """The answers to as many of the first queries as the budget pays for: fewer, or none, at its end."""
        answers = self.oracle.ask(queries, partial=True)
        paid = queries[: len(answers)]
        if paid.from_pool:
            self._asked.append((paid.rows, None, answers))
        else:
            self._asked.append((np.full(len(paid), -1, dtype=np.int64), paid.inputs(), answers))
        return answers

    def transfer_set(self, note: str) -> TransferSet:
        """All of it. `note`: the attack, for the card. There was at least one question."""
        if len(self) < self.total:
            log.warning("the attack ended after %d of %d affordable queries", len(self), self.total)
        made = [inputs for _, inputs, _ in self._asked if inputs is not None]
        answers = Answers.join([answers for _, _, answers in self._asked])
        return TransferSet(
            rows=np.concatenate([rows for rows, _, _ in self._asked]),
            posteriors=answers.posteriors,
            made=np.concatenate(made) if made else None,
            logits=answers.logits,
            pool=self.pool.fingerprint,
            profile=str(self.oracle.profile),
            note=f"{note} on {self.pool.name}",
        )


def column_ranges(pool: Examples) -> tuple[np.ndarray, np.ndarray]:
    """(features,) float32 twice: the least and the largest value of each column of a table."""
    table = pool.inputs[: len(pool)]
    return table.min(axis=0), table.max(axis=0)


def halvings(tolerance: float) -> int:
    """How often a segment is halved until it is no longer than this share of itself. Raises `DistillError`."""
    if not 0 < tolerance < 1:
        raise DistillError(f"tolerance lies between 0 and 1, not {tolerance}")
    return int(np.ceil(-np.log2(tolerance)))


def bisect(
    as_low: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Halve n segments `steps` times, all at once, so that their ends are still answered differently.

    Args:
        as_low: Asks about (n, features) middles: (m,) bool, whether each is answered as its segment's low end. Where
            m < n the budget is spent, and that is the end.
        low, high: (n, features) float32 ends, which are answered differently.
        steps: How often.

    Returns:
        The ends, as `low` and `high`.
    """
    low, high = low.copy(), high.copy()
    for _ in range(steps):
        middle = (low + high) / 2
        as_its_low = as_low(middle)
        told = np.arange(len(as_its_low))
        low[told[as_its_low]] = middle[told[as_its_low]]
        high[told[~as_its_low]] = middle[told[~as_its_low]]
        if len(told) < len(low):
            break
    return low, high
