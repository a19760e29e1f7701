"""A table of finished runs, read from their files.

python -m distill.report                      every run under outputs/
python -m distill.report outputs/*-vs-rounding
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distill.config import NOT_IDENTITY, QUERY_GROUPS, STUDENT_GROUPS, digest
from distill.errors import DistillError
from distill.launch import SWEEP_FILE, one_line_errors
from distill.records import Result, TransferSet

log = logging.getLogger(__name__)

# Columns of the comparing table: title and how to read it from a result.
AXES = ("data", "teacher", "attack", "defense", "access", "sampling", "recovery", "signal", "objective", "student")
NUMBERS: dict[str, Any] = {
    "teacher acc": lambda r: r.accuracy["teacher"]["accuracy"],
    "defended acc": lambda r: r.accuracy["defended_teacher"]["accuracy"],
    "student acc": lambda r: r.accuracy["student"]["accuracy"],
    "agreement": lambda r: r.fidelity["agreement"],
    "own acc": lambda r: _own(r, "student/accuracy"),
    "own agreement": lambda r: _own(r, "fidelity/agreement"),
    "KL": lambda r: r.fidelity["kl"],
    "mean L1": lambda r: r.utility["l1_mean"],
    "queries": lambda r: r.cost["queries"],
    "tokens": lambda r: r.cost["tokens_in"] + r.cost["tokens_out"] if not r.classes else None,
    "usd": lambda r: r.cost["usd"],
}
UNKNOWN = "–"  # the run did not measure it

# What a defense costs honest users: title and name in `Result.utility`.
COSTS = {
    "accuracy lost": "accuracy_lost",
    "L1 mean": "l1_mean",
    "max": "l1_max",
    "KL": "kl",
    "ECE": "ece",
    "NLL": "nll",
    "OOD AUROC": "ood_auroc",
}
CONTROL = "ground_truth_answers"
# Controls that wrap another attack on a classifier: title and option.
CONTROLS = {
    "beyond truth": "ground_truth_labels",
    "beyond weaker": "weaker_model_labels",
    "beyond self-taught": "self_taught",
    "beyond random": "random_labels",
}
HOW_TAUGHT = ("defense", "attack", "access", "signal", "rollout", "objective")  # in these a control may differ


def load_runs(places: list[Path]) -> dict[Path, Result]:
    """The results at or below these folders; damaged ones are named in a warning and left out."""
    found: dict[Path, Result] = {}
    for place in places:
        for path in sorted(place.rglob("result.json")):
            try:
                found[path.parent] = Result.load(path)
            except DistillError as error:
                log.warning("%s", error)
    return found


def _number(title: str, result: Result) -> str:
    try:
        value = NUMBERS[title](result)
    except KeyError:
        value = None
    if value is None:
        return UNKNOWN
    if title in ("queries", "tokens"):
        return f"{value:,.0f}"
    return f"{value:.2f}" if title == "usd" else f"{value:.4f}"


def recovery_ratios(results: list[Result]) -> list[dict[str, float]]:
    """For each run, how much of what the undefended teacher's answers teach its student learnt.

    "recovery ratio" is (S_d − S_0)/(S_clean − S_0), of task accuracies: S_d of the run's student, S_0 of the untrained
    one, S_clean of the student of the run that differs in nothing but having no defense. "ground truth" is the same
    with the student of the control on ground truth in the place of S_d. A ratio is left out where a run that it needs
    is not among these, where there was nothing to learn (S_clean ≤ S_0), and for controls.
    """
    clean = {_common(r, "defense"): r for r in results if r.choices["defense"] == "none"}
    truth = {_common(r, *HOW_TAUGHT): r for r in results if r.choices["attack"] == CONTROL}
    found: list[dict[str, float]] = []
    for result in results:
        ratios: dict[str, float] = {}
        students = {"recovery ratio": result, "ground truth": truth.get(_common(result, *HOW_TAUGHT))}
        undefended = clean.get(_common(result, "defense"))
        top, start = _accuracy(undefended, "student"), _accuracy(result, "untrained")
        if result.cost["queries"] and top is not None and start is not None and top > start:
            for title, other in students.items():
                if (reached := _accuracy(other, "student")) is not None:
                    ratios[title] = (reached - start) / (top - start)
        found.append(ratios)
    return found


def beyond_controls(results: list[Result]) -> list[dict[str, float]]:
    """For each run, what the teacher's answers were worth: by how much the accuracy of its student is above those of
    the students of its controls, which differ in nothing but the answers to the very same queries.

    A control is told by its attack, which wraps the attack of the run; an attack that adapts heard the same answers in
    both, since nothing else differs. "beyond truth" is the difference from ground truth, and so on: from the best of
    several that differ in options of their own. One is left out where that control is not among these.
    """
    without: dict[tuple[str, ...], float] = {}
    for result in results:
        for title, option in CONTROLS.items():
            if result.choices["attack"] == option and (reached := _accuracy(result, "student")) is not None:
                control = title, _common(result, "attack"), digest(_told(result.config["attack"].get("attack")))
                without[control] = max(reached, without.get(control, 0.0))
    found: list[dict[str, float]] = []
    for result in results:
        run = _common(result, "attack"), digest(_told(result.config["attack"]))
        if (reached := _accuracy(result, "student")) is None:
            found.append({})
            continue
        found.append({title: reached - without[title, *run] for title in CONTROLS if (title, *run) in without})
    return found


def _common(result: Result, *but: str) -> str:
    """The same for two runs that differ in these groups alone. A path stands for itself: what it holds is told apart by
    the fingerprints, all but the teacher's, since a defense may train another one."""
    groups = {name: _told(result.config.get(name)) for name in QUERY_GROUPS + STUDENT_GROUPS if name not in but}
    return digest([groups, {name: value for name, value in result.fingerprints.items() if name != "teacher"}])


def _told(node: Any) -> Any:
    """A config without what can't change a result."""
    if isinstance(node, list):
        return [_told(child) for child in node]
    if isinstance(node, dict):
        return {name: _told(child) for name, child in node.items() if name not in NOT_IDENTITY}
    return node


def _own(result: Result, name: str) -> float | None:
    """A number of the attack's own student, where it has one."""
    track = result.tracks.get("B", {"own": False})
    return track.get(name) if track["own"] else None


def _accuracy(result: Result | None, who: str) -> float | None:
    return None if result is None else result.accuracy.get(who, {}).get("accuracy")


def comparison(runs: dict[Path, Result]) -> Table:
    """One row a run: what differs between the runs, the numbers, and the run's id. n of every number: the test rows."""
    results = list(runs.values())
    axes = [axis for axis in AXES if len({r.choices.get(axis) for r in results}) > 1]
    options = varied(results)
    seeds = len({r.seed for r in results}) > 1
    rows = sorted({r.test_rows for r in results})
    table = Table(box=box.SIMPLE_HEAD, caption=f"n = {', '.join(map(str, rows))} test rows; seed{'s' * seeds} "
                  f"{', '.join(map(str, sorted({r.seed for r in results})))}")  # fmt: skip
    for title in [*axes, *options, *(["seed"] if seeds else [])]:
        table.add_column(title)
    titles = [title for title in NUMBERS if any(_number(title, result) != UNKNOWN for result in results)]
    for title in titles:
        table.add_column(title, justify="right")
    ratios = recovery_ratios(results)
    shares = list(dict.fromkeys(title for row in ratios for title in row))
    if all(r.choices["defense"] == "none" for r in results):  # 1 by definition
        shares = [title for title in shares if title != "recovery ratio"]
    worths = beyond_controls(results)
    beyond = [title for title in CONTROLS if any(title in row for row in worths)]
    for title in [*shares, *beyond]:
        table.add_column(title, justify="right")
    table.add_column("run")
    for i, ((run_dir, result), share, worth) in enumerate(zip(runs.items(), ratios, worths, strict=True)):
        row = [result.choices.get(axis, UNKNOWN) for axis in axes]
        row += [values[i] for values in options.values()] + ([str(result.seed)] if seeds else [])
        row += [_number(title, result) for title in titles]
        row += [f"{share[title]:.4f}" if title in share else UNKNOWN for title in shares]
        row += [f"{worth[title]:+.4f}" if title in worth else UNKNOWN for title in beyond]
        table.add_row(*row, run_dir.name)
    return table


def varied(results: list[Result]) -> dict[str, list[str]]:
    """The options in which runs differ that chose the same component of that group (or in the budget, the curve's
    length and the like), by name, such as ``defense.delta``; for each its value in every run."""
    chosen: dict[str, dict[str, set[str]]] = {}
    flat = [
        _flat({name: _told(result.config.get(name)) for name in QUERY_GROUPS + STUDENT_GROUPS}) for result in results
    ]
    for result, options in zip(results, flat, strict=True):
        for name, value in options.items():
            choice = result.choices.get(name.partition(".")[0], "")
            chosen.setdefault(name, {}).setdefault(choice, set()).add(value)
    names = [name for name, by in chosen.items() if name != "seed" and any(len(values) > 1 for values in by.values())]
    return {name: [options.get(name, UNKNOWN) for options in flat] for name in names}


def _flat(node: Any, prefix: str = "") -> dict[str, str]:
    """The leaves of a config by their dotted names, as text."""
    if isinstance(node, dict):
        leaves: dict[str, str] = {}
        for name, child in node.items():
            leaves |= _flat(child, f"{prefix}.{name}" if prefix else str(name))
        return leaves
    return {prefix: UNKNOWN if node is None else str(node)}


def show_runs(places: list[Path]) -> None:
    """Print the comparing table of the finished runs at or below these folders."""
    runs = load_runs(places)
    if not runs:
        raise DistillError(f"no result.json under {', '.join(map(str, places))}; make a run first", "report")
    _console().print(comparison(runs))


def show_result(run_dir: Path) -> None:
    """Print the small table at the end of a run, where it lies and what to try next."""
    result = Result.load(run_dir / "result.json")
    title = f"{result.choices['attack']} vs {result.choices['defense']} on {result.choices['data']}"
    if SWEEP_FILE in os.environ:  # a sweep ends with one table for all
        log.info("%s: agreement %s (%s)", title, _number("agreement", result), _short(run_dir))
        return
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name in NUMBERS:
        if (number := _number(name, result)) != UNKNOWN:
            table.add_row(name, number)
    table.add_row("teacher forwards", f"{result.cost['teacher_forwards']:,}")
    for who, size in result.sizes.items():
        if size["parameters"] is not None:
            table.add_row(f"{who} parameters", f"{size['parameters']:,}")
    table.add_row("seconds", f"{result.cost['seconds']:.1f}")
    console = _console()
    console.print(f"\n{title}")
    console.print(table)
    if result.utility.get("l1_max"):
        costs = [f"{title} {result.utility[name]:.4f}" for title, name in COSTS.items() if name in result.utility]
        if "latency_s" in result.utility:
            costs.append(f"{1000 * result.utility['latency_s']:.3f} ms later")
        console.print(f"honest users get: {', '.join(costs)}", soft_wrap=True)
    for flag in result.flags:
        console.print(f"note: {flag}", soft_wrap=True)
    console.print(f"n = {result.test_rows} test rows, seed {result.seed}; run: {_short(run_dir)}", soft_wrap=True)
    if (experiment := result.choices.get("experiment", "None")) != "None":
        others = "defense=none,rounding,gaussian_noise,label_only"
        if not result.classes:
            others = "budget.queries=250,1000,4000"
        console.print(f"next: python -m distill.train +experiment={experiment} -m {others}", soft_wrap=True)


def show_query(folder: Path, transfer_set: TransferSet, cost: dict[str, float]) -> None:
    """Print what a query stage left and what it cost."""
    _console().print(
        f"{len(transfer_set):,} answers (reveals: {transfer_set.profile}) for {cost['usd']:.2f} usd, "
        f"{cost['teacher_forwards']:,} teacher forwards: {_short(folder / 'transfer_set')}",
        soft_wrap=True,
    )


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _console() -> Console:
    """Piped into a file or a notebook, whatever these say of colours, a table is plain and not folded to 80 columns."""
    terminal = sys.stdout.isatty()
    return Console(highlight=False, force_terminal=terminal, no_color=not terminal, width=None if terminal else 240)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distill.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("places", nargs="*", type=Path, default=[Path("outputs")], metavar="FOLDER")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with one_line_errors():
        show_runs(arguments.places)


if __name__ == "__main__":
    main()
