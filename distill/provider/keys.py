"""Columns that are found by the content of a query: no Python object a row, and quick for one row or a million."""

from __future__ import annotations

import numpy as np


class KeyIndex:
    """Numbers distinct content keys 0, 1, 2 … in the order of their arrival.

    Sorted runs of arrays; a run is merged with the one before it when that is not much longer, so there are few runs
    and adding n keys one at a time costs O(n log n) in all.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(n,) int64: the number of each key, -1 where it is unknown."""
        found = np.full(len(keys), -1, dtype=np.int64)
        for known, numbers in self._runs:
            at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            hit = known[at] == keys
            found[hit] = numbers[at[hit]]
        return found

    def add(self, keys: np.ndarray) -> np.ndarray:
        """(n,) int64: the numbers of these keys, which are distinct and unknown so far."""
        added = np.arange(self._size, self._size + len(keys))
        if len(keys):
            order = np.argsort(keys)
            run = keys[order], added[order]
            while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
                known, numbers = (np.concatenate(pair) for pair in zip(self._runs.pop(), run, strict=True))
                order = np.argsort(known, kind="stable")
                run = known[order], numbers[order]
            self._runs.append(run)
            self._size += len(keys)
        return added


class Growing:
    """An array that grows at its end, at a constant cost a row."""

    def __init__(self) -> None:
        self._room = np.empty(0)
        self._size = 0

    @property
    def rows(self) -> np.ndarray:
        """All rows: a view that is valid until the next `extend`."""
        return self._room[: self._size]

    def extend(self, rows: np.ndarray) -> None:
        end = self._size + len(rows)
        if end > len(self._room):
            room = np.empty((max(end, 2 * len(self._room)), *rows.shape[1:]), rows.dtype)
            room[: self._size] = self.rows if self._size else 0
            self._room = room
        self._room[self._size : end] = rows
        self._size = end


class RepeatCounter:
    """How often the same content was asked before."""

    def __init__(self) -> None:
        self._index = KeyIndex()
        self._asked = Growing()

    def count(self, keys: np.ndarray) -> np.ndarray:
        """(n,) int64: for each key how often it came before, in earlier calls and earlier in this one."""
        distinct, which, times = np.unique(keys, return_inverse=True, return_counts=True)
        numbers = self._index.find(distinct)
        new = numbers < 0
        numbers[new] = self._index.add(distinct[new])
        self._asked.extend(np.zeros(int(new.sum()), dtype=np.int64))
        order = np.argsort(which, kind="stable")
        earlier_here = np.empty(len(keys), dtype=np.int64)
        earlier_here[order] = np.arange(len(keys)) - np.repeat(np.cumsum(times) - times, times)
        repeats = self._asked.rows[numbers][which] + earlier_here
        self._asked.rows[numbers] += times
        return repeats
