from __future__ import annotations

import numpy as np

from distill.data import assets
from distill.data.chats import CHECKERS, ChatColumns, open_splits
from distill.data.passages import read_passages
from distill.data.splits import check_share
from distill.errors import DistillError, nearest
from distill.language import Prompts, Task
from distill.randomness import generator


class ChatLocal:
    """Your own prompts: JSONL, CSV or Parquet, a folder of them, or a data set of the Hugging Face hub.

    The rows are shared out between the attacker (`held_out`) and the evaluation (`test`); none are left to train a
    teacher on. References, where there are any, are what the checker compares with.

    Args:
        path: The file or folder.
        hub_id: ``owner/name`` to use instead, with its `config` (subset) and `revision` (branch, tag or commit).
        train_split: The split that the attacker's prompts come from.
        test_split: The split of the evaluation; null: a random `test_share` of the rows.
        test_share: See `test_split`.
        prompt_column: Texts, or chats as lists of messages; null: the first of messages, prompt, question, instruction
            and text that is there.
        reference_column: Right answers; null: the assistant's last messages of the chats, or none.
        check: exact (but for case and white space around it) or last_number (as GSM8K is scored); null: no checker.
        text_path: Plain text for perplexity; null: none.
        held_out_rows, test_rows: Keep this many, drawn at random; null: all.
        split_seed: The seed of every shuffle.

    Raises:
        DistillError: An option has no meaning.
    """

    def __init__(
        self,
        path: str | None = None,
        hub_id: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        test_share: float = 0.2,
        prompt_column: str | None = None,
        reference_column: str | None = None,
        check: str | None = None,
        text_path: str | None = None,
        held_out_rows: int | None = None,
        test_rows: int | None = None,
        split_seed: int = 0,
    ) -> None:
        if check is not None and check not in CHECKERS:
            raise DistillError(f"check has no '{check}'.{nearest(check, CHECKERS)}")
        for name, rows in (("held_out_rows", held_out_rows), ("test_rows", test_rows)):
            if rows is not None and rows < 1:
                raise DistillError(f"{name} must be at least 1, or null for all, not {rows}")
        self.path, self.hub_id, self.config, self.revision = path, hub_id, config, revision
        self.train_split, self.test_split, self.test_share = train_split, test_split, check_share(test_share)
        self.columns = ChatColumns(prompt_column, reference_column)
        self.check, self.text_path = check, text_path
        self.held_out_rows, self.test_rows, self.split_seed = held_out_rows, test_rows, split_seed

    def load(self) -> Task:
        """Raises `MissingAsset` when there is no such data, `DistillError` when it can't serve."""
        name, splits = open_splits(self.path, self.hub_id, self.config, self.revision, "data")
        rows = self._shuffled(self.columns.read(assets.part(splits, self.train_split, "data.train_split"), name))
        if self.test_split is not None:
            test = self._shuffled(self.columns.read(assets.part(splits, self.test_split, "data.test_split"), name))
        else:
            test_rows = round(len(rows) * self.test_share)
            test, rows = rows.take(slice(0, test_rows)), rows.take(slice(test_rows, None))
        # A prompt that the evaluation asks is none that an attacker holds.
        rows = rows.take(~np.isin(rows.keys, test.keys))
        if not len(rows) or not len(test):
            raise DistillError(
                f"{len(rows)} prompts for the attacker and {len(test)} for the test are too few; bring more rows, or "
                "change data.test_share",
                "data.path",
            )
        if self.check is not None and (rows.references is None or test.references is None):
            raise DistillError("there are no references to check against; state their column", "data.reference_column")
        return Task(
            name,
            train=rows.take(slice(0, 0)),
            held_out=rows.take(slice(0, self.held_out_rows)),
            test=test.take(slice(0, self.test_rows)),
            check=None if self.check is None else CHECKERS[self.check],
            held_out_text=None if self.text_path is None else read_passages(self.text_path, 512, "data.text_path"),
        )

    def _shuffled(self, prompts: Prompts) -> Prompts:
        return prompts.take(generator(self.split_seed, "split").permutation(len(prompts)))
