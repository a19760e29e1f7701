from __future__ import annotations

import gzip

import numpy as np

from distill.data import assets
from distill.data.splits import Splits
from distill.errors import MissingAsset
from distill.records import Dataset, Examples, InputSpec


class Digits:
    """1,797 handwritten digits of 8 by 8 grey pixels, inside scikit-learn: real data that is always there.

    Source: `sklearn.datasets.load_digits` (the test part of UCI's "Optical Recognition of Handwritten Digits").
    Images are uint8 (n, 8, 8, 1), the source's 0..16 spread over 0..255; ten classes. A stratified fifth, drawn with
    `split_seed`, is the test.

    Args: see `Splits`.
    """

    def __init__(
        self,
        victim_share: float = 1.0,
        split_seed: int = 0,
        train_rows: int | None = None,
        test_rows: int | None = None,
    ) -> None:
        self.splits = Splits(victim_share, split_seed, train_rows, test_rows)

    def load(self) -> Dataset:
        """Raises `DistillError` when more rows are asked for than there are."""
        # Read as `load_digits` reads it, without the two seconds that importing scikit-learn takes.
        path = assets.package_file("sklearn", "datasets/data/digits.csv.gz")
        if path is None:
            raise MissingAsset("digits lie in scikit-learn, which is not installed: pip install scikit-learn", "data")
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",")
        pixels = np.rint(table[:, :-1] * (255.0 / 16.0)).astype(np.uint8).reshape(-1, 8, 8, 1)
        labels = table[:, -1].astype(np.int64)
        examples = Examples(pixels, InputSpec("image", (8, 8, 1)), labels, tuple("0123456789"), "digits")
        return self.splits.apply("digits", examples, None, test_share=0.2)
