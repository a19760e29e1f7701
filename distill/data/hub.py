from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.data import assets
from distill.data.columns import Columns
from distill.data.splits import Splits, check_share
from distill.records import Dataset


class Hub:
    """Any labelled image, text or table data set of the Hugging Face hub, such as uoft-cs/cifar100.

    Read from `root`, or the Hugging Face cache, or the hub. Images are uint8 (n, height, width, 1 or 3), tables float32
    (n, features), texts (n,) `str`. Pictures that need more than `memory_mb` are decoded when they are asked for, and
    identified by the data set's fingerprint instead of a hash of every row.

    Args:
        id: ``owner/name``.
        config: The configuration (subset), where the data set has several.
        revision: A branch, tag or commit; null: the newest, or whatever the cache holds. State a commit to be exact.
        root: A copy of the repository on this machine.
        train_split: The split that the victim (and an in-distribution attacker) draws from.
        test_split: The split of the evaluation; null: a stratified `test_share` of the training rows.
        test_share: See `test_split`.
        kind, input_columns, label_column, image_size, channels, memory_mb: See `Local`.
        victim_share, split_seed, train_rows, test_rows: See `Splits`.
    """

    def __init__(
        self,
        id: str,
        config: str | None = None,
        revision: str | None = None,
        root: str | None = None,
        train_split: str = "train",
        test_split: str | None = "test",
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
        self.id, self.config, self.revision, self.root = id, config, revision, root
        self.train_split, self.test_split = train_split, test_split
        self.test_share = check_share(test_share)
        self.columns = Columns(kind, input_columns, label_column, image_size, channels, memory_mb)
        self.splits = Splits(victim_share, split_seed, train_rows, test_rows)

    def load(self) -> Dataset:
        """Raises `MissingAsset` when it can't be had, `DistillError` when it can't serve."""
        found = assets.find(
            self.id, root=self.root, hub_id=self.id, config=self.config, revision=self.revision, key="data.root"
        )
        splits = assets.open_path(found) if isinstance(found, Path) else found
        train_rows = assets.part(splits, self.train_split, "data.train_split")
        columns = self.columns.settle(train_rows)
        train = columns.read(train_rows, f"{self.id}/train")
        if self.test_split is None:
            return self.splits.apply(self.id, train, None, self.test_share)
        test_rows = assets.part(splits, self.test_split, "data.test_split")
        test = columns.read(test_rows, f"{self.id}/test", spec=train.spec, class_names=train.class_names)
        return self.splits.apply(self.id, train, test)
