"""The signal cache: the distributions of a teacher, stored once and read by many students."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import lzma
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import numpy as np

from distill.contracts import Codec, Signal
from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.signals._distributions import round_trip
from distill.signals._lanes import spans

log = logging.getLogger(__name__)

FORMAT = 1
MEASURED = 256  # positions of each write that are decoded again to state the error
FITTED = 16_384  # positions of the first write that the coding is adapted to
COMPRESSED = 32 << 20  # a larger shared part (an output matrix) is stored as it is

_SHARD = re.compile(r"(\d{8})-([0-9a-f]{32})\.signal")
_SHARED = re.compile(r"shared-([0-9a-f]{32})\.npz(\.xz)?")
_UNFINISHED = ".unfinished"
_UNCHECKED, _SOUND, _LOST = range(3)


@dataclass(frozen=True)
class _Shard:
    """One file: a header line, the index (a column for each sequence), the lengths of all positions, their bytes.

    The digest in the file's name is that of header and index; the index has one for the lengths and bytes of each
    sequence, so a sequence is checked, and lost, by itself.
    """

    path: Path
    sequences: np.ndarray  # (m,) int64
    firsts: np.ndarray  # (m + 1,) int64: the first position of each
    starts: np.ndarray  # (m + 1,) int64: the first byte of each
    digests: np.ndarray  # (m,) uint64
    lengths: np.ndarray  # (positions,) unsigned, mapped; as many as the file still has
    data: np.ndarray  # uint8, mapped
    state: np.ndarray  # (m,) uint8, what this process knows of each: one of the three below
    error: dict[str, float]
    size: int

    def part(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of one sequence and the length of each of its positions."""
        positions = slice(self.firsts[place], self.firsts[place + 1])
        return self.data[self.starts[place] : self.starts[place + 1]], self.lengths[positions]

    def intact(self, place: int) -> bool:
        data, lengths = self.part(place)
        return _digest(lengths, data, size=8) == self.digests[place].tobytes()


class SignalCache:
    """A folder of signals, grouped by sequence: append, look up, read any positions.

    Files are written under another name, synced and renamed, so what `write` has returned from survives a crash.
    Several processes may share a folder: writing happens under a lock, and what another one wrote meanwhile is not
    written again. Reading maps the files and touches only what is asked for; damage is noticed when a sequence is read.

    Args:
        folder: Made if it is not there.
        signal: How positions are stored.
        teacher: Fingerprint of the teacher.
        vocabulary: Its number of tokens.
        temperature: What the distributions were softened with.

    Raises:
        DistillError: The folder holds other signals than these, or can't be used.
    """

    def __init__(self, folder: Path, signal: Signal, teacher: str, vocabulary: int, temperature: float = 1.0) -> None:
        self.folder, self.signal, self.vocabulary = folder, signal, vocabulary
        self._identity = {"format": FORMAT, "teacher": teacher, "vocabulary": vocabulary, "temperature": temperature}
        self._identity |= signal.identity
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DistillError(f"cannot make the folder {folder} ({error.strerror})", "signal") from None
        self._lock = filelock.FileLock(folder / ".lock")
        self._codec: Codec | None = None
        self._shards: dict[str, _Shard] = {}
        self._check_identity()
        self._index()
        self.refresh()

    # --- what is there ----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Learn what other processes wrote since."""
        before = len(self._shards)
        for name in sorted(os.listdir(self.folder)):
            match = _SHARD.fullmatch(name)
            if match and name not in self._shards:
                shard = self._open(self.folder / name, match[2])
                if shard is not None:
                    self._shards[name] = shard
        if len(self._shards) > before:
            self._index()

    def missing(self, sequences: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those of `sequences` that are not there (never written, or found damaged), in the order given."""
        wanted = np.asarray(sequences, dtype=np.int64)
        return wanted[self._find(wanted) < 0]

    def have(self, sequence: int) -> bool:
        return not len(self.missing([sequence]))

    @property
    def sequences(self) -> np.ndarray:
        """All that are there, rising: (m,) int64."""
        return self._known

    def lengths(self, sequences: Sequence[int] | np.ndarray) -> np.ndarray:
        """How many positions each has: (m,) int64. Raises `DistillError` for one that is not there."""
        return np.array([shard.firsts[i + 1] - shard.firsts[i] for shard, i in self._places(sequences)], dtype=np.int64)

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, sequences: Sequence[int] | np.ndarray) -> Head | Sparse | None:
        """The distributions at all positions of these sequences, one after the other. Raises as `rows` does."""
        parts = [self._part(*place) for place in self._places(sequences)]
        lengths = [np.empty(0, np.int64), *(lengths for _, lengths in parts)]
        return self._decode(
            np.concatenate([np.empty(0, np.uint8), *(data for data, _ in parts)]), np.concatenate(lengths)
        )

    def rows(
        self, sequences: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray
    ) -> Head | Sparse | None:
        """The distributions at n places: row i is position ``positions[i]`` of sequence ``sequences[i]``.

        Raises:
            DistillError: A sequence is not there, is shorter, or is damaged: then the error says which, and from now on
                they are `missing`.
        """
        wanted, positions = np.asarray(sequences, dtype=np.int64), np.asarray(positions, dtype=np.int64)
        order = np.argsort(wanted, kind="stable")
        distinct, firsts = np.unique(wanted[order], return_index=True)
        sizes = np.zeros(len(wanted), np.int64)
        chunks = [np.empty(0, np.uint8)]
        for sequence, place, rows in zip(distinct, self._places(distinct), np.split(order, firsts[1:]), strict=False):
            data, lengths = self._part(*place)
            at = positions[rows]
            if ((at < 0) | (at >= len(lengths))).any():
                raise DistillError(f"sequence {sequence} has {len(lengths)} positions, from 0 on", "signal")
            sizes[rows] = lengths[at]
            chunks.append(data[spans(np.cumsum(lengths, dtype=np.int64)[at] - sizes[rows], sizes[rows])])
        starts = np.empty_like(sizes)
        starts[order] = np.cumsum(sizes[order]) - sizes[order]
        return self._decode(np.concatenate(chunks)[spans(starts, sizes)], sizes)

    def verify(self) -> np.ndarray:
        """Check everything. Returns the sequences that are damaged and must be made again: (m,) int64."""
        bad: list[int] = []
        for shard in self._order:
            shard.state[shard.state == _SOUND] = _UNCHECKED
        for sequence, (shard, place) in zip(self._known.tolist(), self._places(self._known), strict=True):
            if not self._intact(shard, place):
                bad.append(sequence)
        self._index()
        return np.array(bad, dtype=np.int64)

    def summary(self) -> dict[str, float]:
        """For `result.json`: sizes, and what decoding loses as it was measured on some positions of each write.

        ``bytes_per_token`` counts every byte of every file, ``shared_bytes`` the part of them that does not grow.
        The rest is `distill.signals._distributions.round_trip`, over ``measured`` positions.
        """
        shards = list(self._shards.values())
        shared = sum(path.stat().st_size for path in self._shared_files())
        tokens = sum(int(shard.firsts[-1]) for shard in shards)
        size = shared + sum(shard.size for shard in shards)
        result = {"sequences": float(len(self._known)), "tokens": float(tokens), "bytes": float(size)}
        result |= {"shared_bytes": float(shared), "bytes_per_token": size / max(tokens, 1)}
        measured = [shard.error for shard in shards if shard.error.get("measured")]
        result["measured"] = sum(error["measured"] for error in measured)
        for name in sorted({name for error in measured for name in error} - {"measured"}):
            some = [error for error in measured if name in error]
            if name.endswith("_max"):
                result[name] = max(error[name] for error in some)
            else:
                result[name] = sum(e[name] * e["measured"] for e in some) / sum(e["measured"] for e in some)
        return result

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(
        self, sequences: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray, distributions: Head | Sparse
    ) -> None:
        """Append sequences. Those that are there already are left as they are.

        The very first write is what the coding is adapted to: it should hold a few thousand positions like the others.
        Each write makes a file, so thousands of positions at a time are better than a few.

        Args:
            sequences: (m,) distinct non-negative integers of the caller's choosing.
            lengths: (m,) how many positions each has.
            distributions: At all these positions, one sequence after the other.

        Raises:
            DistillError: The numbers do not fit together, the signal can't store such distributions, or the disk is
                full; nothing was changed.
        """
        sequences, lengths = np.asarray(sequences, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
        if len(np.unique(sequences)) != len(sequences) or (sequences < 0).any():
            raise DistillError("sequences are distinct and not negative", "signal")
        if len(lengths) != len(sequences) or (lengths < 0).any() or lengths.sum() != len(distributions):
            raise DistillError(
                f"{len(sequences)} sequences with {lengths.sum()} positions need as many distributions, "
                f"not {len(distributions)}",
                "signal",
            )
        if not len(sequences):
            return
        with self._exclusive():
            self.refresh()
            self._remove_unfinished()
            new = self._find(sequences) < 0
            if not new.all():
                sequences, lengths, distributions = _only(new, sequences, lengths, distributions)
            if len(sequences):
                self._append(sequences, lengths, distributions)
        self.refresh()

    def _append(self, sequences: np.ndarray, lengths: np.ndarray, distributions: Head | Sparse) -> None:
        if not len(distributions):
            data, sizes, error = np.empty(0, np.uint8), np.empty(0, np.int64), {"measured": 0.0}
        else:
            data, sizes, error = self._encoded(sequences, lengths, distributions)
        firsts = np.concatenate([[0], np.cumsum(lengths)])
        starts = np.concatenate([[0], np.cumsum(sizes)])[firsts]
        constant = int(sizes[0]) if len(sizes) and (sizes == sizes[0]).all() else None
        width = "u1" if sizes.max(initial=0) < 1 << 8 else "<u2" if sizes.max() < 1 << 16 else "<u4"
        stored = sizes.astype(width)
        parts = zip(firsts[:-1], firsts[1:], starts[:-1], starts[1:], strict=True)
        digests = b"".join(_digest(stored[a:b], data[c:d], size=8) for a, b, c, d in parts)
        header = {"sequences": len(sequences), "width": width, "constant": constant, "error": error}
        index = b"".join(column.astype("<i8").tobytes() for column in (sequences, firsts, starts)) + digests
        head = json.dumps(header, sort_keys=True).encode() + b"\n" + index
        number = max([-1, *(int(name[:8]) for name in self._shards)]) + 1
        content = [head, b"" if constant is not None else stored.tobytes(), data.tobytes()]
        self._store(f"{number:08d}-{_digest(head).hex()}.signal", content)

    def _encoded(
        self, sequences: np.ndarray, lengths: np.ndarray, distributions: Head | Sparse
    ) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Bytes, the length of each position, and what decoding the first of them loses."""
        codec = self._open_codec(distributions)
        positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        keys = np.stack([np.repeat(sequences, lengths), positions], axis=1).astype("<i8").view("S16")[:, 0]
        data, sizes = codec.encode(distributions, keys)
        few = slice(0, MEASURED)
        error = {"measured": float(min(MEASURED, len(sizes)))}
        decoded = codec.decode(data[: sizes[few].sum()], sizes[few])
        if decoded is not None and len(decoded):
            error |= round_trip(_take(distributions, few), decoded)
        return data, sizes, error

    def _store(self, name: str, content: list[bytes]) -> None:
        unfinished = self.folder / (name + _UNFINISHED)
        try:
            with unfinished.open("wb") as file:
                for part in content:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.folder / name)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise DistillError(
                f"cannot write {self.folder / name} ({error.strerror}); what was stored before is kept", "signal"
            ) from None

    # --- inside -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        try:
            self._lock.acquire()
        except OSError as error:
            raise DistillError(f"cannot write in {self.folder} ({error.strerror})", "signal") from None
        try:
            yield
        finally:
            self._lock.release()

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob("*" + _UNFINISHED):  # of a process that was killed: we hold the lock
            path.unlink()

    def _check_identity(self) -> None:
        path = self.folder / "cache.json"
        if not path.exists():
            with self._exclusive():
                if not path.exists():
                    self._store(path.name, [(json.dumps(self._identity, indent=1, sort_keys=True) + "\n").encode()])
        try:
            found = json.loads(path.read_text())
            differ = [key for key in sorted(found | self._identity) if found.get(key) != self._identity.get(key)]
        except (ValueError, TypeError):
            raise DistillError(f"{path} is damaged; delete {self.folder} to make its signals again", "signal") from None
        if differ:
            what = ", ".join(f"{key} {found.get(key)!r}, not {self._identity.get(key)!r}" for key in differ)
            raise DistillError(f"{self.folder} holds signals of {what}; take another folder for these", "signal")

    def _shared_files(self) -> list[Path]:
        return [self.folder / name for name in sorted(os.listdir(self.folder)) if _SHARED.fullmatch(name)]

    def _open_codec(self, first: Head | Sparse | None = None) -> Codec:
        """The codec of this cache. With `first`, one is made where there is none: this needs the lock."""
        if self._codec is not None:
            return self._codec
        files = self._shared_files()
        if not files and (first is None or any(shard.firsts[-1] for shard in self._shards.values())):
            raise DistillError(f"{self.folder} lacks its shared file; delete it to make its signals again", "signal")
        if not files and first is not None:
            buffer = io.BytesIO()
            shared = self.signal.fit(_take(first, slice(0, FITTED)), self.vocabulary)
            np.savez(buffer, **shared)  # type: ignore[arg-type]  # numpy's stub takes a column for its flag
            content, ending = buffer.getvalue(), "npz"
            if len(content) < COMPRESSED:
                content, ending = lzma.compress(content), "npz.xz"
            self._store(f"shared-{_digest(content).hex()}.{ending}", [content])
            files = self._shared_files()
        content, match = files[0].read_bytes(), _SHARED.fullmatch(files[0].name)
        if match is None or _digest(content).hex() != match[1]:
            raise DistillError(f"{files[0]} is damaged; delete {self.folder} to make its signals again", "signal")
        with np.load(io.BytesIO(lzma.decompress(content) if match[2] else content)) as columns:
            self._codec = self.signal.codec(dict(columns))
        return self._codec

    def _open(self, path: Path, digest: str) -> _Shard | None:
        """A shard, or None if its index is damaged: it is then named in a warning and moved aside."""
        size = path.stat().st_size
        content = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
        try:
            line = bytes(content[:4096]).split(b"\n", 1)[0]
            header = json.loads(line)
            m = header["sequences"]
            at = len(line) + 1
            end = at + 8 * (m + 2 * (m + 1) + m)
            if _digest(content[:end]).hex() != digest:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            with suppress(OSError):  # another process did, or we may only read
                path.replace(path.with_name(path.name + ".damaged"))
            log.warning("the index of %s is damaged: its sequences are missing now (kept as *.damaged)", path)
            return None
        columns = np.frombuffer(bytes(content[at : end - 8 * m]), "<i8")
        firsts, starts = columns[m : 2 * m + 1], columns[2 * m + 1 :]
        positions = int(firsts[-1])
        body = content[end:]
        width = np.dtype(header["width"])
        if header["constant"] is not None:
            lengths = np.broadcast_to(np.array(header["constant"], width), (positions,))
        else:
            stored = body[: positions * width.itemsize]
            lengths = stored[: len(stored) // width.itemsize * width.itemsize].view(width)
            body = body[positions * width.itemsize :]
        digests = np.frombuffer(bytes(content[end - 8 * m : end]), "<u8")
        state = np.full(m, _UNCHECKED, np.uint8)
        return _Shard(path, columns[:m], firsts, starts, digests, lengths, body, state, header["error"], size)

    def _index(self) -> None:
        """Where each sequence is: in the last shard that has it whole."""
        self._order = [self._shards[name] for name in sorted(self._shards)]
        sequences, shards, places = [np.empty((0,), np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number, shard in enumerate(self._order):
            kept = shard.state != _LOST
            sequences.append(shard.sequences[kept])
            shards.append(np.full(kept.sum(), number))
            places.append(np.flatnonzero(kept))
        everything = np.concatenate(sequences)
        self._known, last = np.unique(everything[::-1], return_index=True)
        self._shard_of, self._place_of = (np.concatenate(a)[::-1][last] for a in (shards, places))

    def _find(self, sequences: np.ndarray) -> np.ndarray:
        """Their rows in the index, -1 where there is none."""
        if not len(self._known):
            return np.full(len(sequences), -1)
        at = np.minimum(np.searchsorted(self._known, sequences), len(self._known) - 1)
        return np.where(self._known[at] == sequences, at, -1)

    def _places(self, sequences: Sequence[int] | np.ndarray) -> list[tuple[_Shard, int]]:
        wanted = np.asarray(sequences, dtype=np.int64)
        at = self._find(wanted)
        if (at < 0).any():
            raise DistillError(f"{self.folder} has no signal of the sequences {_named(wanted[at < 0])}", "signal")
        return [(self._order[self._shard_of[i]], int(self._place_of[i])) for i in at]

    def _intact(self, shard: _Shard, place: int) -> bool:
        if shard.state[place] == _UNCHECKED:
            shard.state[place] = _SOUND if shard.intact(place) else _LOST
        return bool(shard.state[place] == _SOUND)

    def _part(self, shard: _Shard, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes and lengths of one sequence, checked when it is read for the first time."""
        if not self._intact(shard, place):
            bad = shard.sequences[[i for i in range(len(shard.sequences)) if not self._intact(shard, i)]]
            self._index()
            raise DistillError(f"{shard.path} is damaged: make the sequences {_named(bad)} again", "signal")
        return shard.part(place)

    def _decode(self, data: np.ndarray, lengths: np.ndarray) -> Head | Sparse | None:
        return self._open_codec().decode(np.asarray(data), np.asarray(lengths))


def _named(sequences: np.ndarray) -> str:
    return ", ".join(map(str, sequences[:20])) + (f" and {len(sequences) - 20} more" if len(sequences) > 20 else "")


def _digest(*parts: bytes | np.ndarray, size: int = 16) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).view(np.uint8).data)
    return digest.digest()


def _only(
    which: np.ndarray, sequences: np.ndarray, lengths: np.ndarray, distributions: Head | Sparse
) -> tuple[np.ndarray, np.ndarray, Head | Sparse]:
    kept = np.repeat(which, lengths)
    return sequences[which], lengths[which], _take(distributions, np.flatnonzero(kept))


def _take(distributions: Head | Sparse, rows: slice | np.ndarray) -> Head | Sparse:
    if isinstance(distributions, Head):
        return replace(distributions, hidden=distributions.hidden[rows])
    weights = distributions.weights
    return Sparse(distributions.ids[rows], distributions.logprobs[rows], None if weights is None else weights[rows])
