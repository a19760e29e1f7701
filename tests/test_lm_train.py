"""A whole experiment with a language model through the real command line, on a small task."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from commands import complaint, distill, refused
from test_train import CLOCK, killed, result_of
from test_train import numbers as all_numbers

QUICK = [
    "+experiment=lm_quickstart",
    *("data.train_rows=400", "data.held_out_rows=100", "data.test_rows=12"),
    *("data.min_assignments=3", "data.max_assignments=4", "teacher.width=32", "teacher.recipe.max_steps=30"),
    *("access=logits", "signal=hidden_states", "objective=token_jsd", "sampling.max_tokens=40"),
    *("budget.queries=40", "curve=[0.5]", "training.epochs=2", "run.progress=false"),
]
TEXT_ONLY = ["signal=text", "objective=sequence_kd"]
EFFORT = {"tokens_per_s", "teacher_tokens", "spent_usd", *CLOCK}


def numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: numbers(child) for name, child in all_numbers(value).items() if name not in EFFORT}
    return [numbers(child) for child in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("finished")
    done = distill("train", *QUICK, cwd=cwd, fresh=True)
    assert "agreement" in done.stdout
    assert "tokens" in done.stdout
    return cwd


def test_a_run_leaves_what_the_readme_says(finished: Path) -> None:
    (path,) = (finished / "outputs/prompt_pool-vs-none").glob("*/result.json")
    run, result = path.parent, json.loads(path.read_text())
    names = [".hydra/config.yaml", "transfer_set", "provider_log/answers.jsonl", "metrics.jsonl", "samples.jsonl"]
    names += ["train.log", "student/model.safetensors", "student/tokenizer.json", "student/config.json"]
    for name in names:
        assert (run / name).exists(), name
    assert set(result["accuracy"]) == {"teacher", "defended_teacher", "student", "untrained"}
    assert result["cost"]["queries"] == 40
    assert result["cost"]["tokens_out"] > 40
    assert 0 < result["cost"]["recovery_seconds"] < result["cost"]["seconds"]
    assert set(result["fidelity"]) >= {"agreement", "kl", "acceptance", "rouge_l", "student_text_kl"}
    assert 0 <= result["fidelity"]["acceptance"] <= 1
    assert result["training"]["packing"]["examples"] == 40
    assert result["training"]["signal"]["tokens"] == result["cost"]["tokens_out"]
    assert result["training"]["signal"]["kl_max"] == 0, "hidden states come back as they were"
    assert [point["cost/queries"] for point in result["curve"]] == [20]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    assert set(samples[0]) >= {"prompt", "reference", "teacher", "student", "untrained"}


def test_the_transfer_set_and_the_student_load_elsewhere(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = datasets.load_from_disk(str(next((finished / "outputs").glob("*/queries-*/transfer_set"))))
    assert len(rows) == 40
    assert rows[0]["messages"][-1]["role"] == "assistant"
    (run,) = (path.parent for path in (finished / "outputs").glob("*/*/result.json"))
    model = AutoModelForCausalLM.from_pretrained(run / "student")
    tokens = AutoTokenizer.from_pretrained(run / "student")("a=1;", return_tensors="pt")
    assert model(input_ids=tokens.input_ids).logits.isfinite().all()


def test_another_student_asks_nothing_and_text_alone_shares_the_answers(finished: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "copy"
    shutil.copytree(finished, cwd, symlinks=True)
    assert "nothing is asked" in distill("train", *QUICK, *TEXT_ONLY, cwd=cwd).stderr
    results = [json.loads(path.read_text()) for path in (cwd / "outputs").glob("*/*/result.json")]
    (text,) = (result for result in results if result["choices"]["signal"] == "text")
    assert (text["cost"]["teacher_forwards"], text["cost"]["queries"]) == (0, 40)
    assert "signal" not in text["training"]
    assert "token_jsd" in distill("report", cwd=cwd).stdout


def test_evaluate_measures_again_what_train_measured(finished: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "copy"
    shutil.copytree(finished, cwd, symlinks=True)
    path = next((cwd / "outputs").glob("*/*/result.json"))
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"fidelity": {}, "accuracy": {}}))
    distill("evaluate", str(path.parent), cwd=cwd)
    assert numbers(json.loads(path.read_text())) == numbers(before)


def test_a_student_that_learns_on_its_own_text_is_billed_for_its_scores(tmp_path: Path) -> None:
    on_policy = ["rollout=gkd", "rollout.max_tokens=40", "objective=token_reverse_kl", *("access=probs", "signal=text")]
    distill("train", *QUICK, "curve=[]", *on_policy, "budget.scored=80", cwd=tmp_path)
    result = result_of(tmp_path)
    assert result["cost"]["queries"] == 40
    assert result["training"]["scored"]["queries"] == 80, "40 answers of its own in each of two epochs"
    assert result["training"]["scored"]["tokens"] > 0
    done = distill("train", *QUICK, "curve=[]", *on_policy, "budget.scored=79", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "affords only" in complaint(done.stderr)


def test_a_white_box_student_says_so(tmp_path: Path) -> None:
    sizes = ("width", "layers", "heads", "mlp_ratio", "context", "initializer_range")
    white = ["student=teacher_layers", *(f"~student.{name}" for name in sizes), *TEXT_ONLY, "curve=[]"]
    denied = distill("train", *QUICK, *white, cwd=tmp_path, check=False)
    assert "teacher_layers requires weights" in complaint(denied.stderr)
    distill("train", *QUICK, *white, "access=white_box", cwd=tmp_path)
    result = result_of(tmp_path)
    assert any("white-box" in flag for flag in result["flags"])
    assert result["sizes"]["student"]["parameters"] < result["sizes"]["teacher"]["parameters"]


def test_kill_9_and_the_same_command_again(finished: Path, tmp_path: Path) -> None:
    """Killed a little later each time, from an empty cache on, it ends with the numbers of an uninterrupted run."""
    words = [*QUICK, "training.checkpoint_steps=1", "teacher.recipe.checkpoint_steps=5"]
    (tmp_path / "whole").mkdir()
    whole = distill("train", *words, cwd=tmp_path / "whole", env={"DISTILL_CACHE": str(tmp_path / "first")}).cpu_s
    assert whole is not None
    rng = random.Random(0)
    (tmp_path / "killed").mkdir()
    after, kills = 0.4 * whole, 0
    while killed(words, tmp_path / "killed", after, {"DISTILL_CACHE": str(tmp_path / "second")}):
        kills += 1
        after += rng.uniform(0.12, 0.2) * whole
    assert kills
    assert numbers(result_of(tmp_path / "killed")) == numbers(result_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sampling.max_tokens=0"], "sampling.max_tokens: must be at least 1"),
        (["attack=knockoff_random"], "attack: knockoff_random is of the other domain"),
        (["recovery=top1"], "recovery: top1 is of the other domain"),
        (["access=text"], "objective: token_jsd requires top_k"),
        (["signal=text"], "signal: objective=token_jsd learns from distributions"),
        (["defense=rounding"], "defense: rounding is of the other domain"),
        (["samples=0"], "samples: is at least 1"),
        (["budget.queries=null", "budget.usd=1"], "budget.usd: answers are free"),
        (["access=top_k", "access.top_k=200", "signal=top_k"], "access.top_k: 200 is more than"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused([*QUICK, *words], tmp_path, monkeypatch, capsys)
