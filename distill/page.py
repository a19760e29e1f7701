"""One page that shows a comparison to people: a single file, which needs no network and no other file.

What was compared, what to beware of, which defense holds and at what cost, the figures, and a table of all arms that
can be sorted and filtered. All text that comes from runs is escaped.
"""

from __future__ import annotations

import base64
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from distill import checks, figures, results, statistics
from distill.figures import TIE, Drawn, arms, narrowed, titled
from distill.results import UNKNOWN, Comparison, leaves
from distill.tables import counted, p_value, plain
from distill.verdict import PARTS, SURE, headline, judged, number, of_users, uneven

BUDGET = "cost/queries"
GLYPHS = dict(zip(figures.MARKS, "●■▲◆▼✚✖", strict=True))  # the marks of the figures, as letters
TRUTH = ("ground_truth_labels", "ground_truth_answers")  # attacks that are the control of true labels
OF_RUNS = ("#student-not-cheaper)", "#white-box)")  # flags of single runs that no check of a table repeats
COLUMNS = (  # of the table of all arms, after what the judge reads; those that were measured
    *("fidelity/agreement", "accuracy/student", "accuracy/defended_teacher", "accuracy/teacher", "utility/l1_mean"),
    *("own/fidelity/agreement", "own/student/accuracy", "cost/queries", "cost/usd", "cost/train_seconds"),
)
FILES = {  # what a run leaves, as a reader calls it
    "result": "result.json",
    "config": ".hydra/config.yaml",
    "samples": "samples.jsonl",
    "metrics": "metrics.jsonl",
    "log": "train.log",
}


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison. The same runs give the same bytes.

    Args:
        path: An .html file. Links to the files of runs are relative to its folder, and only where those files exist.
    """
    environment = Environment(
        loader=PackageLoader("distill"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path, comparison = path.absolute(), figures.whole(comparison)
    at_last, at = narrowed(comparison)
    verdict = judged(at_last)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        environment.get_template("report.html.j2").render(
            comparison=comparison,
            what=described(comparison),
            at=at,
            warnings=warnings(comparison),
            headline=headline(at_last, verdict),
            summary=summary(at_last, verdict),
            figures=[shown(one) for one in figures.drawn(comparison)],
            further=further(comparison, at_last),
            table=everything(comparison, at_last, path.parent),
            missing=unfinished(comparison),
            counted=counted(comparison.frame),
            made=made(comparison),
        ),
        encoding="utf-8",
    )


def described(comparison: Comparison) -> str:
    """What was compared, in a sentence or two."""
    judge, axes, frame = comparison.judge, comparison.axes, comparison.frame
    varied = [f"{len(values)} × {axis}" for axis, values in axes.items() if len(values) > 1]
    controls = sorted(set(frame.control) - {""})
    text = f"{len(frame):,} runs: {', '.join(varied) or 'one arm'}, {frame.seed.nunique()} × seed"
    text += f", and controls ({', '.join(controls)}). " if controls else ". "
    over = [axis for axis in judge.over if len(axes.get(axis, [])) > 1]
    if judge.per == "defense":
        worst = f", judged by the worst {' and '.join(over)}" if over else ""
        return f"{text}What each defense leaves to a student ({titled(judge.student)}){worst}; and what it leaves to \
honest users ({titled(judge.utility)})."
    return f"{text}How close the student comes ({titled(judge.student)}) for each {judge.per}."


def warnings(comparison: Comparison) -> list[tuple[str, str]]:
    """What to beware of, as text and where: of the comparison, and what runs say of themselves besides."""
    found = checks.warnings(comparison.frame, comparison.judge, results.curves(comparison))
    told = [(f"{warning.text} ({warning.anchor})", warning.where) for warning in found]
    flags = Counter(flag for flags in comparison.frame["flags"] for flag in flags if flag.endswith(OF_RUNS))
    return told + [(flag, f"{n:,} of {len(comparison.frame):,} runs") for flag, n in flags.most_common()]


# --- the verdict ---------------------------------------------------------------------------------------------------


def summary(comparison: Comparison, table: pd.DataFrame) -> dict[str, Any]:
    """The verdict as rows of text, with the places of a small drawing of each interval, in per cent."""
    judge = comparison.judge
    low, high = np.nanmin(table[["low", "mean", "naive mean"]]), np.nanmax(table[["high", "mean", "naive mean"]])
    span = (high - low) or 1.0
    look = figures.looks(comparison, [judge.per])
    users = [name for name in of_users(comparison) if table[f"{name} mean"].nunique() > 1]
    rows = []
    for row in table.to_dict("records"):
        ends = [row["low"], row["high"]] if row["n"] > 1 else [row["mean"]] * 2
        bar = [100 * (np.clip(value, low, high) - low) / span for value in (*ends, row["mean"], row["naive mean"])]
        rows.append({
            "name": row[judge.per],
            "baseline": row[judge.per] == judge.baseline,
            "colour": look[row[judge.per]].colour.replace(figures.INK, "var(--ink)"),
            "mark": GLYPHS[look[row[judge.per]].mark],
            "bar": [f"{place:.1f}" for place in bar],
            "arm": row["arm"],
            "worst": (number(row, "", judge.student), row["mean"]),
            "naive": (number(row, "naive", judge.student), row["naive mean"]),
            "difference": (number(row, "difference", judge.student), row["difference mean"]),
            "sure": "" if not row["p_holm"] < SURE else
                    "good" if (row["difference mean"] < 0) == (judge.per == "defense") else "bad",
            "p": (UNKNOWN if np.isnan(row["p_holm"]) else p_value(row["p_holm"]).lstrip("p= "), row["p_holm"]),
            "users": [(number(row, name, name), row[f"{name} mean"]) for name in users],
        })  # fmt: skip
    return {
        "per": judge.per,
        "student": titled(judge.student),
        "users": [titled(name) for name in users],
        "rows": rows,
        "over": bool(judge.over) and any(row["arm"] for row in rows),
        "compared": table["difference mean"].notna().any(),
        "uneven": uneven(comparison),
    }


# --- figures --------------------------------------------------------------------------------------------------------


def shown(one: Drawn) -> dict[str, Any]:
    """A figure as the template takes it: inline SVG in the page's own colours and font, and its CSV as a link."""
    svg = figures.to_svg(one.figure)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="|href="#(?!arm-)|url\(#)', rf"\1{one.name}-", svg)  # several figures share one page
    svg = re.sub(r"font-family: [^;]+;", "", svg).replace(' target="_blank"', "")
    svg = re.sub(r"(font: [\d.]+px) [^;]+;", r"\1 var(--sans);", svg)
    for colour, name in ((figures.INK, "ink"), (figures.FAINT, "faint"), (figures.PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{name})")
    wide, high = (float(n) for n in re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    role = "group" if "<a " in svg else "img"  # links inside of an image would not be told of
    svg = re.sub(r"<svg [^>]*>", lambda _: (
        f'<svg role="{role}" aria-labelledby="{one.name}-title {one.name}-text" viewBox="0 0 {wide} {high}" '
        f'style="max-width:{wide * 4 / 3:.0f}px;min-width:{wide * 0.85:.0f}px">'
        f'<title id="{one.name}-title">{escape(one.title)}</title>'
        f'<desc id="{one.name}-text">{escape(one.text)} {escape(_told(one))}</desc>'), svg, count=1)  # fmt: skip
    csv = one.data.to_csv(index=False, float_format="%.5g").encode()
    link = "data:text/csv;charset=utf-8;base64," + base64.b64encode(csv).decode()
    return {"name": one.name, "title": one.title, "text": one.text, "svg": Markup(svg), "csv": link, "wide": wide > 640}


def _told(one: Drawn) -> str:
    """What is to be seen, for those who don't see it: the extremes, by name."""
    data = one.data.dropna(subset=["mean"])
    names = [c for c in data.columns if data[c].dtype == object or isinstance(data[c].dtype, pd.StringDtype)]
    names = [name for name in names if name not in ("seeds", "kind", "family")]
    ends = [data.loc[data["mean"].idxmin()], data.loc[data["mean"].idxmax()]]
    least, most = (f"{' '.join(str(row[n]) for n in names if row[n])} {row['mean']:.4g}" for row in ends)
    return f"{len(data)} numbers, from {least} to {most}; all of them are in the CSV."


# --- further tables -------------------------------------------------------------------------------------------------


def further(comparison: Comparison, at_last: Comparison) -> list[dict[str, Any]]:
    """Tables beside the summary, those for which there are the numbers: defenses at equal utility, budget curves as
    numbers, and what stealing saved. A cell is a name, or a number as text and as value."""
    found = [equal_utility(at_last), over_budgets(comparison), saved(comparison)]
    return [table for table in found if table["rows"]]


def equal_utility(comparison: Comparison) -> dict[str, Any]:
    """Families of defenses at the same utility: the dearest to which more than half of them can be set."""
    judge, frame = comparison.judge, comparison.frame[comparison.frame.control == ""]
    family, level, rows = f"choice/{judge.per}", 0.0, []
    if {family, judge.utility} <= {*frame} and judge.baseline in set(frame[judge.per]) and frame[judge.utility].any():
        users = frame.groupby([family, judge.per], sort=False)[judge.utility].mean().dropna().rename("at").reset_index()
        start = float(users[users[judge.per] == judge.baseline]["at"].iloc[0])
        spans = users[users[judge.per] != judge.baseline].groupby(family)["at"].agg(["min", "max"]).clip
        low, high = spans(upper=start)["min"], spans(lower=start)["max"]
        many = [at for at in users["at"] if 2 * ((low <= at) & (at <= high)).sum() > len(low)]
        level = max(many, key=lambda at: abs(at - start), default=start)
        found = statistics.at_equal_utility(
            frame, judge.per, family, judge.student, judge.utility, level, over=judge.over, baseline=judge.baseline
        )
        found = found[found["how"] != "out of range"].sort_values("mean", ascending=judge.per == "defense")
        rows = [[row[family], _cell(row, judge.student), row["how"]] for row in found.to_dict("records")]
    return {
        "name": "equal",
        "title": "At equal cost for honest users",
        "text": f"{titled(judge.student)[0].upper()}{titled(judge.student)[1:]} of the worst attacker’s student where "
        f"the {titled(judge.utility)} is {plain(level, judge.utility)}: strengths of one {judge.per}, and none at all, "
        "are joined by straight lines. Those that cannot be set to this are left out.",
        "columns": [judge.per, titled(judge.student), "how"],
        "rows": rows if len(rows) > 1 else [],
    }


def over_budgets(comparison: Comparison) -> dict[str, Any]:
    """The area under each budget curve, and the queries to come nine tenths of the way."""
    judge, curves = comparison.judge, results.curves(comparison)
    curves = curves[(curves["control"] == "") & curves[judge.student].notna()]
    by, rows = [judge.per, *judge.over], []
    if len(curves) and curves.groupby([*by, statistics.SEED])[BUDGET].nunique().max() > 1:
        best = float(curves.groupby([*by, BUDGET])[judge.student].mean().max())
        areas = statistics.budget_area(curves, by, BUDGET, judge.student)
        queries = statistics.queries_to_reach(curves, by, BUDGET, judge.student, 0.9, best)
        both = areas.merge(queries, on=by, suffixes=("", " queries")).sort_values("mean", ascending=False)
        for row in both.to_dict("records"):
            told = row["how"] if np.isnan(row["queries"]) else f"{row['queries']:,.0f}"
            told = f"at most {told}" if row["how"] == "at most" else told
            rows.append([*(row[name] for name in by), _cell(row, judge.student), (told, row["queries"])])
    return {
        "name": "budgets",
        "title": "What queries buy, in numbers",
        "text": f"Area: the mean {titled(judge.student)} along the budget curve, over the logarithm of the queries. "
        "Queries: how many it takes to nine tenths of the best that any of these students reached.",
        "columns": [*by, "area", "queries to 90 %"],
        "rows": rows,
    }


def saved(comparison: Comparison) -> dict[str, Any]:
    """What the answers of the undefended teacher were worth, against buying labels."""
    judge, rows, value = comparison.judge, [], "accuracy/student"
    frame = comparison.frame
    if judge.per == "defense" and judge.baseline in set(frame[judge.per]):
        frame = frame[(frame[judge.per] == judge.baseline) | (frame.control != "")]
    by = [judge.per, *judge.over]
    labelled = frame.control[(frame.control != "") & frame["choice/attack"].isin(TRUTH)].unique()
    if len(labelled) and value in frame and (frame.control == "").any():
        curves = results.curves(comparison)
        curves = curves[curves.run.isin(frame.run)]
        for row in statistics.savings(frame, curves, by, value, control=labelled[0]).to_dict("records"):
            labels = "unclear" if np.isnan(row["labels"]) else f"{row['labels']:,.0f}"
            labels = f"{row['how']} {labels}" if row["how"].startswith("at ") else labels
            rows.append([
                *(row[name] for name in by),
                (f"{row['reached']:.3f}", row["reached"]),
                (f"{row['queries']:,.0f}", row["queries"]),
                (labels, row["labels"]),
                (UNKNOWN if np.isnan(row["usd"]) else f"{row['usd']:,.2f}", row["usd"]),
                *((UNKNOWN if np.isnan(row[s]) else f"{row[s]:,.1f}", row[s]) for s in ("seconds", "control_seconds")),
            ])  # fmt: skip
    return {
        "name": "saved",
        "title": "What stealing saved",
        "text": "Against having inputs labelled: how many true labels the same student needs until it is as accurate, "
        "what the queries cost, and the training time of both. A bound where the labels that were tried do not tell.",
        "columns": [*by, titled(value), "queries", "labels instead", "usd for queries", "training seconds",
                    "with labels"],
        "rows": rows,
    }  # fmt: skip


def _cell(row: Mapping[str, Any], column: str) -> tuple[str, float]:
    return number(row, "", column), row["mean"]


# --- the table of all arms ------------------------------------------------------------------------------------------


def everything(comparison: Comparison, at_last: Comparison, beside: Path) -> dict[str, Any]:
    """Every arm with its numbers, and every run with its config and files.

    Configs are told as differences from the most common value of each option, which is told once (`base`).
    """
    frame, judge, axes = comparison.frame, comparison.judge, list(comparison.axes)
    by = ["control", *axes]
    names = [name for name in dict.fromkeys([judge.student, judge.utility, *COLUMNS])
             if name in frame and frame[name].notna().any()]  # fmt: skip
    same = [name for name in names if len(frame) > 1 and frame[name].notna().all() and frame[name].nunique() == 1]
    measured = [name for name in names if name not in same or name == judge.student]
    ordered = _ordered(comparison)
    numbers = {name: statistics.summarise(ordered, by, name) for name in measured}
    texts = {name: [(number(row, "", name), row["mean"]) for row in of[[*PARTS]].to_dict("records")]
             for name, of in numbers.items()}  # fmt: skip
    base, differences = _configs(comparison)
    last = set(at_last.frame.run)
    rows = []
    for i, (arm, of) in enumerate(ordered.groupby(by, sort=False)):
        runs = of[["seed", "run", "folder"]].to_dict("records")
        first, *others = (differences[run["folder"]] for run in runs)
        common = [item for item in first.items() if all(item in other.items() for other in others)]
        rows.append({
            "id": figures.anchor(of[judge.per].iloc[0], TIE.join(of[axis].iloc[0] for axis in judge.over))
            if not arm[0] and runs[0]["run"] in last else "",
            "names": [f"control: {arm[0]}", *arm[2:]] if arm[0] else arm[1:],
            "control": arm[0],
            "numbers": [texts[name][i] for name in measured],
            "n": len(set(of.seed)),
            "config": common,
            "runs": [{"seed": run["seed"], "run": run["run"], "links": _links(run["folder"], beside),
                      "config": [item for item in differences[run["folder"]].items() if item not in common]}
                     for run in runs],
        })  # fmt: skip
    told = [f"{titled(name)} {plain(frame[name].iloc[0], name)}" for name in same if name not in measured]
    return {"axes": axes, "numbers": [titled(name) for name in measured], "same": told, "rows": rows, "base": base}


def _ordered(comparison: Comparison) -> pd.DataFrame:
    """The rows in the order of the axes' values, controls last."""
    frame = comparison.frame
    keys = {f"order {axis}": frame[axis].map({value: i for i, value in enumerate(values)}).fillna(len(values))
            for axis, values in comparison.axes.items()}  # fmt: skip
    order = pd.DataFrame({"control": frame.control, **keys, "seed": frame.seed})
    return frame.loc[order.sort_values(list(order.columns), kind="stable").index]


def _configs(comparison: Comparison) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """The most common value of each option; and for each run, by its folder, where it differs. A run that lacks an
    option that most have says "–"."""
    options = {folder: leaves(result.config) for folder, result in comparison.results.items()}
    options = {folder: options[folder] for folder in comparison.frame.folder}
    names = dict.fromkeys(name for run in options.values() for name in run)
    base = {name: Counter(run.get(name, UNKNOWN) for run in options.values()).most_common(1)[0][0] for name in names}
    differ = {folder: {name: value for name, common in base.items() if (value := run.get(name, UNKNOWN)) != common}
              for folder, run in options.items()}  # fmt: skip
    return {name: value for name, value in base.items() if value != UNKNOWN}, differ


def _links(folder: str, beside: Path) -> dict[str, str]:
    """The files of a run that exist, relative to the page. A published run is one file."""
    place = Path(folder).absolute()
    if place.is_file():
        return {"result": quote(os.path.relpath(place, beside))}
    start = os.path.relpath(place, beside)
    return {name: quote(f"{start}/{file}") for name, file in FILES.items() if (place / file).is_file()}


def made(comparison: Comparison) -> dict[str, str]:
    """Of what, when and where all this was made."""
    found = {}
    for name, value in comparison.made.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, float):
            value = f"{value:,.1f}"
        if value not in (None, ""):
            found["uncommitted changes" if name == "dirty" else name.replace("_", " ")] = str(value)
    return found


def unfinished(comparison: Comparison) -> list[dict[str, Any]]:
    """The cells without a result, by their status and reason."""
    missing = comparison.missing
    found = []
    for (status, reason), of in missing.groupby(["status", "reason"], sort=False):
        names = arms(of.assign(control=of.control.astype(str)), ["control", *comparison.axes, "seed"])
        cells = [TIE.join(part for part in name.split(TIE) if part and part != UNKNOWN) for name in names]
        found.append({"status": status, "reason": reason, "cells": cells})
    return found
