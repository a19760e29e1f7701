"""Columns that are found by the content of a query: no Python object a row, and quick for one row or a million."""

from __future__ import annotations

import numpy as np


class KeyIndex:
    """Numbers distinct content keys 0, 1, 2 … in the order of their arrival.

    Sorted runs of arrays; a run is merged with the one before it when that is not much longer, so there are few runs
    and adding n keys one at a time costs O(n log n) in all. They are sorted by the first half of a key, a whole number,
    which is several times as quick to look up as 16 bytes are.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # first half, second half, number
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(n,) int64: the number of each key, -1 where it is unknown."""
        found = np.full(len(keys), -1, dtype=np.int64)
        first, second = _halves(keys)
        for known, rest, numbers in self._runs:
            at = np.searchsorted(known, first)
            some = np.flatnonzero(at < len(known))
            while len(some):  # once, unless keys begin alike
                some = some[known[at[some]] == first[some]]
                hit = rest[at[some]] == second[some]
                found[some[hit]] = numbers[at[some[hit]]]
                some = some[~hit]
                at[some] += 1
                some = some[at[some] < len(known)]
        return found

    def add(self, keys: np.ndarray) -> np.ndarray:
        """(n,) int64: the numbers of these keys, which are distinct and unknown so far."""
        added = np.arange(self._size, self._size + len(keys))
        if len(keys):
            run = _sorted(*_halves(keys), added)
            while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
                run = _sorted(*(np.concatenate(pair) for pair in zip(self._runs.pop(), run, strict=True)))
            self._runs.append(run)
            self._size += len(keys)
        return added


def _halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both halves of ``S16`` keys as whole numbers, in the order of the bytes."""
    words = np.ascontiguousarray(keys, dtype="S16").view(">u8").reshape(-1, 2).astype(np.uint64)
    return words[:, 0].copy(), words[:, 1].copy()


def _sorted(first: np.ndarray, second: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    order = np.argsort(first, kind="stable")
    return first[order], second[order], numbers[order]


def distinct(keys: np.ndarray) -> np.ndarray:
    """Where each of ``S16`` keys comes first, in the order of coming."""
    if len(np.unique(_halves(keys)[0])) == len(keys):  # quick, and mostly so
        return np.arange(len(keys))
    return np.sort(np.unique(keys, return_index=True)[1])


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
        if len(distinct(keys)) == len(keys):
            which, times, first = np.arange(len(keys)), np.ones(len(keys), dtype=np.int64), keys
        else:
            first, which, times = np.unique(keys, return_inverse=True, return_counts=True)
        numbers = self._index.find(first)
        new = numbers < 0
        numbers[new] = self._index.add(first[new])
        self._asked.extend(np.zeros(int(new.sum()), dtype=np.int64))
        order = np.argsort(which, kind="stable")
        earlier_here = np.empty(len(keys), dtype=np.int64)
        earlier_here[order] = np.arange(len(keys)) - np.repeat(np.cumsum(times) - times, times)
        repeats = self._asked.rows[numbers][which] + earlier_here
        self._asked.rows[numbers] += times
        return repeats
