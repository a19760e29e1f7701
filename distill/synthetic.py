"""Synthetic sets on disk: the transfer sets of the generation domain, as Hugging Face data sets for any trainer.

One table serves the run (`save`, `load`), other people (`export`, `push_to_hub`) and any trainer. Its columns:

- ``prompt`` and ``completion``: messages where the prompts are chats (then ``messages`` has all of them), else texts;
- ``token_ids``, ``logprobs``, ``top_ids``, ``top_logprobs`` of the answer, where the teacher told them;
- ``prompt_tokens``, ``completion_tokens`` and ``usd`` as billed, ``finish_reason``, ``repeat`` and ``teacher``;
- ``reference`` and ``entry``, and of a curated set ``weight`` and ``row`` (in the set that was paid for), where given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import List, Value

from distill.errors import DistillError
from distill.language import FLAT, Completions, Prompts, Sampling, SyntheticSet, encode_messages, texts
from distill.stored import card, lists, read, replacing, write_arrow, write_parquet, write_sidecar

SCHEMA = 1
BATCH_BYTES = 16 << 20  # what is turned into arrow at once

_SIDECAR = "synthetic_set.json"
_CHAT = List({"role": Value("string"), "content": Value("string")})
_TEXT = Value("string")
_DTYPES = {"token_ids": "int32", "logprobs": "float32", "top_ids": "int32", "top_logprobs": "float32"}


def save(synthetic: SyntheticSet, path: Path) -> None:
    """Write a folder that `datasets.load_from_disk` loads, all of it or nothing; one that is there is replaced.

    Raises:
        DistillError: It can't be written.
    """
    with replacing(path) as folder:
        content = write_arrow(folder, _columns(synthetic), len(synthetic), _step(synthetic))
        (folder / "README.md").write_text(_card(synthetic, f'datasets.load_from_disk("{path.name}")'))
        facts = {
            "schema": SCHEMA,
            "answers": len(synthetic),
            "chat": synthetic.prompts.chat,
            "prompts": synthetic.prompts.name,
            "top_k": synthetic.completions.top_k,
            "sampling": None if synthetic.sampling is None else asdict(synthetic.sampling),
            "teacher": synthetic.teacher,
            "profile": synthetic.profile,
            "dropped": synthetic.dropped,
            "note": synthetic.note,
            "data": content,
        }
        write_sidecar(folder / _SIDECAR, facts)


def load(path: Path) -> SyntheticSet:
    """Read what `save` wrote. Tokens are arrays, however many there are.

    Raises:
        DamagedTransferSet: It is missing, incomplete, or a checksum doesn't fit.
    """
    table, facts = read(path, _SIDECAR, SCHEMA)
    chat = facts["chat"]
    if chat:
        column = texts([encode_messages(messages) for messages in _each(table, "prompt")])
        answers = texts([reply["content"] for (reply,) in _each(table, "completion")])
    else:
        column, answers = texts(list(_each(table, "prompt"))), texts(list(_each(table, "completion")))
    flat: dict[str, Any] = {name: _tokens(table, name, facts["top_k"]) for name in FLAT if name in table.column_names}
    if flat:
        lengths = pc.list_value_length(table.column(next(iter(flat)))).to_numpy()
        flat["offsets"] = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return SyntheticSet(
        prompts=Prompts(column, chat, _texts(table, "reference"), _texts(table, "entry"), facts["prompts"]),
        completions=Completions(
            answers,
            texts(list(_each(table, "finish_reason"))),
            table.column("prompt_tokens").to_numpy(),
            table.column("completion_tokens").to_numpy(),
            **flat,
        ),
        repeats=table.column("repeat").to_numpy(),
        sampling=None if facts["sampling"] is None else Sampling(**facts["sampling"]),
        usd=table.column("usd").to_numpy(),
        teacher=facts["teacher"],
        profile=facts["profile"],
        weights=table.column("weight").to_numpy() if "weight" in table.column_names else None,
        rows=table.column("row").to_numpy() if "row" in table.column_names else None,
        dropped=facts["dropped"],
        note=facts["note"],
    )


def export(synthetic: SyntheticSet, path: Path) -> None:
    """Write the same table in the hub's own form: ``datasets.load_dataset(path)``.

    Raises:
        DistillError: It can't be written.
    """
    with replacing(path) as folder:
        write_parquet(folder, _columns(synthetic), len(synthetic), _step(synthetic))
        (folder / "README.md").write_text(_card(synthetic, f'datasets.load_dataset("{path.name}", split="train")'))


def push_to_hub(synthetic: SyntheticSet, repo: str, private: bool = True) -> str:
    """Put what `export` writes into a data set repository of the Hugging Face hub, made where it is not there.

    Args:
        synthetic: What to publish.
        repo: ``owner/name``.
        private: Where the repository is made, only its owner sees it.

    Returns:
        The address of the commit.

    Raises:
        DistillError: The hub can't be reached or refuses (no token, no right to write).
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="distill")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo.rpartition("/")[2]
        export(synthetic, folder)
        loading = f'datasets.load_dataset("{repo}", split="train")'
        (folder / "README.md").write_text(_card(synthetic, loading))
        try:
            api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, repo_type="dataset", commit_message=f"{len(synthetic)} answers"
            )
        except Exception as error:  # each version of the client has other classes for what can go wrong on the way
            reason = " ".join(str(error).split())[:300]
            raise DistillError(
                f"{repo} can't be pushed ({reason}); is HF_TOKEN a token that may write there?", "run.push_to_hub"
            ) from error
    return str(commit.commit_url)


def _columns(synthetic: SyntheticSet) -> dict[str, tuple[Any, Callable[[slice], pa.Array]]]:
    prompts, completions = synthetic.prompts, synthetic.completions

    def rows(values: Any, kind: pa.DataType) -> Callable[[slice], pa.Array]:
        return lambda part: pa.array(values[part], kind)

    def asked(part: slice) -> list[Any]:
        return [prompts.messages(row) for row in range(part.start, part.stop)]

    def replied(part: slice) -> list[Any]:
        return [[{"role": "assistant", "content": text}] for text in completions.column[part]]

    columns: dict[str, tuple[Any, Callable[[slice], pa.Array]]] = {}
    if prompts.chat:
        kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        columns["messages"] = (
            _CHAT,
            lambda part: pa.array([[*a, *b] for a, b in zip(asked(part), replied(part), strict=True)], kind),
        )
        columns["prompt"] = _CHAT, lambda part: pa.array(asked(part), kind)
        columns["completion"] = _CHAT, lambda part: pa.array(replied(part), kind)
    else:
        columns["prompt"] = _TEXT, rows(prompts.column, pa.string())
        columns["completion"] = _TEXT, rows(completions.column, pa.string())
    for name, values in completions.flat().items():
        if values is not None:
            feature: Any = Value(_DTYPES[name])
            for length in reversed(values.shape[1:]):
                feature = List(feature, length=length)
            columns[name] = List(feature), _of_answers(completions.offsets, values)
    columns |= {
        "prompt_tokens": (Value("int64"), rows(completions.prompt_tokens, pa.int64())),
        "completion_tokens": (Value("int64"), rows(completions.completion_tokens, pa.int64())),
        "finish_reason": (_TEXT, rows(completions.finish, pa.string())),
        "usd": (Value("float64"), rows(synthetic.usd, pa.float64())),
        "repeat": (Value("int64"), rows(synthetic.repeats, pa.int64())),
        "teacher": (_TEXT, lambda part: pa.array([synthetic.teacher] * (part.stop - part.start), pa.string())),
    }
    for name, values in (("reference", prompts.references), ("entry", prompts.entries)):
        if values is not None:
            columns[name] = _TEXT, rows(values, pa.string())
    if synthetic.weights is not None:
        columns["weight"] = Value("float32"), rows(synthetic.weights, pa.float32())
    if synthetic.rows is not None:
        columns["row"] = Value("int64"), rows(synthetic.rows, pa.int64())
    return columns


def _of_answers(offsets: Any, values: np.ndarray) -> Callable[[slice], pa.Array]:
    """Flat values of tokens as one list for each answer."""

    def make(part: slice) -> pa.Array:
        ends = offsets[part.start : part.stop + 1]
        starts = pa.array((ends - ends[0]).astype(np.int32))
        return pa.ListArray.from_arrays(starts, lists(values[ends[0] : ends[-1]]))

    return make


def _tokens(table: pa.Table, name: str, top_k: int) -> np.ndarray:
    """All values of a column of lists, flat: (t,), or (t, k)."""
    shape = (-1, top_k) if name.startswith("top_") else (-1,)
    parts = [chunk.flatten() for chunk in table.column(name).chunks]
    if name.startswith("top_"):
        parts = [part.flatten() for part in parts]
    return np.concatenate([np.empty(0, _DTYPES[name]), *(part.to_numpy() for part in parts)]).reshape(shape)


def _each(table: pa.Table, name: str) -> Iterator[Any]:
    for chunk in table.column(name).chunks:
        yield from chunk.to_pylist()


def _texts(table: pa.Table, name: str) -> np.ndarray | None:
    return texts(list(_each(table, name))) if name in table.column_names else None


def _step(synthetic: SyntheticSet) -> int:
    """How many answers are turned into arrow at once."""
    tokens = sum(values.nbytes for values in synthetic.completions.flat().values() if values is not None)
    characters = sum(map(len, synthetic.prompts.column)) + sum(map(len, synthetic.completions.column))
    return max(1, BATCH_BYTES * len(synthetic) // (tokens + 2 * characters + 1))


def _card(synthetic: SyntheticSet, loading: str) -> str:
    completions, sampling = synthetic.completions, synthetic.sampling
    facts = {
        "answers": f"{len(synthetic)} to {len(np.unique(synthetic.prompts.keys))} prompts",
        "prompts": synthetic.prompts.name or "of the attack's own",
        "teacher": synthetic.teacher or "none",
        "interface profile": synthetic.profile,
        "sampling": "none" if sampling is None else ", ".join(f"{k} {v!r}" for k, v in asdict(sampling).items()),
        "tokens": f"{completions.prompt_tokens.sum()} of prompts, {completions.completion_tokens.sum()} of answers",
        "billed": f"{synthetic.usd.sum():.6g} USD",
    }
    if synthetic.dropped:
        facts["dropped"] = ", ".join(f"{count} as {name}" for name, count in synthetic.dropped.items())
    about = synthetic.note or "Prompts and the answers that a teacher's provider returned."
    return card("Synthetic set", about, facts, loading, "- synthetic\ntask_categories:\n- text-generation\n")
