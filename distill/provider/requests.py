"""Every answer of a language model that was ever made, kept by request and shared by runs and processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distill.language import FLAT, Completions, texts
from distill.provider.shards import Shard, Shards


class RequestCache:
    """A store from request keys to completions: append-only shards with checksums (`distill.provider.shards`).

    Whatever is generated is stored before anything else is generated, and generating happens under a lock, so no
    request is made twice, be it after a crash or by another process. A request that was stored with fewer
    log-probabilities than are wanted now counts as unknown; its newer answer takes its place.
    """

    def __init__(self, folder: Path) -> None:
        self._shards = Shards(folder)
        self._parts: list[Completions] = []
        self._wanted: list[int] = []  # of each part, how many log-probabilities were asked for
        self._where: dict[bytes, tuple[int, int]] = {}  # key: which part, which row of it
        self._read: set[Shard] = set()

    def get_or_generate(
        self, keys: np.ndarray, top_k: int, generate: Callable[[np.ndarray], Completions], at_once: int
    ) -> Completions:
        """The completion of each request.

        Args:
            keys: (n,) ``S16``.
            top_k: How many log-probabilities are wanted at each position.
            generate: Given positions in `keys`, at most `at_once` with distinct keys, returns their completions.
            at_once: What a crash can lose.
        """
        missing = self._distinct_unknown(keys, top_k)
        for start in range(0, len(missing), at_once):
            part = missing[start : start + at_once]
            with self._shards.exclusive():
                self._catch_up()
                part = part[[not self._known(key, top_k) for key in keys[part].tolist()]]
                if len(part):
                    self._store(keys[part], top_k, generate(part))
        return self._collect(keys, top_k)

    def _known(self, key: bytes, top_k: int) -> bool:
        place = self._where.get(key)
        return place is not None and self._wanted[place[0]] >= top_k

    def _distinct_unknown(self, keys: np.ndarray, top_k: int) -> np.ndarray:
        """The positions of requests that are not known here, each once, in the order of asking."""
        first = np.sort(np.unique(keys, return_index=True)[1])
        return first[[not self._known(key, top_k) for key in keys[first].tolist()]]

    def _collect(self, keys: np.ndarray, top_k: int) -> Completions:
        """The completions of known requests: gathered from each part, then put in the order of asking."""
        places = np.array([self._where[key] for key in keys.tolist()], dtype=np.int64).reshape(-1, 2)
        rows = [np.flatnonzero(places[:, 0] == part) for part in range(len(self._parts))]
        gathered = [
            self._parts[part].take(places[some, 1]).with_top(top_k) for part, some in enumerate(rows) if len(some)
        ]
        return Completions.join(gathered).take(np.argsort(np.concatenate(rows))) if gathered else Completions.none()

    def _catch_up(self) -> None:
        """Learn what this or another process stored since. Needs the lock."""
        intact = []
        for shard in self._shards.scan():
            if shard not in self._read:
                columns = self._shards.read(shard)
                if columns is None:
                    continue
                self._learn(columns["key"], int(columns["wanted"][0]), unpacked(columns))
            intact.append(shard)
        self._read = set(intact)

    def _store(self, keys: np.ndarray, wanted: int, completions: Completions) -> None:
        """Write answers that are unknown. Needs the lock, and to have caught up."""
        end = max((shard.end for shard in self._read), default=0)
        columns = {"key": keys, "wanted": np.array([wanted])} | packed(completions)
        self._read.add(self._shards.write(end, columns))
        self._learn(keys, wanted, completions)

    def _learn(self, keys: np.ndarray, wanted: int, completions: Completions) -> None:
        self._where.update({key: (len(self._parts), row) for row, key in enumerate(keys.tolist())})
        self._parts.append(completions)
        self._wanted.append(wanted)


def packed(completions: Completions) -> dict[str, np.ndarray]:
    """Completions as plain arrays that a shard holds: texts as UTF-8 bytes and their lengths."""
    columns: dict[str, np.ndarray] = {
        "prompt_tokens": completions.prompt_tokens,
        "completion_tokens": completions.completion_tokens,
    }
    for name in ("column", "finish"):
        encoded = [text.encode("utf-8", "surrogatepass") for text in getattr(completions, name)]
        columns[f"{name}_bytes"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        columns[f"{name}_lengths"] = np.array([len(text) for text in encoded], dtype=np.int64)
    if completions.offsets is not None:
        columns["lengths"] = np.diff(completions.offsets)
        columns |= {name: column for name, column in completions.flat().items() if column is not None}
    return columns


def unpacked(columns: dict[str, np.ndarray]) -> Completions:
    """What `packed` made plain."""
    written: dict[str, Any] = {name: columns[name] for name in ("prompt_tokens", "completion_tokens")}
    for name in ("column", "finish"):
        whole, ends = columns[f"{name}_bytes"].tobytes(), np.cumsum(columns[f"{name}_lengths"])
        starts = ends - columns[f"{name}_lengths"]
        written[name] = texts(
            [whole[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        )
    if "lengths" in columns:
        written["offsets"] = np.concatenate([[0], np.cumsum(columns["lengths"])])
        written |= {name: columns.get(name) for name in FLAT}
    return Completions(**written)
