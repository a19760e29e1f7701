"""How long a report of many runs takes: results like a real one, of a made-up grid.

    python scripts/bench/report.py RUN_DIR [N…]

Writes N copies of RUN_DIR's result.json, defense x recovery x seed, with noise on their numbers, as a benchmark and as
plain folders, and times each step in a process of its own, imports included: seconds, and of the processor.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

SEEDS = 5
STEPS = {
    "tables of runs": ["outputs"],
    "one row a run": ["outputs", "--runs"],
    "filtered": ["outputs", "seed=0,1", "defense=d1,d2"],
    "csv": ["outputs", "--csv", "runs.csv"],
    "tables of a benchmark": ["benchmark"],
    "html of a benchmark": ["benchmark", "--html", "page.html"],
}


def grid(run: Path, number: int, root: Path) -> None:
    """`number` runs: about as many defenses as recoveries, and every seed of every arm."""
    real = json.loads((run / "result.json").read_text())
    arms = number // SEEDS
    defenses = max(2, round(arms**0.5))
    others = -(-arms // defenses)
    axes = {
        "defense": ["none", *(f"d{i}" for i in range(1, defenses))],
        "recovery": ["as_returned", *(f"r{i}" for i in range(1, others))],
    }
    noise, cells = random.Random(0), []
    cases = [*product(*axes.values(), range(SEEDS))][:number]
    for i, (defense, recovery, seed) in enumerate(cases):
        result = json.loads(json.dumps(real)) | {"run_id": f"{i:08x}", "seed": seed}
        result["choices"] |= {"defense": defense, "recovery": recovery}
        result["config"]["seed"] = seed
        for section in ("fidelity", "utility"):
            result[section] = {name: value * noise.uniform(0.9, 1.0) for name, value in result[section].items()}
        folder = root / "outputs" / f"{real['choices']['attack']}-vs-{defense}" / result["run_id"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result, indent=1))
        for name in (".hydra", "student"):
            (folder / name).mkdir()
        at = {"defense": defense, "recovery": recovery, "seed": str(seed)}
        cells.append({"at": at, "control": "", "run": result["run_id"], "folder": f"../{folder.relative_to(root)}",
                      "status": "done", "reason": "", "seconds": 1.0})  # fmt: skip
    judge = {"per": "defense", "over": ["recovery"], "baseline": "none", "budget": None,
             "student": "fidelity/agreement", "utility": "utility/l1_mean", "utility_better": "lower"}  # fmt: skip
    made = {"commit": "0" * 40, "dirty": False, "date": "", "hardware": "", "torch": "", "seconds": 0.0}
    axes["seed"] = [str(seed) for seed in range(SEEDS)]
    manifest = {"schema": 1, "name": "made_up", "title": f"{number:,} made-up runs", "experiment": "", "axes": axes,
                "judge": judge, "controls": [], "cells": cells, "made": made}  # fmt: skip
    (root / "benchmark").mkdir()
    (root / "benchmark" / "benchmark.json").write_text(json.dumps(manifest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("numbers", nargs="*", type=int, default=[2_000, 10_000])
    arguments = parser.parse_args()
    print(f"{'runs':26}" + "".join(f"{number:>16,}" for number in arguments.numbers))
    with tempfile.TemporaryDirectory() as name:
        for number in arguments.numbers:
            grid(arguments.run, number, Path(name, str(number)))
        for step, words in STEPS.items():
            print(f"{step:26}", end="", flush=True)
            for number in arguments.numbers:
                started, spent = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
                subprocess.run([sys.executable, "-m", "distill.report", *words], cwd=Path(name, str(number)),
                               check=True, stdout=subprocess.DEVNULL)  # fmt: skip
                spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - spent
                print(f"{time.monotonic() - started:9.1f} ({spent:4.1f})", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
