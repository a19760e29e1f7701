"""Spend the budget and stop after the transfer set.

    python -m distill.query +experiment=quickstart

The folder that this leaves is the one that `distill.train` looks for: every student that differs only in how it is
trained shares it, and nothing is asked twice.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config import query_id
from distill.errors import DistillError
from distill.launch import RANK, claim, launch, write_atomically

log = logging.getLogger(__name__)

NEW_WORK = (
    "teacher_forwards",
    "teacher_tokens",
    "defense_tokens",
    "spent_usd",
    "query_seconds",
)  # costs that are paid once, not a run


def query(experiment: Any, *, force: bool = False) -> tuple[Any, dict[str, float]]:
    """The transfer set of an experiment and what it cost, from an earlier run if it is there already.

    `experiment.queries` holds `provider_log/` (every answer, with the clean one: the provider's), `transfer_set/` (the
    attacker's) and `query.json`, which is written last and means "done". An interrupted attack is played back from
    the log and goes on where it was. Under several ranks the first asks and the others wait.
    """
    folder = experiment.queries
    cost = None
    if RANK == 0:
        with claim(folder, "transfer set"):
            cost = _query(experiment, folder, force)
    cost = experiment.trainer.broadcast(cost)
    return experiment.load_answers(), cost


def _query(experiment: Any, folder: Path, force: bool) -> dict[str, float]:
    done = folder / "query.json"
    if force:
        done.unlink(missing_ok=True)
        for name in ("provider_log", "transfer_set"):
            shutil.rmtree(folder / name, ignore_errors=True)
    if done.exists():
        summary = json.loads(done.read_text())
        then = summary["fingerprints"]
        changed = sorted(name for name, value in experiment.fingerprints.items() if then[name] != value)
        if changed:
            raise DistillError(f"has changed since {folder} was made; run.force=true asks again", changed[0])
        try:
            experiment.load_answers()
        except DistillError as error:
            log.warning("%s; it is made again from provider_log", error)
        else:
            log.info("transfer set: %s (made before; nothing is asked)", folder)
            return summary["cost"] | dict.fromkeys(NEW_WORK, 0.0)
    started = time.monotonic()
    if experiment.attack.uses_teacher:
        who = (experiment.choices[c] for c in ("teacher", "defense", "access"))
        log.info("asking %s (defense: %s, access: %s)", *who)
    transfer_set = experiment.ask()
    spent = experiment.provider.cost()
    if not len(transfer_set):
        raise DistillError("the attack came back without any answer", "attack")
    experiment.save_answers(transfer_set)
    cost = {name: value for name, value in asdict(spent).items() if name != "seconds"}
    cost["query_seconds"] = time.monotonic() - started
    summary = {
        "query_id": query_id(experiment.config),
        "queries": len(transfer_set),
        "profile": transfer_set.profile,
        "choices": experiment.choices,
        "fingerprints": experiment.fingerprints,
        "cost": cost,
    }
    write_atomically(done, json.dumps(summary, indent=1) + "\n")
    return cost


def run(config: Any) -> None:
    """The task of `python -m distill.query`."""
    from hydra.core.hydra_config import HydraConfig

    from distill.experiment import make_trainer, open_experiment
    from distill.report import show_query

    folder = Path(HydraConfig.get().runtime.output_dir)
    choices = {name: str(option) for name, option in HydraConfig.get().runtime.choices.items()}
    experiment = open_experiment(config, make_trainer(config), choices, folder)
    transfer_set, cost = query(experiment, force=config.run.force)
    if RANK == 0:
        export(experiment, transfer_set)
        show_query(folder, transfer_set, cost)


def export(experiment: Any, transfer_set: Any) -> None:
    """Write a self-contained copy, inputs included, where `run.export` or `run.push_to_hub` say so."""
    if (path := experiment.config.run.export) is not None:
        experiment.export(transfer_set, Path(path))
        log.info("exported the transfer set to %s", path)
    if (repo := experiment.config.run.push_to_hub) is not None:
        log.info("pushed the transfer set to %s", experiment.push_to_hub(transfer_set, repo))


def main() -> None:
    launch(run, "query", __doc__ or "")


if __name__ == "__main__":
    main()
