"""From the columns of a Hugging Face data set to prompts, and the checkers of answers that have a reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.data import assets
from distill.errors import DistillError, nearest
from distill.language import Prompts, encode_messages, texts

if TYPE_CHECKING:
    import datasets

OBVIOUS = ("messages", "prompt", "question", "instruction", "text")  # the first of these that is there
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class ChatColumns:
    """Which columns are what.

    Args:
        prompt_column: Texts (each becomes a message of the user) or chats: lists of messages with a role and a content.
            None: the first of messages, prompt, question, instruction and text that is there.
        reference_column: Right answers; None: the last message of a chat where it is the assistant's in all of them.
        key: The config node, for messages.
    """

    prompt_column: str | None = None
    reference_column: str | None = None
    key: str = "data"

    def read(self, rows: datasets.Dataset, name: str) -> Prompts:
        """The rows, in their order.

        Raises:
            DistillError: A column is missing, a prompt is empty, a value is of the wrong type.
        """
        if len(rows) == 0:
            raise DistillError(f"{name} has no rows", self.key)
        columns = rows.column_names
        column = self.prompt_column or next((known for known in OBVIOUS if known in columns), "")
        for option, wanted in (("prompt_column", column), ("reference_column", self.reference_column)):
            if wanted is not None and wanted not in columns:
                which = f"no column '{wanted}'.{nearest(wanted, columns)}"
                if not wanted:
                    which = f"which column holds the prompts? There are {', '.join(columns)}"
                raise DistillError(which, f"{self.key}.{option}")
        prompts: list[str] = []
        replies: list[str | None] = []
        for row, value in enumerate(self._cells(rows, column)):
            try:
                prompt, reply = _chat(value)
            except DistillError as error:
                reason = str(error).removeprefix("pool: ")
                raise DistillError(f"{name}, row {row}: {reason}", f"{self.key}.prompt_column") from None
            prompts.append(prompt)
            replies.append(reply)
        if self.reference_column is not None:
            replies = self._cells(rows, self.reference_column)
            bad = next((row for row, reply in enumerate(replies) if reply is None), None)
            if bad is not None:
                raise DistillError(f"{name} has none in row {bad}; fill it", f"{self.key}.reference_column")
        references = texts([str(reply) for reply in replies]) if all(reply is not None for reply in replies) else None
        return Prompts(texts(prompts), references=references, entries=references, name=name)

    def _cells(self, rows: datasets.Dataset, column: str) -> list[Any]:
        try:
            return list(rows[column][:])
        except UnicodeDecodeError as error:  # JSONL is not looked at before
            raise DistillError(
                f"'{column}' is not UTF-8 text ({error}); save it as UTF-8", f"{self.key}.path"
            ) from None


def _chat(value: Any) -> tuple[str, str | None]:
    """The encoded chat and, where the assistant has the last word, that word."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DistillError(f"a prompt is a text or a list of messages, not {value!r:.80}")
    # Other keys (a name, tool calls that are null) are what some writers put beside the two.
    messages = [{"role": message.get("role"), "content": message.get("content")} for message in value]
    reply = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    encoded = encode_messages(messages)
    if not messages[-1]["content"].strip():
        raise DistillError("the prompt is empty; fill it or drop the row")
    return encoded, reply


def open_splits(
    path: str | None, hub_id: str | None, config: str | None, revision: str | None, key: str
) -> tuple[str, datasets.DatasetDict]:
    """A name and the splits of a file, folder or hub data set.

    Raises:
        MissingAsset: It is not there.
        DistillError: It can't be read, or neither was stated.
    """
    if path is None and hub_id is None:
        raise DistillError(f"state your prompts: {key}.path=… or {key}.hub_id=owner/name", f"{key}.path")
    found = assets.find("your data", root=path, hub_id=hub_id, config=config, revision=revision, key=f"{key}.path")
    name = str(hub_id) if path is None else Path(path).name
    return name, assets.open_path(found, f"{key}.path") if isinstance(found, Path) else found


# --- checkers -------------------------------------------------------------------------------------------------------


def exact(prompts: Prompts, answers: np.ndarray) -> np.ndarray:
    """(n,) float64: 1 where the answer is the reference, but for white space around it and its case."""
    return _compare(prompts, answers, lambda text: text.strip().casefold())


def last_number(prompts: Prompts, answers: np.ndarray) -> np.ndarray:
    """(n,) float64: 1 where the last number of the answer is that of the reference (as GSM8K is scored)."""
    return _compare(prompts, answers, number_in)


def number_in(text: str) -> float | None:
    """The last number, whatever its commas; None where there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _compare(prompts: Prompts, answers: np.ndarray, part: Callable[[str], Any]) -> np.ndarray:
    if prompts.entries is None:
        raise DistillError(f"{prompts.name} has no reference answers to check against", "data.reference_column")
    pairs = [(part(answer), part(entry)) for answer, entry in zip(answers, prompts.entries, strict=True)]
    return np.array([answer is not None and answer == entry for answer, entry in pairs], dtype=np.float64)


CHECKERS = {"exact": exact, "last_number": last_number}
