"""How long `python -m distill.benchmark --dry-run` takes to plan 5,000 cells, from the start of the process.

    python scripts/bench/dry_run.py [--repeats 3] [--done 1000]

Asked for: under 5 s. The grid crosses ten defenses, ten recoveries, ten budgets and five seeds of Fashion-MNIST; with
`--done`, so many results of an earlier run lie in the folder and are read for the expected time. It needs the data
(README, "Data without a hub") but no teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

BENCHMARK = """# @package _global_
name: plan
title: a plan
experiment: modelguard_grid
axes:
  defense: [none, rounding, top_k, temperature, gaussian_noise, logit_noise, random_redirect, reverse_sigmoid, mad,
            mad_argmax]
  recovery: [as_returned, top1, label_smoothing, average, ddae, ddae_plus, pbayes, defense_in_loop, s4l, pseudo_labels]
  budget.queries: [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]
  seed: [0, 1, 2, 3, 4]
"""


def plan(folder: Path) -> tuple[float, float, str]:
    """Wall and processor seconds of one dry run, and what it printed."""
    words = ["-m", "distill.benchmark", "+benchmark=plan", f"hydra.searchpath=[file://{folder}/configs]", "--dry-run"]
    started, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=True)
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, cpu_s, done.stdout


def finish(folder: Path, cells: int) -> None:
    """Leave results in the folders of the first cells."""
    from hydra import compose, initialize_config_dir

    from distill.benchmark import open_grid, place
    from distill.config import CONFIG_DIR

    search = f"hydra.searchpath=[file://{folder}/configs]"
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        grid = open_grid(compose("benchmark", overrides=["+benchmark=plan", search]))
        for cell in grid.cells[:cells]:
            path = place(cell, folder / "outputs") / "result.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"cost": {"seconds": 9.0}, "config": cell.config}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--done", type=int, default=1000)
    arguments = parser.parse_args()
    table = Table("5,000 cells", "wall s (median)", "all", "processor s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "configs/benchmark").mkdir(parents=True)
        (folder / "configs/benchmark/plan.yaml").write_text(BENCHMARK)
        for title, done in (("none finished", 0), (f"{arguments.done:,} finished", arguments.done)):
            if done:
                finish(folder, done)
            runs = [plan(folder) for _ in range(arguments.repeats)]
            wall = [run[0] for run in runs]
            table.add_row(
                title,
                f"{statistics.median(wall):.2f}",
                ", ".join(f"{s:.2f}" for s in wall),
                f"{statistics.median(run[1] for run in runs):.2f}",
            )
    console = Console()
    console.print(runs[-1][2])
    console.print(table)


if __name__ == "__main__":
    main()
