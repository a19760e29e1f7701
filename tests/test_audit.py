"""The leakage audit: what each attack recovers through the real door, what stops it, and the command itself."""

from __future__ import annotations

import copy
import csv
import json
import math
import sys
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import test_one_door
import torch
from commands import complaint, distill
from tiny_language import CHARACTERS, characters, network
from transformers import GPT2Config, GPT2LMHeadModel

from distill.audit import Cell, first_token, inside_of, main
from distill.contracts import Inside, Verdict
from distill.errors import DistillError
from distill.language import Prompts, Task, texts
from distill.leaks._vectors import Spectrum, by_argmax, chosen_prompts, own_texts
from distill.leaks.argmax_logits import ArgmaxLogits
from distill.leaks.hidden_width import HiddenWidth
from distill.leaks.model_image import ModelImage, distances
from distill.leaks.output_head import OutputHead
from distill.leaks.top_1_logits import Top1Logits
from distill.leaks.top_k_logits import TopKLogits
from distill.provider.defenses.bias_limit import BiasLimit
from distill.provider.defenses.bias_xor_logprobs import BiasXorLogprobs
from distill.provider.defenses.logprob_noise import LogprobNoise
from distill.provider.defenses.logprob_rounding import LogprobRounding
from distill.provider.defenses.logprob_temperature import LogprobTemperature
from distill.provider.language_provider import LanguageProvider
from distill.provider.ledger import Prices
from distill.provider.oracle import serve_text
from distill.provider.teachers.openai import OpenAI
from distill.records import Budget, InterfaceProfile, Reveals
from distill.speaker import CausalLM

WIDTH = 64
TOKENIZER = characters(extra="".join(map(chr, range(0x4E00, 0x4E00 + 151))))
VOCABULARY = len(TOKENIZER)
POOL = Prompts.of_users(["".join(np.random.default_rng(i).choice(list(CHARACTERS[:36]), 5)) for i in range(200)])
MANY: dict[str, Any] = {"prompts": 100, "tokens": 80}


@cache
def a_teacher(kind: str = "llama", seed: int = 0) -> CausalLM:
    """A random model of width 64."""
    teacher = CausalLM(batch_size=128)
    if kind == "llama":
        sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "max_position_embeddings": 64}
        teacher.hold(network(VOCABULARY, seed, **sizes), copy.deepcopy(TOKENIZER))
    else:
        torch.manual_seed(seed)
        sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        teacher.hold(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)).eval(), copy.deepcopy(TOKENIZER))
    return teacher


def a_provider(folder: Path, teacher: Any = None, top_k: int = 0, bias: bool = True, **others: Any) -> LanguageProvider:
    access = InterfaceProfile.parse("top_k", top_k, logit_bias=bias)
    defaults: dict[str, Any] = {"prices": Prices(0.001, 0.5, 1.5), "budget": Budget(queries=1_000_000)}
    options = defaults | {"sampling": None, "cache": folder} | others
    return LanguageProvider(teacher or a_teacher(), access=access, **options)


def played(leak: Any, provider: LanguageProvider, inside: Inside | None = None) -> dict[str, Any]:
    return Cell("", "", leak, provider, inside or inside_of(provider.serving)).play(POOL, 0)


# --- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 5, 20])
def test_top_k_logits_cost_what_the_formula_says(tmp_path: Path, k: int) -> None:
    cell = played(TopKLogits(), a_provider(tmp_path, top_k=k))
    assert cell["recovered"], cell
    assert cell["error"] < 1e-4
    assert cell["queries"] == cell["formula"] == math.ceil((VOCABULARY - 1) / (k - 1))
    (tokens,) = a_teacher().count_tokens(chosen_prompts(POOL, 1, 0), first_token()).tolist()
    assert cell["tokens"] == cell["queries"] * (tokens + 1)
    assert cell["usd"] == pytest.approx(cell["queries"] * (0.001 + (0.5 * tokens + 1.5) / 1e6))


def test_one_answer_with_every_log_probability_is_enough(tmp_path: Path) -> None:
    cell = played(TopKLogits(), a_provider(tmp_path, top_k=VOCABULARY, bias=False))
    assert cell["recovered"]
    assert cell["queries"] == 1


def test_top_1_logits(tmp_path: Path) -> None:
    cell = played(Top1Logits(prompts=2), a_provider(tmp_path, top_k=1))
    assert cell["recovered"], cell
    assert cell["formula"] == 2 * VOCABULARY <= cell["queries"] <= 4 * VOCABULARY


def test_bisection_needs_text_alone(tmp_path: Path) -> None:
    provider = a_provider(tmp_path)
    cell = played(ArgmaxLogits(tokens=20), provider)
    assert provider.profile.reveals is Reveals.TEXT
    assert cell["recovered"], cell
    steps = math.ceil(math.log2(40 / 0.001))
    assert cell["queries"] in (1 + 20 * steps, 1 + 19 * steps), "19 where the most probable token is one of them"
    together = played(ArgmaxLogits(tokens=20, together=10), a_provider(tmp_path))
    assert together["recovered"], together
    assert together["queries"] < 0.6 * cell["queries"]


def test_tokens_without_a_text_of_their_own_are_left_out(tmp_path: Path) -> None:
    names = own_texts(TOKENIZER)
    assert set(range(6)).isdisjoint(names.values()), "special tokens are written as nothing"
    assert len(names) == VOCABULARY - 6
    with serve_text(a_provider(tmp_path)) as oracle:
        found = by_argmax(oracle, chosen_prompts(POOL, 1, 0), np.arange(9), 40.0, 0.5, 1)
    assert found.tokens.tolist() == [6, 7, 8]


# --- width, matrix, image -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_rms_norm_shows_the_whole_width(tmp_path: Path, seed: int) -> None:
    cell = played(HiddenWidth(**MANY), a_provider(tmp_path, a_teacher("llama", seed), top_k=20))
    assert (cell["recovered"], cell["error"]) == (True, 0), cell
    assert cell["note"].startswith("width 64,")
    assert cell["queries"] == cell["formula"] == 100 * math.ceil(79 / 19)


def test_a_layer_norm_hides_a_direction_until_its_bias_shows_it(tmp_path: Path) -> None:
    cell = played(HiddenWidth(**MANY), a_provider(tmp_path / "0", a_teacher("gpt2"), top_k=VOCABULARY))
    assert (cell["recovered"], cell["error"]) == (True, -1), "the mean is taken out, and the norm's bias is 0"
    moved = CausalLM(batch_size=128)
    changed = copy.deepcopy(a_teacher("gpt2").network)
    with torch.no_grad():
        changed.transformer.ln_f.bias.normal_(generator=torch.Generator().manual_seed(0))
    moved.hold(changed, TOKENIZER)
    cell = played(HiddenWidth(**MANY), a_provider(tmp_path / "1", moved, top_k=VOCABULARY))
    assert (cell["recovered"], cell["error"]) == (True, 0), cell


def test_a_vocabulary_no_larger_than_the_width_hides_it(tmp_path: Path) -> None:
    cell = played(HiddenWidth(prompts=100, tokens=60), a_provider(tmp_path, top_k=VOCABULARY))
    assert not cell["recovered"], cell


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_output_matrix_up_to_an_invertible_map(tmp_path: Path, kind: str) -> None:
    leak, provider = OutputHead(prompts=100), a_provider(tmp_path, a_teacher(kind), top_k=VOCABULARY)
    inside = inside_of(provider.serving)
    cell = played(leak, provider, inside)
    assert cell["recovered"], cell
    assert cell["error"] < 1e-4
    with serve_text(a_provider(tmp_path, a_teacher(kind), top_k=VOCABULARY)) as oracle:
        found = leak.extract(oracle, POOL, 0)
    wrong = Inside(np.random.default_rng(0).normal(size=inside.head.shape), inside.hidden, inside.logits)
    assert not leak.judge(found, wrong).recovered, "another matrix is not in that image"
    assert leak.judge(found, None).recovered is None


def test_the_image_tells_a_model_from_its_fine_tuned_copy(tmp_path: Path) -> None:
    cell = played(ModelImage(**MANY), a_provider(tmp_path, top_k=VOCABULARY))
    assert cell["recovered"], cell
    tuned = CausalLM(batch_size=128)
    tuned.hold(copy.deepcopy(a_teacher().network), TOKENIZER)
    tuned.network.requires_grad_(True)
    steps = torch.optim.SGD(tuned.network.parameters(), lr=1e-3)
    tokens = torch.randint(6, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        steps.zero_grad()
        tuned.network(input_ids=tokens, labels=tokens).loss.backward()
        steps.step()
    tuned.hold(tuned.network, TOKENIZER)
    with serve_text(a_provider(tmp_path, top_k=VOCABULARY)) as oracle:
        (known, same), vectors = ModelImage(**MANY).extract(oracle, POOL, 0), Spectrum(100, 80, 40.0, 0.001, 8, 1)
    with serve_text(a_provider(tmp_path / "tuned", tuned, top_k=VOCABULARY)) as oracle:
        other = vectors.of(oracle, POOL, 0, further=4)
    _, _, image = np.linalg.svd(known.centred, full_matrices=False)
    assert distances(image[:WIDTH], other.values).min() > 10 * distances(image[:WIDTH], same.values).max()


def test_width_by_text_alone(tmp_path: Path) -> None:
    """The costliest way, on a narrower model, with a resolution that its smallest directions need."""
    small = CausalLM(batch_size=1)
    small.hold(network(VOCABULARY, hidden_size=8, num_attention_heads=2, intermediate_size=8, layers=1), TOKENIZER)
    cell = played(HiddenWidth(prompts=14, tokens=12, together=4), a_provider(tmp_path, small))
    assert (cell["recovered"], cell["error"]) == (True, 0), cell


# --- what stops them ------------------------------------------------------------------------------------------------

LEAKS = {
    "top_k_logits": TopKLogits(),
    "top_1_logits": Top1Logits(),
    "argmax_logits": ArgmaxLogits(tokens=6),
    "hidden_width": HiddenWidth(**MANY),
    "output_head": OutputHead(**MANY),
    "model_image": ModelImage(**MANY),
}
ALL = set(LEAKS)
LOGPROBS = ALL - {"argmax_logits"}
# Each policy, and what it stops: everything else gets through.
POLICIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "open": ({"top_k": 20}, set()),
    "no bias": ({"top_k": 20, "bias": False}, ALL),
    "text": ({"bias": False}, ALL),
    "rounded": ({"top_k": 20, "defense": LogprobRounding(decimals=0)}, LOGPROBS),
    "noisy": ({"top_k": 20, "defense": LogprobNoise(scale=0.1)}, LOGPROBS),
    "tempered": ({"top_k": 20, "defense": LogprobTemperature(2.0)}, {"top_k_logits", "top_1_logits"}),
    "limited": ({"top_k": 20, "defense": BiasLimit(0.1)}, ALL),
    "bias xor log-probabilities": ({"top_k": 20, "defense": BiasXorLogprobs()}, LOGPROBS),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_policy_stops(tmp_path: Path, policy: str) -> None:
    options, stopped = POLICIES[policy]
    for name, leak in LEAKS.items():
        cell = played(leak, a_provider(tmp_path, budget=Budget(queries=3000), **options))
        assert cell["recovered"] == (name not in stopped), (name, cell)
        if policy in ("text", "no bias"):
            assert cell["queries"] == 0
            assert cell["note"] in ("refused: no logit bias", "refused: no log-probabilities"), name


def test_the_mean_of_many_answers_undoes_noise_unless_it_is_fixed(tmp_path: Path) -> None:
    once, often, fixed = (
        played(TopKLogits(repeats=repeats), a_provider(tmp_path, top_k=20, defense=LogprobNoise(0.5, per_repeat=new)))
        for repeats, new in ((1, True), (100, True), (100, False))
    )
    assert often["error"] < once["error"] / 5, "about the root of 100"
    assert fixed["error"] > once["error"] / 5
    assert often["queries"] == often["formula"] == 100 * once["queries"]
    assert often["usd"] == pytest.approx(100 * once["usd"])
    provider = a_provider(tmp_path, top_k=VOCABULARY, defense=LogprobNoise(0.1))
    cell = played(HiddenWidth(**MANY, repeats=16), provider)
    assert (cell["recovered"], cell["error"], cell["queries"]) == (True, 0, 1600), cell
    provider = a_provider(tmp_path, top_k=5, defense=LogprobNoise(0.1))
    cell = played(Top1Logits(tokens=20, tolerance=0.1, repeats=16), provider)
    assert cell["recovered"], cell


def test_repeats_without_noise_change_nothing_but_the_price(tmp_path: Path) -> None:
    for leak, options in ((TopKLogits, {"top_k": 20}), (TopKLogits, {"top_k": VOCABULARY}), (Top1Logits, {"top_k": 1})):
        found = []
        for repeats in (1, 70):  # more than are asked for at once
            with serve_text(a_provider(tmp_path, **options)) as oracle:
                found.append(leak(tokens=4, prompts=2, repeats=repeats).extract(oracle, POOL, 0))
        np.testing.assert_allclose(found[1].values, found[0].values, rtol=0, atol=1e-5)
        assert found[1].formula == 70 * found[0].formula


def test_a_budget_ends_an_attack_cleanly(tmp_path: Path) -> None:
    cell = played(TopKLogits(), a_provider(tmp_path, top_k=5, budget=Budget(queries=10)))
    assert (cell["recovered"], cell["queries"], cell["note"]) == (False, 0, "budget: 50 more queries needed, 10 left")
    cell = played(ArgmaxLogits(tokens=20, together=20), a_provider(tmp_path, budget=Budget(queries=80)))
    assert (cell["recovered"], cell["queries"], cell["note"]) == (False, 80, "budget: 1 more queries needed, 0 left")
    cell = played(TopKLogits(), a_provider(tmp_path, top_k=5, budget=Budget(tokens=100)))
    assert (cell["recovered"], cell["note"]) == (False, "budget: 1 more queries needed, 0 left")
    assert 0 < cell["tokens"] <= 100


def test_a_pool_that_is_too_small_is_said(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="pool: 300 prompts are needed"):
        played(HiddenWidth(prompts=300), a_provider(tmp_path, top_k=20))


def test_the_providers_own_failure_is_no_defense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = a_provider(tmp_path, top_k=20)
    monkeypatch.setattr(provider, "defended", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        played(TopKLogits(), provider)


@pytest.mark.parametrize(
    "wrong",
    [{"prompts": 0}, {"tokens": 1}, {"bias": 0.0}, {"tolerance": -1.0}, {"bias": math.inf}, {"repeats": 0}],
    ids=str,
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(DistillError, match=f"^{next(iter(wrong))} must be"):
        TopKLogits(**wrong)
    with pytest.raises(DistillError, match="most"):
        BiasLimit(-1.0)


# --- the door -------------------------------------------------------------------------------------------------------


class Hoarder:
    """An attack that keeps what it is handed."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def refusal(self, oracle: Any) -> str:
        self.kept.append(oracle)
        return ""

    def extract(self, oracle: Any, pool: Prompts, seed: int) -> Any:
        self.kept += [oracle, pool, seed, oracle.ask, TopKLogits().extract(oracle, pool, seed)]
        return None

    def judge(self, found: Any, inside: Inside | None) -> Verdict:
        assert test_one_door.leaks({"kept": self.kept}, NOTHING) == []
        return Verdict(True, None, "")


NOTHING: Any = type("Nothing", (), {"classes": -1})


def test_an_attack_never_sees_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_one_door, "FORBIDDEN", (CausalLM, LanguageProvider, LogprobNoise, torch.nn.Module))
    provider = a_provider(tmp_path, top_k=5, defense=LogprobNoise())
    assert played(Hoarder(), provider)["recovered"]
    assert test_one_door.leaks({"kept": [{"deep": provider}]}, NOTHING), "the walk would have found it"


# --- a server that is not ours --------------------------------------------------------------------------------------


class Compatible(BaseHTTPRequestHandler):
    """An OpenAI-compatible API over the random Llama: the five most probable tokens, with a bias."""

    asked: list[dict[str, Any]]

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        prompt = TOKENIZER.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = a_teacher().network(input_ids=torch.tensor([prompt])).logits[0, -1]
        for token, bias in body.get("logit_bias", {}).items():
            logits[int(token)] += bias
        values, tokens = logits.log_softmax(0).topk(body["top_logprobs"])
        listed = [
            {"token": TOKENIZER.decode([token]), "id": token, "logprob": value}
            for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
        ]
        told = {"content": [{**listed[0], "top_logprobs": listed}]}
        message = {"role": "assistant", "content": listed[0]["token"]}
        self._reply(
            {
                "model": "tiny",
                "choices": [{"index": 0, "finish_reason": "length", "message": message, "logprobs": told}],
                "usage": {"prompt_tokens": len(prompt), "completion_tokens": 1},
            }
        )

    def _reply(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def url() -> Iterator[str]:
    Compatible.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Compatible) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_a_compatible_server_leaks_as_a_local_teacher_does(tmp_path: Path, url: str) -> None:
    pytest.importorskip("openai")
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    teacher = OpenAI(url, "tiny", tokenizer=str(tmp_path / "tokenizer"), top_k=5)
    nothing = Prompts(texts([]))
    teacher.prepare(Task("none", nothing, nothing, nothing), None, tmp_path)  # type: ignore[arg-type]
    provider = a_provider(tmp_path, teacher, top_k=5)
    cell = played(TopKLogits(tokens=21), provider, inside_of(a_teacher()))
    assert cell["recovered"], cell
    assert cell["queries"] == len(Compatible.asked) == 5
    assert {len(body["logit_bias"]) for body in Compatible.asked} == {5}
    unknown = Cell("", "", TopKLogits(tokens=21), a_provider(tmp_path, teacher, top_k=5), None).play(POOL, 0)
    assert unknown["recovered"] is None, "nobody knows the truth"


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_its_table_once(tmp_path: Path) -> None:
    a_teacher().network.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    words = ["teacher=hf_causal_lm", f"teacher.model={tmp_path / 'model'}", "leak=[top_k_logits,hidden_width]",
             "data.train_rows=50", "data.held_out_rows=120", "data.test_rows=5",
             "leak.hidden_width.prompts=90", "leak.hidden_width.tokens=70",
             "only=[everything,text,noisy]", "run.progress=false"]  # fmt: skip
    env = {"DISTILL_CACHE": str(tmp_path / "cache")}
    done = distill("audit", *words, cwd=tmp_path, env=env)
    (run,) = (tmp_path / "outputs/audit-of-hf_causal_lm").iterdir()
    cells = json.loads((run / "audit.json").read_text())["cells"]
    assert [(cell["policy"], cell["leak"]) for cell in cells] == [
        (policy, leak) for policy in ("everything", "text", "noisy") for leak in ("top_k_logits", "hidden_width")
    ]
    assert [cell["recovered"] for cell in cells] == [True, True, False, False, False, False]
    assert "refused: no log-probabilities" in done.stdout
    table = list(csv.DictReader((run / "audit.csv").open()))
    assert [int(row["queries"]) for row in table] == [cell["queries"] for cell in cells]
    # Again it is shown; with a cell less it goes on.
    assert "finished before" in distill("audit", *words, cwd=tmp_path, env=env).stderr
    (run / "audit.json").unlink()
    lines = (run / "cells.jsonl").read_text().splitlines(keepends=True)
    (run / "cells.jsonl").write_text("".join(lines[:-1]))
    distill("audit", *words, cwd=tmp_path, env=env)
    again = json.loads((run / "audit.json").read_text())["cells"]
    assert [cell | {"seconds": 0} for cell in again] == [cell | {"seconds": 0} for cell in cells]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("only=[everythin]", "only: no policy 'everythin'. Did you mean 'everything'?"),
        ("+budgett=1", "budgett: no such key. Did you mean 'budget'?"),
        ("leak.top_k_logits.prompts=0", "leak.top_k_logits.prompts: must be at least 1, not 0"),
        ("data=digits", "data: digits holds classes"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, word: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distill.audit", word])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # `launch` sets it; this takes it away again
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert says in complaint(capsys.readouterr().err)
