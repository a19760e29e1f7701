"""Hugging Face data sets on disk: written whole or not at all, sealed, and checked when they are read.

What the transfer sets of both domains share. Columns are made a slice of rows at a time, so that no table has to fit in
memory twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetInfo, Features

from distill.errors import DamagedTransferSet, DistillError
from distill.records import file_hash

DATA = "data-00000-of-00001.arrow"

Columns = Mapping[str, tuple[Any, Callable[[slice], pa.Array]]]  # its feature, and its values at these rows


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` when it is complete. Raises `DistillError` where it can't."""
    unfinished, old = (path.with_name(f".{path.name}.{what}") for what in ("unfinished", "old"))
    try:
        for leftover in (unfinished, old):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if path.exists():
            path.rename(old)
        unfinished.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise DistillError(f"cannot write {path} ({error.strerror or error})") from None


def write_arrow(folder: Path, columns: Columns, rows: int, step: int) -> str:
    """What `Dataset.save_to_disk` writes, without its progress bar and copies; returns the content hash."""
    features = _features(columns)
    with pa.OSFile(str(folder / DATA), "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as stream:
        for batch in _batches(columns, features, rows, step):
            stream.write_table(batch)
    content = file_hash(folder / DATA)
    DatasetInfo(features=features).write_to_directory(str(folder))
    state = dict.fromkeys(("_format_columns", "_format_type", "_split")) | {
        "_data_files": [{"filename": DATA}],
        "_fingerprint": content,
        "_format_kwargs": {},
        "_output_all_columns": False,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    return content


def write_parquet(folder: Path, columns: Columns, rows: int, step: int) -> None:
    """The hub's own form: one file of the split train."""
    features = _features(columns)
    (folder / "data").mkdir()
    with pq.ParquetWriter(folder / "data" / "train-00000-of-00001.parquet", features.arrow_schema) as writer:
        for batch in _batches(columns, features, rows, step):
            writer.write_table(batch)


def write_sidecar(file: Path, facts: Mapping[str, Any]) -> None:
    """The facts with their checksum."""
    file.write_text(json.dumps({**facts, "checksum": _seal(facts)}, indent=1) + "\n")


def read(path: Path, sidecar: str, schema: int) -> tuple[pa.Table, dict[str, Any]]:
    """The table (memory-mapped) and the facts of its sidecar, in which ``data`` is the table's content hash.

    Raises:
        DamagedTransferSet: It is missing, incomplete, of another schema, or a checksum doesn't fit.
    """
    try:
        facts = json.loads((path / sidecar).read_text())
        checksum = facts.pop("checksum")
        if checksum != _seal(facts):
            raise DamagedTransferSet(f"{path / sidecar} is damaged (its checksum does not fit)")
        if facts["schema"] != schema:
            raise DamagedTransferSet(f"{path} has schema {facts['schema']}; this version reads {schema}")
        if file_hash(path / DATA) != facts["data"]:
            raise DamagedTransferSet(f"{path / DATA} is damaged (its checksum does not fit)")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedTransferSet(f"{path} is not a complete transfer set ({error})") from None
    with pa.memory_map(str(path / DATA)) as file:
        return pa.ipc.open_stream(file).read_all(), facts


def lists(rows: np.ndarray) -> pa.Array:
    """(n, a, b, …) numbers as n lists of a lists of b …, of fixed lengths."""
    values = pa.array(np.ascontiguousarray(rows).reshape(-1))
    for length in reversed(rows.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, length)
    return values


def card(title: str, about: str, facts: Mapping[str, Any], loading: str, header: str = "") -> str:
    """A data set card: `about` in words, then the facts; `header` is more yaml."""
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"""---
tags:
- knowledge-distillation
- model-extraction
{header}---
# {title}

{about}

{lines}

Load it with `{loading}`. The answers are those that the attacker received, after the provider's defense; the teacher's
own answers are not in here.
"""


def _features(columns: Columns) -> Features:
    return Features({name: feature for name, (feature, _) in columns.items()})


def _batches(columns: Columns, features: Features, rows: int, step: int) -> Iterator[pa.Table]:
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        yield pa.table({name: make(part) for name, (_, make) in columns.items()}, schema=features.arrow_schema)


def _seal(facts: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
