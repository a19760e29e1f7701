from __future__ import annotations

from dataclasses import replace

from distill.data import assets
from distill.data.chats import ChatColumns, open_splits
from distill.language import Prompts, Task


class PromptsLocal:
    """Your own prompts: JSONL, CSV or Parquet, a folder of them, or a data set of the Hugging Face hub.

    The task's checker knows nothing of them, so `entries` are none.

    Args:
        path, hub_id, config, revision, prompt_column, reference_column: See `ChatLocal`.
        split: The split to read.
    """

    def __init__(
        self,
        path: str | None = None,
        hub_id: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        split: str = "train",
        prompt_column: str | None = None,
        reference_column: str | None = None,
    ) -> None:
        self.path, self.hub_id, self.config, self.revision, self.split = path, hub_id, config, revision, split
        self.columns = ChatColumns(prompt_column, reference_column, "pool")

    def load_prompts(self, task: Task) -> Prompts:
        """Raises `MissingAsset` when there is no such data, `DistillError` when it can't serve."""
        name, splits = open_splits(self.path, self.hub_id, self.config, self.revision, "pool")
        prompts = self.columns.read(assets.part(splits, self.split, "pool.split"), name)
        return replace(prompts, entries=None)
