"""Results as runs leave them, without the runs; and a benchmark of such."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from distill.config import CONFIG_DIR, Config, query_id, run_id
from distill.records import Result

UNTRAINED = 0.125


@cache
def composed(experiment: str, *options: str) -> tuple[Any, dict[str, str]]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose("train", overrides=[f"+experiment={experiment}", *options], return_hydra_config=True)
    choices = {name: str(option) for name, option in config.hydra.runtime.choices.items()}
    HydraConfig.instance().set_config(config)
    return OmegaConf.to_container(OmegaConf.masked_copy(config, list(Config.__annotations__)), resolve=True), choices


def finished(accuracy: float, *options: str, defense: str = "none", queries: int = 4000, **values: Any) -> Result:
    """What a run of `lm_quickstart` with these options and values leaves, whose student has this accuracy."""
    resolved, choices = composed("lm_quickstart", f"defense={defense}", *options)
    config = OmegaConf.create(resolved)
    for name, value in values.items():
        OmegaConf.update(config, name.replace("__", "."), value)
    return Result(
        *(run_id(config), query_id(config), choices, OmegaConf.to_container(config), config.seed, "text"),
        fingerprints={"teacher": defense, "train": "a", "test": "b", "pool": "c"},
        accuracy={"student": {"accuracy": accuracy}, "untrained": {"accuracy": UNTRAINED}},
        cost={"queries": queries},
        test_rows=64,
    )


def truth(accuracy: float, **values: Any) -> Result:
    return finished(accuracy, "attack=ground_truth_answers", queries=0, **values)


def classified(
    accuracy: float, attack: str = "knockoff_random", *options: str, seed: int | None = None, **changes: Any
) -> Result:
    """What a run of `quickstart` leaves, whose student has this accuracy; `changes` of the result's own fields."""
    resolved, choices = composed("quickstart", f"attack={attack}", *options)
    config = OmegaConf.create(resolved)
    if seed is not None:
        config.seed = seed
    values: dict[str, Any] = {
        "fingerprints": {"teacher": "t", "train": "a", "test": "b", "pool": "c"},
        "classes": 10,
        "accuracy": {who: {"accuracy": accuracy} for who in ("teacher", "defended_teacher", "student")},
        "fidelity": {"agreement": 0.5, "kl": 0.25},
        "utility": {"l1_mean": 0.0},
        "cost": {"queries": 500, "usd": 0.0},
        "test_rows": 360,
    }
    own = OmegaConf.to_container(config)
    return Result(run_id(config), query_id(config), choices, own, config.seed, "probs", **(values | changes))


def leave(folder: Path, *runs: Result) -> Path:
    """Write them as run0, run1 … below a folder."""
    for number, run in enumerate(runs):
        (folder / f"run{number}").mkdir(parents=True, exist_ok=True)
        (folder / f"run{number}" / "result.json").write_text(run.to_json())
    return folder


# agreement of the student by defense, recovery and seed
AGREEMENT = {
    ("none", "as returned"): (0.90, 0.92, 0.91),
    ("none", "top-1"): (0.88, 0.90, 0.89),
    ("mad 0.5", "as returned"): (0.50, 0.54, 0.52),
    ("mad 0.5", "top-1"): (0.86, 0.87, 0.88),
}
CONTROL = (0.80, 0.82, 0.81)


def benchmark(folder: Path, published: bool = False) -> Path:
    """A benchmark's folder: the cells of `AGREEMENT`, a control on ground truth, two cells n/a, one that failed."""
    options = {"as returned": "recovery=as_returned", "top-1": "recovery=top1"}
    defenses = {"none": ["defense=none"], "mad 0.5": ["defense=mad", "defense.l1_budget=0.5"]}
    home = folder / ("results/small" if published else "outputs/benchmarks/small")
    home.mkdir(parents=True)
    cells: list[dict[str, Any]] = []

    def cell(at: dict[str, str], control: str, result: Result) -> None:
        run = f"{result.run_id}{len(cells)}"
        result.run_id = run
        at = at | {"seed": str(result.seed)}
        cells.append({"at": at, "control": control, "run": run, "folder": f"../../any-vs-any/{run}", "status": "done",
                      "reason": "", "seconds": 1.0})  # fmt: skip
        path = home / f"{run}.json" if published else folder / "outputs/any-vs-any" / run / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(result.to_json())

    for (defense, recovery), values in AGREEMENT.items():
        for seed, value in enumerate(values):
            result = classified(0.9, "knockoff_random", *defenses[defense], options[recovery], seed=seed)
            result.fidelity = {"agreement": value}
            result.utility = {"l1_mean": 0.5 if defense == "mad 0.5" else 0.0}
            result.flags = ["a note"]
            cell({"defense": defense, "recovery": recovery}, "", result)
    for seed, value in enumerate(CONTROL):
        result = classified(value, "ground_truth_labels", "defense=none", seed=seed, fidelity={"agreement": value})
        cell({}, "ground truth", result)
    for seed, (status, reason) in enumerate([("n/a", "pbayes needs posteriors")] * 2 + [("failed", "out of memory")]):
        at = {"defense": "none", "recovery": "pBayes", "seed": str(seed)}
        cells.append({"at": at, "control": "", "run": "", "folder": "", "status": status, "reason": reason,
                      "seconds": 0.0})  # fmt: skip
    manifest = {
        "schema": 1,
        "name": "small",
        "title": "Two defenses, two recoveries",
        "experiment": "quickstart",
        "axes": {
            "defense": ["none", "mad 0.5"],
            "recovery": ["as returned", "top-1", "pBayes"],
            "seed": ["0", "1", "2"],
        },
        "judge": {
            "per": "defense",
            "over": ["recovery"],
            "baseline": "none",
            "budget": None,
            "student": "fidelity/agreement",
            "utility": "utility/l1_mean",
            "utility_better": "lower",
        },
        "controls": ["ground truth"],
        "cells": cells,
        "made": {"commit": "a" * 40, "dirty": False, "date": "2026-11-25", "hardware": "cpu", "torch": "2.13.0"},
    }
    (home / "benchmark.json").write_text(json.dumps(manifest))
    return home
