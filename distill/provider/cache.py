"""What was computed once for a query, kept by the query's content and shared by runs and processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from distill.provider.keys import Growing, KeyIndex, distinct
from distill.provider.shards import Shard, Shards


class RowCache:
    """A store from content keys to rows of numbers: a teacher's clean answers, or a defense's query information.

    It holds its values in memory (a million answers over 10 classes are 40 MB) and on disk as shards with the columns
    `key` (n,) ``S16`` and `value` (n, m) float32. Whatever is computed is stored before anything else is computed, and
    computing happens under a lock, so no row is computed twice, be it after a crash or by another process.
    """

    def __init__(self, folder: Path) -> None:
        self._shards = Shards(folder)
        self._index = KeyIndex()
        self._values = Growing()
        self._read: set[Shard] = set()

    def get_or_compute(
        self, keys: np.ndarray, compute: Callable[[np.ndarray], np.ndarray], rows_at_once: int
    ) -> np.ndarray:
        """The value of each key: (n, m) float32.

        Args:
            keys: (n,) ``S16``.
            compute: Given positions in `keys`, at most `rows_at_once` with distinct keys, returns their values.
            rows_at_once: What a crash can lose.
        """
        missing = self._distinct_unknown(keys)
        for start in range(0, len(missing), rows_at_once):
            part = missing[start : start + rows_at_once]
            with self._shards.exclusive():
                self._catch_up()
                part = part[self._index.find(keys[part]) < 0]
                if len(part):
                    self._store(keys[part], compute(part))
        return self._values.rows[self._index.find(keys)]

    def _distinct_unknown(self, keys: np.ndarray) -> np.ndarray:
        """The positions of keys that are not known here, each content once, in the order of asking."""
        unknown = np.flatnonzero(self._index.find(keys) < 0)
        return unknown[distinct(keys[unknown])]

    def _catch_up(self) -> None:
        """Learn what this or another process stored since. Needs the lock."""
        intact = []
        for shard in self._shards.scan():
            if shard not in self._read:
                columns = self._shards.read(shard)
                if columns is None:
                    continue
                self._learn(columns["key"], columns["value"])
            intact.append(shard)
        self._read = set(self._shards.tidy(intact))

    def _store(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Write rows that are unknown. Needs the lock, and to have caught up."""
        end = max((shard.end for shard in self._read), default=0)
        self._read.add(self._shards.write(end, {"key": keys, "value": values.astype(np.float32, copy=False)}))
        self._learn(keys, values)

    def _learn(self, keys: np.ndarray, values: np.ndarray) -> None:
        new = self._distinct_unknown(keys)  # a joined shard brings rows that are known
        self._index.add(keys[new])
        self._values.extend(values[new].astype(np.float32, copy=False))
