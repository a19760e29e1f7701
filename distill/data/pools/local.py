from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill import records
from distill.data import assets
from distill.data.columns import Columns
from distill.data.pools.fitting import fit


class Local:
    """Your own inputs, with or without labels: a CSV, TSV, Parquet or JSONL file, or a folder of them or of pictures.

    Read by Hugging Face `datasets` (of several splits, the one called train). Pictures are cropped, resized and
    recoloured to the victim's.

    Args:
        path: The file or folder.
        input_columns: The image or text column, or the numeric features in the victim's order; null: the obvious ones.
        label_column: A label, for controls; its classes are its own. Null for none.
        memory_mb: Pictures that need more than this are decoded when they are asked for.
    """

    def __init__(
        self,
        path: str,
        input_columns: str | Sequence[str] | None = None,
        label_column: str | None = None,
        memory_mb: float = 1024,
    ) -> None:
        self.path, self.input_columns = path, input_columns
        self.label_column, self.memory_mb = label_column, memory_mb

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises `MissingAsset` when there is no such file, `DistillError` when its rows don't fit the victim."""
        file = assets.find("your pool", root=self.path, key="pool.path")
        assert isinstance(file, Path)  # a stated path is used or refused
        rows = assets.part(assets.open_path(file, "pool.path"), "train", "pool.path")
        columns = Columns(data.spec.kind, self.input_columns, self.label_column, memory_mb=self.memory_mb, key="pool")
        name = f"local/{Path(self.path).name}"
        spec = data.spec if data.spec.kind == "image" else None
        return fit(columns.read(rows, name, spec=spec, fit=True), data.spec, "pool")
