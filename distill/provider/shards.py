"""Columns of rows in a folder of checksummed files. A crash loses what was not yet written; damage, its own rows."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from distill.errors import DistillError

log = logging.getLogger(__name__)

SHARD_BYTES = 8 << 20  # what one file holds, so that reading, checking and joining files takes little memory
MANY_FILES = 64  # this many small files are joined

_NAME = re.compile(r"(\d{12})-(\d+)-([0-9a-f]{32})\.npz")
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Shard:
    """One file: the rows ``first`` … ``end - 1`` of the folder, and the blake2b digest of its bytes."""

    first: int
    rows: int
    digest: str

    @property
    def end(self) -> int:
        return self.first + self.rows

    @property
    def name(self) -> str:
        return f"{self.first:012d}-{self.rows}-{self.digest}.npz"


class Shards:
    """A folder of shards. One process at a time may use it: where there are several, inside of `exclusive`.

    A shard is an uncompressed ``.npz`` of equally long columns. It is written under another name, synced and renamed,
    so a file with a shard's name is complete; its name carries the digest, so damage that comes later is noticed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DistillError(f"cannot make the folder {folder} ({error.strerror})") from None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """For one process at a time; the others wait. Raises `DistillError` where the folder can't be written."""
        lock = filelock.FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("waiting for another process that fills %s", self.folder)
            lock.acquire()
        except OSError as error:
            raise DistillError(f"cannot write in {self.folder} ({error.strerror})") from None
        try:
            yield
        finally:
            lock.release()

    def scan(self) -> list[Shard]:
        """The shards that are there, in order of their rows. Removes what an interrupted write or join left behind."""
        shards = []
        for name in os.listdir(self.folder):
            if name.endswith(_UNFINISHED):
                (self.folder / name).unlink()
            elif match := _NAME.fullmatch(name):
                shards.append(Shard(int(match[1]), int(match[2]), match[3]))
        kept: list[Shard] = []
        for shard in sorted(shards, key=lambda shard: (shard.first, -shard.rows)):
            if kept and shard.end <= kept[-1].end:  # joined into that one already
                self.remove(shard)
            else:
                kept.append(shard)
        return kept

    def read(self, shard: Shard) -> dict[str, np.ndarray] | None:
        """The columns of a shard, or None if it is damaged: it is then named in a warning and moved aside."""
        path = self.folder / shard.name
        content = path.read_bytes()
        if _digest(content) == shard.digest:
            with np.load(io.BytesIO(content)) as columns:
                return dict(columns)
        aside = path.with_name(path.name + ".damaged")
        path.replace(aside)
        log.warning("%s is damaged; its %d rows are made again (kept as %s)", path, shard.rows, aside.name)
        return None

    def write(self, first: int, columns: Mapping[str, np.ndarray]) -> Shard:
        """Store rows from `first` on. When this returns they survive a crash.

        Raises:
            DistillError: The disk is full or refuses; nothing was changed.
        """
        buffer = io.BytesIO()
        np.savez(buffer, **columns)  # type: ignore[arg-type]  # numpy's stub takes a column for its flag
        shard = Shard(first, len(next(iter(columns.values()))), _digest(buffer.getbuffer()))
        unfinished = self.folder / (shard.name + _UNFINISHED)
        try:
            with unfinished.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.folder / shard.name)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise DistillError(
                f"cannot write {self.folder / shard.name} ({error.strerror}); what was answered before is kept: "
                "mend this and run the same command again to go on"
            ) from None
        return shard

    def remove(self, shard: Shard) -> None:
        (self.folder / shard.name).unlink(missing_ok=True)

    def tidy(self, shards: list[Shard]) -> list[Shard]:
        """Join neighbouring small files once there are many, so that many small writes don't leave many files."""
        if len(shards) < MANY_FILES:
            return shards
        sizes = {shard: (self.folder / shard.name).stat().st_size for shard in shards}
        if sum(size < SHARD_BYTES // 2 for size in sizes.values()) < MANY_FILES:
            return shards
        groups: list[list[Shard]] = [[]]
        filled = 0
        for shard in shards:
            adjoins = not groups[-1] or groups[-1][-1].end == shard.first
            if filled >= SHARD_BYTES // 2 or sizes[shard] >= SHARD_BYTES // 2 or not adjoins:
                groups.append([])
                filled = 0
            groups[-1].append(shard)
            filled += sizes[shard]
        for group in groups:
            parts = [part for shard in group if (part := self.read(shard)) is not None] if len(group) > 1 else []
            if parts and len(parts) == len(group):
                self.write(group[0].first, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
                for shard in group:
                    self.remove(shard)
        return self.scan()


def _digest(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
