from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.data import assets
from distill.data.columns import Columns
from distill.data.splits import Splits, check_share
from distill.records import Dataset


class Local:
    """Your own labelled data: a CSV, TSV, Parquet or JSONL file, or a folder of such files or of pictures.

    Read by Hugging Face `datasets`: pictures lie in one folder for each class (``cat/1.png``), and a folder may have
    ``train`` and ``test`` in the names of its files or subfolders. Images are uint8 (n, height, width, 1 or 3), tables
    float32 (n, features), texts (n,) `str`. Texts and whole numbers serve as labels; classes are in sorted order.

    Args:
        path: The file or folder.
        test_path: The test rows; null: the folder's own test split or, where there is none, a `test_share`.
        test_share: The stratified share of the rows that becomes the test, where nothing else is.
        kind: image, text, table, or auto: what the columns look like.
        input_columns: The image or text column, or the list of numeric features; null: the obvious ones.
        label_column: The label.
        image_size: Side in pixels that pictures are cropped and resized to; null: as they are.
        channels: 1 for grey, 3 for colour; null: those of the first picture.
        memory_mb: Pictures that need more than this are decoded when they are asked for.
        victim_share, split_seed, train_rows, test_rows: See `Splits`.
    """

    def __init__(
        self,
        path: str,
        test_path: str | None = None,
        test_share: float = 0.2,
        kind: str = "auto",
        input_columns: str | Sequence[str] | None = None,
        label_column: str = "label",
        image_size: int | None = None,
        channels: int | None = None,
        memory_mb: float = 1024,
        victim_share: float = 1.0,
        split_seed: int = 0,
        train_rows: int | None = None,
        test_rows: int | None = None,
    ) -> None:
        self.path, self.test_path = path, test_path
        self.test_share = check_share(test_share)
        self.columns = Columns(kind, input_columns, label_column, image_size, channels, memory_mb)
        self.splits = Splits(victim_share, split_seed, train_rows, test_rows)

    def load(self) -> Dataset:
        """Raises `MissingAsset` when there is no such file, `DistillError` when it can't serve."""
        rows = assets.open_path(_existing(self.path, "data.path"), "data.path")
        name = f"local/{Path(self.path).name}"
        train_rows = assets.part(rows, "train", "data.path")
        columns = self.columns.settle(train_rows)
        train = columns.read(train_rows, name)
        test_rows = rows.get("test")
        if self.test_path is not None:
            other = assets.open_path(_existing(self.test_path, "data.test_path"), "data.test_path")
            test_rows = other["test"] if "test" in other else assets.part(other, "train", "data.test_path")
        if test_rows is None:
            return self.splits.apply(name, train, None, self.test_share)
        test = columns.read(test_rows, f"{name} (test)", spec=train.spec, class_names=train.class_names)
        return self.splits.apply(name, train, test)


def _existing(path: str, key: str) -> Path:
    found = assets.find("your data", root=path, key=key)
    assert isinstance(found, Path)  # a stated path is used or refused
    return found
