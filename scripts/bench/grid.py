"""What the cells of a grid cost beyond their students' training, one after the other in one process and on one thread.

    python scripts/bench/grid.py [--experiment reuters_perturbed] [--defenses none,rounding] [--seeds 0] [--profile 40]

By default cells of `modelguard_grid` (Fashion-MNIST, LeNet, 2,000 queries); the first pays for what the process keeps.
What counts as training is all that the attacker does with its transfer set: *recovery* (the simulations that it wants)
and *training* (each `Trainer.fit` in it, the student's above all). The rest is what the framework adds: *open* (data,
pool, teacher), *query*, *measure*, and *other* (tracking, saving, locks). Stages are in CPU seconds, those of child
processes included, because other processes may want the CPU too; the ratio is given of wall seconds besides. The
teacher is trained before, outside of the count, unless it lies in the cache.

What came out (AMD EPYC, two busy cores, torch 2.13; the 20 cells of the defaults, the first left out; CPU seconds): 6.7
of training and 1.24 beyond it (1.185 ×) when each cell measured its provider anew, 0.65 (1.097 ×) since a process keeps
that. A cell whose provider was measured before costs 0.45 to 0.5 (1.07 ×), most of it the student's 12,000 answers, so
the more recoveries share one, the better. Memory: 700 MiB after 30 cells, as after 20. On `reuters_perturbed`, 30 s of
training each, it is 1.03 ×, and was; with pBayes, D-DAE+ and the loop, whose recoveries count as training, 1.05 ×.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import os
import pstats
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from distill import evaluate, experiment, query, train
from distill.config import CONFIG_DIR
from distill.training import Trainer

STAGES = ("open", "query", "recovery", "training", "measure", "other")


def clock() -> np.ndarray:
    """Wall and CPU seconds, those of finished child processes included."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)])


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Stages:
    """Seconds by stage; an inner stage's are taken off the outer one's."""

    def __init__(self, profile: cProfile.Profile | None) -> None:
        self.seconds: dict[str, np.ndarray] = {}
        self._inner: list[np.ndarray] = []
        self._profile = profile

    def run(self, stage: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        trains = stage in ("recovery", "training")
        if self._profile is not None and trains:
            self._profile.disable()
        started = clock()
        self._inner.append(np.zeros(2))
        try:
            return call(*args, **options)
        finally:
            took, inner = clock() - started, self._inner.pop()
            self.seconds[stage] = self.seconds.get(stage, 0) + took - inner
            if self._inner:
                self._inner[-1] += took
            if self._profile is not None and stage != "training":  # which is a part of a recovery
                self._profile.enable()

    def watch(self, owner: Any, name: str, stage: str) -> None:
        call = getattr(owner, name)
        setattr(owner, name, lambda *args, **options: self.run(stage, call, *args, **options))


def composed(experiment: str, words: list[str]) -> tuple[Any, dict[str, str]]:
    """A cell's config and choices, as `distill.train` composes them."""
    config = compose("train", overrides=[f"+experiment={experiment}", *words], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    choices = {name: str(option) for name, option in config.hydra.runtime.choices.items()}
    with open_dict(config):
        config.name = f"{choices['attack']}-vs-{choices['defense']}"
        del config["hydra"]
    return OmegaConf.create(OmegaConf.to_container(config)), choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="modelguard_grid", help="or reuters_perturbed, ...")
    parser.add_argument("--defenses", default="none,rounding,mad_argmax,modelguard_w,modelguard_s")
    parser.add_argument("--recoveries", default="as_returned,top1")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="show the N dearest functions besides")
    arguments = parser.parse_args()
    profile = cProfile.Profile(time.process_time) if arguments.profile else None
    columns = [getattr(arguments, name).split(",") for name in ("defenses", "seeds", "recoveries")]
    cells = list(itertools.product(*columns))
    rows, seconds = [], []
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        place = Path(folder)

        def configured(defense: str, seed: str, recovery: str) -> tuple[Any, dict[str, str]]:
            words = [f"defense={defense}", f"seed={seed}", f"recovery={recovery}", "run.progress=false"]
            return composed(arguments.experiment, words + arguments.set)

        experiment.open_experiment(*_parts(*configured(*cells[0]), place / "teacher"))
        stages = Stages(profile)
        for owner, name, stage in (
            (experiment, "open_experiment", "open"),
            (query, "query", "query"),
            (evaluate, "measure", "measure"),
            (experiment.Experiment, "fit", "recovery"),
            (Trainer, "fit", "training"),
        ):
            stages.watch(owner, name, stage)
        for number, cell in enumerate(cells):
            config, choices = configured(*cell)
            run_dir = place / f"{choices['attack']}-vs-{choices['defense']}" / f"cell{number}"
            run_dir.mkdir(parents=True)
            stages.seconds = {}
            stages.run("other", train.extract, config, run_dir, choices)
            if profile is not None:
                profile.disable()
            row = np.array([stages.seconds.get(stage, np.zeros(2)) for stage in STAGES])
            seconds.append(row)
            rows.append([*cell, row, resident_mib()])
    show(rows, np.array(seconds))
    if profile is not None:
        print("\nfunctions, all cells together, trainings left out")
        pstats.Stats(profile).sort_stats("cumulative").print_stats(arguments.profile)


def _parts(config: Any, choices: dict[str, str], queries: Path) -> tuple[Any, Any, dict[str, str], Path]:
    return config, experiment.make_trainer(config), choices, queries


def show(rows: list[list[Any]], seconds: np.ndarray) -> None:
    table = Table("defense", "seed", "recovery", *STAGES, "total", "beyond", "CPU ÷", "wall ÷", "MiB")
    trains = np.isin(STAGES, ("recovery", "training"))

    def numbers(stages: np.ndarray) -> list[str]:
        total, training = stages.sum(axis=0), stages[trains].sum(axis=0)
        shown = [f"{cpu:.2f}" for cpu in (*stages[:, 1], total[1], (total - training)[1])]
        return [*shown, *(f"{ratio:.3f}" for ratio in (total / training)[::-1])]

    for defense, seed, recovery, stages, mib in rows:
        table.add_row(defense, seed, recovery, *numbers(stages), f"{mib:.0f}")
    table.add_section()
    table.add_row("all", "", "", *numbers(seconds.sum(axis=0)), "")
    later = seconds[1:] if len(seconds) > 1 else seconds
    table.add_row("but the first, mean", "", "", *numbers(later.mean(axis=0)), "")
    Console(width=160).print(table)
    wall, cpu = np.median(later[:, ~trains].sum(axis=1), axis=0)
    print(f"beyond training, median of {len(later)} cells after the first: {cpu:.3f} s CPU, {wall:.3f} s wall")
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"load {os.getloadavg()[0]:.2f}; peak {peak_mib} MiB")


if __name__ == "__main__":
    main()
