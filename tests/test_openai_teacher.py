"""The `openai` teacher against a server that is not ours (`transformers serve`) and against one that misbehaves."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from distill.contracts import LanguageTeacher
from distill.errors import BadAnswer, DistillError, MissingAsset
from distill.language import Completions, Prompts, Sampling, Task, texts
from distill.provider.language_provider import LanguageProvider
from distill.provider.ledger import Prices
from distill.provider.teachers import openai as module
from distill.provider.teachers._openai_answers import TokenNames
from distill.provider.teachers.openai import OpenAI
from distill.records import Budget, InterfaceProfile, Reveals

pytest.importorskip("openai", reason="pip install 'distill-framework[text]'")

NONE = Prompts(texts([]))
TASK = Task("toy", NONE, NONE, NONE)
NO_TRAINER: Any = None
KEY = "sk-very-secret"
GREEDY = Sampling(max_tokens=8, temperature=0)
DRAWN = Sampling(max_tokens=8)


def ready(cache: Path, url: str, model: str = "toy-1", **options: Any) -> OpenAI:
    teacher = OpenAI(url, model, **options)
    teacher.prepare(TASK, NO_TRAINER, cache)
    return teacher


def ask(teacher: OpenAI, *questions: str, sampling: Sampling = GREEDY, repeat: int = 0, top_k: int = 0) -> Completions:
    return teacher.generate(Prompts.of_users(questions), sampling, np.full(len(questions), repeat), top_k)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random Llama with a byte-level tokenizer and a chat template, saved as the hub's models are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    pieces = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġh", "Ġhi"]
    merges = [("Ġ", "h"), ("Ġh", "i")]
    core = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **ends)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    numbers = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = LlamaConfig(vocab_size=len(pieces), max_position_embeddings=256, initializer_range=0.3, **sizes, **numbers)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# --- a server that is not ours ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory) -> Iterator[str]:
    """`transformers serve` with the tiny model: the base of its API."""
    for package in ("fastapi", "uvicorn", "pydantic"):
        pytest.importorskip(package, reason="transformers serve needs it: pip install -e '.[test]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(tiny), "--device", "cpu"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    said = tmp_path_factory.mktemp("served") / "log"
    with said.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=env, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        with httpx.Client(trust_env=False) as client:
            deadline = time.monotonic() + 120
            while True:
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                try:
                    if client.get(f"http://127.0.0.1:{port}/health").is_success:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def local(tiny) -> Callable[[str, int], tuple[str, int]]:
    """The greedy answer of the tiny model in this process, and its number of tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny).eval()

    def answer(text: str, max_tokens: int) -> tuple[str, int]:
        tokens = tokenizer(text, return_tensors="pt")
        made = model.generate(**tokens, max_new_tokens=max_tokens, do_sample=False)[0, tokens.input_ids.shape[1] :]
        return tokenizer.decode(made, skip_special_tokens=True), len(made)

    return answer


def chat_text(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_serve_answers_as_the_model_does(served, tiny, local, tmp_path):
    teacher = ready(tmp_path, served, str(tiny), tokenizer=str(tiny))
    questions = ["hi", "how are you?", "naïve 😀"]
    answers = ask(teacher, *questions)
    wanted = [local(chat_text(question), GREEDY.max_tokens) for question in questions]
    assert answers.column.tolist() == [text for text, _ in wanted]
    assert answers.completion_tokens.tolist() == [tokens for _, tokens in wanted]
    assert answers.prompt_tokens.tolist() == teacher.count_tokens(Prompts.of_users(questions), GREEDY).tolist()
    assert answers.finish.tolist() == ["length"] * 3
    assert answers.offsets is None, "the server tells no tokens"
    plain = Prompts(texts(["once upon"]), chat=False)
    answers = teacher.generate(plain, GREEDY, np.zeros(1, np.int64))
    assert answers.column[0] == local("once upon", GREEDY.max_tokens)[0]
    assert answers.prompt_tokens.tolist() == teacher.count_tokens(plain, GREEDY).tolist()


def test_serve_draws_by_seed_and_repeat(served, tiny, tmp_path):
    draw = json.dumps({"do_sample": True, "eos_token_id": 1, "pad_token_id": 1})
    teacher = ready(tmp_path, served, str(tiny), concurrency=1, extra_body={"generation_config": draw})
    drawn = [ask(teacher, "hi", sampling=DRAWN, repeat=repeat).column[0] for repeat in (0, 1, 2)]
    assert len(set(drawn)) == 3
    assert ask(teacher, "hi", sampling=DRAWN, repeat=1).column[0] == drawn[1]
    assert ask(teacher, "hi", sampling=Sampling(max_tokens=8, seed=1)).column[0] not in drawn


def test_serve_stops(served, tiny, tmp_path):
    teacher = ready(tmp_path, served, str(tiny))
    whole = ask(teacher, "hi").column[0]
    stop = next(character for character in whole[1:] if character.isascii() and character.isprintable())
    answer = ask(teacher, "hi", sampling=Sampling(max_tokens=8, temperature=0, stop=(stop,)))
    assert answer.column[0] == whole[: whole.index(stop)]
    assert answer.finish[0] == "stop"


def test_serve_tells_no_log_probabilities(served, tiny, tmp_path):
    with pytest.raises(DistillError, match=r"access\.top_k: 3 .* grants at most 0"):
        ask(ready(tmp_path, served, str(tiny)), "hi", top_k=3)
    with pytest.raises(DistillError, match=r"access\.top_k: .*at most 0 log-probabilities, not 3"):
        ask(ready(tmp_path, served, str(tiny), top_k=0), "hi", top_k=3)


def test_serve_another_model(served, tiny, tmp_path):
    with pytest.raises(DistillError, match=r"teacher\.model: .*does not serve '.*tinny'\. Did you mean '.*tiny'\?"):
        ready(tmp_path, served, str(tiny.with_name("tinny")))


def test_serve_behind_the_provider(served, tiny, tmp_path, monkeypatch):
    def provider() -> LanguageProvider:
        access, prices = InterfaceProfile(Reveals.TEXT), Prices(0.0, 1.0, 2.0)
        teacher = ready(tmp_path, served, str(tiny), usd_per_mtok_in=3.0, usd_per_mtok_out=5.0)
        return LanguageProvider(
            teacher, access=access, prices=prices, budget=Budget(queries=9), sampling=GREEDY, cache=tmp_path
        )

    first = provider()
    asked = first.answer(Prompts.of_users(["hi", "ho", "hu"]), None, 1, False)
    cost = first.cost()
    used = asked.completions.prompt_tokens.sum(), asked.completions.completion_tokens.sum()
    assert cost.usd == pytest.approx((used[0] * 1 + used[1] * 2) / 1e6)
    assert cost.spent_usd == pytest.approx((used[0] * 3 + used[1] * 5) / 1e6)
    second = provider()
    monkeypatch.setattr(second.teacher, "generate", lambda *arguments: pytest.fail("asked again"))
    again = second.answer(Prompts.of_users(["hi", "ho", "hu"]), None, 1, False)
    assert again.completions.column.tolist() == asked.completions.column.tolist()
    assert second.cost().spent_usd == 0


# --- a server that misbehaves -----------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible API that echoes. `faults` are met first, one for each request to answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: Any = {"data": [{"id": "toy-1", "max_model_len": 4096}, {"id": "toy-2"}]}
        self.faults: deque[Any] = deque()
        self.answer: Callable[[dict[str, Any]], Any] = answer
        self.refuse: Callable[[dict[str, Any]], bool] = lambda body: False
        self.delay_s = 0.0
        self.requests: list[dict[str, Any]] = []
        self.answered: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.busy = self.most_busy = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [request["body"] for request in self.requests]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that have gone are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        status = 404 if self.server.models is None else 200
        self.reply(status, json.dumps(self.server.models).encode())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Idempotency-Key"]
        with server.lock:
            server.requests.append(
                {
                    "body": body,
                    "key": key,
                    "headers": {name.lower(): value for name, value in self.headers.items()},
                    "path": self.path,
                }
            )
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            fault = server.faults.popleft() if server.faults else None
        try:
            time.sleep(server.delay_s)
            if server.refuse(body):
                self.reply(500, b"")
            elif fault is None:
                with server.lock:
                    server.answered[key] += 1
                self.reply(200, json.dumps(server.answer(body)).encode())
            elif fault == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"mess')
                self.close_connection = True
            elif fault == "trickle":
                late = json.dumps(server.answer(body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(15 + len(late)))
                self.end_headers()
                for _ in range(15):
                    self.wfile.write(b" ")
                    time.sleep(0.1)
                self.wfile.write(late)
            elif isinstance(fault, float):
                time.sleep(fault)
                self.reply(200, b"{}")
            else:
                self.reply(*fault)
        finally:
            with server.lock:
                server.busy -= 1

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def answer(body: dict[str, Any], **others: Any) -> dict[str, Any]:
    """The answer to "q" is "re: q", 10 tokens in and 5 out."""
    text = f"re: {body['messages'][-1]['content'] if 'messages' in body else body['prompt']}"
    said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
    return {
        "id": "x",
        "model": f"{body['model']}-2026",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "finish_reason": "stop", **said}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    } | others


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def numbered(n: int) -> list[str]:
    return [f"question {i}" for i in range(n)]


def test_answers_in_order_with_bounded_concurrency(server, tmp_path):
    server.delay_s = 0.03
    teacher = ready(tmp_path, server.url, concurrency=3)
    assert isinstance(teacher, LanguageTeacher)
    assert not server.requests, "prepare asks nothing that costs"
    answers = ask(teacher, *numbered(10))
    assert answers.column.tolist() == [f"re: {question}" for question in numbered(10)]
    assert answers.prompt_tokens.tolist() == [10] * 10
    assert answers.completion_tokens.tolist() == [5] * 10
    assert answers.finish.tolist() == ["stop"] * 10
    assert len(server.requests) == 10
    assert server.most_busy == 3
    assert teacher.requests_at_once == 24
    assert teacher.context_tokens == 4096
    assert len(ask(teacher)) == 0


def test_what_is_sent(server, tmp_path):
    teacher = ready(tmp_path, server.url, max_tokens_field="max_completion_tokens", extra_body={"min_p": 0.1})
    sampling = Sampling(max_tokens=7, temperature=0.5, top_p=0.9, system_prompt="Be brief.", stop=("\n", "end"))
    teacher.generate(Prompts.of_users(["q", "q"]), sampling, np.arange(2))
    teacher.generate(Prompts(texts(["p"]), chat=False), GREEDY, np.zeros(1, np.int64))
    first, second = sorted(server.bodies[:2], key=lambda body: body["seed"])
    assert 0 <= first.pop("seed") < second.pop("seed") < 2**31
    assert first == second
    assert first == {
        "model": "toy-1",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}],
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["\n", "end"],
        "min_p": 0.1,
    }
    assert server.bodies[2] == {"model": "toy-1", "prompt": "p", "max_tokens": 8, "temperature": 0, "min_p": 0.1}
    assert [request["path"] for request in server.requests[1:]] == ["/v1/chat/completions", "/v1/completions"]


def test_a_stop_that_the_server_leaves_in_is_cut(server, tmp_path):
    answers = ask(ready(tmp_path, server.url), "one. two. three", sampling=Sampling(stop=("three", ". ")))
    assert answers.column.tolist() == ["re: one"]


ERROR_500 = (500, b"oops")
FAULTS = {
    "500 then fine": ([ERROR_500], 2),
    "503 and 500": ([(503, b""), ERROR_500], 3),
    "cut connection": (["cut"], 2),
    "slower than the timeout": ([1.0], 2),
    "slower than the timeout, byte by byte": (["trickle"], 2),
    "not JSON": ([(200, b'{"choices": [{')], 2),
    "a page": ([(200, b"<html>", {"Content-Type": "text/html"})], 2),
    "429 without a time": ([(429, b"")], 2),
}


@pytest.mark.parametrize(("faults", "requests"), FAULTS.values(), ids=FAULTS.keys())
def test_tries_again(server, tmp_path, faults, requests):
    server.faults.extend(faults)
    teacher = ready(tmp_path, server.url, timeout_s=0.3)
    assert ask(teacher, "q").column.tolist() == ["re: q"]
    assert len(server.requests) == requests
    assert len({request["key"] for request in server.requests}) == 1, "attempts at one question have one key"


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_waits_as_long_as_it_is_told(server, tmp_path, form):
    after = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.faults.append((429, b"", {"Retry-After": after}))
    teacher = ready(tmp_path, server.url)
    started = time.monotonic()
    ask(teacher, "q")
    assert 0.9 <= time.monotonic() - started < 4


def test_stops_when_the_wait_is_too_long(server, tmp_path):
    server.faults.append((429, b"", {"Retry-After": "86400"}))
    with pytest.raises(DistillError, match="1440 minutes"):
        ask(ready(tmp_path, server.url), "q")


def test_gives_up_after_the_last_attempt(server, tmp_path):
    server.faults.extend([(200, b"<html>")] * 3)
    with pytest.raises(BadAnswer, match=r"3 attempts.*not JSON"):
        ask(ready(tmp_path, server.url, max_attempts=3), "q")
    assert len(server.requests) == 3


def test_does_not_wait_after_the_last_attempt(server, tmp_path):
    server.faults.append((429, b"", {"Retry-After": "60"}))
    started = time.monotonic()
    with pytest.raises(DistillError, match=r"1 attempts.*status 429"):
        ask(ready(tmp_path, server.url, max_attempts=1), "q")
    assert time.monotonic() - started < 5


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    with pytest.raises(DistillError, match=r"2 attempts.*ConnectError"):
        ready(tmp_path, "http://127.0.0.1:9/v1", max_attempts=2)


BAD_ANSWERS: dict[str, Any] = {
    "a list": [1],
    "no choices": {"choices": []},
    "an error": {"error": {"message": "overloaded"}},
    "no message": {"choices": [{"text": "a"}]},
    "no text": {"choices": [{"message": {"content": [1, 2]}}]},
    "half a usage": {"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": 3}},
    "money back": {
        "choices": [{"message": {"content": "a"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": -1},
    },
}


@pytest.mark.parametrize("bad", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_refuses_a_bad_answer_without_paying_again(server, tmp_path, bad):
    server.answer = lambda body: bad
    with pytest.raises(BadAnswer, match=r"teacher: .*gave a bad answer: it is no completion") as caught:
        ask(ready(tmp_path, server.url), "q")
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1
    assert not notes(tmp_path)


def notes(cache: Path) -> list[Path]:
    return [path for path in (cache / "teachers" / "openai").rglob("*.json") if path.name != "served.json"]


def test_key_is_sent_and_nowhere_else(server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    for variable in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(variable, "sk-of-another-service")
    monkeypatch.setenv("TOY_KEY", KEY)
    teacher = ready(tmp_path, server.url, api_key_env="TOY_KEY")
    ask(teacher, "q")
    assert {request["headers"].get("authorization") for request in server.requests} == {f"Bearer {KEY}"}
    server.requests.clear()
    server.faults.append((401, f"bad key\n {KEY}".encode()))
    with pytest.raises(DistillError, match=r"401 \(bad key \*\*\*\); check the key") as caught:
        ask(teacher, "p")
    assert len(server.requests) == 1, "a refusal is not tried again"
    assert KEY not in caplog.text + str(caught.value)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    server.requests.clear()
    ask(ready(tmp_path, server.url), "keyless")
    assert "sk-of-another-service" not in json.dumps(server.requests)


def test_key_missing(server, tmp_path, monkeypatch):
    monkeypatch.delenv("TOY_KEY", raising=False)
    with pytest.raises(DistillError, match=r"teacher\.api_key_env: .*TOY_KEY is not set"):
        ready(tmp_path, server.url, api_key_env="TOY_KEY")


def test_client_missing(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(DistillError, match=r"pip install 'distill-framework\[text\]'"):
        ready(tmp_path, server.url)


def test_inside_a_loop(server, tmp_path):
    async def notebook() -> Completions:
        return ask(ready(tmp_path, server.url), "q")

    assert asyncio.run(notebook()).column.tolist() == ["re: q"]


def test_models(server, tmp_path, caplog):
    with pytest.raises(DistillError, match=r"teacher\.model: .*does not serve 'toy1'\. Did you mean 'toy-1'\?"):
        ready(tmp_path, server.url, "toy1")
    first = ready(tmp_path, server.url)
    others = [{"model": "toy-2"}, {"version": "2"}, {"extra_body": {"a": 1}}]
    prints = {first.fingerprint, *(ready(tmp_path, server.url, **other).fingerprint for other in others)}
    assert len(prints) == 4
    assert ready(tmp_path, server.url, concurrency=1, timeout_s=9, authorized=True).fingerprint == first.fingerprint
    server.models = {"models": []}
    with pytest.raises(BadAnswer, match="no list of models"):
        ready(tmp_path, server.url)
    server.models = None
    assert ask(ready(tmp_path, server.url, "unlisted"), "q").column.tolist() == ["re: q"]
    assert "unlisted is believed to be there" in caplog.text


def test_what_was_answered_is_not_paid_for_twice(server, tmp_path):
    server.refuse = lambda body: body["messages"][-1]["content"] == "question 5"
    with pytest.raises(DistillError, match="status 500"):
        ask(ready(tmp_path, server.url, concurrency=2, max_attempts=2), *numbered(9))
    assert 4 <= sum(server.answered.values()) < 9
    server.refuse = lambda body: False
    teacher = ready(tmp_path, server.url, concurrency=2)
    assert ask(teacher, *numbered(9)).column.tolist() == [f"re: {question}" for question in numbered(9)]
    assert len(server.answered) == 9
    assert set(server.answered.values()) == {1}
    assert len(notes(tmp_path)) == 9
    ask(teacher, "another")
    assert len(notes(tmp_path)) == 1, "notes of answers that the caller has stored are dropped"


def test_those_that_wait_are_not_tried_again_after_a_failure(server, tmp_path):
    server.faults.extend([(429, b"", {"Retry-After": "60"}), (400, b"no")])
    server.delay_s = 0.05
    started = time.monotonic()
    with pytest.raises(DistillError, match="refused: status 400"):
        ask(ready(tmp_path, server.url, concurrency=2), *numbered(5))
    assert time.monotonic() - started < 5
    assert len(server.requests) == 2


def test_a_damaged_note_is_asked_again(server, tmp_path):
    ask(ready(tmp_path, server.url), "q")
    (note,) = notes(tmp_path)
    note.write_text(note.read_text()[:-9])
    assert ask(ready(tmp_path, server.url), "q").column.tolist() == ["re: q"]
    assert len(server.requests) == 2


@pytest.mark.parametrize("name", ["model", "system_fingerprint"])
def test_another_model_under_us(server, tmp_path, name):
    ask(ready(tmp_path, server.url), "before")
    server.answer = lambda body: answer(body, **{name: "another"})
    for _ in range(2):  # in this run or a later one
        with pytest.raises(
            DistillError, match=rf"teacher\.model: .*as {name} 'another', but as '.*' before; .*version"
        ):
            ask(ready(tmp_path, server.url, concurrency=1), "before", "q")
    assert [body["messages"][-1]["content"] for body in server.bodies] == ["before", "q", "q"]
    assert ask(ready(tmp_path, server.url, version="2"), "q").column.tolist() == ["re: q"]
    assert server.requests[-1]["key"] != server.requests[-2]["key"], "a server that remembers is asked anew"
    loose = ready(tmp_path, server.url, same_system=False)
    asked = len(server.requests)
    if name == "system_fingerprint":
        assert len(ask(loose, "before", "q")) == 2
        assert len(server.requests) == asked, "what was paid for is kept"
    else:
        with pytest.raises(DistillError, match="as model 'another'"):
            ask(loose, "q")


# --- money ------------------------------------------------------------------------------------------------------------

PRICES: dict[str, Any] = {"usd_per_mtok_in": 1.0, "usd_per_mtok_out": 2.0}
REAL = (10 * 1 + 5 * 2) / 1e6  # of one answer of the server, in usd
LONGEST = (len("question 0") + module.TEMPLATE_TOKENS + module.MESSAGE_TOKENS + 8 * 2) / 1e6  # set aside for it


def test_max_usd_is_never_passed_and_nothing_is_lost(server, tmp_path):
    bound = 4 * REAL + LONGEST  # the fifth is still affordable at its longest
    options = {**PRICES, "max_usd": bound, "concurrency": 4}
    with pytest.raises(DistillError, match=r"teacher\.max_usd: .*are spent, and the next answer may cost"):
        ask(ready(tmp_path, server.url, **options), *numbered(9))
    assert sum(server.answered.values()) == 5, "requests that are under way are waited for"
    with pytest.raises(DistillError, match=r"teacher\.max_usd"):
        ask(ready(tmp_path, server.url, **options), *numbered(9))
    assert sum(server.answered.values()) == 5, "another run has the same purse"
    answers = ask(ready(tmp_path, server.url, **options | {"max_usd": 1.0}), *numbered(9))
    assert answers.column.tolist() == [f"re: {question}" for question in numbered(9)]
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 9


def test_max_usd_counts_what_may_have_been_billed(server, tmp_path):
    options = {**PRICES, "timeout_s": 0.2, "max_attempts": 9}
    server.faults.extend([(500, b""), (429, b"")])
    ask(ready(tmp_path, server.url, **options, max_usd=LONGEST), "question 0")
    server.requests.clear()
    server.faults.extend([1.0, "cut", (200, b"{")] * 2)
    with pytest.raises(DistillError, match=r"teacher\.max_usd"):
        ask(ready(tmp_path, server.url, **options, max_usd=REAL + 3 * LONGEST), "question 1")
    assert len(server.requests) == 3


def test_max_usd_survives_a_kill(server, tmp_path):
    """What was set aside when a process died stays spent: the answer may have been billed."""
    teacher = ready(tmp_path, server.url, **PRICES, max_usd=2 * LONGEST)
    assert teacher._purse.take(module.Fraction(str(LONGEST)))
    ask(ready(tmp_path, server.url, **PRICES, max_usd=2 * LONGEST), "question 0")
    with pytest.raises(DistillError, match=r"teacher\.max_usd"):
        ask(ready(tmp_path, server.url, **PRICES, max_usd=2 * LONGEST), "question 1")
    assert len(server.requests) == 1


def test_an_answer_without_usage_counts_at_its_longest(server, tmp_path):
    server.answer = lambda body: {name: value for name, value in answer(body).items() if name != "usage"}
    teacher = ready(tmp_path, server.url, **PRICES)
    answers = ask(teacher, "question 0")
    assert answers.prompt_tokens.tolist() == teacher.count_tokens(Prompts.of_users(["question 0"]), GREEDY).tolist()
    assert answers.completion_tokens.tolist() == [8]
    assert float(teacher._purse.spent()) == pytest.approx(LONGEST)


# --- log-probabilities ------------------------------------------------------------------------------------------------

TOKENS = [" hi", "é", "!"]


def entry(token: str, logprob: float | None, **others: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()), **others}


def chat_logprobs(k: int, **others: Any) -> dict[str, Any]:
    """As OpenAI's chats have them, the tops in no order."""
    tops = [entry(token, value) for token, value in [("b", -3.0), (" hi", -0.5), ("a", -2.0), ("c", None)]]
    return {"content": [entry(token, -0.5, top_logprobs=tops[:k], **others) for token in TOKENS]}


def legacy_logprobs(k: int) -> dict[str, Any]:
    """As completions have them (llama-cpp-python, vLLM), with the drawn token besides the k."""
    tops = dict([(" hi", -0.5), ("a", -2.0), ("b", -3.0)][: k + 1])
    return {"tokens": TOKENS, "token_logprobs": [-0.5] * 3, "top_logprobs": [tops] * 3, "text_offset": [0, 3, 4]}


def with_logprobs(logprobs: Any) -> Callable[[dict[str, Any]], Any]:
    def answers(body: dict[str, Any]) -> Any:
        made = answer(body)
        made["choices"][0] |= {"logprobs": logprobs}
        return made

    return answers


def test_log_probabilities_of_chats(server, tmp_path, tiny):
    from transformers import AutoTokenizer

    numbers = AutoTokenizer.from_pretrained(tiny).convert_tokens_to_ids
    server.answer = with_logprobs(chat_logprobs(4))
    answers = ask(ready(tmp_path, server.url, tokenizer=str(tiny)), "q", "p", top_k=3)
    assert {(body["logprobs"], body["top_logprobs"]) for body in server.bodies} == {(True, 3)}
    assert answers.offsets.tolist() == [0, 4, 8]
    told = [numbers("Ġhi"), -1, numbers("!"), numbers("<|im_end|>")]
    assert answers.tokens(0).tolist() == told, "é is two tokens of this vocabulary; the end is put back"
    assert answers.top_ids[0].tolist() == [numbers("Ġhi"), numbers("a"), numbers("b")]
    certain = [0.0, -np.inf, -np.inf]
    np.testing.assert_allclose(answers.top_logprobs, [*[[-0.5, -2.0, -3.0]] * 3, certain] * 2)
    np.testing.assert_allclose(answers.logprobs, [-0.5, -0.5, -0.5, 0.0] * 2)
    nameless = ask(ready(tmp_path, server.url), "q", top_k=3)
    assert nameless.token_ids.tolist() == [-1] * 3
    assert (nameless.top_ids == -1).all()
    np.testing.assert_allclose(nameless.top_logprobs, answers.top_logprobs[:3])
    assert ask(ready(tmp_path, server.url), "r").offsets is None, "tokens are told where they are asked for"


def test_log_probabilities_of_completions(server, tmp_path, tiny):
    prompts = Prompts(texts(["p"]), chat=False)
    server.answer = with_logprobs(legacy_logprobs(2))
    teacher = ready(tmp_path, server.url, tokenizer=str(tiny))
    legacy = teacher.generate(prompts, GREEDY, np.zeros(1, np.int64), 2)
    assert server.bodies[0]["logprobs"] == 2
    assert legacy.top_ids.shape == (4, 2)
    np.testing.assert_allclose(legacy.top_logprobs, [*[[-0.5, -2.0]] * 3, [0.0, -np.inf]])
    server.answer = with_logprobs(chat_logprobs(2, id=7))  # llama.cpp: as chats, with ids
    modern = teacher.generate(Prompts(texts(["other"]), chat=False), GREEDY, np.zeros(1, np.int64), 2)
    assert modern.token_ids.tolist()[:3] == [7, 7, 7]


def test_the_end_of_an_answer_is_told_once(server, tmp_path, tiny):
    from transformers import AutoTokenizer

    number, end = AutoTokenizer.from_pretrained(tiny).convert_tokens_to_ids(["a", "<|im_end|>"])

    def tokens(content: list[dict[str, Any]], finish: str, prompts: Prompts) -> list[int]:
        def answers(body: dict[str, Any]) -> Any:
            made = with_logprobs({"content": content})(body)
            made["choices"][0]["finish_reason"] = finish
            return made

        server.answer = answers
        asked, noted = (
            ready(tmp_path, server.url, tokenizer=str(tiny)).generate(prompts, GREEDY, np.zeros(1, np.int64), 1)
            for _ in range(2)
        )
        assert asked.tokens(0).tolist() == noted.tokens(0).tolist()
        assert len(asked.top_ids) == len(asked.logprobs) == len(asked.token_ids) == asked.offsets[-1]
        return asked.token_ids.tolist()

    a = entry("a", -1.0, top_logprobs=[entry("a", -1.0)])
    ended = entry("<|im_end|>", -0.1, top_logprobs=[entry("<|im_end|>", -0.1)])
    assert tokens([a, ended], "stop", Prompts.of_users(["vLLM tells it"])) == [number, end]
    assert tokens([a], "stop", Prompts.of_users(["some leave it out"])) == [number, end]
    assert tokens([a], "stop", Prompts(texts(["plain text ends too"]), chat=False)) == [number, end]
    assert tokens([], "stop", Prompts.of_users(["an answer of nothing"])) == [end]
    assert tokens([a], "length", Prompts.of_users(["a cut answer has no end"])) == [number]
    assert len(server.requests) == 5, "each was asked once and then read from its note"


def test_log_probabilities_end_with_the_text(server, tmp_path):
    def answers(body: dict[str, Any]) -> Any:
        made = with_logprobs({"content": [entry(c, -1.0, top_logprobs=[entry(c, -1.0)]) for c in "re: né. x"]})(body)
        made["choices"][0]["finish_reason"] = "length"
        return made

    server.answer = answers
    sampling = Sampling(max_tokens=16, temperature=0, stop=(". ",))
    cut = ask(ready(tmp_path, server.url), "né. x", sampling=sampling, top_k=1)
    assert cut.column.tolist() == ["re: né"]
    assert cut.finish.tolist() == ["stop"]
    assert cut.offsets.tolist() == [0, 6]


def test_fewer_log_probabilities_than_asked_for(server, tmp_path):
    server.answer = with_logprobs(chat_logprobs(2))
    for _ in range(2):
        with pytest.raises(DistillError, match=r"access\.top_k: 3 .* grants at most 2; set access\.top_k=2"):
            ask(ready(tmp_path, server.url), "q", top_k=3)
    assert len(server.requests) == 1, "the same finding is not paid for twice"
    assert ask(ready(tmp_path, server.url), "q", top_k=2).top_k == 2


REFUSALS = {
    "vllm": (b"Requested sample logprobs of 30, which is greater than max allowed: 20.", "grants at most 20; set"),
    "openai": (b"Invalid value for 'top_logprobs': must be less than or equal to 20.", "grants at most 20; set"),
    "none": (b"logprobs are not supported with this model", "does not grant 30 log-probabilities"),
}


@pytest.mark.parametrize(("said", "wanted"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_log_probabilities(server, tmp_path, said, wanted):
    server.faults.append((400, said))
    with pytest.raises(DistillError, match=wanted) as caught:
        ask(ready(tmp_path, server.url, top_k=50), "q", top_k=30)
    assert caught.value.key == "access.top_k"
    assert len(server.requests) == 1


@pytest.mark.parametrize("value", [0.5, float("nan"), "x"])
def test_bad_log_probabilities(server, tmp_path, value):
    server.answer = with_logprobs({"content": [entry("a", value, top_logprobs=[])]})
    with pytest.raises(BadAnswer, match="no completion"):
        ask(ready(tmp_path, server.url), "q", top_k=1)


def test_token_names(tiny):
    from tokenizers import Tokenizer, decoders, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    gpt2 = AutoTokenizer.from_pretrained(tiny)
    names = TokenNames(gpt2)
    bytes_ = [names.number({"token": "�", "bytes": [byte]}) for byte in range(256)]
    assert bytes_[:128] == [gpt2.encode(chr(byte))[0] for byte in range(128)]
    assert [bytes_[byte] for byte in "é😀".encode()] == gpt2.encode("é😀")
    assert len(set(bytes_) - {-1}) == 256
    assert names.number({"token": "\n"}) == gpt2.encode("\n")[0]
    assert names.number({"token": "<|im_end|>"}) == 1
    assert names.number({"token": "token_id:300"}) == 300
    assert names.number({"token": "never"}) == -1
    unnamed = np.array([gpt2.encode("n")[0], -1, -1], np.int32)  # é, as llama.cpp names its two halves
    assert names.filled(unnamed, "né").tolist() == gpt2.encode("né")
    assert names.filled(unnamed, "mé").tolist() == unnamed.tolist()
    assert names.filled(unnamed, "nés").tolist() == unnamed.tolist()
    core = Tokenizer(models.BPE(vocab={"▁hi": 0, "<0xE2>": 1, "hi": 2, "▁": 3, "h": 4, "i": 5}, merges=[]))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = TokenNames(PreTrainedTokenizerFast(tokenizer_object=core))
    told = [{"token": " hi"}, {"token": "hi"}, {"token": "�", "bytes": [0xE2]}, {"token": "�"}]
    assert [names.number(some) for some in told] == [0, 2, 1, -1]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [Prompts.of_users(["q", " \n"]), Prompts(texts(["q", ""]), chat=False)])
def test_an_empty_prompt(server, tmp_path, prompts, tiny):
    for options in ({}, {"tokenizer": str(tiny)}):
        teacher = ready(tmp_path, server.url, **options)
        with pytest.raises(DistillError, match="pool: prompt 1 of these prompts is empty"):
            teacher.count_tokens(prompts, GREEDY)
        with pytest.raises(DistillError, match="pool: prompt 1 of these prompts is empty"):
            teacher.generate(prompts, GREEDY, np.zeros(2, np.int64))
    assert not server.requests, "what is wrong is told before anything is asked"


def test_a_prompt_that_is_too_long(server, tmp_path, tiny):
    teacher = ready(tmp_path, server.url, tokenizer=str(tiny), context_tokens=64)
    assert teacher.count_tokens(Prompts.of_users(["q" * 30]), GREEDY)[0] <= 56
    with pytest.raises(DistillError, match=r"sampling\.max_tokens: 8 tokens do not fit .* context of 64"):
        ask(teacher, "q" * 50)
    assert not server.requests
    server.faults.append((400, b"This model's maximum context length is 64 tokens."))
    with pytest.raises(DistillError, match=r"refused: status 400 .*maximum context length"):
        ask(ready(tmp_path, server.url, context_tokens=64), "q" * 50)


def test_estimates_are_not_too_low(server, tmp_path, tiny):
    prompts = Prompts.of_users(["?", "hi hi hi", "naïve 😀" * 9])
    exact = ready(tmp_path, server.url, tokenizer=str(tiny)).count_tokens(prompts, GREEDY)
    assert (ready(tmp_path, server.url).count_tokens(prompts, GREEDY) >= exact).all()


def test_tokenizers_that_do_not_serve(server, tmp_path, tiny):
    from transformers import AutoTokenizer

    with pytest.raises(MissingAsset, match=r"teacher\.tokenizer: .*neither a folder with a tokenizer"):
        ready(tmp_path, server.url, tokenizer=str(tmp_path / "nowhere"))
    bare = AutoTokenizer.from_pretrained(tiny)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    teacher = ready(tmp_path, server.url, tokenizer=str(tmp_path / "bare"))
    with pytest.raises(DistillError, match=r"teacher\.tokenizer: .*no chat template"):
        ask(teacher, "q")


OPTIONS: dict[str, dict[str, Any]] = {
    "teacher.url": {"url": "ftp://a"},
    "teacher.authorized": {"url": "https://api.example.com/v1"},
    "teacher.top_k": {"top_k": -1},
    "teacher.usd_per_mtok_in": {"usd_per_mtok_in": -1.0},
    "teacher.usd_per_mtok_out": {"usd_per_mtok_out": float("nan")},
    "teacher.max_usd": {"max_usd": 0.0, "usd_per_mtok_in": 1.0},
    "teacher.max_tokens_field": {"max_tokens_field": "max_token"},
    "teacher.concurrency": {"concurrency": 0},
    "teacher.max_attempts": {"max_attempts": 0},
    "teacher.timeout_s": {"timeout_s": 0.0},
}


@pytest.mark.parametrize(("key", "options"), OPTIONS.items(), ids=OPTIONS.keys())
def test_bad_options(key, options):
    with pytest.raises(DistillError) as caught:
        OpenAI(**{"url": "http://127.0.0.1:1/v1", "model": "m"} | options)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_a_bound_on_nothing():
    with pytest.raises(DistillError, match=r"teacher\.max_usd: answers are free"):
        OpenAI("http://127.0.0.1:1/v1", "m", max_usd=1.0)


def test_the_yaml_is_the_class():
    import inspect

    import yaml

    from distill.config import CONFIG_DIR

    written = yaml.safe_load((CONFIG_DIR / "teacher" / "openai.yaml").read_text())
    assert written.pop("_target_") == f"{OpenAI.__module__}.OpenAI"
    defaults = {name: value.default for name, value in inspect.signature(OpenAI).parameters.items()}
    empty = inspect.Parameter.empty
    assert {name: "???" if value is empty else value for name, value in defaults.items()} == written
