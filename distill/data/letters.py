from __future__ import annotations

import importlib.util
import string
import warnings
from pathlib import Path

import numpy as np

from distill.data import assets
from distill.data.splits import Splits
from distill.errors import DistillError, MissingAsset
from distill.records import Dataset, Examples, InputSpec

DEBIAN = Path("/usr/lib/R/site-library/mlbench/data/LetterRecognition.rda")
FEATURES = 16
ROWS, TEST_ROWS = 20_000, 4_000


class Letters:
    """Letter Recognition: 20,000 capital letters, each described by 16 small whole numbers; 26 classes.

    Source: Frey and Slate, "Letter Recognition Using Holland-Style Adaptive Classifiers", Machine Learning 1991; UCI
    data set 59. Read from `root`, or from Debian's r-cran-mlbench (with the PyPI package rdata); the rows are the same.
    Tables are float32 (n, 16) in 0..15. The last 4,000 rows are the test, as in the paper.

    Args:
        root: UCI's letter-recognition.data, or mlbench's LetterRecognition.rda.
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
        """Raises `MissingAsset` when it is nowhere, `DistillError` when the file is not Letter Recognition."""
        path = assets.find(
            "Letter Recognition (https://archive.ics.uci.edu/dataset/59)",
            root=self.root,
            packaged=DEBIAN,
            install="apt-get install r-cran-mlbench && pip install rdata",
        )
        assert isinstance(path, Path)  # it is on no hub
        letters, features = _read_rda(path) if path.suffix == ".rda" else _read_uci(path)
        labels = np.array([string.ascii_uppercase.find(letter) for letter in letters], dtype=np.int64)
        if features.shape != (ROWS, FEATURES) or labels.shape != (ROWS,) or labels.min() < 0:
            raise DistillError(
                f"{path} holds {features.shape[0]} rows of {features.shape[1:]} features, not the {ROWS} x {FEATURES} "
                "of Letter Recognition; for other data set data=local",
                "data.root",
            )
        whole = Examples(features, InputSpec("table", (FEATURES,)), labels, tuple(string.ascii_uppercase), "letters")
        rows = np.arange(ROWS)
        return self.splits.apply("letters", whole.take(rows[:-TEST_ROWS]), whole.take(rows[-TEST_ROWS:]))


def _read_uci(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        cells = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
        return [row[0] for row in cells], np.array([row[1:] for row in cells], dtype=np.float32)
    except (OSError, ValueError) as error:
        raise DistillError(f"{path} can't be read as letter-recognition.data ({error})", "data.root") from error


def _read_rda(path: Path) -> tuple[list[str], np.ndarray]:
    if importlib.util.find_spec("rdata") is None:
        raise MissingAsset(f"{path} needs one more package to be read: pip install rdata", "data.root")
    import rdata

    with warnings.catch_warnings():  # the file does not state its encoding; it holds capital letters
        warnings.simplefilter("ignore", UserWarning)
        try:
            frame = rdata.read_rda(path)["LetterRecognition"]
        except (OSError, ValueError, KeyError) as error:
            raise DistillError(f"{path} can't be read as LetterRecognition.rda ({error})", "data.root") from error
    return list(frame["lettr"].astype(str)), frame.drop(columns="lettr").to_numpy(np.float32)
