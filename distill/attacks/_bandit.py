"""A gradient bandit that stays finite whatever it is rewarded with."""

from __future__ import annotations

from collections import deque

import numpy as np

BOUND = 1e30  # rewards are clipped to it, so that their squares are finite


class Standardised:
    """Numbers minus the mean of all so far, divided by their deviation (Welford 1962); 0 while they don't differ."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(n,), each with the statistics of itself and those before it."""
        scaled = np.empty(len(values))
        for i, value in enumerate(np.clip(np.nan_to_num(values.astype(np.float64)), -BOUND, BOUND)):
            self._count += 1
            off = value - self._mean
            self._mean += off / self._count
            self._squares += off * (value - self._mean)
            deviation = (max(self._squares, 0.0) / self._count) ** 0.5
            scaled[i] = (value - self._mean) / deviation if deviation > 0 else 0.0
        return scaled


class Bandit:
    """A softmax policy over classes that follows the gradient of the reward; a class that is used up is closed.

    Args:
        labels: (n,) the class of each row.
        window: Rewards in the baseline.
        rng: Draws classes and rows.
    """

    def __init__(self, labels: np.ndarray, window: int, rng: np.random.Generator) -> None:
        self._rng, order = rng, rng.permutation(len(labels))
        self.classes = np.unique(labels)
        self._rows = [order[labels[order] == label].tolist() for label in self.classes]
        self.preferences = np.zeros(len(self.classes))
        self._left = np.array([len(rows) for rows in self._rows])
        self._counts = np.zeros(len(self.classes), dtype=np.int64)
        self._recent: deque[float] = deque(maxlen=window)
        self._drawn: list[tuple[int, np.ndarray]] = []  # what has not been rewarded yet

    def policy(self) -> np.ndarray:
        """(classes,) how probable each is."""
        open_ = self._left > 0
        weights = np.exp(self.preferences - self.preferences[open_].max(), where=open_, out=np.zeros(len(open_)))
        return weights / weights.sum()

    def draw(self, n: int) -> np.ndarray:
        """(n,) rows that were not drawn before; at least n are left."""
        rows = np.empty(n, dtype=np.int64)
        for i in range(n):
            policy = self.policy()
            action = int(self._rng.choice(len(policy), p=policy))
            self._drawn.append((action, policy))
            self._left[action] -= 1
            rows[i] = self._rows[action].pop()
        return rows

    def learn(self, rewards: np.ndarray) -> None:
        """(n,) rewards of the last n rows, in the order of drawing."""
        for (action, policy), reward in zip(self._drawn, rewards.tolist(), strict=True):
            self._counts[action] += 1
            baseline = sum(self._recent) / len(self._recent) if self._recent else reward
            step = (reward - baseline) / self._counts[action]
            self.preferences -= step * policy
            self.preferences[action] += step
            self._recent.append(reward)
        self._drawn.clear()
