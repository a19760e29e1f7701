"""Transfer sets on disk: as Hugging Face data sets, checked when read, and never with a clean answer in them.

Inside a run a transfer set refers to its pool by row (`save`, `load`); exported, it holds its inputs (`export`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Image, LargeList, List, Value
from PIL import Image as Pixels

from distill.records import Examples, InputSpec, TransferSet
from distill.stored import card, lists, read, replacing, write_arrow, write_parquet, write_sidecar

SCHEMA = 1
BATCH_BYTES = 16 << 20  # what is turned into arrow at once
PNG_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels

_SIDECAR = "transfer_set.json"


def save(transfer_set: TransferSet, path: Path) -> None:
    """Write a folder that `datasets.load_from_disk` loads, all of it or nothing; one that is there is replaced.

    Columns: `row` of the pool (-1 where the attack made the input), `posterior`, `label`, and where there are any
    `logits`, `group` and `input` (flat; null where it is a pool row). Targets are not stored: they are a recovery's.

    Raises:
        DistillError: It can't be written.
    """
    columns: dict[str, tuple[Any, Callable[[slice], pa.Array]]] = {
        "row": (Value("int64"), lambda part: pa.array(transfer_set.rows[part])),
    } | _answer_columns(transfer_set, Value("int64"))
    groups = transfer_set.groups
    if groups is not None:
        columns["group"] = Value("int64"), lambda part: pa.array(groups[part])
    made = transfer_set.made
    if made is not None:
        text = made.dtype == object
        feature = Value("large_string") if text else LargeList(Value(made.dtype.name))
        columns["input"] = feature, lambda part: _made_inputs(transfer_set.rows, made, part)
    row_bytes = 8 * transfer_set.classes + (0 if made is None or made.dtype == object else made[:1].nbytes)
    with replacing(path) as folder:
        content = write_arrow(folder, columns, len(transfer_set), max(1, BATCH_BYTES // row_bytes))
        (folder / "README.md").write_text(_card(transfer_set, f'datasets.load_from_disk("{path.name}")'))
        facts = {
            "schema": SCHEMA,
            "queries": len(transfer_set),
            "classes": transfer_set.classes,
            "pool": transfer_set.pool,
            "profile": transfer_set.profile,
            "note": transfer_set.note,
            "made": None if made is None else {"shape": made.shape[1:], "dtype": made.dtype.name},
            "data": content,
        }
        write_sidecar(folder / _SIDECAR, facts)


def load(path: Path) -> TransferSet:
    """Read what `save` wrote.

    Raises:
        DamagedTransferSet: It is missing, incomplete, or a checksum doesn't fit.
    """
    table, sidecar = read(path, _SIDECAR, SCHEMA)
    shape = (len(table), sidecar["classes"])
    made = sidecar["made"]
    return TransferSet(
        rows=_values(table, "row"),
        posteriors=_values(table, "posterior").reshape(shape),
        made=None if made is None else _values(table, "input").astype(made["dtype"]).reshape(-1, *made["shape"]),
        logits=_values(table, "logits").reshape(shape) if "logits" in table.column_names else None,
        groups=_values(table, "group") if "group" in table.column_names else None,
        pool=sidecar["pool"],
        profile=sidecar["profile"],
        note=sidecar["note"],
    )


def export(transfer_set: TransferSet, pool: Examples, path: Path, class_names: tuple[str, ...]) -> None:
    """Write a folder that holds the inputs too, in the hub's own form: ``datasets.load_dataset(path)``.

    Columns: `image`, `text` or `features`, then `label`, `posterior` and, where revealed, `logits`. Images of bytes
    become PNG; images that an attack made as floats stay (height, width, channels) lists in [0, 1].

    Raises:
        DistillError: `pool` is not the pool that was asked from, or the folder can't be written.
    """
    inputs = transfer_set.inputs(pool)
    feature, encode = _input_column(pool.spec, inputs[0:0].dtype)
    name = {"image": "image", "text": "text", "table": "features"}[pool.spec.kind]
    columns: dict[str, tuple[Any, Callable[[slice], pa.Array]]] = {
        name: (feature, lambda part: encode(inputs[part])),
    } | _answer_columns(transfer_set, ClassLabel(names=list(class_names)))
    row_bytes = 8 * transfer_set.classes + 8 * int(np.prod(pool.spec.shape))
    with replacing(path) as folder:
        write_parquet(folder, columns, len(transfer_set), max(1, BATCH_BYTES // row_bytes))
        (folder / "README.md").write_text(_card(transfer_set, f'datasets.load_dataset("{path.name}", split="train")'))


def _answer_columns(transfer_set: TransferSet, label: Any) -> dict[str, tuple[Any, Callable[[slice], pa.Array]]]:
    posterior = List(Value("float32"), length=transfer_set.classes)
    posteriors, logits = transfer_set.posteriors, transfer_set.logits
    columns: dict[str, tuple[Any, Callable[[slice], pa.Array]]] = {
        "label": (label, lambda part: pa.array(posteriors[part].argmax(axis=1))),
        "posterior": (posterior, lambda part: lists(posteriors[part])),
    }
    if logits is not None:
        columns["logits"] = posterior, lambda part: lists(logits[part])
    return columns


def _made_inputs(rows: np.ndarray, made: np.ndarray, part: slice) -> pa.Array:
    """The attack's own inputs among these queries; null for the others, which take no room."""
    is_made = rows[part] < 0
    first = int((rows[: part.start] < 0).sum())
    inputs = made[first : first + int(is_made.sum())]
    if made.dtype == object:
        texts = np.full(len(is_made), None, dtype=object)
        texts[is_made] = inputs
        return pa.array(texts, pa.large_string())
    lengths = np.where(is_made, made[:1].size, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = pa.array(np.ascontiguousarray(inputs).reshape(-1))
    return pa.LargeListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~is_made))


def _input_column(spec: InputSpec, dtype: np.dtype) -> tuple[Any, Callable[[np.ndarray], pa.Array]]:
    if spec.kind == "text":
        return Value("large_string"), lambda texts: pa.array(texts, pa.large_string())
    if spec.kind == "image" and dtype == np.uint8 and spec.shape[2] in PNG_MODES:
        return Image(), _png
    feature: Any = Value(dtype.name)
    for length in reversed(spec.shape):
        feature = List(feature, length=length)
    return feature, lists


def _png(images: np.ndarray) -> pa.Array:
    files = []
    for image in images:
        buffer = io.BytesIO()
        squeezed = image[:, :, 0] if image.shape[2] == 1 else image
        Pixels.fromarray(np.ascontiguousarray(squeezed)).save(buffer, format="PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    return pa.array(files, Image().pa_type)


def _values(table: pa.Table, name: str) -> np.ndarray:
    """All numbers (or texts) of a column in one array, without its nulls."""
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if not pa.types.is_fixed_size_list(column.type) and column.null_count:
        column = column.drop_null()
    if not pa.types.is_primitive(column.type) and not pa.types.is_large_string(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False)


def _card(transfer_set: TransferSet, loading: str) -> str:
    made = int((transfer_set.rows < 0).sum())
    facts = {
        "queries": f"{len(transfer_set)}, of which the attack made {made} itself",
        "classes": transfer_set.classes,
        "interface profile": transfer_set.profile,
        "pool": transfer_set.pool,
    }
    about = transfer_set.note or "Queries to a teacher and the answers that its provider returned."
    return card("Transfer set", about, facts, loading)
