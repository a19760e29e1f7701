"""Finished runs as one frame: those of a benchmark, of a sweep, or of any folders. pandas only, no torch."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from distill.config import NOT_IDENTITY, QUERY_GROUPS, STUDENT_GROUPS
from distill.errors import DistillError, nearest
from distill.records import Result
from distill.trackers.rows import flat

log = logging.getLogger(__name__)

MANIFEST = "benchmark.json"
MANIFEST_SCHEMA = 1
UNKNOWN = "–"  # the run did not measure it, or has no such option

# The groups of which a run chooses one option, in the order of a table's columns.
GROUPS = (
    *("data", "pool", "teacher", "attack", "defense", "access", "sampling"),
    *("recovery", "signal", "rollout", "objective", "student", "training"),
)
# Attacks that ask no teacher: option -> what it is the control of.
CONTROLS = {
    "ground_truth_labels": "ground truth",
    "ground_truth_answers": "ground truth",
    "weaker_model_labels": "weaker model",
    "self_taught": "self-taught",
    "random_labels": "random labels",
    "no_teacher": "no teacher",
    "no_teacher_text": "no teacher",
}
# How much of what there was to learn, and what the answers were worth: title -> column.
RATIOS = {"recovery ratio": "ratio/recovery", "ground truth": "ratio/ground_truth"}
BEYOND = {
    "beyond truth": "beyond/ground_truth_labels",
    "beyond weaker": "beyond/weaker_model_labels",
    "beyond self-taught": "beyond/self_taught",
    "beyond random": "beyond/random_labels",
}
TRUTH = "ground_truth_answers"
MEASURING = ("metric", "outliers", "curve")  # groups that say what is measured: the student does not depend on them
HOW_TAUGHT = ("defense", "attack", "access", "signal", "rollout", "objective")  # in these that control may differ


@dataclass(frozen=True)
class Judge:
    """What is judged, and how.

    Args:
        per: The axis whose values are judged.
        over: The axes over which the worst case is taken.
        baseline: The value of `per` that the others are compared with.
        budget: The axis of budgets, for curves; None without one.
        student: How close the student comes: a column of numbers; higher is closer.
        utility: What honest users get: a column of numbers.
        utility_better: "lower", as of a distance, or "higher", as of an accuracy.
    """

    per: str = "defense"
    over: tuple[str, ...] = ("attack", "recovery")
    baseline: str = "none"
    budget: str | None = None
    student: str = "fidelity/agreement"
    utility: str = "utility/l1_mean"
    utility_better: str = "lower"


@dataclass(frozen=True)
class Comparison:
    """Runs that are compared: a benchmark's, or those found in some folders.

    Args:
        axes: What was varied, seeds apart: a column of `frame` and its values in order.
        frame: One row a finished run: run, folder (where its result.json lies, or the published file), control ("" or
            the control's name), a column of text for each axis ("–" where a control has none), seed, n (test rows),
            profile, ``choice/<group>``, flags (a list of text), the headline numbers under the names of
            `distill.trackers.rows.flat`, and ``own/…`` (of the attack's own student), ``ratio/…`` and ``beyond/…``
            (`recovery_ratios`, `beyond_controls`); NaN where a run has not measured it.
        missing: The cells without a result: the axes, seed, control, status and reason.
        made: Of what all this is: commit, dirty, date, hardware …
        results: The results themselves, by `frame`'s folder.
        benchmark: Whether a manifest says what was varied and is judged; else it is a guess.
    """

    name: str
    title: str
    axes: dict[str, list[str]]
    frame: pd.DataFrame
    judge: Judge
    missing: pd.DataFrame
    made: dict[str, Any]
    results: dict[str, Result] = field(default_factory=dict, repr=False)
    benchmark: bool = False


Run = tuple[Path, Result, str, dict[str, str]]  # its folder or file, what it measured, of which control, its axes


# --- reading --------------------------------------------------------------------------------------------------------


def load_runs(places: Iterable[Path]) -> dict[Path, Result]:
    """The results at or below these folders; damaged ones are named in a warning and left out."""
    found: dict[Path, Result] = {}
    for place in places:
        for folder, below, files in os.walk(place):
            below.sort()
            if "result.json" in files:
                below.clear()  # there are no runs inside of runs
                if (result := _load(Path(folder, "result.json"))) is not None:
                    found[Path(folder)] = result
    return found


def _load(path: Path) -> Result | None:
    try:
        return Result.load(path)
    except DistillError as error:
        log.warning("%s", error)
        return None


def compare(places: Iterable[Path], where: Mapping[str, list[str]] | None = None) -> Comparison:
    """The runs at these places, those that match `where`.

    Args:
        places: A benchmark's folder, which says what was varied and what is judged; or any folders with runs below:
            then the axes are the choices and options in which the runs differ.
        where: An axis, a choice (``defense``), ``seed``, or an option (``defense.beta``), and the values to keep.

    Raises:
        DistillError: There is nothing; several benchmarks; an unknown key or value.
    """
    places, where = list(places), dict(where or {})
    manifests = [place / MANIFEST for place in places if (place / MANIFEST).is_file()]
    if not manifests:
        return _compare_runs(places, where)
    if len(places) > 1:
        raise DistillError(f"{places[0]} and {places[1]}: one benchmark at a time", "report")
    return _compare_cells(manifests[0], where)


def _compare_cells(path: Path, where: dict[str, list[str]]) -> Comparison:
    """What a benchmark's manifest tells."""
    try:
        manifest = json.loads(path.read_text())
        if manifest["schema"] != MANIFEST_SCHEMA:
            raise DistillError(f"{path} has schema {manifest['schema']}; this version reads {MANIFEST_SCHEMA}")
        axes = {name: [*map(str, values)] for name, values in manifest["axes"].items() if name != "seed"}
        judge = Judge(**manifest["judge"] | {"over": tuple(manifest["judge"]["over"])})
        if judge.per not in axes:
            raise ValueError(f"it judges {judge.per}, which is no axis")
        runs, missing = _cells(path.parent, manifest["cells"], axes)
        about = manifest["name"], manifest["title"], manifest["made"]
    except (ValueError, KeyError, TypeError) as error:
        raise DistillError(f"{path} is not a benchmark of this program ({error})") from None
    if where and runs:
        options = [leaves(result.config) for _, result, _, _ in runs]
        _check_known(where, _known([run[1] for run in runs], options, axes))
        runs = [run for run, own in zip(runs, options, strict=True) if _kept(run[1], own, run[3], run[2], where)]
    if not runs:
        raise DistillError(f"no cell of {path.parent} has {_words(where) or 'finished'}", "report")
    for key in set(where) & set(missing.columns):
        missing = missing[missing[key].isin([*where[key], UNKNOWN])]
    there = {axis: {*missing[axis], *(run[3][axis] for run in runs)} for axis in axes}
    axes = {axis: [value for value in values if value in there[axis]] for axis, values in axes.items()}
    name, title, made = about
    results = {str(folder): result for folder, result, _, _ in runs}
    return Comparison(
        name, title, axes, _frame(runs), judge, missing.reset_index(drop=True), made, results, benchmark=True
    )


def _cells(home: Path, cells: list[dict[str, Any]], axes: Iterable[str]) -> tuple[list[Run], pd.DataFrame]:
    """The cells that have results, and those that have none."""
    loaded: dict[Path, Result | None] = {}  # cells may share a run
    runs, missing = [], []
    for cell in cells:
        at = {axis: str(cell["at"].get(axis, UNKNOWN)) for axis in (*axes, "seed")}
        control, status, reason = cell["control"], cell["status"], cell["reason"]
        if status == "done":
            file = home / f"{cell['run']}.json"  # as published; else where it was made
            file = file if file.is_file() else home / cell["folder"] / "result.json"
            if file not in loaded:
                loaded[file] = _load(file) if file.is_file() else None
            if (result := loaded[file]) is not None:
                folder = file.parent if file.name == "result.json" else file
                runs.append((folder, result, control, {axis: at[axis] for axis in axes}))
                continue
            status, reason = "open", f"{file} is gone or damaged"
        missing.append({**at, "control": control, "status": status, "reason": reason})
    return runs, pd.DataFrame(missing, columns=[*axes, "seed", "control", "status", "reason"])


def _compare_runs(places: list[Path], where: dict[str, list[str]]) -> Comparison:
    """What finished runs tell of themselves."""
    found = load_runs(places)
    named = ", ".join(map(str, places))
    if not found:
        benchmarks = sorted(str(path.parent) for place in places for path in place.glob(f"*/{MANIFEST}"))
        what = f"name one benchmark: {', '.join(benchmarks)}" if benchmarks else "make a run first"
        raise DistillError(f"no result.json under {named}; {what}", "report")
    options = [leaves(result.config) for result in found.values()]
    if where:
        _check_known(where, _known(list(found.values()), options, {}))
        kept = [_kept(result, own, {}, "", where) for result, own in zip(found.values(), options, strict=True)]
        options = [own for own, keep in zip(options, kept, strict=True) if keep]
        found = {folder: result for (folder, result), keep in zip(found.items(), kept, strict=True) if keep}
        if not found:
            raise DistillError(f"no run under {named} has {_words(where)}", "report")
    arms, controls = _arms(list(found.values()), options)
    runs = [
        (folder, result, control, {axis: values[i] for axis, values in arms.items()})
        for i, ((folder, result), control) in enumerate(zip(found.items(), controls, strict=True))
    ]
    axes = {axis: sorted({v for v in values if v != UNKNOWN}, key=_in_order) for axis, values in arms.items()}
    frame = _frame(runs)
    empty = pd.DataFrame(columns=[*axes, "seed", "control", "status", "reason"])
    title = f"{len(found):,} run{'s' * (len(found) > 1)} under {named}"
    name = places[0].name if len(places) == 1 else "runs"
    return Comparison(
        *(name, title, axes, frame, _judge(axes, frame), empty, _made(found)),
        results={str(folder): result for folder, result in found.items()},
    )


def _frame(runs: list[Run]) -> pd.DataFrame:
    """See `Comparison.frame`."""
    rows = []
    for folder, result, control, at in runs:
        row: dict[str, Any] = {"run": result.run_id, "folder": str(folder), "control": control, **at}
        row |= {"seed": result.seed, "n": result.test_rows, "profile": result.profile, "flags": result.flags}
        choices = {group: result.choices[group] for group in (*GROUPS, "experiment") if group in result.choices}
        rows.append(row | {f"choice/{group}": option for group, option in choices.items()} | numbers(result))
    results = [result for _, result, _, _ in runs]
    for row, ratios, worths in zip(rows, recovery_ratios(results), beyond_controls(results), strict=True):
        row |= {RATIOS[title]: value for title, value in ratios.items()}
        row |= {BEYOND[title]: value for title, value in worths.items()}
    return pd.DataFrame(rows)


def numbers(result: Result) -> dict[str, float]:
    """The headline numbers, those of the attack's own student (track B), and all tokens of a language model."""
    found = flat(result)
    track = result.tracks.get("B", {"own": False})
    if track["own"]:
        found |= {f"own/{name}": value for name, value in track.items() if "/" in name}
    if not result.classes and "tokens_in" in result.cost:
        found["cost/tokens"] = result.cost["tokens_in"] + result.cost["tokens_out"]
    return found


def _made(found: dict[Path, Result]) -> dict[str, Any]:
    made = [result.environment for result in found.values()]
    newest = max((folder / "result.json").stat().st_mtime for folder in found)

    def all_of(*names: str) -> str:
        words = {" ".join(str(e[name]) for name in names if e.get(name)) for e in made}
        return ", ".join(sorted(words))

    return {
        "commit": all_of("commit"),
        "dirty": any(e.get("dirty", False) for e in made),
        "date": datetime.fromtimestamp(newest, UTC).date().isoformat(),
        "hardware": all_of("device", "gpu", "cpu"),
        "torch": ", ".join(sorted({e["versions"]["torch"] for e in made if "versions" in e})),
    }


def _judge(axes: dict[str, list[str]], frame: pd.DataFrame) -> Judge:
    """What can be judged of these runs: defenses, where they differ in these; else the first axis."""
    budgets = [axis for axis in axes if axis.startswith("budget.")]
    others = [axis for axis in axes if axis not in budgets]
    per = "defense" if "defense" in axes or not others else others[0]
    values = axes.get(per, ["none"])
    measured = [name for name in frame.columns if frame[name].notna().any()]
    student = "fidelity/agreement" if "fidelity/agreement" in measured else "accuracy/student"
    utility = ("utility/l1_mean", "lower") if "utility/l1_mean" in measured else ("accuracy/defended_teacher", "higher")
    over = tuple(axis for axis in others if axis != per)
    return Judge(per, over, values[0], budgets[0] if budgets else None, student, *utility)


# --- what differs ---------------------------------------------------------------------------------------------------


def leaves(config: Mapping[str, Any]) -> dict[str, str]:
    """The options in a config that can change a result, by their dotted names, as text."""
    found: dict[str, str] = {}
    for name in QUERY_GROUPS + STUDENT_GROUPS:
        if name in config:
            _leaves(config[name], name, found)
    return found


def _leaves(node: Any, prefix: str, into: dict[str, str]) -> None:
    if isinstance(node, dict):
        for name, child in node.items():
            if name not in NOT_IDENTITY:
                _leaves(child, f"{prefix}.{name}", into)
    elif node is None:
        into[prefix] = UNKNOWN
    else:
        into[prefix] = str(_told(node)) if isinstance(node, list) else str(node)


def _told(node: Any) -> Any:
    """A list in a config without what can't change a result."""
    if isinstance(node, list):
        return [_told(child) for child in node]
    if isinstance(node, dict):
        return {name: _told(child) for name, child in node.items() if name not in NOT_IDENTITY}
    return node


def varied(results: list[Result]) -> dict[str, list[str]]:
    """The options in which runs differ that chose the same component of that group (or in the budget, the curve's
    length and the like), by name, such as ``defense.delta``; for each its value in every run."""
    return _varied(results, [leaves(result.config) for result in results])


def _varied(results: list[Result], options: list[dict[str, str]]) -> dict[str, list[str]]:
    names = list(dict.fromkeys(name for run in options for name in run))
    found = {}
    for name in names:
        values = [run.get(name, UNKNOWN) for run in options]
        if name == "seed" or len(set(values)) == 1:
            continue
        if name.endswith(".seed") and all(v in (str(r.seed), UNKNOWN) for r, v in zip(results, values, strict=True)):
            continue  # it follows the run's
        group = name.partition(".")[0]
        by: dict[str, set[str]] = {}
        for result, value in zip(results, values, strict=True):
            by.setdefault(result.choices.get(group, ""), set()).add(value)
        if any(len(different) > 1 for different in by.values()):
            found[name] = values
    return found


def _arms(results: list[Result], leaves_of: list[dict[str, str]]) -> tuple[dict[str, list[str]], list[str]]:
    """The axes in which runs differ, with the value of every run, and of which control a run is ("" of none).

    An option belongs to the component that it is one of: ``mad l1_budget=0.5`` is one value of the axis ``defense``.
    """
    options = {name: v for name, v in _varied(results, leaves_of).items() if name.partition(".")[0] not in MEASURING}
    arms: dict[str, list[str]] = {}
    for group in GROUPS:
        own = [name for name in options if name.startswith(f"{group}.")]
        differ: dict[str, set[tuple[str, ...]]] = {}
        values = [tuple(options[name][i] for name in own) for i in range(len(results))]
        for result, value in zip(results, values, strict=True):
            differ.setdefault(result.choices.get(group, UNKNOWN), set()).add(value)
        if len(differ) == 1 and not own:
            continue
        tells = {
            option: [len(set(column)) > 1 for column in zip(*seen, strict=True)] for option, seen in differ.items()
        }
        arms[group] = []
        for result, value in zip(results, values, strict=True):
            option = result.choices.get(group, UNKNOWN)
            parts = [
                f"{_short(name)}={_stem(part)}"
                for name, part, tell in zip(own, value, tells[option], strict=True)
                if tell and part != UNKNOWN
            ]
            arms[group].append(" ".join([option, *parts]))
    arms |= {name: values for name, values in options.items() if name.partition(".")[0] not in GROUPS}
    controls = [CONTROLS.get(result.choices.get("attack", ""), "") for result in results]
    if any(controls) and not all(controls) and "attack" in arms:
        for i, control in enumerate(controls):
            if control:  # its own options tell several of a kind apart
                _, _, rest = arms["attack"][i].partition(" ")
                controls[i], arms["attack"][i] = f"{control} {rest}".strip(), UNKNOWN
        if len(set(arms["attack"]) - {UNKNOWN}) == 1:
            del arms["attack"]
    elif all(controls):
        controls = [""] * len(results)
    return arms, controls


def _short(name: str) -> str:
    return name.removesuffix("._target_").rpartition(".")[2].rstrip("_")


def _stem(value: str) -> str:
    """A component by its module: ``distill.students.lenet.LeNet`` is lenet."""
    return value.split(".")[-2] if re.fullmatch(r"[a-zA-Z_]\w*(\.\w+)+", value) else value


def _in_order(value: str) -> tuple[Any, ...]:
    """Nothing done first, numbers by size."""
    first = value not in ("none", "as_returned", "all_answers")
    return first, *((0, float(part), "") if re.fullmatch(r"[\d.]*\d", part) else (1, 0.0, part)
                    for part in re.split(r"(\d[\d.]*)", value) if part)  # fmt: skip


# --- filters --------------------------------------------------------------------------------------------------------


def _known(results: list[Result], options: list[dict[str, str]], axes: dict[str, list[str]]) -> dict[str, set[str]]:
    """What may be asked for: axes, choices, options, with the values that there are."""
    known: dict[str, set[str]] = {}
    for result, own in zip(results, options, strict=True):
        for name, value in own.items():
            known.setdefault(name, set()).add(value)
        for name, value in result.choices.items():
            if not name.startswith("hydra/"):
                known.setdefault(name, set()).add(value)
    for axis, values in axes.items():
        known.setdefault(axis, set()).update(map(str, values))
    return known


def _check_known(where: dict[str, list[str]], known: dict[str, set[str]]) -> None:
    for name, wanted in where.items():
        if name not in known:
            raise DistillError(f"no run has '{name}'.{nearest(name, known)}", "report")
        for value in wanted:
            if not any(_same(value, there) for there in known[name]):
                raise DistillError(f"no run has {name}={value}.{nearest(value, known[name])}", "report")


def _kept(
    result: Result, options: dict[str, str], at: dict[str, str], control: str, where: dict[str, list[str]]
) -> bool:
    """Whether a run has one of the values of every key. A control is kept where it was not crossed with that axis."""
    for name, wanted in where.items():
        if control and name != "seed" and at.get(name, UNKNOWN) == UNKNOWN:
            continue
        has = [at.get(name), result.choices.get(name), options.get(name)]
        if not any(_same(value, there) for value in wanted for there in has if there is not None):
            return False
    return True


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return float(one) == float(other)
    except ValueError:
        return False


def _words(where: dict[str, list[str]]) -> str:
    return " ".join(f"{name}={','.join(values)}" for name, values in where.items())


# --- runs against one another ---------------------------------------------------------------------------------------


def recovery_ratios(results: list[Result]) -> list[dict[str, float]]:
    """For each run, how much of what the undefended teacher's answers teach its student learnt.

    "recovery ratio" is (S_d − S_0)/(S_clean − S_0), of task accuracies: S_d of the run's student, S_0 of the untrained
    one, S_clean of the student of the run that differs in nothing but having no defense. "ground truth" is the same
    with the student of the control on ground truth in the place of S_d. A ratio is left out where a run that it needs
    is not among these, where there was nothing to learn (S_clean ≤ S_0), and for controls.
    """
    if not any("untrained" in result.accuracy for result in results):
        return [{} for _ in results]
    alike = _Alike(results)
    clean = {alike(i, "defense"): r for i, r in enumerate(results) if r.choices["defense"] == "none"}
    truth = {alike(i, *HOW_TAUGHT): r for i, r in enumerate(results) if r.choices["attack"] == TRUTH}
    found: list[dict[str, float]] = []
    for i, result in enumerate(results):
        ratios: dict[str, float] = {}
        start = _accuracy(result, "untrained")
        if start is not None and result.cost["queries"]:
            students = {"recovery ratio": result, "ground truth": truth.get(alike(i, *HOW_TAUGHT))}
            top = _accuracy(clean.get(alike(i, "defense")), "student")
            if top is not None and top > start:
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
    if not any(f"beyond/{result.choices['attack']}" in BEYOND.values() for result in results):
        return [{} for _ in results]
    alike = _Alike(results)
    without: dict[tuple[Any, ...], float] = {}
    for i, result in enumerate(results):
        for title, column in BEYOND.items():
            if column == f"beyond/{result.choices['attack']}" and (reached := _accuracy(result, "student")) is not None:
                control = title, alike(i, "attack"), alike.under(i, "attack.attack")
                without[control] = max(reached, without.get(control, 0.0))
    found: list[dict[str, float]] = []
    for i, result in enumerate(results):
        worth: dict[str, float] = {}
        if (reached := _accuracy(result, "student")) is not None:
            run = alike(i, "attack"), alike.under(i, "attack")
            worth = {title: reached - without[title, *run] for title in BEYOND if (title, *run) in without}
        found.append(worth)
    return found


class _Alike:
    """Tells which runs differ in some groups alone. A path stands for itself: what it holds is told apart by the
    fingerprints, all but those of the teacher and of the defense's own network, which a defense may train."""

    def __init__(self, results: list[Result]) -> None:
        self.options = [leaves(result.config) for result in results]
        for run, result in zip(self.options, results, strict=True):
            run |= {f"fingerprint {n}": f for n, f in result.fingerprints.items() if n not in ("teacher", "defense")}
        names = dict.fromkeys(name for run in self.options for name in run)
        self.differ = [name for name in names if len({run.get(name, UNKNOWN) for run in self.options}) > 1]

    def __call__(self, i: int, *but: str) -> tuple[str, ...]:
        """The same for two runs that differ in these groups alone."""
        return tuple(self.options[i].get(name, UNKNOWN) for name in self.differ if name.partition(".")[0] not in but)

    def under(self, i: int, prefix: str) -> frozenset[tuple[str, str]]:
        """The options below a node, by their names there."""
        start = f"{prefix}."
        return frozenset((n.removeprefix(start), v) for n, v in self.options[i].items() if n.startswith(start))


def _accuracy(result: Result | None, who: str) -> float | None:
    return None if result is None else result.accuracy.get(who, {}).get("accuracy")


# --- curves ---------------------------------------------------------------------------------------------------------


def curves(comparison: Comparison) -> pd.DataFrame:
    """One row for each run and number of queries at which a fresh student was trained (track A), the last included:
    run, control, the axes, seed, ``cost/queries``, and the student's numbers under the names of `Comparison.frame`.

    A control asks nothing: it is where its queries would have been.
    """
    rows = []
    for row in comparison.frame.to_dict("records"):
        result = comparison.results[row["folder"]]
        at = {name: row[name] for name in ("run", "control", *comparison.axes, "seed")}
        rows += [at | _renamed(point) for point in result.curve]
        last = {name: v for name, v in row.items() if str(name).startswith("fidelity/") or name == "accuracy/student"}
        rows.append(at | last | {"cost/queries": asked(result)})
    return pd.DataFrame(rows).sort_values(["run", "cost/queries"], kind="stable", ignore_index=True)


def asked(result: Result) -> int:
    """The queries that were asked, or that a control would have asked."""
    return int(result.cost["queries"] or result.config["budget"]["queries"] or 0)


def _renamed(point: dict[str, float]) -> dict[str, float]:
    """A curve's row under the names of the headline numbers."""
    names = {"student/accuracy": "accuracy/student"}
    return {names.get(name, name.replace("student/", "calibration/student_")): value for name, value in point.items()}
