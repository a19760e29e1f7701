"""Whole comparisons in Weights & Biases and trackio, without an account; a sweep's agent; the upload later."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import Running, distill, environment
from omegaconf import OmegaConf

from distill.errors import DistillError
from distill.records import Result
from distill.results import MANIFEST, compare
from distill.trackers.push import SUMMARY, push
from distill.trackers.rows import cells, flat
from distill.tracking import Tracking

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = ["+experiment=quickstart", "curve=[]", "training.epochs=2", "student.hidden=[16]", "run.progress=false"]
NOBODY: dict[str, str | None] = {"WANDB_MODE": "offline", "WANDB_API_KEY": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a benchmark of four cells, and one that failed."""
    cwd = tmp_path_factory.mktemp("made")
    axes = {"defense": ["none", "rounding"], "seed": ["0", "1"]}
    distill("train", *SMALL, "budget.queries=60", "-m", *(f"{axis}={','.join(v)}" for axis, v in axes.items()), cwd=cwd)
    folder = cwd / "outputs/benchmarks/toy"
    folder.mkdir(parents=True)
    done = []
    for path in sorted(cwd.glob("outputs/*/*/result.json")):
        result = Result.load(path)
        at = {"defense": "none" if result.choices["defense"] == "none" else "one decimal", "seed": str(result.seed)}
        done.append({"at": at, "control": "", "run": result.run_id, "folder": os.path.relpath(path.parent, folder)})
    assert len(done) == 4
    lost = {"at": {"defense": "one decimal", "seed": "2"}, "control": "", "run": "x", "folder": "x"}
    manifest = {
        "schema": 1,
        "name": "toy",
        "title": "A grid of four",
        "experiment": "quickstart",
        "axes": {"defense": ["none", "one decimal"], "seed": ["0", "1", "2"]},
        "judge": {"per": "defense", "over": [], "baseline": "none", "budget": None, "student": "fidelity/agreement",
                  "utility": "utility/l1_mean", "utility_better": "lower"},
        "controls": [],
        "cells": [{**cell, "status": "done", "reason": "", "seconds": 1.0} for cell in done]
        + [{**lost, "status": "failed", "reason": "killed", "seconds": 0.0}],
        "made": {"commit": "0" * 40, "dirty": False, "date": "2026-01-01", "hardware": "cpu", "seconds": 4.0},
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return cwd


@pytest.fixture
def there(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "work")


def send(tracker: str) -> None:
    """In a process of its own, as `report` is: trackers read the environment when they are imported."""
    print(push(compare([Path("outputs/benchmarks/toy")]), tracker))


def sent(tracker: str, cwd: Path, env: dict[str, str | None]) -> str:
    done = Running(send, tracker, cwd=cwd, env=env).end()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def records(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What W&B's own reader finds in an offline run: how it is filed, and its config, summary and state."""
    (log,) = run.glob("*.wandb")
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    filed = next(record["run"] for line in lines if (record := json.loads(line))["type"] == "run")
    words.insert(-1, "--summary")
    return filed, json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def table(run: Path, entry: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    content = json.loads((run / "files" / entry["path"]).read_text())
    assert (entry["nrows"], entry["ncols"]) == (len(content["data"]), len(content["columns"]))
    return content["columns"], content["data"]


def test_a_benchmark_in_wandb(there: Path) -> None:
    comparison = compare([there / "outputs/benchmarks/toy"])
    first = comparison.frame.iloc[0]
    samples = Path(first.folder, "samples.jsonl").read_text()
    Path(first.folder, "samples.jsonl").write_text('{"cut off')
    said = sent("wandb", there, NOBODY)
    assert said.startswith("3 runs sent, 0 were there; offline; scripts/wandb_sync.sh uploads them\n")
    assert f"not sent: {first.run} (" in said, "one that is damaged is named; the others are sent"

    run = comparison.frame.iloc[2]
    result = comparison.results[run.folder]
    (folder,) = Path(run.folder).glob("wandb/offline-run-*")
    filed, read = records(folder)
    assert [filed["run_group"], filed["job_type"], filed["run_id"]] == ["toy", "benchmark", run.run]
    assert read["state"] == "finished"
    scalars = {"defense": "rounding", "axis/defense": "one decimal", "control": "", "recovery": "as_returned"}
    scalars |= {"attack": "knockoff_random", "student": "mlp", "data": "digits", "budget_queries": 60}
    assert (scalars | {"seed": int(run.seed)}).items() <= read["config"].items()
    for name, value in flat(result).items():
        assert read["summary"][name] == pytest.approx(value), name

    (folder,) = there.glob("outputs/benchmarks/toy/wandb/offline-run-*")
    filed, read = records(folder)
    assert [filed["run_group"], filed["job_type"], filed["run_id"]] == ["toy", "summary", "summary-toy"]
    told = {"title": "A grid of four", "axis/defense": "none, one decimal", "runs": 4, "missing": 1}
    assert told.items() <= read["config"].items()
    columns, rows = table(folder, read["summary"]["runs"])
    frame = comparison.frame.drop(columns="folder")
    assert columns == list(frame.columns)
    assert [row[columns.index("run")] for row in rows] == list(frame["run"])
    got = np.array([row[columns.index("fidelity/agreement")] for row in rows], float)
    np.testing.assert_allclose(got, frame["fidelity/agreement"])
    judged = [name for name in read["summary"] if name.startswith("table/")]
    assert any("none" in row for name in judged for row in table(folder, read["summary"][name])[1])
    picture = read["summary"]["figure/pareto"]
    assert (folder / "files" / picture["path"]).read_bytes().startswith(b"\x89PNG")

    Path(first.folder, "samples.jsonl").write_text(samples)
    assert sent("wandb", there, NOBODY).startswith("1 runs sent, 3 were there;")
    assert len(list(there.glob("outputs/benchmarks/toy/wandb/offline-run-*"))) == 1, "the summary took its place"
    uploads(there)


def uploads(cwd: Path) -> None:
    """`scripts/wandb_sync.sh` finds all of these, not those that are uploaded, and never asks for a key."""
    script, env = str(SCRIPTS / "wandb_sync.sh"), environment(NOBODY | {"HOME": str(cwd), "NETRC": str(cwd / "none")})
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    logs = sorted(cwd.glob("outputs/**/offline-run-*/*.wandb"))
    assert len(logs) == 6, "of one a half, too"
    logs[0].with_name(f"{logs[0].name}.synced").touch()
    ran = subprocess.run(
        [script, "--dry-run"], cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == 0, ran.stderr
    assert [log.name in ran.stderr for log in logs] == [False, True, True, True, True, True]
    for log in logs:
        log.with_name(f"{log.name}.synced").touch()
    ran = subprocess.run([script], cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.stdout == "nothing to upload\n"


def test_a_benchmark_in_trackio(there: Path) -> None:
    pytest.importorskip("trackio")
    env: dict[str, str | None] = {"TRACKIO_DIR": str(there / "trackio")}
    assert sent("trackio", there, env) == "4 runs sent, 0 were there; trackio show --project distill\n"
    assert sent("trackio", there, env) == "0 runs sent, 4 were there; trackio show --project distill\n"

    comparison = compare([there / "outputs/benchmarks/toy"])
    (path,) = (there / "trackio").glob("distill*.db")
    with sqlite3.connect(path) as database:
        configs = dict(database.execute("select run_name, config from configs"))
        rows = list(database.execute("select run_name, metrics from metrics order by step"))
    assert set(configs) == {*comparison.frame["run"], "summary-toy"}
    run = comparison.frame.iloc[2]
    config, logged = json.loads(configs[run.run]), {}
    told = {"defense": "rounding", "axis/defense": "one decimal", "seed": int(run.seed), "_Group": "toy"}
    assert told.items() <= config.items()
    for name, metrics in rows:
        if name == run.run:
            logged |= json.loads(metrics)
    for name, value in flat(comparison.results[run.folder]).items():
        assert logged[name] == pytest.approx(value), name
    (summary,) = [json.loads(metrics) for name, metrics in rows if name == "summary-toy"]
    assert [row["run"] for row in summary["runs"]["_value"]] == list(comparison.frame["run"])
    got = [row["fidelity/agreement"] for row in summary["runs"]["_value"]]
    np.testing.assert_allclose(got, comparison.frame["fidelity/agreement"])
    assert list((there / "trackio").rglob(Path(summary["figure/pareto"]["file_path"]).name))


def test_only_dashboards_take_comparisons(made: Path) -> None:
    comparison = compare([made / "outputs/benchmarks/toy"])
    with pytest.raises(DistillError, match="'none' shows no comparisons; wandb and trackio do"):
        push(comparison, "none")
    with pytest.raises(DistillError, match=r"no option 'wandbb'\. Did you mean 'wandb'"):
        push(comparison, "wandbb")


def test_what_has_no_server_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.trackers.wandb import WandB

    def refuses(self: WandB, folders: object) -> set[str]:
        raise ConnectionError("no server\n at all")

    monkeypatch.setattr(WandB, "held", refuses)
    comparison = compare([made / "outputs/benchmarks/toy"])
    pushed = push(comparison, "wandb")
    assert pushed.failed == dict.fromkeys([*comparison.frame["run"], SUMMARY], "no server at all")
    assert str(pushed).endswith(f"not sent: {', '.join(pushed.failed)} (no server at all)")


def test_cells_of_a_table_are_plain() -> None:
    import pandas as pd

    frame = pd.DataFrame({"a": [1.5, np.nan], "b": [["x", "y"], []], "c": [1, 2]})
    assert cells(frame) == [[1.5, "x, y", 1], [None, "", 2]]


def live(run_dir: str) -> None:
    """A cell of a benchmark that is tracked while it runs."""
    result = Result.load(Path(run_dir, "result.json"))
    tracker = {"_target_": "distill.trackers.wandb.WandB", "job_type": "benchmark", "machine": False}
    config = OmegaConf.create(result.config | {"tracker": tracker})
    Tracking.open(config, Path(run_dir), result.choices | {"benchmark": "toy"}).finish(None)


def test_a_cell_that_is_tracked_while_it_runs_is_filed_under_its_benchmark(there: Path) -> None:
    run = compare([there / "outputs/benchmarks/toy"]).frame.iloc[0]
    done = Running(live, run.folder, cwd=there, env=NOBODY).end()
    assert done.returncode == 0, done.stderr
    (folder,) = Path(run.folder).glob("wandb/offline-run-*")
    filed, read = records(folder)
    assert [filed["run_group"], filed["job_type"], filed["run_id"]] == ["toy", "benchmark", run.run]
    assert read["exit_code"] == 1, "it has no result"


def agent(words: list[str]) -> None:
    """W&B's own agent, told to start one run of `scripts/sweep.yaml`; a server would choose the values."""
    from wandb.wandb_agent import Agent

    sweep = yaml.safe_load((SCRIPTS / "sweep.yaml").read_text())
    agent = Agent(None, None, sweep_id=os.environ["WANDB_SWEEP_ID"])
    agent._sweep_command = [*sweep["command"], *words]
    chosen = {name: {"value": parameter["values"][1]} for name, parameter in sweep["parameters"].items()}
    told = {"type": "run", "run_id": "told", "program": sweep["program"], "args": chosen}
    assert "exception" not in agent._process_command(told)
    sys.exit(agent._run_processes["told"].wait())


def test_the_sweep_drives_the_experiment(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = NOBODY | {"PATH": path, "WANDB_SWEEP_ID": "abcd1234", "WANDB_PROJECT": "p", "WANDB_DIR": str(tmp_path)}
    done = Running(agent, [*SMALL[1:4], "budget.queries=60"], cwd=tmp_path, env=env).end()
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("outputs/knockoff_random-vs-rounding/*/wandb/offline-run-*")
    result = Result.load(folder.parents[1] / "result.json")
    assert (result.choices["defense"], result.choices["recovery"], result.seed) == ("rounding", "top1", 1)
    filed, read = records(folder)
    assert [filed["run_id"], filed["sweep_id"], filed["job_type"]] == ["told", "abcd1234", "sweep"]
    assert read["project"] == "p"
    assert {"defense": "rounding", "recovery": "top1", "seed": 1}.items() <= read["config"].items()
    assert read["summary"]["fidelity/agreement"] == pytest.approx(result.fidelity["agreement"])
