"""How long a user waits: `--help`, and the quickstart's first optimiser step with the teacher cached.

    python scripts/bench/startup.py [--runs 5]

The targets: help in under 1 s without loading torch; the first step within 6 s of the start of the process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICKSTART = ["+experiment=quickstart", "curve=[]", "run.progress=false", "training.log_steps=1"]


def seconds_of_help(cwd: Path) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "distill.train", "--help"], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def seconds_to_first_step(cwd: Path, seed: int) -> float:
    """Until the first row of `metrics.jsonl`, which the first step writes; a new seed asks new queries each time."""
    command = [sys.executable, "-m", "distill.train", *QUICKSTART, f"seed={seed}"]
    started = time.monotonic()
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        before = set(cwd.glob("outputs/*/*/metrics.jsonl"))
        while not (set(cwd.glob("outputs/*/*/metrics.jsonl")) - before) and process.poll() is None:
            time.sleep(0.005)
        seconds = time.monotonic() - started
        process.wait()
    if process.returncode != 0:
        sys.exit(f"the quickstart failed with exit code {process.returncode}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        os.environ["DISTILL_CACHE"] = str(cwd / "cache")
        seconds_to_first_step(cwd, seed=1000)  # trains the teacher
        rows = {
            "--help": [seconds_of_help(cwd) for _ in range(runs)],
            "quickstart, first step": [seconds_to_first_step(cwd, seed) for seed in range(runs)],
        }
    print(f"load {os.getloadavg()[0]:.2f}, n = {runs}")
    print(f"{'seconds from process start':<28} {'median':>8} {'min':>8} {'max':>8}")
    for name, seconds in rows.items():
        print(f"{name:<28} {statistics.median(seconds):8.2f} {min(seconds):8.2f} {max(seconds):8.2f}")


if __name__ == "__main__":
    main()
