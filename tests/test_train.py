"""The whole experiment through its real command line: results, sharing, interruption, and views."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from commands import Running, command, complaint, distill

from distill.config import CONFIG_DIR
from distill.records import RESULT_SCHEMA, Result

TWO_PROCESSES = CONFIG_DIR / "accelerate" / "two_processes.yaml"
QUICK = ["+experiment=quickstart", "budget.queries=200", "curve=[0.5]", "training.epochs=12", "run.progress=false"]
# Wall-clock and effort, which differ from run to run; everything else of a result is the same.
CLOCK = {"seconds", "query_seconds", "recovery_seconds", "train_seconds", "evaluation_seconds", "latency_s"}
CLOCK |= {"teacher_forwards"}


def result_of(cwd: Path, pattern: str = "*/*") -> dict[str, Any]:
    (path,) = (cwd / "outputs").glob(f"{pattern}/result.json")
    return json.loads(path.read_text())


def numbers(value: Any) -> Any:
    """A result without what the clock says, and without ``config.run``, which says how it was made and not what."""
    if isinstance(value, dict):
        return {name: numbers(child) for name, child in value.items() if name not in CLOCK | {"environment", "run"}}
    return [numbers(child) for child in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with one finished run, and the reference for every interrupted one."""
    cwd = tmp_path_factory.mktemp("finished")
    done = distill("train", *QUICK, cwd=cwd, fresh=True)
    assert "agreement" in done.stdout
    assert "next: python -m distill.train +experiment=quickstart -m defense=none,rounding" in done.stdout
    return cwd


def test_a_run_leaves_what_the_readme_says(finished: Path) -> None:
    (run,) = (finished / "outputs/knockoff_random-vs-rounding").glob("*/result.json")
    run = run.parent
    for name in (".hydra/config.yaml", "transfer_set", "provider_log", "student/model.safetensors", "metrics.jsonl",
                 "samples.jsonl", "train.log"):  # fmt: skip
        assert (run / name).exists(), name
    assert not (run / "training").exists(), "checkpoints are removed at the end"
    result = Result.load(run / "result.json")
    assert result.schema == RESULT_SCHEMA
    assert result.run_id == run.name
    assert result.choices["defense"] == "rounding"
    assert result.profile == "probs"
    assert result.cost["queries"] == 200
    assert result.accuracy["teacher"]["accuracy"] > 0.9
    assert result.fidelity["agreement"] > 0.6
    assert result.utility["l1_max"] > 0, "rounding moved something"
    assert result.utility["accuracy"] == result.accuracy["defended_teacher"]["accuracy"]
    assert [point["cost/queries"] for point in result.curve] == [100]
    assert result.curve[0]["fidelity/agreement"] < result.fidelity["agreement"] + 0.1
    assert result.sizes["student"]["parameters"] < result.sizes["teacher"]["parameters"]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 100
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} >= {"student", "result"}


def test_the_transfer_set_is_a_dataset_of_what_was_returned(finished: Path) -> None:
    path = next((finished / "outputs").glob("*/queries-*/transfer_set"))
    loaded = datasets.load_from_disk(str(path))
    posteriors = np.array(loaded["posterior"], dtype=np.float64)
    assert posteriors.shape == (200, 10)
    np.testing.assert_allclose(posteriors.sum(axis=1), 1, atol=1e-5)
    assert len(set(loaded["row"])) == 200, "random without replacement"
    assert (path / "README.md").exists()


def test_a_finished_run_is_not_repeated_and_force_repeats_it(finished: Path) -> None:
    before = result_of(finished)
    stamp = next((finished / "outputs").glob("*/*/result.json")).stat().st_mtime_ns
    done = distill("train", *QUICK, cwd=finished)
    assert "finished before" in done.stderr
    assert next((finished / "outputs").glob("*/*/result.json")).stat().st_mtime_ns == stamp
    distill("train", *QUICK, "run.force=true", cwd=finished)
    again = result_of(finished)
    assert next((finished / "outputs").glob("*/*/result.json")).stat().st_mtime_ns != stamp
    assert numbers(again) == numbers(before)


def test_another_student_or_defense_costs_no_teacher_forward(finished: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "copy"
    shutil.copytree(finished, cwd, symlinks=True)
    done = distill("train", *QUICK, "student=lenet", cwd=cwd)
    assert "nothing is asked" in done.stderr
    other_student = [
        Result.load(path) for path in (cwd / "outputs").glob("*/*/result.json")
        if Result.load(path).choices["student"] == "lenet"
    ]  # fmt: skip
    assert other_student[0].cost["teacher_forwards"] == 0
    assert other_student[0].cost["queries"] == 200, "the answers were paid for once, and count for every student"
    distill("train", *QUICK, "defense=gaussian_noise", cwd=cwd)
    noisy = result_of(cwd, "knockoff_random-vs-gaussian_noise/*")
    assert noisy["cost"]["teacher_forwards"] == 0
    assert noisy["cost"]["queries"] == 200
    # Paired: the same queries, in the same order.
    rows = [
        datasets.load_from_disk(str(path))["row"] for path in sorted((cwd / "outputs").glob("*/queries-*/transfer_set"))
    ]
    assert len(rows) == 2
    assert list(rows[0]) == list(rows[1])


def test_query_stops_after_the_transfer_set_and_train_finds_it(tmp_path: Path) -> None:
    done = distill("query", *QUICK, "run.export=exported", cwd=tmp_path)
    assert "200 answers" in done.stdout
    assert not list(tmp_path.rglob("result.json"))
    exported = datasets.load_dataset(str(tmp_path / "exported"), split="train", cache_dir=str(tmp_path / "hf"))
    assert len(exported) == 200
    assert np.array(exported[0]["image"]).shape == (8, 8)
    assert "nothing is asked" in distill("train", *QUICK, cwd=tmp_path).stderr


def test_evaluate_measures_again_what_train_measured(finished: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "copy"
    shutil.copytree(finished, cwd, symlinks=True)
    path = next((cwd / "outputs").glob("*/*/result.json"))
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"fidelity": {}, "accuracy": {}}))
    done = distill("evaluate", str(path.parent), cwd=cwd)
    assert "agreement" in done.stdout
    assert numbers(json.loads(path.read_text())) == numbers(before)
    assert "knockoff" not in distill("report", cwd=cwd).stderr


def test_damaged_weights_are_noticed(finished: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "copy"
    shutil.copytree(finished, cwd, symlinks=True)
    run = next((cwd / "outputs").glob("*/*/result.json")).parent
    expected = numbers(result_of(cwd))
    weights = run / "student" / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-5] ^= 1
    weights.write_bytes(blob)
    done = distill("evaluate", str(run), cwd=cwd, check=False)
    assert done.returncode == 2
    assert "holds no whole student" in complaint(done.stderr)
    (run / "result.json").unlink()
    assert "model.safetensors is damaged" in distill("train", *QUICK, cwd=cwd).stderr
    assert numbers(result_of(cwd)) == expected, "it was trained again"


@pytest.mark.parametrize("control", ["ground_truth_labels", "no_teacher"])
def test_controls_run_in_the_same_contract(control: str, tmp_path: Path) -> None:
    distill("train", *QUICK, "defense=none", f"attack={control}", cwd=tmp_path)
    result = result_of(tmp_path)
    assert result["cost"]["queries"] == 0, "a control asks nothing"
    if control == "no_teacher":
        assert result["accuracy"]["student"]["accuracy"] < 0.35
    else:
        assert result["accuracy"]["student"]["accuracy"] > 0.6


def test_a_sweep_ends_in_one_table_and_a_failing_run_does_not_stop_it(tmp_path: Path) -> None:
    done = distill("train", *QUICK, "-m", "objective=kl", "defense=label_only,none,rounding", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "objective: kl requires probs" in complaint(done.stderr)
    table = done.stdout[done.stdout.index("defense") :]
    assert [word for word in table.split() if word in ("none", "rounding", "label_only")] == ["none", "rounding"]
    assert len(list(tmp_path.glob("outputs/*/*/result.json"))) == 2


def test_money_bounds_the_queries(tmp_path: Path) -> None:
    distill("train", *QUICK, "budget.queries=null", "budget.usd=0.3", "access.usd_per_query=0.002", cwd=tmp_path)
    result = result_of(tmp_path)
    assert result["cost"]["queries"] == 150
    assert result["cost"]["usd"] == pytest.approx(0.3)


# --- interruption ---------------------------------------------------------------------------------------------------


def killed(words: list[str], cwd: Path, after_s: float, env: dict[str, str | None]) -> bool:
    """Start a run and kill it after so many seconds of processor time. True if it had not ended by then."""
    done = Running(command, "train", *words, cwd=cwd, env=env, cpu_s=after_s).end()
    assert done.returncode in (0, -signal.SIGPROF), done.stderr
    return done.returncode != 0


def test_kill_9_at_any_moment_and_the_same_command_again(tmp_path: Path) -> None:
    """One run is killed again and again, each time a little deeper, until an attempt lives to its end.

    It begins with an empty cache, so the kills fall on the teacher's training, the queries, the students of the
    budget curve, the last student and the writing of the files; each attempt goes on where the one before was killed.
    """
    words = [*QUICK, "training.checkpoint_steps=3", "teacher.recipe.checkpoint_steps=20", "teacher.recipe.epochs=12"]
    reference, cwd = tmp_path / "reference", tmp_path / "killed"
    reference.mkdir()
    cwd.mkdir()
    whole = distill("train", *words, cwd=reference, env={"DISTILL_CACHE": str(reference / "cache")}).cpu_s
    assert whole is not None
    rng = random.Random(0)
    kills, after, seen = 0, 0.2 * whole, set()
    while killed(words, cwd, after, {"DISTILL_CACHE": str(cwd / "cache")}):
        kills += 1
        seen |= {path.name for path in cwd.rglob("*") if path.name in ("network.json", "query.json", "student.json")}
        after += rng.uniform(0.01, 0.03) * whole  # small steps, so that no attempt does all stages
    assert kills >= 5
    assert seen, "some kill fell between two stages"
    assert numbers(result_of(cwd)) == numbers(result_of(reference))
    log = [np.load(p) for p in next((cwd / "outputs").glob("*/queries-*/provider_log")).glob("*.npz")]
    assert sum(len(shard["row"]) for shard in log) == 200, "no answer was given twice, none is lost"


def test_a_damaged_transfer_set_is_named_and_made_again_without_asking(finished: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "copy"
    shutil.copytree(finished, cwd, symlinks=True)
    expected = numbers(result_of(cwd))
    path = next((cwd / "outputs").glob("*/queries-*/transfer_set/*.arrow"))
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)
    done = distill("train", *QUICK, "student.hidden=[16]", cwd=cwd)
    assert path.name in done.stderr
    results = [json.loads(p.read_text()) for p in (cwd / "outputs").glob("*/*/result.json")]
    (fresh,) = (r for r in results if r["run_id"] != expected["run_id"])
    assert fresh["cost"]["teacher_forwards"] == 0
    assert fresh["cost"]["queries"] == 200


def test_two_processes_on_one_run_make_it_once(tmp_path: Path) -> None:
    both = [Running(command, "train", *QUICK, cwd=tmp_path) for _ in range(2)]
    said = [process.end() for process in both]
    assert [one.returncode for one in said] == [0, 0], said
    assert sum("another process works on this run" in one.stderr for one in said) == 1
    assert sum("finished before" in one.stderr for one in said) == 1


def test_two_ranks_train_as_one(finished: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO_PROCESSES)]
    command = [*launcher, "--main_process_port", "0", "-m", "distill.train", *QUICK]
    fresh = {"DISTILL_CACHE": str(tmp_path / "cache")}  # both ranks train the teacher too
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, env=os.environ | fresh)
    assert done.returncode == 0, done.stderr
    two, one = result_of(tmp_path), result_of(finished)
    assert two["environment"]["processes"] == 2
    assert one["environment"]["processes"] == 1
    assert two["run_id"] == one["run_id"]
    for ours, theirs in zip(two["training"]["curve"], one["training"]["curve"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert two["fidelity"]["kl"] == pytest.approx(one["fidelity"]["kl"], abs=1e-4)
    assert two["cost"]["queries"] == 200
    assert len(list(tmp_path.glob("outputs/*/*/result.json"))) == 1


def on_a_full_disk(*words: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    command("train", *words)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files, as a full disk does")
def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(finished: Path, tmp_path: Path) -> None:
    done = Running(on_a_full_disk, *QUICK, "student.hidden=[256]", cwd=tmp_path).end()
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    distill("train", *QUICK, "student.hidden=[256]", cwd=tmp_path)


# --- views ----------------------------------------------------------------------------------------------------------


def test_wandb_without_a_key_is_offline_and_never_asks(tmp_path: Path) -> None:
    env = {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    distill("train", *QUICK, "tracker=wandb", cwd=tmp_path, env=env)
    (record,) = tmp_path.glob("outputs/*/*/wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    for name in (b"quickstart", b"fidelity/agreement", b"knockoff_random", b"transfer-set-", b"samples"):
        assert name in content, name


def test_trackio_shows_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    env = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    distill("train", *QUICK, "tracker=trackio", cwd=tmp_path, env=env)
    assert list((tmp_path / "trackio").glob("distill*.db"))


def test_a_tracker_that_fails_costs_a_warning(tmp_path: Path) -> None:
    nobody = {"WANDB_MODE": "online", "WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    words = ["tracker=wandb", "tracker.mode=online", "tracker.init_timeout_s=3"]
    done = distill("train", *QUICK, *words, cwd=tmp_path, env=nobody, fresh=True)
    assert "tracker WandB failed and is left out" in done.stderr
    assert result_of(tmp_path)["fidelity"]["agreement"] > 0.5
