"""One extraction experiment, top to bottom: query the teacher, train a student, measure how close it came.

python -m distill.train +experiment=quickstart
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from distill.config import query_id
from distill.launch import PROCESSES, RANK, claim, launch, note_run, write_atomically

log = logging.getLogger(__name__)


def run(config: Any) -> None:
    """The task of `python -m distill.train`: a finished run is shown, anything else is made or continued."""
    from hydra.core.hydra_config import HydraConfig

    from distill.report import show_result

    run_dir = Path(HydraConfig.get().runtime.output_dir)
    choices = {name: str(option) for name, option in HydraConfig.get().runtime.choices.items()}
    with claim(run_dir, "run"):
        if config.run.force and RANK == 0:
            for name in ("result.json", "metrics.jsonl"):
                (run_dir / name).unlink(missing_ok=True)
            for name in ("student", "curve", "training"):
                shutil.rmtree(run_dir / name, ignore_errors=True)
        if PROCESSES == 1 and (run_dir / "result.json").exists():
            log.info("finished before: %s (run.force=true repeats it)", run_dir)
        else:
            extract(config, run_dir, choices)
    note_run(run_dir)
    if RANK == 0:
        show_result(run_dir)


def extract(config: Any, run_dir: Path, choices: dict[str, str]) -> None:
    """The experiment. It leaves the folder that the README describes; `result.json` is written last."""
    from distill.evaluate import headline, measure, save
    from distill.experiment import make_trainer, open_experiment
    from distill.query import export, query
    from distill.tracking import Tracking

    started = time.monotonic()
    tracking = Tracking.open(config, run_dir, choices)
    result = None
    try:
        trainer = make_trainer(config, tracking.log)
        if trainer.broadcast((run_dir / "result.json").exists()):  # several ranks decide as the first does
            return
        queries = run_dir.parent / f"queries-{query_id(config)}"
        experiment = open_experiment(config, trainer, choices, queries)
        transfer_set, cost = query(experiment, force=config.run.force)
        curve = [curve_point(experiment, transfer_set, share, run_dir) for share in config.curve]
        student = train_student(experiment, transfer_set, run_dir)
        if trainer.is_main:
            export(experiment, transfer_set)
            link(queries, run_dir)
            cost["train_seconds"] = student.history["seconds"]
            cost["recovery_seconds"] = student.history.get("recovery_seconds", 0.0)
            result = measure(experiment, student, transfer_set, cost, run_dir)
            result.curve = curve
            result.cost["seconds"] = time.monotonic() - started
            for point in [*curve, headline(result)]:
                tracking.log({"stage": "result", **point})
            save(result, run_dir)
        trainer.wait()
    finally:
        tracking.finish(result)


def train_student(experiment: Any, transfer_set: Any, run_dir: Path) -> Any:
    """The student on the whole transfer set, from `run_dir/student` if its training ended before an interruption."""
    if (finished := experiment.students.load(run_dir / "student")) is not None:
        return finished
    student = experiment.fit(transfer_set, "student", run_dir / "training")
    if experiment.trainer.is_main:
        experiment.students.save(student, run_dir / "student")
        shutil.rmtree(run_dir / "training", ignore_errors=True)
    return student


def curve_point(experiment: Any, transfer_set: Any, share: float, run_dir: Path) -> dict[str, float]:
    """Fidelity at an intermediate budget: a fresh student on the first answers, with the final one's initialisation."""
    n = max(1, round(share * len(transfer_set)))
    path = run_dir / "curve" / f"{n}.json"
    if experiment.trainer.broadcast(path.exists()):
        return json.loads(path.read_text())
    training = run_dir / "training" / str(n)
    student = experiment.fit(transfer_set.head(n), f"student at {n}", training)
    point: dict[str, float] = {}
    if experiment.trainer.is_main:
        point = {"cost/queries": n} | experiment.compare(student)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(point) + "\n")
        shutil.rmtree(training, ignore_errors=True)
    return point


def link(queries: Path, run_dir: Path) -> None:
    """Show the shared transfer set and the provider's log in the run's folder."""
    for name in ("transfer_set", "provider_log"):
        place = run_dir / name
        if not place.is_symlink():
            place.symlink_to(os.path.relpath(queries / name, run_dir))


def main() -> None:
    launch(run, "train", __doc__ or "")


if __name__ == "__main__":
    main()
