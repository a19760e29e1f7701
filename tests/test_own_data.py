"""A user's own data and models, from files and servers to a result, through the command line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import distill, refused
from PIL import Image

SMALL = ["budget.queries=40", "curve=[]", "training=small", "training.epochs=15", "training.lr=0.01"]
SMALL += ["run.progress=false"]
OWN = ["data=local", "data.victim_share=0.5", "data.test_share=0.3"]


def result_of(cwd: Path) -> dict[str, Any]:
    (path,) = cwd.glob("outputs/*/*/result.json")
    return json.loads(path.read_text())


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A CSV of short texts in two classes, told apart by their words."""
    rng = np.random.default_rng(0)
    words = {"bad": ["bad", "day", "a"], "good": ["good", "!", "a"]}
    lines = ["text,label"]
    for i in range(200):
        label = ("bad", "good")[i % 2]
        lines.append(f"{' '.join(rng.choice(words[label], 6))},{label}")
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT as small as can be, in a folder as the hub would hold it."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path / "bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "day", "!"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=160, id2label={0: "bad", 1: "good"})  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_bring_your_own_csv_and_model(reviews: Path, bert: Path, tmp_path: Path) -> None:
    words = [
        f"data.path={reviews}",
        f"teacher.architecture.model={bert}",
        "teacher.recipe.lr=0.01",
        "teacher.recipe.epochs=40",
    ]
    distill("train", "+experiment=bring_your_own", *words, *SMALL, cwd=tmp_path)
    result = result_of(tmp_path)
    assert result["accuracy"]["teacher"]["accuracy"] > 0.9
    assert result["accuracy"]["student"]["accuracy"] > 0.6


def test_a_pretrained_classifier_as_it_is(reviews: Path, bert: Path, tmp_path: Path) -> None:
    words = [f"data.path={reviews}", "teacher=hf_text_classifier", f"teacher.model={bert}", "student=text_encoder"]
    distill("train", *OWN, *words, *SMALL, cwd=tmp_path)
    result = result_of(tmp_path)
    assert result["sizes"]["teacher"]["parameters"] > 1000
    assert result["fidelity"]["agreement"] > 0.5


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(120):
        folder = tmp_path / "pictures" / ("dark", "light")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (12, 12, 3)) + 150 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    words = [f"data.path={tmp_path / 'pictures'}", "student=mlp", "teacher.recipe.epochs=5"]
    distill("train", *OWN, *words, *SMALL, cwd=tmp_path)
    assert result_of(tmp_path)["accuracy"]["teacher"]["accuracy"] > 0.9


FUNCTIONS = """
import numpy as np

def good(texts):
    p = np.array([0.9 if "good" in text else 0.1 for text in texts])
    return np.stack([1 - p, p], axis=1)

def nan(texts):
    return good(texts) * np.nan

def too_much(texts):
    return good(texts) * 2
"""


def test_any_function_as_the_teacher(reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    words = [f"data.path={reviews}", "teacher=callable", "teacher.function=mine:good", "student=text_encoder"]
    env = {"PYTHONPATH": str(tmp_path), "DISTILL_ALLOW_TARGETS": "mine."}
    distill("train", *OWN, *words, *SMALL, cwd=tmp_path, env=env, fresh=True)
    assert result_of(tmp_path)["accuracy"]["teacher"]["accuracy"] > 0.9


@pytest.mark.parametrize(("function", "says"), [("nan", "NaN"), ("too_much", "does not sum to one")])
def test_what_a_function_gets_wrong_is_one_line(
    function: str,
    says: str,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = f"wrong_{function}"
    (tmp_path / f"{module}.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DISTILL_ALLOW_TARGETS", f"{module}.")
    words = [f"data.path={reviews}", "teacher=callable", f"teacher.function={module}:{function}"]
    line = refused([*OWN, *words, "student=text_encoder", *SMALL], tmp_path, monkeypatch, capsys)
    assert line.startswith("error: teacher: ")
    assert says in line


class Posteriors(BaseHTTPRequestHandler):
    """The protocol of `teacher=http`: texts in, posteriors out. Every second request is refused for the moment."""

    served: int
    requests: int

    def do_POST(self) -> None:
        cls = type(self)
        cls.requests += 1
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        if cls.requests % 2:
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        cls.served += len(asked)
        body = json.dumps({"posteriors": [[0.2, 0.8] if "good" in text else [0.8, 0.2] for text in asked]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    Posteriors.served = Posteriors.requests = 0
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Posteriors)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/"
    httpd.shutdown()


def test_a_remote_teacher_is_paid_for_each_answer_once(server: str, reviews: Path, tmp_path: Path) -> None:
    words = [f"data.path={reviews}", "teacher=http", f"teacher.url={server}", "student=text_encoder"]
    distill("train", *OWN, *words, *SMALL, cwd=tmp_path)
    served = Posteriors.served
    result = result_of(tmp_path)
    assert result["fidelity"]["agreement"] > 0.6
    assert result["cost"]["teacher_forwards"] == served
    assert result["sizes"]["teacher"]["parameters"] is None
    distill("train", *OWN, *words, *SMALL, "defense=rounding", cwd=tmp_path)
    assert Posteriors.served == served, "another defense on the same queries asks nothing"


def test_a_teacher_of_somebody_else_needs_their_leave(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.path={reviews}", "teacher=http", "teacher.url=https://api.example.com/", "student=text_encoder"]
    assert "teacher.authorized" in refused([*OWN, *words, *SMALL], tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["text,label", "a,x", "b,x", "c,x"], "class"),
        (["text,label"], "data"),
        (["a,b", "1,2"], "data.label_column"),
    ],
)
def test_data_that_can_not_serve_is_told_in_one_line(
    lines: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "own.csv"
    path.write_text("\n".join(lines) + "\n")
    words = [f"data.path={path}", "student=text_encoder"]
    assert says in refused([*OWN, *words, *SMALL], tmp_path, monkeypatch, capsys)
