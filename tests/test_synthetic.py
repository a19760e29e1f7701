"""Synthetic sets on disk: what is read is what was written, damage is noticed, and other people's tools train on it."""

from __future__ import annotations

import importlib.util
import io
import json
import threading
from base64 import b64decode
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from assets import need
from prompt_toys import chats, flip_a_bit

from distill import synthetic
from distill.errors import DamagedTransferSet, DistillError
from distill.language import Completions, Prompts, Sampling, SyntheticSet, texts

SAMPLING = Sampling(max_tokens=9, temperature=0.5, top_p=0.9, system_prompt="Be kind – ü.", stop=("\n", "#"), seed=7)


def some_answers(rows: int, kind: str, prompts: Prompts | None = None) -> SyntheticSet:
    """Answers of 0 to 4 tokens; `kind` says which columns the teacher told: text, ids, logprobs or top."""
    rng = np.random.default_rng(rows)
    lengths = rng.integers(0, 5, size=rows)
    total = int(lengths.sum())
    told: dict[str, Any] = {}
    if kind != "text":
        told["offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        told["token_ids"] = rng.integers(0, 50_000, size=total).astype(np.int32)
    if kind in ("logprobs", "top"):
        told["logprobs"] = -rng.random(total).astype(np.float32)
    if kind == "top":
        told["top_ids"] = rng.integers(-1, 50_000, size=(total, 3)).astype(np.int32)
        told["top_logprobs"] = np.where(told["top_ids"] < 0, -np.inf, -rng.random((total, 3))).astype(np.float32)
    completions = Completions(
        texts([f"answer {i} – ü\n" for i in range(rows)]),
        texts([("stop", "length")[i % 2] for i in range(rows)]),
        rng.integers(1, 9, size=rows),
        lengths.astype(np.int64),
        **told,
    )
    return SyntheticSet(
        prompts or chats(rows),
        completions,
        rng.integers(0, 3, size=rows),
        SAMPLING,
        rng.random(rows),
        teacher="abc",
        profile="text, top 3",
        note="a test's",
    )


def plain(rows: int) -> Prompts:
    return Prompts(texts([f"text {i}\n to go on" for i in range(rows)]), chat=False, name="plain")


def equal(one: Any, other: Any) -> bool:
    """All columns and facts, with their types."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, (SyntheticSet, Prompts, Completions)):
        names = type(one).__dataclass_fields__
        return type(one) is type(other) and all(equal(getattr(one, n), getattr(other, n)) for n in names)
    return one == other


@pytest.mark.parametrize("kind", ["text", "ids", "logprobs", "top"])
@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("batch_bytes", [1, 10_000_000])  # a row a batch, and all in one
def test_what_is_loaded_is_what_was_saved(
    tmp_path: Path, kind: str, rows: int, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "BATCH_BYTES", batch_bytes)
    for prompts in (chats(rows), chats(rows, references=False), plain(rows)):
        given = some_answers(rows, kind, prompts)
        synthetic.save(given, tmp_path / "set")
        assert equal(synthetic.load(tmp_path / "set"), given)


def test_curated_and_teacherless_sets_too(tmp_path: Path) -> None:
    given = some_answers(9, "top")
    curated = replace(given, weights=np.linspace(0, 1, 9, dtype=np.float32)).keep(np.arange(9) % 3 > 0, "a_filter")
    unsampled = replace(some_answers(4, "text"), sampling=None, teacher="", note="")
    for one in (curated, unsampled):
        synthetic.save(one, tmp_path / "set")
        assert equal(synthetic.load(tmp_path / "set"), one)


def test_several_messages_of_several_roles(tmp_path: Path) -> None:
    from distill.language import encode_messages

    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": '"c"\n\\ \u2028'}]  # fmt: skip
    given = some_answers(1, "ids", Prompts(texts([encode_messages(chat)])))
    synthetic.save(given, tmp_path / "set")
    assert equal(synthetic.load(tmp_path / "set"), given)
    row = datasets.load_from_disk(str(tmp_path / "set"))[0]
    assert row["prompt"] == chat
    assert row["messages"] == [*chat, {"role": "assistant", "content": given.completions.column[0]}]


def test_hugging_face_loads_it(tmp_path: Path) -> None:
    given = some_answers(9, "top")
    synthetic.save(given, tmp_path / "set")
    loaded = datasets.load_from_disk(str(tmp_path / "set"))
    assert loaded.column_names == [
        "messages", "prompt", "completion", "token_ids", "logprobs", "top_ids", "top_logprobs", "prompt_tokens",
        "completion_tokens", "finish_reason", "usd", "repeat", "teacher", "reference", "entry",
    ]  # fmt: skip
    for row in range(9):
        assert loaded[row]["messages"] == loaded[row]["prompt"] + loaded[row]["completion"]
        assert loaded[row]["token_ids"] == given.completions.tokens(row).tolist()
        part = slice(*given.completions.offsets[row : row + 2])
        np.testing.assert_array_equal(np.array(loaded[row]["top_ids"]).reshape(-1, 3), given.completions.top_ids[part])
        np.testing.assert_allclose(loaded[row]["logprobs"], given.completions.logprobs[part])
    assert loaded["usd"][:] == given.usd.tolist()
    synthetic.save(some_answers(3, "text", plain(3)), tmp_path / "plain")
    assert datasets.load_from_disk(str(tmp_path / "plain"))[1]["prompt"] == "text 1\n to go on"
    assert "messages" not in datasets.load_from_disk(str(tmp_path / "plain")).column_names


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    given = some_answers(9, "top").keep(np.arange(9) != 4, "a_filter")
    synthetic.save(given, tmp_path / "set")
    card = (tmp_path / "set" / "README.md").read_text()
    for fact in ("answers: 8 to 8 prompts", "teacher: abc", "top_p 0.9", "dropped: 1 as a_filter", "a test's",
                 "text-generation", 'load_from_disk("set")'):  # fmt: skip
        assert fact in card
    import yaml

    header = yaml.safe_load(card.split("---")[1])
    assert header == {
        "tags": ["knowledge-distillation", "model-extraction", "synthetic"], "task_categories": ["text-generation"]
    }  # fmt: skip


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-7])])
@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "synthetic_set.json"])
def test_damage_is_noticed_and_the_file_is_named(tmp_path: Path, damage: Any, name: str) -> None:
    given = some_answers(9, "top")
    synthetic.save(given, tmp_path / "set")
    damage(tmp_path / "set" / name)
    with pytest.raises(DamagedTransferSet, match=str(tmp_path / "set")):
        synthetic.load(tmp_path / "set")
    synthetic.save(given, tmp_path / "set")
    assert equal(synthetic.load(tmp_path / "set"), given)


def test_an_interrupted_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    old, new = some_answers(3, "ids"), some_answers(5, "ids")
    synthetic.save(old, tmp_path / "set")
    monkeypatch.setattr(synthetic, "_card", killed)
    with pytest.raises(KeyboardInterrupt):
        synthetic.save(new, tmp_path / "set")
    assert equal(synthetic.load(tmp_path / "set"), old)
    monkeypatch.undo()
    synthetic.save(new, tmp_path / "set")
    assert equal(synthetic.load(tmp_path / "set"), new)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    with pytest.raises(DamagedTransferSet):
        synthetic.load(tmp_path / "nowhere")


def test_tokens_are_never_python_objects(tmp_path: Path) -> None:
    """Half a million tokens with their five best: 22 MB as arrays, twenty times that as numbers of Python."""
    import tracemalloc

    rows, length, k = 500, 1_000, 5
    rng = np.random.default_rng(0)
    lengths = np.full(rows, length)
    told = {
        "token_ids": rng.integers(0, 50_000, size=rows * length).astype(np.int32),
        "logprobs": -rng.random(rows * length).astype(np.float32),
        "top_ids": rng.integers(0, 50_000, size=(rows * length, k)).astype(np.int32),
        "top_logprobs": -rng.random((rows * length, k)).astype(np.float32),
    }
    completions = Completions(texts(["x"] * rows), texts(["stop"] * rows), lengths, lengths,
                              np.arange(rows + 1) * length, **told)  # fmt: skip
    given = replace(some_answers(rows, "text"), completions=completions)
    size = sum(column.nbytes for column in told.values())
    tracemalloc.start()
    synthetic.save(given, tmp_path / "set")
    loaded = synthetic.load(tmp_path / "set")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert equal(loaded, given)
    assert peak < 2 * size
    picked = loaded.take(np.array([400, 3]))
    np.testing.assert_array_equal(picked.completions.tokens(0), completions.tokens(400))


# --- other people's tools -------------------------------------------------------------------------------------------


def test_an_export_is_a_repository_of_the_hub(tmp_path: Path) -> None:
    given = some_answers(9, "top")
    synthetic.export(given, tmp_path / "export")
    loaded = datasets.load_dataset(str(tmp_path / "export"), split="train", cache_dir=str(tmp_path / "cache"))
    synthetic.save(given, tmp_path / "set")
    saved = datasets.load_from_disk(str(tmp_path / "set"))
    assert loaded.features == saved.features
    assert loaded[:] == saved[:]
    assert 'load_dataset("export", split="train")' in (tmp_path / "export" / "README.md").read_text()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; it keeps what it is sent, in `server.received`."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        received = self.server.received  # type: ignore[attr-defined]
        received.append((self.path, body, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "who are you?"}, 401)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/datasets/me/answers"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.answer({"files": [{"path": file["path"]} | mode for file in files]})
        elif self.path.endswith("/commit/main"):
            self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/datasets/me/answers/commit/123", "commitOid": "123"}
            )
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self.answer({"id": "me/answers", "sha": "0" * 40, "siblings": []})

    def answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.received = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", address, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    server.server_close()


def test_what_is_pushed_to_the_hub_is_the_export(tmp_path: Path, hub: Any) -> None:
    given = some_answers(9, "top")
    assert synthetic.push_to_hub(given, "me/answers").endswith("/commit/123")
    made = json.loads(hub.received[0][1])
    assert hub.received[0][0] == "/api/repos/create"
    assert (made["organization"], made["name"], made["type"]) == ("me", "answers", "dataset")
    assert made.get("private", made.get("visibility")) in (True, "private")
    commit = [json.loads(line) for line in hub.received[-1][1].splitlines()]
    files = {part["value"]["path"]: b64decode(part["value"]["content"]) for part in commit if part["key"] == "file"}
    assert set(files) == {"README.md", "data/train-00000-of-00001.parquet"}
    assert b'load_dataset("me/answers", split="train")' in files["README.md"]
    import pyarrow.parquet as pq

    synthetic.export(given, tmp_path / "export")
    exported = pq.read_table(tmp_path / "export" / "data" / "train-00000-of-00001.parquet")
    assert pq.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"])).equals(exported)


def test_a_hub_that_refuses_or_is_not_there_is_one_line(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DistillError, match=r"^run.push_to_hub: me/answers can't be pushed \(.*HF_TOKEN") as caught:
        synthetic.push_to_hub(some_answers(1, "text"), "me/answers")
    assert "\n" not in str(caught.value)
    with pytest.raises(DistillError, match="can't be pushed"):
        synthetic.push_to_hub(some_answers(1, "text"), "no such/name at all")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DistillError, match="can't be pushed"):
        synthetic.push_to_hub(some_answers(1, "text"), "me/answers")


def test_trl_trains_on_it_unchanged(tmp_path: Path) -> None:
    need(importlib.util.find_spec("trl"), "pip install trl")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    letters = {chr(i): i for i in range(32, 127)} | {"<pad>": 0, "<eos>": 1, "\n": 2, "–": 3, "ü": 4}
    characters = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for name, prompts in (("chats", chats(16)), ("plain", plain(16))):
        given = some_answers(16, "top", prompts)
        synthetic.save(given, tmp_path / name)
        config = LlamaConfig(vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2)  # fmt: skip
        arguments = SFTConfig(
            str(tmp_path / "out"), max_steps=8, learning_rate=1e-2, per_device_train_batch_size=8, use_cpu=True,
            bf16=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            LlamaForCausalLM(config), arguments, train_dataset=datasets.load_from_disk(str(tmp_path / name)),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert losses[-1] < 0.9 * losses[0], "it learns"
        batch = next(iter(trainer.get_train_dataloader()))
        learnt = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
        assert all(text.rstrip("\n").replace("<eos>", "").rstrip("\n") in
                   {answer.strip() for answer in given.completions.column} for text in learnt), learnt  # fmt: skip
