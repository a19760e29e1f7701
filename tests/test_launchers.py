"""Launchers: the same runs side by side, as jobs of a queue, or on a cluster (`scripts/check_launchers.sh` has Ray)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import complaint, distill, refused
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from distill.benchmark import BenchmarkConfig
from distill.config import CONFIG_DIR, run_id

PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "slurm": "hydra_submitit_launcher",
    "slurm_local": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}
SMALL = ["+experiment=quickstart", "curve=[]", "training.epochs=2", "student.hidden=[16]", "run.progress=false"]


def installed(option: str) -> bool:
    return importlib.util.find_spec(f"hydra_plugins.{PLUGINS[option]}") is not None


def composed(primary: str, *words: str) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose(primary, overrides=list(words), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


def results(cwd: Path) -> dict[int, dict[str, Any]]:
    """By seed."""
    found = (json.loads(path.read_text()) for path in cwd.glob("outputs/*/*/result.json"))
    return {result["seed"]: result for result in found}


def test_every_option_is_told_apart_here() -> None:
    assert {path.stem for path in (CONFIG_DIR / "launch").glob("*.yaml")} == set(PLUGINS)


@pytest.mark.parametrize("option", PLUGINS)
def test_a_launch_says_how_jobs_start_and_nothing_of_what_they_do(option: str) -> None:
    if not installed(option):
        pytest.skip(f"{PLUGINS[option]} is not installed")
    assert "worker" in vars(BenchmarkConfig()), "what a launcher numbers; the import makes the schema known"
    for primary, words in (("train", ["+experiment=quickstart"]), ("benchmark", ["+benchmark=smoke"])):
        config = composed(primary, *words, f"+launch={option}")
        launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
        assert PLUGINS[option] in launcher["_target_"]
        assert config.hydra.job.env_set["OMP_NUM_THREADS"] == "1"
        plain = composed(primary, *words)
        assert {key: config[key] for key in plain if key != "hydra"} == {k: plain[k] for k in plain if k != "hydra"}
    quick = composed("train", "+experiment=quickstart", f"+launch={option}")
    assert run_id(quick) == run_id(composed("train", "+experiment=quickstart"))
    assert not {"submitit", "ray"} & set(sys.modules), "composing starts nothing"


@pytest.mark.parametrize("option", PLUGINS)
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if installed(option):
        pytest.skip(f"{PLUGINS[option]} is installed")
    line = refused([*SMALL, f"+launch={option}", "-m", "seed=0,1"], tmp_path, monkeypatch, capsys)
    assert "launch: its plugin is not installed; pip install 'distill-framework[" in line


@pytest.mark.skipif(not installed("joblib") or not installed("slurm_local"), reason="no launchers are installed")
def test_jobs_make_the_runs_that_one_process_would(tmp_path: Path) -> None:
    """Two at once, beside one that is refused; then a queue, which leaves alone what is finished."""
    env: dict[str, str | None] = {"OMP_NUM_THREADS": "2"}
    words = [*SMALL, "-m", "+launch=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", "budget.queries=60,0"]
    done = distill("train", *words, cwd=tmp_path, env=env, check=False, fresh=True)
    assert done.returncode == 2, done.stderr
    assert "budget.queries: must be at least 1, not 0" in complaint(done.stderr)
    made = results(tmp_path)
    assert set(made) == {0, 1}
    assert all(result["run_id"] in done.stdout for result in made.values()), "the table at the end has both"
    assert {result["environment"]["threads"] for result in made.values()} == {1}
    assert {result["choices"]["launch"] for result in made.values()} == {"joblib"}

    words = [*SMALL, "-m", "+launch=slurm_local", "run.threads=2", "seed=0,2", "budget.queries=60"]
    done = distill("train", *words, cwd=tmp_path, env=env, fresh=True)
    queued = results(tmp_path)
    assert set(queued) == {0, 1, 2}
    assert all(queued[seed] == made[seed] for seed in made)
    assert all(queued[seed]["run_id"] in done.stdout for seed in (0, 2))
    assert queued[2]["environment"]["threads"] == 2
    logs = [path.read_text() for path in tmp_path.glob("outputs/.submitit/*/*_log.err")]
    assert len(logs) == 2
    assert sum("finished before" in text for text in logs) == 1


@pytest.mark.skipif(not installed("slurm"), reason="no launcher is installed")
def test_what_slurm_is_asked_for(tmp_path: Path) -> None:
    """The script that `sbatch` would be handed, by the real command; there is no Slurm here."""
    for name, does in {"srun": "", "sbatch": 'cat "$1" > script; exit 1'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env: dict[str, str | None] = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    words = [
        *SMALL,
        "-m",
        "+launch=slurm",
        "hydra.launcher.partition=long",
        "hydra.launcher.array_parallelism=2",
        "seed=0,1,2",
    ]
    done = distill("train", *words, cwd=tmp_path, env=env, check=False)
    assert done.returncode != 0
    script = (tmp_path / "script").read_text()
    asked = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in script.splitlines()
                 if line.startswith("#SBATCH --") and "=" in line)  # fmt: skip
    assert asked["array"] == "0-2%2"
    assert asked["partition"] == "long"
    assert asked["time"] == "240"
    assert asked["mem"] == "8GB"
    assert asked["cpus-per-task"] == "1"
    assert asked["signal"].endswith("@120")
    assert "gpus-per-node" not in asked


@pytest.mark.skipif(not installed("slurm"), reason="no launcher is installed")
def test_without_slurm_the_way_to_try_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refused([*SMALL, "+launch=slurm", "-m", "seed=0,1"], tmp_path, monkeypatch, capsys)
    assert "+launch=slurm_local" in line
