"""A grid of experiments: every cell an ordinary run, finished ones skipped, the rest shared out among workers.

    python -m distill.benchmark +benchmark=classification_defenses
    python -m distill.benchmark +benchmark=classification_defenses --dry-run
    python -m distill.benchmark +benchmark=lm_defenses +launch=slurm -m worker=0,1,2,3

A worker takes a cell that nobody has finished or holds, until none is left; so any number of them, on one machine or on
many that share a folder, are one grid. What is known of a cell lies in its folder.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from distill.config import CONFIG_DIR
from distill.errors import DistillError, Incompatible, nearest
from distill.grid import SEED, Cell, Grid, values_of
from distill.launch import SWEEP_FILE, explain, launch, note_run, options, write_atomically
from distill.results import MANIFEST

log = logging.getLogger(__name__)

ATTEMPT = "attempt.json"  # in the folder of a cell that is being run, failed, or can't be
POLL_S = 0.5
GOLDEN = (5**0.5 - 1) / 2  # its multiples lie evenly on a circle, however many they are
DEATHS = 5  # of workers in a row, with no cell ended between them
DONE, FAILED, NOT_APPLICABLE, OPEN = "done", "failed", "n/a", "open"


@dataclass
class JudgeConfig:
    """What is judged, and how: see `distill.results.Judge`."""

    per: str = "defense"
    over: list[str] = field(default_factory=lambda: ["recovery"])
    baseline: str = "none"
    budget: str | None = None
    student: str = "fidelity/agreement"
    utility: str = "utility/l1_mean"
    utility_better: str = "lower"


@dataclass
class BenchmarkConfig:
    """The root of `configs/benchmark.yaml`.

    Attributes:
        experiment: The experiment that every cell starts from.
        overrides: What all cells set besides.
        axes, controls, skip: See `distill.grid.Grid`.
        only: Axis to the values that are run this time; null for all.
        workers: Processes on this machine; null for one a core.
        worker: Its number where this process is one of several that a launcher started; null to start the processes.
        threads: Of each worker; null to share the cores out.
        retries: How often a cell that failed or was killed is tried again in one launch.
        publish: A folder, such as results, to which the finished grid is copied: one small JSON a cell, and figures.
    """

    name: str = MISSING
    title: str = MISSING
    experiment: str = MISSING
    overrides: list[str] = field(default_factory=list)
    axes: dict[str, Any] = field(default_factory=dict)
    controls: dict[str, Any] = field(default_factory=dict)
    skip: list[dict[str, Any]] = field(default_factory=list)
    only: Any = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    workers: int | None = None
    worker: int | None = None
    threads: int | None = None
    retries: int = 1
    dry_run: bool = False
    progress: bool = True
    publish: str | None = None


ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)


def run(config: Any) -> None:
    """The task of `python -m distill.benchmark`."""
    from hydra.core.hydra_config import HydraConfig

    folder = Path(HydraConfig.get().runtime.output_dir)
    outputs = folder.parent.parent
    grid = open_grid(config, [str(place) for place in HydraConfig.get().searchpath or ()])
    cells = grid.checked()
    wanted = chosen(cells, config.only, grid)
    if config.dry_run:
        show_plan(config, wanted, outputs)
        return
    folder.mkdir(parents=True, exist_ok=True)
    started, peak = time.time(), 0.0
    launch = os.environ.get(SWEEP_FILE, f"{os.getpid()}-{started:.0f}")  # the same for all workers of one launch
    wanted = in_order(wanted, config.judge.over)
    try:
        if config.worker is not None:
            work(wanted, config.worker, outputs, launch, config.retries, config.threads or 1)
        else:
            peak = work_together(wanted, outputs, launch, config)
    finally:
        write_manifest(config, grid, cells, outputs, folder, started, peak)
    note_run(folder)  # of several workers' table, at the end of all
    if config.worker is None:
        from distill.report import show_runs

        show_runs([folder])
        if config.publish is not None:
            publish(folder, Path(config.publish) / config.name)


def open_grid(config: Any, search: Sequence[str] = ()) -> Grid:
    """The grid that a benchmark's configuration describes; `search` are further places of configs, as Hydra spells
    them."""
    judge, axes = config.judge, config.axes
    shared = [SEED] if judge.budget is None else [judge.budget, SEED]
    for key, axis in (("per", judge.per), *(("over", axis) for axis in judge.over), *(("budget", a) for a in shared)):
        if axis not in axes:
            raise DistillError(f"no axis '{axis}'.{nearest(axis, axes)}", f"judge.{key}")
    folders = [CONFIG_DIR, *(Path(place.removeprefix("file://")) for place in search)]
    judged = values_of(judge.per, axes[judge.per], folders)
    if judge.baseline not in judged:
        raise DistillError(f"is a value of {judge.per}.{nearest(judge.baseline, judged)}", "judge.baseline")
    base = [f"+experiment={config.experiment}", *config.overrides]
    if search:
        base.append(f"hydra.searchpath=[{','.join(search)}]")
    return Grid(config.name, base, axes, config.controls, shared, judged[judge.baseline], config.skip, folders)


def chosen(cells: list[Cell], only: Any, grid: Grid) -> list[Cell]:
    """The cells that lie at these values of the axes."""
    wanted: dict[str, set[str]] = {}
    for axis, values in (only or {}).items():
        if axis not in grid.values:
            raise DistillError(f"no axis '{axis}'.{nearest(axis, grid.values)}", "only")
        wanted[axis] = {str(value) for value in ([values] if isinstance(values, (str, int, float)) else values)}
        for value in wanted[axis]:
            if value not in grid.values[axis]:
                raise DistillError(f"no value '{value}'.{nearest(value, grid.values[axis])}", f"only.{axis}")
    return [cell for cell in cells if all(cell.at.get(axis) in {None, *values} for axis, values in wanted.items())]


def in_order(cells: list[Cell], inner: Sequence[str]) -> list[Cell]:
    """The cells so that those which differ on the `inner` axes alone follow one another: a process keeps what the
    evaluations of one defense and seed share."""
    blocks: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        outer = tuple(pair for pair in cell.at.items() if pair[0] not in inner)
        blocks.setdefault((cell.control, outer), []).append(cell)
    return [cell for block in blocks.values() for cell in block]


# --- the state of a cell --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """How far a cell is: its status, why, and how often it was tried in which launch."""

    status: str
    reason: str = ""
    attempts: int = 0
    launch: str = ""

    @classmethod
    def of(cls, cell: Cell, outputs: Path) -> State:
        folder = place(cell, outputs)
        if (folder / "result.json").exists():
            return cls(DONE)
        if cell.reason:
            return cls(NOT_APPLICABLE, cell.reason)
        try:
            return cls(**json.loads((folder / ATTEMPT).read_text()))
        except (OSError, ValueError, TypeError):
            return cls(OPEN)

    def ended(self, launch: str, retries: int) -> bool:
        """Whether this launch leaves the cell as it is."""
        tried = self.launch == launch and self.attempts > retries
        return self.status in (DONE, NOT_APPLICABLE) or (self.status == FAILED and tried)


def place(cell: Cell, outputs: Path) -> Path:
    """The folder of a cell's run."""
    return outputs / cell.name / cell.run


# --- workers --------------------------------------------------------------------------------------------------------


def work(cells: list[Cell], number: int, outputs: Path, launch: str, retries: int, threads: int) -> None:
    """Run cells, one after the other, until each is finished, failed or held by another worker that finishes it.

    Workers start far from one another, wherever their numbers end, so that they rarely share what others have begun.
    """
    import torch

    torch.set_num_threads(threads)
    start = round(len(cells) * (number * GOLDEN % 1))
    left = cells[start:] + cells[:start]
    while left:
        for cell in left:
            if State.of(cell, outputs).ended(launch, retries):
                continue
            with taken(cell, outputs) as mine:
                if mine and not State.of(cell, outputs).ended(launch, retries):
                    run_cell(cell, outputs, launch, retries)
        left = [cell for cell in left if not State.of(cell, outputs).ended(launch, retries)]
        if left:  # another worker holds them, or they failed and are tried again
            time.sleep(POLL_S)


@contextmanager
def taken(cell: Cell, outputs: Path) -> Iterator[bool]:
    """Whether this process holds the cell, and its queries as long as they have not been asked."""
    folder = place(cell, outputs)
    queries = folder.parent / f"queries-{cell.query}"
    locks = [folder / ".lock"] if (queries / "query.json").exists() else [queries / ".taken", folder / ".lock"]
    with ExitStack() as held:
        try:
            for path in locks:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = filelock.FileLock(path, blocking=False)
                held.enter_context(lock)
        except filelock.Timeout:
            yield False
        else:
            yield True


def run_cell(cell: Cell, outputs: Path, launch: str, retries: int) -> None:
    """One run, as `python -m distill.train` makes it. What goes wrong is noted in its folder."""
    from distill.train import extract

    folder, before = place(cell, outputs), State.of(cell, outputs)
    attempts = 1 + (before.attempts if before.launch == launch else 0)

    def note(status: str, reason: str, attempts: int = attempts) -> None:
        write_atomically(folder / ATTEMPT, json.dumps(asdict(State(status, reason, attempts, launch))) + "\n")

    if attempts > retries + 1:  # the worker that held it died, not the cell
        note(FAILED, "killed each time; was there memory for it?")
        return
    note(OPEN, "")
    with logged(folder / "train.log"):
        try:
            (folder / ".hydra").mkdir(exist_ok=True)
            config = cell.full_config
            OmegaConf.save(config, folder / ".hydra" / "config.yaml")
            OmegaConf.save(OmegaConf.create(list(cell.overrides)), folder / ".hydra" / "overrides.yaml")
            extract(config, folder, cell.choices)
        except Incompatible as error:
            note(NOT_APPLICABLE, str(error))
        except Exception as error:
            line = explain(error)
            log.error("%s", line or traceback.format_exc())
            # The user has to mend what can be explained; the rest may have been an accident.
            note(FAILED, line or f"{type(error).__name__}: {error}", retries + 1 if line else attempts)
        else:
            (folder / ATTEMPT).unlink()


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Messages go to this file, and nowhere else."""
    root = logging.getLogger()
    before, handler = root.handlers[:], logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.handlers[:] = [handler]
    try:
        yield
    finally:
        root.handlers[:] = before
        handler.close()


# --- several workers on this machine --------------------------------------------------------------------------------


def work_together(cells: list[Cell], outputs: Path, launch: str, config: Any) -> float:
    """Run the cells in processes of this machine, whatever becomes of one of these, and show how far it is.

    Returns the largest memory that the processes held together, in GiB.
    """
    from tqdm.auto import tqdm

    todo = [cell for cell in cells if not State.of(cell, outputs).ended(launch, config.retries)]
    if not todo:
        return 0.0
    workers = min(config.workers or cores(), len(todo))
    threads = config.threads or max(1, cores() // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a worker starts
    context = multiprocessing.get_context("spawn")
    level = logging.getLogger().level

    def start(number: int) -> Any:
        words = (number, todo, outputs, launch, config.retries, threads, level)
        process = context.Process(target=_worker, args=words, name=f"worker {number}")
        process.start()
        return process

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does; workers would go on
    processes = [start(number) for number in range(workers)]
    peak, deaths, ended = 0.0, 0, 0
    every = 0.5 if sys.stderr.isatty() else 60  # in a file, a line a minute
    with tqdm(total=len(todo), unit="cell", mininterval=every, disable=not config.progress) as bar:
        try:
            while any(process.exitcode != 0 for process in processes):
                time.sleep(POLL_S)
                peak = max(peak, _memory_gib(processes))
                states = [State.of(cell, outputs) for cell in todo]
                now = sum(state.ended(launch, config.retries) for state in states)
                deaths, ended = (0 if now > ended else deaths), now
                bar.set_postfix(failed=sum(state.status == FAILED for state in states), refresh=False)
                bar.update(now - bar.n)
                for number, process in enumerate(processes):
                    if process.exitcode not in (None, 0):
                        deaths += 1
                        if deaths > DEATHS:
                            raise DistillError("workers die one after the other; a train.log may say why", "workers")
                        processes[number] = start(number)
        finally:
            _stop(processes)
            signal.signal(signal.SIGTERM, before)
    return peak


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _worker(number: int, cells: list[Cell], outputs: Path, launch: str, retries: int, threads: int, level: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    logging.getLogger().setLevel(level)
    cards = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if cards > 1:  # a GPU each, as far as they go
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", str(number % cards))
    try:
        work(cells, number, outputs, launch, retries, threads)
    except KeyboardInterrupt:  # the process that started this one says so
        sys.exit(130)


def _memory_gib(processes: list[Any]) -> float:
    import psutil

    total = 0
    for process in processes:
        try:
            total += psutil.Process(process.pid).memory_info().rss
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return total / 2**30


def _stop(processes: list[Any]) -> None:
    """End those that still run, in such a way that what they have finished is kept."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join(30)
        if process.is_alive():
            process.kill()
            process.join()


# --- before and after -----------------------------------------------------------------------------------------------


def show_plan(config: Any, cells: list[Cell], outputs: Path) -> None:
    """How many cells there are, how far they are, and what the rest will take."""
    from rich.console import Console

    states = [State.of(cell, outputs) for cell in cells]
    counts = Counter(state.status for state in states)
    todo = [cell for cell, state in zip(cells, states, strict=True) if state.status in (OPEN, FAILED)]
    queries = {cell.query for cell in todo}
    console = Console(highlight=False, soft_wrap=True)
    told = ", ".join(f"{counts[status]:,} {status}" for status in (DONE, FAILED, NOT_APPLICABLE, OPEN))
    console.print(f"{config.name}: {len(cells):,} cells: {told}")
    console.print(f"to do: {len(todo):,} students on {len(queries):,} transfer sets", end="")
    taken_s = seconds_of([cell for cell, state in zip(cells, states, strict=True) if state.status == DONE], outputs)
    if taken_s and todo:
        workers = config.workers or cores()
        seconds = expected(todo, taken_s)
        console.print(
            f", about {_duration(seconds / workers)} on {workers} workers ({_duration(seconds)} of work)", end=""
        )
    console.print("" if taken_s or not todo else ", for a time not known before one is finished")
    usd = sum(price(cell) or 0.0 for cell in {cell.query: cell for cell in todo}.values())
    console.print(f"money: the attackers are billed up to {usd:,.2f} usd", end="")
    console.print("" if all(price(cell) is not None for cell in todo) else ", besides those without a bound on it")
    reasons = Counter(state.reason for state in states if state.status in (NOT_APPLICABLE, FAILED))
    for reason, count in reasons.most_common():
        console.print(f"  {count:,} × {reason}", markup=False)


def seconds_of(cells: list[Cell], outputs: Path) -> list[tuple[Cell, float]]:
    """What finished cells took."""
    return [(cell, json.loads((place(cell, outputs) / "result.json").read_text())["cost"]["seconds"]) for cell in cells]


def expected(todo: list[Cell], taken_s: list[tuple[Cell, float]]) -> float:
    """Seconds of work that are left: each cell as the median of those finished that differ from it in the seed alone,
    else of those with which it shares the most values."""
    total = 0.0
    known: dict[tuple[tuple[str, str], ...], float] = {}
    for cell in todo:
        at = tuple((axis, value) for axis, value in [*cell.at.items(), ("control", cell.control)] if axis != SEED)
        if at not in known:
            shared = [sum(other.at.get(axis, other.control) == value for axis, value in at) for other, _ in taken_s]
            most = max(shared)
            known[at] = statistics.median(s for (_, s), same in zip(taken_s, shared, strict=True) if same == most)
        total += known[at]
    return total


def price(cell: Cell) -> float | None:
    """What the attacker is billed at most, in usd; None where nothing bounds it."""
    access, budget = cell.config["access"], cell.config["budget"]
    if budget["usd"] is not None:
        return float(budget["usd"])
    if access["usd_per_mtok_in"] or access["usd_per_mtok_out"]:
        each = max(access["usd_per_mtok_in"], access["usd_per_mtok_out"]) / 1e6
        return None if budget["tokens"] is None else budget["tokens"] * each
    if not access["usd_per_query"]:
        return 0.0
    return None if budget["queries"] is None else float(budget["queries"] * access["usd_per_query"])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def write_manifest(
    config: Any, grid: Grid, cells: list[Cell], outputs: Path, folder: Path, started: float, peak: float
) -> None:
    """`benchmark.json`: the axes, how it is judged, and where each cell's run lies."""
    rows: list[dict[str, Any]] = []
    made: dict[str, Any] = {}
    seconds = Counter[str]()
    for cell in cells:
        state, at = State.of(cell, outputs), place(cell, outputs)
        row = {
            "at": cell.at,
            "control": cell.control,
            "run": cell.run,
            "folder": os.path.relpath(at, folder),
            "status": state.status,
            "reason": state.reason,
        }
        if state.status == DONE:
            result = json.loads((at / "result.json").read_text())
            row["seconds"] = round(result["cost"]["seconds"], 2)
            for name in ("seconds", "train_seconds", "recovery_seconds"):
                seconds[name] += result["cost"].get(name, 0.0)
            made = made or _made(result["environment"])
        rows.append(row)
    before = json.loads((folder / MANIFEST).read_text())["made"] if (folder / MANIFEST).exists() else {}
    made |= {
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        **{name: round(total, 1) for name, total in seconds.items()},
        "peak_gib": round(max(peak, before.get("peak_gib", 0.0)), 2),
    }
    judge = OmegaConf.to_container(config.judge)
    manifest = {
        "schema": 1,
        "name": config.name,
        "title": config.title,
        "experiment": config.experiment,
        "axes": {axis: list(values) for axis, values in grid.values.items()},
        "judge": judge,
        "controls": list(config.controls),
        "cells": rows,
        "made": made,
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _made(environment: dict[str, Any]) -> dict[str, Any]:
    """Where and with what."""
    hardware = environment["gpu"] or f"{os.cpu_count()} {environment['cpu']} cores"
    versions = environment["versions"]
    return {
        "commit": environment["commit"],
        "dirty": environment["dirty"],
        "hardware": hardware,
        "torch": versions["torch"],
        "python": versions["python"],
        "platform": environment["platform"],
    }


def publish(folder: Path, target: Path) -> None:
    """Copy a grid to where it is kept: the manifest, one small JSON a cell, figures and their numbers.

    A cell that has not run here stays as it was published before, so that a grid may be run in parts, on machines that
    share no folder (`only={seed:[2]}`: pairs of one seed should be of one machine). Cells of an older grid go.
    """
    from distill.figures import export
    from distill.results import compare

    manifest = json.loads((folder / MANIFEST).read_text())
    before = json.loads((target / MANIFEST).read_text())["cells"] if (target / MANIFEST).exists() else []
    kept = {cell["run"]: cell for cell in before if cell["status"] == DONE}
    target.mkdir(parents=True, exist_ok=True)
    for i, cell in enumerate(manifest["cells"]):
        if cell["status"] == DONE:
            result = json.loads((folder / cell["folder"] / "result.json").read_text())
            result["environment"] = {"commit": result["environment"]["commit"]}
            text = json.dumps(result, sort_keys=True, separators=(",", ":"))
            write_atomically(target / f"{cell['run']}.json", text + "\n")
        elif cell["run"] in kept:
            cell = kept[cell["run"]]
        manifest["cells"][i] = cell | {"folder": ""}
    finished = {cell["run"] for cell in manifest["cells"] if cell["status"] == DONE}
    for old in target.glob("*.json"):
        if old.stem not in finished:
            old.unlink()
    write_atomically(target / MANIFEST, json.dumps(manifest, separators=(",", ":")) + "\n")
    export(compare([target]), target)
    log.info("published: %s", target)


def help_text(title: str, module: str, _: list[str]) -> str:
    """The `--help` of this entry point."""
    lines = [title, "+benchmark="]
    lines += [f"  {name:<24} {text}" for name, text in options("benchmark").items()]
    lines += ["\n+launch="]
    lines += [f"  {name:<24} {text}" for name, text in options("launch").items()]
    lines += [
        "\nkeys",
        "  --dry-run                how many cells, how many are done, what the rest takes; dry_run=true",
        "  workers=N threads=N      processes on this machine and threads of each (default: a process a core)",
        "  only={AXIS:[A,B]}        run these cells alone",
        "  overrides=[KEY=VALUE]    for every cell, such as tracker=wandb",
        "  axes.AXIS=[A,B]          other values of an axis; +axes.AXIS.NAME=OVERRIDE adds one",
        "  publish=results          copy the finished grid there: one small JSON a cell, and figures",
        "  retries=N                of a cell that failed or was killed",
        "  worker=N                 one of several that a launcher starts: +launch=… -m worker=0,1,2",
    ]
    return "\n".join(lines) + f"\n\nusage: python -m {module} +benchmark=NAME [KEY=VALUE …]\n"


def main() -> None:
    sys.argv[1:] = ["dry_run=true" if word == "--dry-run" else word for word in sys.argv[1:]]
    launch(run, "benchmark", __doc__ or "", BenchmarkConfig, help_text)


if __name__ == "__main__":
    from distill.benchmark import main as named  # a job elsewhere, and what it hands back, can't name `__main__`

    named()
