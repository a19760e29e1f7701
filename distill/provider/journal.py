"""The provider's log of every answer given, in order, which also lets an interrupted attack go on."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distill.errors import DistillError
from distill.provider.shards import SHARD_BYTES, Shard, Shards

log = logging.getLogger(__name__)

FLUSH_S = 1.0


class Journal:
    """Answers in the order of asking, as equally long columns of which one is `key`, the content of the query.

    An attack is continued by running it again: it asks the same queries in the same order, and as long as the logged
    keys agree with what it asks, `replay` hands out what was answered then. Where a damaged file left a gap, and after
    the end, the provider answers anew and calls `append`.

    Args:
        folder: Where the shards lie.
        identity: What the answers depend on. A log with another identity is emptied.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        self._shards = Shards(folder)
        self._logged = self._shards.scan()
        self._position = 0
        self._buffer: list[dict[str, np.ndarray]] = []
        self._buffered_bytes = 0
        self._flushed_at = time.monotonic()
        self._open: tuple[Shard | None, dict[str, np.ndarray]] = (None, {})
        self._claim(folder / "provider.json", json.dumps(dict(identity), indent=1, sort_keys=True))

    def _claim(self, path: Path, identity: str) -> None:
        if path.exists() and path.read_text() == identity:
            return
        if self._logged:
            log.warning("%s was written by another provider; its answers are not used", path.parent)
            self._discard(self._logged)
        try:
            path.write_text(identity)
        except OSError as error:
            raise DistillError(f"cannot write {path} ({error.strerror})") from None

    def replay(self, keys: np.ndarray) -> dict[str, np.ndarray] | None:
        """The next logged answers, as many as agree with `keys`; None where the next one has to be made anew."""
        while (shard := self._here()) is not None:
            if self._open[0] != shard:
                self.flush()
                columns = self._shards.read(shard)
                if columns is None:
                    self._logged.remove(shard)
                    continue
                self._open = shard, columns
            start = self._position - shard.first
            logged = {name: column[start : start + len(keys)] for name, column in self._open[1].items()}
            differs = logged["key"] != keys[: len(logged["key"])]
            if differs.any():
                agreeing = int(differs.argmax())
                logged = {name: column[:agreeing] for name, column in logged.items()}
                self._part_ways(shard, start + agreeing)
            self._position += len(logged["key"])
            return logged if len(logged["key"]) else None
        return None

    def gap(self) -> int:
        """How many answers have to be made anew before the log has answers again (a large number after its end)."""
        return min((shard.first for shard in self._logged if shard.first > self._position), default=sys.maxsize) - (
            self._position
        )

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Log the next answers. They are on disk after a second, or when they fill a shard, or after `flush`."""
        self._buffer.append(columns)
        self._buffered_bytes += sum(column.nbytes for column in columns.values())
        self._position += len(columns["key"])
        if self._buffered_bytes >= SHARD_BYTES or time.monotonic() - self._flushed_at >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if self._buffer:
            columns = {name: np.concatenate([part[name] for part in self._buffer]) for name in self._buffer[0]}
            self._shards.write(self._position - len(columns["key"]), columns)
            self._logged = self._shards.tidy(self._shards.scan())
        self._buffer, self._buffered_bytes = [], 0
        self._flushed_at = time.monotonic()

    def _here(self) -> Shard | None:
        """The shard that holds the next answer."""
        return next((shard for shard in self._logged if shard.first <= self._position < shard.end), None)

    def _part_ways(self, shard: Shard, agreeing: int) -> None:
        """Forget all that was logged after the first `agreeing` rows of a shard, which are written again."""
        log.warning(
            "%s: query %d is not the one that was logged; the log is dropped from there on (clean answers stay cached)",
            self._shards.folder,
            shard.first + agreeing,
        )
        columns = self._open[1]
        self._discard(self._logged[self._logged.index(shard) :])
        if agreeing:
            self._buffer = [{name: column[:agreeing] for name, column in columns.items()}]

    def _discard(self, shards: list[Shard]) -> None:
        for shard in reversed(shards):  # from the end, so that what a crash leaves is a beginning
            self._shards.remove(shard)
        self._logged = [shard for shard in self._logged if shard not in shards]
        self._open = None, {}
