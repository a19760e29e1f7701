"""Teachers, each against the real thing: a local HTTP server, third-party models, tiny transformers, real training."""

from __future__ import annotations

import base64
import email.utils
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dense
import numpy as np
import pytest
import torch
from assets import need
from commands import Running
from dense import RECIPE, Dense, dataset, digits

from distill.config import CONFIG_DIR, build
from distill.errors import BadAnswer, DistillError, MissingAsset
from distill.kept import find
from distill.provider.teachers import http as http_module
from distill.provider.teachers.callable import Callable
from distill.provider.teachers.hf_image_classifier import HFImageClassifier
from distill.provider.teachers.hf_text_classifier import HFTextClassifier
from distill.provider.teachers.http import HTTP, is_loopback, retry_after_s
from distill.provider.teachers.torch_classifier import TorchClassifier
from distill.records import Dataset, InputSpec, Reveals, softmax
from distill.training import Trainer

ROOT = Path(__file__).resolve().parent.parent


def texts(*rows: str) -> np.ndarray:
    column = np.empty(len(rows), dtype=object)
    column[:] = rows
    return column


def text_data(*class_names: str) -> Dataset:
    rows = texts("a good day", "a bad day", "good good", "bad bad", "a day", "day")
    return dataset(rows, np.arange(6) % len(class_names), InputSpec("text"), class_names)


def table_data(classes: int = 3) -> Dataset:
    rows = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    return dataset(rows, np.arange(30) % classes, InputSpec("table", (4,)), tuple(f"c{i}" for i in range(classes)))


NO_TRAINER: Any = None  # for teachers that do not train


# --- http -----------------------------------------------------------------------------------------------------------

WEIGHTS = np.random.default_rng(1).normal(size=(4, 3))
KEY = "sk-very-secret"


def toy_posteriors(rows: np.ndarray) -> np.ndarray:
    return softmax((np.asarray(rows, dtype=np.float64) @ WEIGHTS).astype(np.float32))


class Endpoint(ThreadingHTTPServer):
    """Answers `toy_posteriors` of table rows. `faults` are met first, one for each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: deque[Any] = deque()
        self.answer: Any = lambda inputs: {"posteriors": toy_posteriors(inputs).tolist()}
        self.refuse: Any = lambda body: False
        self.delay_s = 0.0
        self.requests: list[dict[str, Any]] = []
        self.answered: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.busy = self.most_busy = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/classify"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that have gone are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        endpoint = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Idempotency-Key"]
        with endpoint.lock:
            endpoint.requests.append({"body": body, "key": key, "authorization": self.headers["Authorization"]})
            endpoint.busy += 1
            endpoint.most_busy = max(endpoint.most_busy, endpoint.busy)
            fault = endpoint.faults.popleft() if endpoint.faults else None
        try:
            time.sleep(endpoint.delay_s)
            if endpoint.refuse(body):
                self.reply(500, b"")
            elif fault is None:
                with endpoint.lock:
                    endpoint.answered[key] += 1
                self.reply(200, json.dumps(endpoint.answer(body["inputs"])).encode())
            elif fault == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"posteriors": [[0.1,')
                self.close_connection = True
            elif isinstance(fault, float):
                time.sleep(fault)
                self.reply(200, b"{}")
            else:
                self.reply(*fault)
        finally:
            with endpoint.lock:
                endpoint.busy -= 1

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(http_module, "FIRST_WAIT_S", 0.01)
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ready(teacher: Any, data: Dataset, cache: Path) -> Any:
    teacher.prepare(data, NO_TRAINER, cache)
    return teacher


def test_http_answers_in_order_with_bounded_concurrency(endpoint, tmp_path):
    data = table_data()
    endpoint.delay_s = 0.03
    teacher = ready(HTTP(endpoint.url, batch_size=2, concurrency=3), data, tmp_path)
    assert not endpoint.requests, "prepare costs nothing"
    answers = teacher.predict(data.train.inputs)
    np.testing.assert_allclose(answers, toy_posteriors(data.train.inputs), atol=1e-6)
    assert answers.dtype == np.float32
    assert len(endpoint.requests) == 10
    assert endpoint.most_busy == 3
    assert teacher.rows_at_once == 6
    assert teacher.predict(data.train.inputs[:0]).shape == (0, 3)


ERROR_500 = (500, b"oops")
FAULTS = {
    "500 then fine": ([ERROR_500], 2),
    "503 and 500": ([(503, b""), ERROR_500], 3),
    "cut connection": (["cut"], 2),
    "slower than the timeout": ([1.0], 2),
    "not JSON": ([(200, b'{"posteriors": [[0.')], 2),
    "429 without a time": ([(429, b"")], 2),
}


@pytest.mark.parametrize(("faults", "requests"), FAULTS.values(), ids=FAULTS.keys())
def test_http_tries_again(endpoint, tmp_path, faults, requests):
    data = table_data()
    endpoint.faults.extend(faults)
    teacher = ready(HTTP(endpoint.url, timeout_s=0.3), data, tmp_path)
    np.testing.assert_allclose(teacher.predict(data.train.inputs), toy_posteriors(data.train.inputs), atol=1e-6)
    assert len(endpoint.requests) == requests
    assert len({request["key"] for request in endpoint.requests}) == 1, "attempts at one question have one key"


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_http_waits_as_long_as_it_is_told(endpoint, tmp_path, form):
    data = table_data()
    after = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    endpoint.faults.append((429, b"", {"Retry-After": after}))
    teacher = ready(HTTP(endpoint.url), data, tmp_path)
    started = time.monotonic()
    teacher.predict(data.train.inputs[:2])
    assert 0.9 <= time.monotonic() - started < 4


def test_retry_after_forms():
    now = 1_700_000_000.0
    assert retry_after_s("120", now) == 120
    assert retry_after_s(email.utils.formatdate(now + 30, usegmt=True), now) == 30
    assert retry_after_s(email.utils.formatdate(now - 30, usegmt=True), now) == 0
    assert retry_after_s("soon", now) is None
    assert retry_after_s(None, now) is None


def test_http_stops_when_the_wait_is_too_long(endpoint, tmp_path):
    endpoint.faults.append((429, b"", {"Retry-After": "86400"}))
    teacher = ready(HTTP(endpoint.url), table_data(), tmp_path)
    with pytest.raises(DistillError, match="1440 minutes"):
        teacher.predict(table_data().train.inputs)


BAD_ANSWERS = {
    "too few rows": ({"posteriors": [[0.2, 0.3, 0.5]]}, "shape"),
    "too few classes": ({"posteriors": [[0.5, 0.5]] * 5}, "shape"),
    "ragged": ({"posteriors": [[0.2, 0.3, 0.5], [1.0]] * 2}, "rows of numbers"),
    "NaN": ({"posteriors": [[float("nan"), 0.5, 0.5]] * 5}, "NaN"),
    "infinite": ({"posteriors": [[1e300, 0.5, 0.5]] * 5}, "infinite"),
    "too much": ({"posteriors": [[0.5, 0.5, 0.5]] * 5}, "sum to one"),
    "negative": ({"posteriors": [[-0.1, 0.5, 0.6]] * 5}, "negative"),
    "words": ({"posteriors": [["a", "b", "c"]] * 5}, "rows of numbers"),
    "other field": ({"scores": [[0.2, 0.3, 0.5]] * 5}, "posteriors"),
    "no object": ([1, 2], "posteriors"),
}


@pytest.mark.parametrize(("answer", "says"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_http_refuses_a_bad_answer_without_paying_again(endpoint, tmp_path, answer, says):
    data = table_data()
    endpoint.answer = lambda inputs: answer
    teacher = ready(HTTP(endpoint.url), data, tmp_path)
    with pytest.raises(BadAnswer, match=says) as caught:
        teacher.predict(data.train.inputs[:5])
    assert "\n" not in str(caught.value)
    assert len(endpoint.requests) == 1
    assert not list(teacher_notes(tmp_path)), "a bad answer is not kept"


def teacher_notes(cache: Path) -> list[Path]:
    return list((cache / "teachers" / "http").rglob("*.json"))


def test_http_gives_up_after_the_last_attempt(endpoint, tmp_path):
    endpoint.faults.extend([(200, b"<html>")] * 3)
    teacher = ready(HTTP(endpoint.url, max_attempts=3), table_data(), tmp_path)
    with pytest.raises(BadAnswer, match=r"3 attempts.*not JSON"):
        teacher.predict(table_data().train.inputs)
    assert len(endpoint.requests) == 3


def test_http_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(http_module, "FIRST_WAIT_S", 0.01)
    teacher = ready(HTTP("http://127.0.0.1:9/", max_attempts=2), table_data(), tmp_path)
    with pytest.raises(DistillError, match=r"2 attempts.*ConnectError"):
        teacher.predict(table_data().train.inputs)


def test_http_key_is_sent_and_nowhere_else(endpoint, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TOY_KEY", KEY)
    data = table_data()
    teacher = ready(HTTP(endpoint.url, api_key_env="TOY_KEY"), data, tmp_path)
    endpoint.faults.append(ERROR_500)
    teacher.predict(data.train.inputs[:3])
    assert {request["authorization"] for request in endpoint.requests} == {f"Bearer {KEY}"}
    endpoint.requests.clear()
    endpoint.faults.append((401, f"bad key\n {KEY}".encode()))
    with pytest.raises(DistillError, match=r"401 \(bad key \*\*\*\); check the key") as caught:
        teacher.predict(data.train.inputs[3:6])
    assert len(endpoint.requests) == 1, "a refusal is not tried again"
    assert KEY not in caplog.text + str(caught.value) + repr(vars(teacher)["_client"].headers)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_http_key_missing(endpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("TOY_KEY", raising=False)
    with pytest.raises(DistillError, match=r"teacher\.api_key_env: .*TOY_KEY is not set"):
        ready(HTTP(endpoint.url, api_key_env="TOY_KEY"), table_data(), tmp_path)


def test_http_what_was_answered_is_not_paid_for_twice(endpoint, tmp_path):
    data = table_data()
    inputs = data.train.inputs
    cursed = inputs[9].tolist()
    endpoint.refuse = lambda body: any(np.allclose(row, cursed) for row in body["inputs"])
    options: dict[str, Any] = {"url": endpoint.url, "batch_size": 2, "concurrency": 2, "max_attempts": 2}
    with pytest.raises(DistillError, match="status 500"):
        ready(HTTP(**options), data, tmp_path).predict(inputs)
    assert 0 < sum(endpoint.answered.values()) < 10
    endpoint.refuse = lambda body: False
    teacher = ready(HTTP(**options), data, tmp_path)
    np.testing.assert_allclose(teacher.predict(inputs), toy_posteriors(inputs), atol=1e-6)
    assert len(endpoint.answered) == 10
    assert set(endpoint.answered.values()) == {1}
    assert len(teacher_notes(tmp_path)) == 10
    teacher.predict(inputs[:2])
    assert len(teacher_notes(tmp_path)) <= 1, "notes of answers that the caller has stored are dropped"


def test_http_a_damaged_note_is_asked_again(endpoint, tmp_path):
    data = table_data()
    ready(HTTP(endpoint.url), data, tmp_path).predict(data.train.inputs)
    (note,) = teacher_notes(tmp_path)
    note.write_text(note.read_text()[:-9])
    answers = ready(HTTP(endpoint.url), data, tmp_path).predict(data.train.inputs)
    np.testing.assert_allclose(answers, toy_posteriors(data.train.inputs), atol=1e-6)
    assert len(endpoint.requests) == 2


def test_http_outputs(endpoint, tmp_path):
    data = table_data()
    logits = np.random.default_rng(2).normal(size=(5, 3)) * 9
    endpoint.answer = lambda inputs: {"logits": logits.tolist()}
    teacher = ready(HTTP(endpoint.url, output="logits"), data, tmp_path)
    assert teacher.output is Reveals.LOGITS
    np.testing.assert_allclose(teacher.predict(data.train.inputs[:5]), logits, rtol=1e-6)
    endpoint.answer = lambda inputs: {"labels": [0, 2, 1, 1, 0]}
    teacher = ready(HTTP(endpoint.url, output="label"), data, tmp_path)
    assert teacher.predict(data.train.inputs[:5]).argmax(axis=1).tolist() == [0, 2, 1, 1, 0]
    endpoint.answer = lambda inputs: {"labels": [0, 2, 1, 3, 0]}
    with pytest.raises(BadAnswer, match="outside of 0…2"):
        teacher.predict(data.train.inputs[5:10])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_http_images_arrive_whole(endpoint, tmp_path, dtype):
    data = digits()
    sent = data.test.inputs[:4] if dtype is np.uint8 else data.test.inputs[:4].astype(np.float32) / 255
    seen: list[np.ndarray] = []

    def answer(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        for image in inputs:
            flat = np.frombuffer(base64.b64decode(image["data"]), dtype=image["dtype"])
            seen.append(flat.reshape(image["shape"]))
        return {"posteriors": [[0.1] * 10] * len(inputs)}

    endpoint.answer = answer
    ready(HTTP(endpoint.url, model="digits-v1"), data, tmp_path).predict(sent)
    np.testing.assert_array_equal(np.stack(seen), sent)
    assert np.stack(seen).dtype == dtype
    assert endpoint.requests[0]["body"]["model"] == "digits-v1"


def test_http_texts_arrive_whole(endpoint, tmp_path):
    data = text_data("no", "yes")
    sent = texts("naïve 😀", 'a "quoted"\nline', "")
    endpoint.answer = lambda inputs: {"posteriors": [[0.5, 0.5]] * len(inputs)}
    ready(HTTP(endpoint.url), data, tmp_path).predict(sent)
    assert endpoint.requests[0]["body"] == {"inputs": sent.tolist()}


def test_http_a_remote_endpoint_needs_authorization():
    with pytest.raises(DistillError, match=r"teacher\.authorized: api\.example\.com is not this machine") as caught:
        HTTP("https://api.example.com/v1")
    assert "\n" not in str(caught.value)
    teacher = HTTP("https://api.example.com/v1", authorized=True, usd_per_query=0.01)
    assert teacher.remote
    assert teacher.usd_per_query == 0.01


def test_http_loopback():
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.200.3.4", "::1"]))
    others = [
        "127.0.0.1.example.com",
        "localhost.example.com",
        "10.0.0.1",
        "0.0.0.0",
        "::2",
        "128.0.0.1",
        "example.com",
    ]
    assert not any(map(is_loopback, others))
    HTTP("http://[::1]:80/v1")
    with pytest.raises(DistillError, match="environment variable"):
        HTTP("http://127.0.0.1@example.com/v1")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"url": "ftp://localhost/"}, "teacher.url"),
        ({"url": "localhost:80"}, "teacher.url"),
        ({"output": "probz"}, "teacher.output"),
        ({"batch_size": 0}, "teacher.batch_size"),
        ({"concurrency": -1}, "teacher.concurrency"),
        ({"max_attempts": 0}, "teacher.max_attempts"),
        ({"timeout_s": 0}, "teacher.timeout_s"),
        ({"usd_per_query": -1.0}, "teacher.usd_per_query"),
        ({"usd_per_query": float("nan")}, "teacher.usd_per_query"),
    ],
)
def test_http_bad_options(options, key):
    with pytest.raises(DistillError) as caught:
        HTTP(**{"url": "http://localhost/", **options})
    assert caught.value.key == key


def test_http_fingerprint_is_of_what_is_asked():
    base = HTTP("http://localhost/a").fingerprint
    assert base == HTTP("http://localhost/a", batch_size=5, concurrency=9, timeout_s=1, usd_per_query=1).fingerprint
    others = [
        HTTP("http://localhost/b"),
        HTTP("http://localhost/a", model="m"),
        HTTP("http://localhost/a", version="2"),
        HTTP("http://localhost/a", output="logits"),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 5


# --- callable -------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that `Callable` may name, and returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(source: str) -> str:
        name = f"user_model_{len(written)}"
        (tmp_path / f"{name}.py").write_text("import numpy as np\n" + source)
        written.append(name)
        monkeypatch.setenv("DISTILL_ALLOW_TARGETS", "user_model_")
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_callable_profanity_check(tmp_path, monkeypatch):
    need(importlib.util.find_spec("profanity_check") is not None, "pip install alt-profanity-check")
    monkeypatch.setenv("DISTILL_ALLOW_TARGETS", "profanity_check.")
    teacher = ready(Callable("profanity_check:predict_prob"), text_data("clean", "profane"), tmp_path)
    answers = teacher.predict(texts("have a nice day", "you are a damn idiot", "I will meet you at noon"))
    assert answers.dtype == np.float32
    assert answers.argmax(axis=1).tolist() == [0, 1, 0]
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-6)
    again = ready(Callable("profanity_check:predict_prob"), text_data("clean", "profane"), tmp_path)
    assert again.fingerprint == teacher.fingerprint
    labels = ready(Callable("profanity_check:predict", output="label"), text_data("clean", "profane"), tmp_path)
    assert labels.predict(texts("have a nice day", "you are a damn idiot")).tolist() == [[1, 0], [0, 1]]
    assert labels.fingerprint != teacher.fingerprint


LANGID = """
from py3langid.langid import LanguageIdentifier, MODEL_FILE
identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
identifier.set_languages(["de", "en", "fr"])

def probabilities(texts):
    ranked = [dict(identifier.rank(text)) for text in texts]
    return np.array([[row[language] for language in ("de", "en", "fr")] for row in ranked])

def best(texts):
    return [identifier.classify(text)[0] for text in texts]
"""


def test_callable_py3langid(module, tmp_path):
    need(importlib.util.find_spec("py3langid") is not None, "pip install py3langid")
    name = module(LANGID)
    data = text_data("en", "fr", "de")
    asked = texts("Das Wetter ist heute schön", "The weather is nice today", "Il fait très beau aujourd'hui")
    teacher = ready(Callable(f"{name}:probabilities", classes=["de", "en", "fr"]), data, tmp_path)
    answers = teacher.predict(asked)
    assert [data.class_names[i] for i in answers.argmax(axis=1)] == ["de", "en", "fr"]
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-5)
    labels = ready(Callable(f"{name}:best", output="label"), data, tmp_path).predict(asked)
    np.testing.assert_array_equal(labels.argmax(axis=1), answers.argmax(axis=1))


def test_callable_shapes(module, tmp_path):
    name = module(
        "def wide(x): return np.full((len(x), 3), 1 / 3)\n"
        "def odds(x): return np.full(len(x), 2.0)\n"
        "def short(x): return np.full((len(x) - 1, 3), 1 / 3)\n"
        "def words(x): return [['a', 'b', 'c'] for _ in x]\n"
        "def numbers(x): return np.arange(len(x)) % 3\n"
        "def fails(x): raise RuntimeError('no\\nmodel')\n"
        "constant = 3\n"
    )
    data, inputs = table_data(), table_data().train.inputs
    assert ready(Callable(f"{name}:wide"), data, tmp_path).predict(inputs).shape == (20, 3)
    assert ready(Callable(f"{name}:wide"), data, tmp_path).predict(inputs[:0]).shape == (0, 3)
    numbers = ready(Callable(f"{name}:numbers", output="label", classes=["c2", "c0", "c1"]), data, tmp_path)
    assert numbers.predict(inputs[:3]).argmax(axis=1).tolist() == [2, 0, 1]
    odds = ready(Callable(f"{name}:odds", output="logits"), table_data(2), tmp_path).predict(inputs[:1])
    np.testing.assert_allclose(softmax(odds)[0, 1], 1 / (1 + np.exp(-2.0)), rtol=1e-6)
    for function, output, says in [
        ("short", "probs", r"shape \(19, 3\); 20 inputs"),
        ("odds", "probs", r"shape \(20,\)"),
        ("words", "probs", "not numbers"),
        ("wide", "label", "labels make"),
    ]:
        with pytest.raises(BadAnswer, match=says):
            ready(Callable(f"{name}:{function}", output=output), data, tmp_path).predict(inputs)
    with pytest.raises(BadAnswer, match="the label 2, which is no class"):
        ready(Callable(f"{name}:numbers", output="label"), table_data(2), tmp_path).predict(inputs)
    with pytest.raises(DistillError, match="fails failed: RuntimeError: no model"):
        ready(Callable(f"{name}:fails"), data, tmp_path).predict(inputs)
    with pytest.raises(DistillError, match="not a function"):
        Callable(f"{name}:constant")


def test_callable_must_be_allowed(monkeypatch):
    monkeypatch.delenv("DISTILL_ALLOW_TARGETS", raising=False)
    with pytest.raises(DistillError, match=r"DISTILL_ALLOW_TARGETS=os\."):
        Callable("os:getcwd")
    with pytest.raises(DistillError, match=r"package\.module:function"):
        Callable("os.getcwd")


def test_callable_fingerprint_follows_the_file(module, tmp_path):
    name = module("def answer(x): return np.full((len(x), 3), 1 / 3)\n")
    data = table_data()
    first = ready(Callable(f"{name}:answer"), data, tmp_path).fingerprint
    assert ready(Callable(f"{name}:answer"), data, tmp_path).fingerprint == first
    stated = ready(Callable(f"{name}:answer", fingerprint="v1"), data, tmp_path).fingerprint
    path = tmp_path / f"{name}.py"
    path.write_text(path.read_text() + "# another version\n")
    assert ready(Callable(f"{name}:answer"), data, tmp_path).fingerprint != first
    assert ready(Callable(f"{name}:answer", fingerprint="v1"), data, tmp_path).fingerprint == stated


def test_callable_classes_must_be_the_datas(module, tmp_path):
    name = module("def answer(x): return np.full((len(x), 3), 1 / 3)\n")
    with pytest.raises(DistillError, match=r"teacher\.classes: .*c0, c1, x.*c0, c1, c2"):
        ready(Callable(f"{name}:answer", classes=["c0", "c1", "x"]), table_data(), tmp_path)


# --- Hugging Face ---------------------------------------------------------------------------------------------------

SHADES = ("Dark", "Light", "Mid grey")


def shade_data(channels: int = 3) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, size=(18, 12, 10, channels), dtype=np.uint8)
    return dataset(pixels, np.arange(18) % 3, InputSpec("image", (12, 10, channels)), SHADES)


@pytest.fixture(scope="module")
def cpu() -> Trainer:
    return Trainer(device="cpu")


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        id2label={0: "mid_grey", 1: "dark", 2: "light"},
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "day", "##s", "!"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), vocab=str(folder / "vocab.txt"))
    assert tokenizer("good days")["input_ids"] == [2, 6, 8, 9, 3]
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=160,
        initializer_range=0.5,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_hf_image_is_the_model_with_its_processor(vit, cpu, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    data = shade_data()
    teacher = HFImageClassifier(str(vit), batch_size=4)
    teacher.prepare(data, cpu, tmp_path)
    logits = teacher.predict(data.train.inputs)
    network = AutoModelForImageClassification.from_pretrained(vit).eval()
    processor = AutoImageProcessor.from_pretrained(vit, backend="pil")
    with torch.inference_mode():
        expected = network(**processor(list(data.train.inputs), return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(logits, expected[:, [1, 2, 0]], atol=1e-5)  # the data's order, by name
    assert teacher.parameters == sum(p.numel() for p in network.parameters())
    assert teacher.flops_per_query is not None
    assert teacher.flops_per_query > 1000
    one_by_one = np.concatenate([teacher.predict(data.train.inputs[i : i + 1]) for i in range(12)])
    np.testing.assert_array_equal(one_by_one, logits)
    made = data.train.inputs.astype(np.float32) / 255
    np.testing.assert_array_equal(teacher.predict(made), logits)


def test_hf_image_grey_pixels_are_repeated(vit, cpu, tmp_path):
    grey = shade_data(channels=1)
    teacher = HFImageClassifier(str(vit), batch_size=4)
    teacher.prepare(grey, cpu, tmp_path)
    as_grey = teacher.predict(grey.train.inputs)
    np.testing.assert_array_equal(as_grey, teacher.predict(np.repeat(grey.train.inputs, 3, axis=-1)))


def test_hf_image_with_one_channel(cpu, tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        tmp_path / "resnet"
    )
    data = digits()
    names = {f"LABEL_{i}": str(i) for i in range(10)}
    teacher = HFImageClassifier(str(tmp_path / "resnet"), class_map=names)
    teacher.prepare(data, cpu, tmp_path)
    assert teacher.predict(data.test.inputs[:3]).shape == (3, 10)
    with pytest.raises(DistillError, match="reads 1 channels; toy has 3"):
        HFImageClassifier(str(tmp_path / "resnet")).prepare(shade_data(), cpu, tmp_path)


def test_hf_fingerprint_is_of_content(vit, cpu, tmp_path):
    from transformers import AutoModelForImageClassification, ViTImageProcessorPil

    def fingerprint(folder: Path, **options: Any) -> str:
        teacher = HFImageClassifier(str(folder), **options)
        teacher.prepare(shade_data(), cpu, tmp_path)
        return teacher.fingerprint

    original = fingerprint(vit)
    network = AutoModelForImageClassification.from_pretrained(vit)
    copy = tmp_path / "copy"
    network.save_pretrained(copy)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(copy)
    assert fingerprint(copy) == original == fingerprint(vit, batch_size=7)
    ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False).save_pretrained(copy)
    assert fingerprint(copy) != original
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(copy)
    with torch.no_grad():
        network.classifier.bias[0] += 1e-3
    network.save_pretrained(copy)
    assert fingerprint(copy) != original


def test_hf_text_is_the_model_with_its_tokenizer(bert, cpu, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    data = text_data("positive", "negative")
    teacher = HFTextClassifier(str(bert), batch_size=4, max_length=8)
    teacher.prepare(data, cpu, tmp_path)
    asked = texts("a good day", "bad", "good " * 30, "", "days!")
    logits = teacher.predict(asked)
    network = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    for text, row in zip(asked, logits, strict=True):
        with torch.inference_mode():
            alone = network(**tokenizer(text, truncation=True, max_length=8, return_tensors="pt")).logits.numpy()[0]
        np.testing.assert_allclose(row, alone[[1, 0]], atol=1e-5)
    one_by_one = np.concatenate([teacher.predict(asked[i : i + 1]) for i in range(len(asked))])
    np.testing.assert_array_equal(one_by_one, logits)
    shorter = HFTextClassifier(str(bert), max_length=4)
    shorter.prepare(data, cpu, tmp_path)
    assert shorter.fingerprint != teacher.fingerprint
    with pytest.raises(DistillError, match=r"teacher\.max_length: .* at most 160"):
        HFTextClassifier(str(bert), max_length=161).prepare(data, cpu, tmp_path)


def test_hf_classes(bert, cpu, tmp_path):
    data = text_data("happy", "sad")
    with pytest.raises(DistillError, match=r"NEGATIVE, POSITIVE.*happy, sad.*teacher\.class_map=") as caught:
        HFTextClassifier(str(bert)).prepare(data, cpu, tmp_path)
    assert caught.value.key == "teacher.class_map"
    for class_map, says in [
        ({"POSITIV": "happy", "NEGATIVE": "sad"}, "Did you mean 'POSITIVE'"),
        ({"POSITIVE": "hapy", "NEGATIVE": "sad"}, "Did you mean 'happy'"),
        ({"POSITIVE": "happy"}, "for sad"),
        ({"POSITIVE": "happy", "NEGATIVE": "happy"}, "one class of the data to two"),
    ]:
        with pytest.raises(DistillError, match=says):
            HFTextClassifier(str(bert), max_length=8, class_map=class_map).prepare(data, cpu, tmp_path)
    mapped = HFTextClassifier(str(bert), max_length=8, class_map={"POSITIVE": "happy", "NEGATIVE": "sad"})
    mapped.prepare(data, cpu, tmp_path)
    by_name = HFTextClassifier(str(bert), max_length=8)
    by_name.prepare(text_data("positive", "negative"), cpu, tmp_path)
    np.testing.assert_array_equal(mapped.predict(data.train.inputs), by_name.predict(data.train.inputs))


def test_hf_a_model_that_is_not_there(cpu, tmp_path):
    for model in ("distill-tests/no-such-model", str(tmp_path / "nowhere")):
        with pytest.raises(MissingAsset, match=r"teacher\.model: .*neither a folder.*teacher\.model=DIR") as caught:
            HFTextClassifier(model).prepare(text_data("a", "b"), cpu, tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistillError, match=r"teacher\.model: .*empty can't be loaded") as error:
        HFTextClassifier(str(tmp_path / "empty")).prepare(text_data("a", "b"), cpu, tmp_path)
    assert "\n" not in str(error.value)


def test_hf_a_model_without_a_trained_head(bert, cpu, tmp_path):
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(bert).save_pretrained(tmp_path / "body")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "body")
    with pytest.raises(DistillError, match="not a trained classifier: it has no weights for classifier"):
        HFTextClassifier(str(tmp_path / "body"), max_length=8).prepare(text_data("a", "b"), cpu, tmp_path)


def test_hf_wrong_kind(vit, cpu, tmp_path):
    with pytest.raises(DistillError, match="reads image, but toy holds text"):
        HFImageClassifier(str(vit)).prepare(text_data("a", "b"), cpu, tmp_path)


# --- trained here ---------------------------------------------------------------------------------------------------


def start_rank(cache: Path, **environment: str) -> subprocess.Popen[str]:
    """`dense.py` in an interpreter of its own, which reads its rank before anything else."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, dense.__file__, str(cache)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_training(cache: Path, slow_s: float = 0.0) -> Running:
    return Running(dense.main, cache, cwd=cache, env={"SLOW_S": str(slow_s)})


def finish(process: subprocess.Popen[str] | Running) -> tuple[str, str]:
    """(fingerprint, all that was said)"""
    if isinstance(process, Running):
        done = process.end()
        returncode, said = done.returncode, done.stdout + done.stderr
    else:
        said, _ = process.communicate(timeout=120)
        returncode = process.returncode
    assert returncode == 0, said
    return said.partition("FINGERPRINT ")[2].split()[0], said


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cpu) -> tuple[Path, TorchClassifier]:
    """A cache with one teacher, trained without interruption."""
    cache = tmp_path_factory.mktemp("cache")
    teacher = TorchClassifier(Dense(), RECIPE)
    teacher.prepare(digits(), cpu, cache)
    return cache, teacher


def test_torch_is_trained_once(trained, cpu, monkeypatch):
    cache, teacher = trained
    data = digits()
    logits = teacher.predict(data.test.inputs)
    assert (logits.argmax(axis=1) == data.test.labels).mean() > 0.8
    assert teacher.parameters == 64 * 32 + 32 + 32 * 10 + 10
    assert teacher.flops_per_query == 2 * (64 * 32 + 32 * 10)
    assert sorted(p.suffix for p in (cache / "networks").iterdir()) == ["", ".lock"], "nothing half-done is left"
    monkeypatch.setattr(cpu, "fit", lambda *args, **options: pytest.fail("trained again"))
    again = TorchClassifier(Dense(), RECIPE)
    again.prepare(data, cpu, cache)
    assert again.fingerprint == teacher.fingerprint
    np.testing.assert_array_equal(again.predict(data.test.inputs), logits)
    one_by_one = np.concatenate([again.predict(data.test.inputs[i : i + 1]) for i in range(5)])
    np.testing.assert_array_equal(one_by_one, logits[:5])
    assert again.predict(data.test.inputs[:0]).shape == (0, 10)
    record = json.loads(next(cache.rglob("network.json")).read_text())
    assert record["fingerprint"] == teacher.fingerprint
    assert record["history"]["epochs"] == 8


def test_torch_is_another_when_anything_differs(trained, cpu, tmp_path):
    _, teacher = trained
    data = digits()
    relabelled = replace(data.train, labels=np.roll(np.asarray(data.train.labels), 1))
    short = replace(RECIPE, epochs=1)
    variants = [
        (TorchClassifier(Dense(), short), data),
        (TorchClassifier(Dense(), short, seed=1), data),
        (TorchClassifier(Dense(hidden=33), short), data),
        (TorchClassifier(Dense(), short), replace(data, train=relabelled)),
        (TorchClassifier(Dense(), replace(short, lr=0.02)), data),
    ]
    for variant, on in variants:
        variant.prepare(on, cpu, tmp_path)
    assert len({teacher.fingerprint, *(variant.fingerprint for variant, _ in variants)}) == 6
    assert len(list(tmp_path.rglob("network.json"))) == 5


@pytest.mark.parametrize("name", ["model.safetensors", "network.json"])
def test_torch_damage_is_noticed_and_mended(trained, cpu, caplog, name):
    cache, teacher = trained
    path = next(cache.rglob(name))
    content = bytearray(path.read_bytes())
    if name == "model.safetensors":
        content[-100] ^= 1
    path.write_bytes(content if name == "model.safetensors" else content[:50])
    again = TorchClassifier(Dense(), RECIPE)
    again.prepare(digits(), cpu, cache)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(str(path) in warning and "damaged" in warning for warning in warnings)
    assert again.fingerprint == teacher.fingerprint
    assert find(path.parent, "network.json", "teacher") is not None


def test_torch_killed_and_continued(trained, tmp_path):
    _, uninterrupted = trained
    process = start_training(tmp_path, slow_s=0.05)
    deadline = time.monotonic() + 60
    while not any(int(p.name[:9]) >= 3 for p in tmp_path.rglob("*.pt")):
        assert process.process.is_alive(), process.end().stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.process.kill()
    process.end()
    assert not list(tmp_path.rglob("network.json")), "it was to be killed while training"
    fingerprint, said = finish(start_training(tmp_path))
    assert "continuing after step" in said
    assert fingerprint == uninterrupted.fingerprint


def test_torch_two_processes_train_once(trained, tmp_path):
    _, alone = trained
    both = [start_training(tmp_path, slow_s=0.02) for _ in range(2)]
    results = [finish(process) for process in both]
    assert [fingerprint for fingerprint, _ in results] == [alone.fingerprint] * 2
    assert sum("training the teacher on" in said for _, said in results) == 1
    assert sum("the one trained before" in said for _, said in results) == 1


def test_torch_two_ranks_train_together(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    ranks = [start_rank(tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(2)]
    results = [finish(process) for process in ranks]
    assert len({fingerprint for fingerprint, _ in results}) == 1
    assert all("training the teacher on" in said for _, said in results)
    assert len(list(tmp_path.rglob("network.json"))) == 1


def test_torch_refuses_what_it_cannot_identify(cpu, tmp_path):
    class Forgetful(Dense):
        def __init__(self, layers: int = 2) -> None:
            super().__init__(hidden=layers)

    with pytest.raises(DistillError, match=r"Forgetful must keep each option .*'layers'"):
        TorchClassifier(Forgetful(), RECIPE)
    data = digits()
    unlabelled = replace(data, train=replace(data.train, labels=None))
    with pytest.raises(DistillError, match="no labels"):
        TorchClassifier(Dense(), RECIPE).prepare(unlabelled, cpu, tmp_path)


@pytest.mark.parametrize("architecture", ["lenet", "mlp", "resnet"])
def test_torch_is_composed_of_any_student_and_recipe(architecture):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        chosen = [f"student@teacher.architecture={architecture}", "training@teacher.recipe=sgd"]
        config = compose(overrides=["+teacher=torch_classifier", *chosen])
    teacher = build(config.teacher, "teacher")
    assert type(teacher.architecture).__module__ == f"distill.students.{architecture}"
    assert teacher.recipe.optimizer == "sgd"
    assert teacher.seed == 0
