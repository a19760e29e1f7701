"""Measure finished runs again, without training: after a metric was added or mended.

    python -m distill.evaluate outputs/*/*

Everything is read from the run's folder and the cache; the numbers under ``cost`` and ``training`` stay as they were.
"""

from __future__ import annotations

import argparse
import logging
import platform
import subprocess
import time
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import checks
from distill.config import query_id, run_id
from distill.errors import DistillError
from distill.launch import claim, one_line_errors, write_atomically
from distill.records import Result

if TYPE_CHECKING:  # loads torch
    from distill.training import Trainer

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "hydra-core", "numpy")


def measure(experiment: Any, student: Any, transfer_set: Any, cost: dict[str, float], run_dir: Path) -> Result:
    """Everything that `result.json` holds; `samples.jsonl` is written on the way."""
    result = Result(
        run_id=run_id(experiment.config),
        query_id=query_id(experiment.config),
        choices=experiment.choices,
        config=_resolved(experiment.config),
        seed=experiment.config.seed,
        profile=transfer_set.profile,
        fingerprints=experiment.fingerprints,
        training=student.history,
        environment=environment(experiment.trainer),
    )
    started = time.monotonic()
    experiment.measure(student, result, run_dir)
    seconds = result.cost.get("evaluation_seconds", 0.0) + time.monotonic() - started
    forwards = experiment.provider.cost().teacher_forwards
    result.cost = cost | {"teacher_forwards": forwards, "evaluation_seconds": seconds}
    accuracy = {who: row["accuracy"] for who, row in result.accuracy.items() if "accuracy" in row}
    if accuracy:
        result.fidelity["normalised_accuracy"] = accuracy["student"] / max(accuracy["teacher"], 1e-12)
        result.utility["accuracy"] = accuracy["defended_teacher"]
        result.utility["accuracy_lost"] = accuracy["teacher"] - accuracy["defended_teacher"]
    result.flags = checks.flags(result, experiment.defense, experiment.choices["recovery"])
    return result


def headline(result: Result) -> dict[str, float]:
    """The last row of `metrics.jsonl`, under the names of the curve's rows."""
    numbers = {"cost/queries": result.cost["queries"]}
    for section in (result.accuracy, result.calibration):
        numbers |= {f"student/{name}": value for name, value in section.get("student", {}).items()}
    return numbers | {f"fidelity/{name}": value for name, value in result.fidelity.items()}


def save(result: Result, run_dir: Path) -> None:
    """Write `result.json`, whole or not at all. Its presence means that the run is done."""
    write_atomically(run_dir / "result.json", result.to_json())


def environment(trainer: Trainer) -> dict[str, Any]:
    """Where a result was made: versions, hardware, the commit of this program and whether it was changed since."""
    import torch

    cuda = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else None
    return {
        **_program(),
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "device": str(trainer.device),
        "processes": trainer.processes,
        "gpu": cuda,
        "threads": torch.get_num_threads(),
    }


@lru_cache(maxsize=1)
def _program() -> dict[str, Any]:
    """What this process runs: commit and versions, looked up once."""
    from distill import __version__

    here = Path(__file__).resolve().parent.parent
    versions = {"distill": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    commit = dirty = None
    if (here / ".git").exists():
        commit = _git(here, "rev-parse", "HEAD")
        dirty = bool(_git(here, "status", "--porcelain"))
    return {"commit": commit, "dirty": dirty, "versions": versions}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _resolved(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(name): value for name, value in resolved.items()}


def evaluate(run_dir: Path) -> Result:
    """Measure one finished run again and rewrite its `result.json`."""
    from omegaconf import OmegaConf

    from distill.config import Config
    from distill.experiment import make_trainer, open_experiment

    path = run_dir / "result.json"
    if not path.exists():
        raise DistillError(f"{run_dir} holds no result.json: it is not a finished run", "RUN_DIR")
    before = Result.load(path)
    config = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(before.config))
    with claim(run_dir, "run"):
        queries = (run_dir / "transfer_set").resolve().parent
        experiment = open_experiment(config, make_trainer(config), before.choices, queries)
        changed = sorted(n for n, value in experiment.fingerprints.items() if before.fingerprints[n] != value)
        if changed:
            raise DistillError(f"has changed since {run_dir} was made; run it again instead", changed[0])
        transfer_set = experiment.load_answers()
        student = experiment.students.load(run_dir / "student")
        if student is None:
            raise DistillError(f"{run_dir / 'student'} holds no whole student; run.force=true makes it again")
        result = measure(experiment, student, transfer_set, before.cost, run_dir)
        result.cost, result.curve = before.cost, before.curve
        save(result, run_dir)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distill.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folders that hold a result.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with one_line_errors():
        from distill.report import show_runs

        for run_dir in arguments.run_dirs:
            evaluate(run_dir)
        show_runs(arguments.run_dirs)


if __name__ == "__main__":
    main()
