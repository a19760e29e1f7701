from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from distill.data import assets
from distill.data.columns import Columns
from distill.data.splits import Splits
from distill.errors import DistillError
from distill.records import Dataset, Examples, InputSpec

HUB_ID = "zalando-datasets/fashion_mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SPEC = InputSpec("image", (28, 28, 1))
CLASSES = (
    "T-shirt / top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PARTS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


class FashionMNIST:
    """60,000 + 10,000 grey pictures of clothes in ten classes, in Zalando's own order and split.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", arXiv 2017. Read from `root`, or the Hugging Face hub (zalando-datasets/fashion_mnist), or Debian's
    package dataset-fashion-mnist; the rows are the same. Images are uint8 (n, 28, 28, 1).

    Args:
        root: A folder with the four ``…-ubyte`` files (gzipped or not), or one that `datasets.load_dataset` reads.
        victim_share, split_seed, train_rows, test_rows: See `Splits`.
    """

    def __init__(
        self,
        root: str | None = None,
        victim_share: float = 1.0,
        split_seed: int = 0,
        train_rows: int | None = None,
        test_rows: int | None = None,
    ) -> None:
        self.root = root
        self.splits = Splits(victim_share, split_seed, train_rows, test_rows)

    def load(self) -> Dataset:
        """Raises `MissingAsset` when it is nowhere, `DistillError` when the files are not Fashion-MNIST."""
        found = assets.find(
            "Fashion-MNIST",
            root=self.root,
            hub_id=HUB_ID,
            packaged=DEBIAN,
            install="apt-get install dataset-fashion-mnist",
        )
        parts: dict[str, Examples] = {}
        if isinstance(found, Path) and _idx(found, "train-labels-idx1") is not None:
            for part, (stem, _) in PARTS.items():
                images, labels = (_read_idx(found, f"{stem}-{what}") for what in ("images-idx3", "labels-idx1"))
                parts[part] = Examples(
                    images[..., None], SPEC, labels.astype(np.int64), CLASSES, f"fashion_mnist/{part}"
                )
        else:
            if isinstance(found, Path):
                found = assets.open_path(found)
            columns = Columns(kind="image", input_columns="image", label_column="label")
            for part in PARTS:
                rows = columns.read(assets.part(found, part, "data.root"), f"fashion_mnist/{part}")
                # The hub writes "T - shirt / top"; names must not depend on where the rows come from.
                parts[part] = Examples(rows.inputs, rows.spec, rows.labels, CLASSES, rows.name)
        for part, (_, count) in PARTS.items():
            if len(parts[part]) != count or parts[part].spec != SPEC:
                raise DistillError(
                    f"Fashion-MNIST has {count} {part} pictures of 28x28, but this has {len(parts[part])} of "
                    f"{parts[part].spec.shape}; for other data set data=local",
                    "data.root",
                )
        return self.splits.apply("fashion_mnist", parts["train"], parts["test"])


def _idx(root: Path, stem: str) -> Path | None:
    return next((path for suffix in ("", ".gz") if (path := root / f"{stem}-ubyte{suffix}").is_file()), None)


def _read_idx(root: Path, stem: str) -> np.ndarray:
    """An IDX file (LeCun's format for MNIST) of unsigned bytes."""
    path = _idx(root, stem)
    if path is None:
        raise DistillError(f"{root} lacks {stem}-ubyte(.gz)", "data.root")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        dimensions = int(stem[-1])
        if data[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(data, ">u4", count=dimensions, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape.tolist())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DistillError(f"{path} can't be read ({error}); get it again", "data.root") from error
