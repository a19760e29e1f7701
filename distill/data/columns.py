"""From the columns of a Hugging Face data set (a hub's, a CSV's, an image folder's) to `Examples`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.data.pictures import GREY_MODES, Pictures, decode
from distill.errors import DistillError, nearest
from distill.records import Examples, InputSpec

if TYPE_CHECKING:
    import datasets

KINDS = ("auto", "image", "text", "table")


@dataclass(frozen=True)
class Columns:
    """Which columns are what.

    Args:
        kind: image, text, table, or auto: an image column makes images, one text column texts, numbers a table.
        input_columns: The image or text column, or the features of a table. None: the only image column; the text
            column called "text", or the only one; every numeric column but the label.
        label_column: The label, or None for none. Numbers and texts become classes in sorted order.
        image_size: Side in pixels that pictures are cropped and resized to; None: as they are, all of one size.
        channels: 1 (grey) or 3 (colour); None: those of the first picture.
        memory_mb: Pictures that need more than this are decoded when they are asked for.
        key: The config node, for messages.

    Raises:
        DistillError: An option has no meaning.
    """

    kind: str = "auto"
    input_columns: str | Sequence[str] | None = None
    label_column: str | None = "label"
    image_size: int | None = None
    channels: int | None = None
    memory_mb: float = 1024
    key: str = "data"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DistillError(f"no kind '{self.kind}'.{nearest(str(self.kind), KINDS)}")
        if self.channels not in (None, 1, 3):
            raise DistillError(f"channels must be 1, 3 or null, not {self.channels}")
        if self.image_size is not None and self.image_size < 1:
            raise DistillError(f"image_size must be at least 1, or null, not {self.image_size}")

    def settle(self, rows: datasets.Dataset) -> Columns:
        """The same with nothing left open, so that other rows (a test) are read by the same columns in their order.

        Raises:
            DistillError: A column is missing, or it is not clear which ones are meant.
        """
        kind, columns = self._inputs(rows)
        return replace(self, kind=kind, input_columns=columns)

    def read(
        self,
        rows: datasets.Dataset,
        name: str,
        *,
        spec: InputSpec | None = None,
        class_names: tuple[str, ...] | None = None,
        fit: bool = False,
    ) -> Examples:
        """The rows, in their order.

        Args:
            rows: Any data set with the columns.
            name: For messages.
            spec: What the inputs must become; None takes what they are.
            class_names: The classes that labels must belong to; None takes what there is.
            fit: Crop, resize and recolour pictures to `spec` whatever they are; else only where the options say so.

        Raises:
            DistillError: A column is missing or of the wrong type, a value is missing, a label is unknown.
        """
        if len(rows) == 0:
            raise DistillError(f"{name} has no rows", self.key)
        kind, columns = self._inputs(rows)
        labels = None
        if self.label_column is not None:
            labels, class_names = self._labels(rows, name, class_names)
        stated = None
        inputs: np.ndarray | Pictures
        if kind == "image":
            pictures = self._pictures(rows, columns[0], spec, fit)
            spec = pictures.spec
            inputs = pictures
            if len(rows) * np.prod(spec.shape) <= self.memory_mb * 2**20:
                inputs = pictures[:]
            else:
                # The library's own hash of where the rows come from; reading all of them is what we avoid.
                source = f"{rows._fingerprint} {columns} {self.label_column} {spec} {class_names}"
                stated = hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
        elif kind == "table":
            inputs = self._table(rows, columns, name)
            spec = InputSpec("table", inputs.shape[1:])
        else:
            inputs = self._texts(rows, columns[0], name)
            spec = InputSpec("text")
        return Examples(inputs, spec, labels, class_names or (), name, stated)

    def _inputs(self, rows: datasets.Dataset) -> tuple[str, list[str]]:
        """The kind and its columns."""
        if self.label_column is not None and self.label_column not in rows.features:
            hint = nearest(self.label_column, rows.features)
            if _kind_of(next(iter(rows.features.values()))) == "image":
                hint += " Pictures in folders get labels where there are two folders or more, one for each class."
            raise DistillError(f"no column '{self.label_column}'.{hint}", f"{self.key}.label_column")
        by_kind: dict[str, list[str]] = {"image": [], "text": [], "table": []}
        for column, feature in rows.features.items():
            if column != self.label_column and (kind := _kind_of(feature)):
                by_kind[kind].append(column)
        if self.input_columns is not None:
            columns = [self.input_columns] if isinstance(self.input_columns, str) else list(self.input_columns)
            for column in columns:
                if column not in rows.features:
                    raise DistillError(
                        f"no column '{column}'.{nearest(column, rows.features)}", f"{self.key}.input_columns"
                    )
            kinds = {_kind_of(rows.features[column]) for column in columns}
            kind = kinds.pop() if len(kinds) == 1 else None
            if kind is None or self.kind not in ("auto", kind) or (kind != "table" and len(columns) != 1):
                raise DistillError(
                    "state one image column, one text column, or numeric columns only"
                    + (f" ({self.key}.kind is {self.kind})" if self.kind != "auto" else ""),
                    f"{self.key}.input_columns",
                )
            return kind, columns
        kind = self.kind
        if kind == "auto":
            if not by_kind["image"] and by_kind["text"] and by_kind["table"]:
                raise DistillError(
                    f"there are texts ({', '.join(by_kind['text'])}) and numbers ({', '.join(by_kind['table'])}); "
                    f"set {self.key}.kind=text or table, or {self.key}.input_columns=[…]",
                    f"{self.key}.kind",
                )
            kind = next((kind for kind, columns in by_kind.items() if columns), "auto")
        columns = by_kind.get(kind, [])
        if kind == "text" and "text" in columns:
            columns = ["text"]
        if not columns or (kind != "table" and len(columns) > 1):
            found = f"several: {', '.join(columns)}" if columns else f"none among {', '.join(rows.features)}"
            raise DistillError(
                f"which column is the {'input' if kind == 'auto' else kind}? There is {found}; "
                f"set {self.key}.input_columns=…",
                f"{self.key}.input_columns",
            )
        return kind, columns

    def _labels(
        self, rows: datasets.Dataset, name: str, class_names: tuple[str, ...] | None
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """(n,) int64 labels, and their meaning."""
        column, key = str(self.label_column), f"{self.key}.label_column"
        values = _cells(rows, column).to_pylist()
        if None in values:
            raise DistillError(f"{name} has no label in row {values.index(None)}; fill it or drop the row", key)
        names = vars(rows.features[column]).get("names")
        if names is not None:  # a ClassLabel
            bad = next((i for i, value in enumerate(values) if not 0 <= value < len(names)), None)
            if bad is not None:
                raise DistillError(
                    f"{name} has label {values[bad]} in row {bad}, outside of its {len(names)} classes "
                    "(an unlabelled split?)",
                    key,
                )
            found: Sequence[Any] = names
            values = [names[value] for value in values]
        else:
            if not isinstance(values[0], (str, bool, int, float)):
                raise DistillError(f"{name} has labels that are neither texts nor numbers in '{column}'", key)
            if isinstance(values[0], float):
                if not all(value.is_integer() for value in values):
                    raise DistillError(f"{name} has fractions in its labels; state a column of classes", key)
                values = [int(value) for value in values]
            found = sorted(set(values))
        class_names = class_names or tuple(map(str, found))
        index = {class_name: i for i, class_name in enumerate(class_names)}
        unknown = next((value for value in values if str(value) not in index), None)
        if unknown is not None:
            raise DistillError(f"{name} has the label '{unknown}', which the training rows don't have", key)
        return np.array([index[str(value)] for value in values], dtype=np.int64), class_names

    def _pictures(self, rows: datasets.Dataset, column: str, spec: InputSpec | None, fit: bool) -> Pictures:
        import datasets

        rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        if spec is None:
            first = decode(rows[0][column], 0, self.key)
            channels = self.channels or (1 if first.mode in GREY_MODES else 3)
            spec = InputSpec("image", (self.image_size or first.height, self.image_size or first.width, channels))
        resize, recolour = fit or self.image_size is not None, fit or self.channels is not None
        return Pictures(rows, column, spec, resize, recolour, self.key)

    def _table(self, rows: datasets.Dataset, columns: list[str], name: str) -> np.ndarray:
        table = np.empty((len(rows), len(columns)), dtype=np.float32)
        for i, column in enumerate(columns):
            values = np.array(_cells(rows, column).to_pylist(), dtype=np.float64)  # a missing cell becomes NaN
            with np.errstate(over="ignore"):
                table[:, i] = values
            if not np.isfinite(table[:, i]).all():
                row = int(np.flatnonzero(~np.isfinite(table[:, i]))[0])
                raise DistillError(
                    f"{name} has a missing or infinite value in row {row} of '{column}'; fill it, drop the row, "
                    f"or leave the column out with {self.key}.input_columns=[…]",
                    f"{self.key}.input_columns",
                )
        return table

    def _texts(self, rows: datasets.Dataset, column: str, name: str) -> np.ndarray:
        values = _cells(rows, column).to_pylist()
        if None in values:
            raise DistillError(
                f"{name} has no text in row {values.index(None)} of '{column}' (in a CSV, a cell such as NA or null "
                "counts as none; JSONL and Parquet keep them)",
                f"{self.key}.input_columns",
            )
        texts = np.empty(len(values), dtype=object)
        texts[:] = values
        return texts


def _cells(rows: datasets.Dataset, column: str) -> Any:
    """One column as a pyarrow ChunkedArray, in the order of the rows."""
    return rows.select_columns([column]).with_format("arrow")[:].column(column)


def _kind_of(feature: Any) -> str | None:
    """image, text, table, or None for what is no input."""
    import datasets

    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
        return "image"
    if isinstance(feature, datasets.ClassLabel) or not isinstance(feature, datasets.Value):
        return None
    if feature.dtype in ("string", "large_string", "string_view"):
        return "text"
    return "table" if feature.dtype.startswith(("int", "uint", "float", "bool")) else None
