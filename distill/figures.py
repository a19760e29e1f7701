"""The figures of a comparison, drawn by matplotlib: each with a table of exactly the numbers that it shows.

A name has the same colour and mark in every figure of every page (`style`), told apart by all kinds of
colour-blindness. Every number comes from `distill.statistics`; here it is only drawn. Intervals are 95 %.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from distill import results, statistics
from distill.errors import DistillError
from distill.launch import options
from distill.results import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A page replaces these three by its own, which follow the reader's colour scheme.
INK, FAINT, PAPER = "#1f2328", "#6e7781", "#ffffff"
# Okabe and Ito (2008), less black, which is for the baseline, and yellow, which can't be seen on white. Six colours and
# seven marks: no two options of a group with up to 42 of them share both.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = "os^DvPX"
GROUPS = ("defense", "recovery", "attack", "objective", "access", "signal", "student", "teacher", "pool", "data")
TIE = ", "  # joins the values of several axes into the name of an arm
TITLES = {
    "fidelity/agreement": "agreement with the teacher",
    "fidelity/kl": "KL from the teacher",
    "accuracy/student": "student’s accuracy",
    "accuracy/teacher": "teacher’s accuracy",
    "accuracy/defended_teacher": "accuracy of the defended answers",
    "own/fidelity/agreement": "own student’s agreement",
    "own/student/accuracy": "own student’s accuracy",
    "utility/l1_mean": "mean L1 change of an answer",
    "utility/accuracy_lost": "accuracy lost by the defense",
    "cost/queries": "queries",
    "cost/usd": "money (usd)",
    "cost/seconds": "seconds",
    "cost/train_seconds": "training seconds",
}


class NothingToDraw(DistillError):
    """A comparison has not the numbers that a figure shows."""


class Style(NamedTuple):
    colour: str
    mark: str


class Drawn(NamedTuple):
    """A figure as a page shows it: `name` is its file's stem, `text` says how to read it, `data` what it shows."""

    name: str
    title: str
    text: str
    figure: Figure
    data: pd.DataFrame


def titled(column: str) -> str:
    """A column's name for a reader: ``fidelity/agreement`` → ``agreement with the teacher``."""
    return TITLES.get(column, column.rpartition("/")[2].replace("_", " "))


def brief(name: str, letters: int = 44) -> str:
    """A name where there is little room: of a long one the beginning and the end."""
    return name if len(name) <= letters else f"{name[: letters * 2 // 3]}…{name[-letters // 3 :]}"


def style(name: str, option: str = "") -> Style:
    """The colour and the mark of a method, from its place among the options of its config group.

    Numbers behind a name, its strength, change nothing. A name that is no option's is that of `option`, which a run
    chose where it bears the name; and without one it has a style of its own, from its letters.
    """
    words = name.split()
    for key in (*(_letters("".join(words[:n])) for n in range(len(words), 0, -1)), _letters(option)):
        if key == "none" and name in ("none", option):
            return Style(INK, "o")
        if (place := _places().get(key)) is not None and key != "none":
            break
    else:
        place = zlib.crc32(_letters(name).encode())
    return Style(COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)])


def looks(comparison: Comparison, columns: list[str]) -> dict[str, Style]:
    """The style of each arm of these columns: the first gives the colour, the last the mark."""
    frame = comparison.frame[comparison.frame.control == ""]
    choices = [f"choice/{column}" for column in columns if f"choice/{column}" in frame]
    found: dict[str, Style] = {}
    for row in frame[[*columns, *choices]].drop_duplicates().to_dict("records"):
        parts = [style(str(row[column]), str(row.get(f"choice/{column}", ""))) for column in columns]
        found.setdefault(TIE.join(str(row[c]) for c in columns), Style(parts[0].colour, parts[-1].mark))
    return found


@cache
def _places() -> dict[str, int]:
    known: dict[str, int] = {}
    for group in GROUPS:
        for i, option in enumerate(options(group)):
            known.setdefault(_letters(option), i)
    return known


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", name).lower().replace("+", "plus"))


def anchor(*names: str) -> str:
    """The place on a page where an arm, by its values of what is judged and ranged over, has its row."""
    return f"arm-{zlib.crc32(TIE.join(names).encode()):08x}"


def arms(frame: pd.DataFrame, columns: list[str]) -> pd.Series:
    """One name for the values of several columns in each row."""
    if not columns:
        return pd.Series("", frame.index)
    return frame[columns].astype(str).agg(TIE.join, axis=1) if len(columns) > 1 else frame[columns[0]].astype(str)


def in_order(comparison: Comparison, columns: list[str]) -> list[str]:
    """The arms that occur, in the order of the axes."""
    of = comparison.frame[comparison.frame.control == ""]
    names = arms(of, columns)
    ranks = [of[column].map({v: i for i, v in enumerate(comparison.axes[column])}) for column in columns]
    if not columns:
        return list(names.unique())
    order = pd.concat(ranks, axis=1).assign(name=names).drop_duplicates("name")
    return list(order.sort_values(list(order.columns[:-1]), kind="stable").name)


def whole(comparison: Comparison) -> Comparison:
    """The same with an axis for what is judged, also where all runs are of one value, and with the values alone of
    which there is a run."""
    judge, frame = comparison.judge, comparison.frame
    there = {axis: set(frame[axis][frame.control == ""]) for axis in comparison.axes}
    axes = {axis: [value for value in values if value in there[axis]] for axis, values in comparison.axes.items()}
    if judge.per not in axes:
        only = frame.get(f"choice/{judge.per}", pd.Series(judge.baseline, frame.index)).astype(str)
        frame, axes = frame.assign(**{judge.per: only}), {**axes, judge.per: list(only.unique())}
    judge = replace(judge, over=tuple(axis for axis in judge.over if axis in axes))
    return replace(comparison, judge=judge, axes=axes, frame=frame)


def narrowed(comparison: Comparison) -> tuple[Comparison, str]:
    """The runs at the largest budget, and at the first value of any other axis that is neither judged nor ranged over;
    and the words for that, such as ``budget.queries 10000``."""
    comparison = whole(comparison)
    judge, frame, said = comparison.judge, comparison.frame, []
    for axis, values in comparison.axes.items():
        if axis in (judge.per, *judge.over) or len(values) < 2:
            continue
        value = max(values, key=_size) if axis == judge.budget else values[0]
        frame = frame[(frame[axis] == value) | ((frame.control != "") & ~frame[axis].isin(values))]
        said.append(f"{axis} {value}")
    return replace(comparison, frame=frame), ", ".join(said)


def _size(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return -np.inf


def naive(comparison: Comparison) -> pd.Series:
    """Which rows of the frame are of the attacker who believes what is returned: the first value of each axis."""
    frame, judge = comparison.frame, comparison.judge
    keep = frame.control == ""
    for axis in judge.over:
        values = comparison.axes[axis]
        keep &= frame[axis] == next((v for v in values if _letters(v) == "asreturned"), values[0])
    return keep


# --- the figures ----------------------------------------------------------------------------------------------------


def pareto_scatter(comparison: Comparison) -> tuple[Figure, pd.DataFrame]:
    """What honest users get against how close the student comes, one point a defense.

    Filled: the worst case over `judge.over`, with its interval; hollow: the naive attacker. Strengths of one defense
    are joined; the stair is the front of the worst cases.
    """
    comparison, _ = narrowed(comparison)
    judge = comparison.judge
    frame = comparison.frame[comparison.frame.control == ""]
    if judge.utility not in frame or judge.student not in frame:
        raise NothingToDraw(f"no run has {judge.utility} and {judge.student}")
    worst_case = statistics.worst_case(frame, judge.per, list(judge.over), judge.student)
    worst_case["mean"] = worst_case["mean"].fillna(worst_case.largest)  # of one seed nothing can be left out
    kinds = {"worst": worst_case}
    if len(in_order(comparison, list(judge.over))) > 1:
        kinds["naive"] = statistics.summarise(comparison.frame[naive(comparison)], [judge.per], judge.student)
    columns = [judge.per, "arm", "mean", "low", "high", "n"]
    data = pd.concat([kind.reindex(columns=columns).assign(kind=name) for name, kind in kinds.items()])
    users = frame.groupby(judge.per)[judge.utility].mean()
    data = data.assign(utility=data[judge.per].map(users)).dropna(subset=["utility", "mean"]).reset_index(drop=True)
    if data.utility.round(6).nunique() < 2:
        raise NothingToDraw(f"every {judge.per} has the same {judge.utility}")
    data["family"] = [_family(value) for value in data[judge.per]]
    worst = data.kind == "worst"
    front = statistics.pareto(data.utility[worst].to_numpy(), data["mean"][worst].to_numpy(), judge.utility_better)
    data["front"] = False
    data.loc[worst, "front"] = front

    look = looks(comparison, [judge.per])
    with _canvas(7.2, 4.8) as figure:
        axis = figure.subplots()
        best = data[data.front].sort_values("utility")
        axis.step(best.utility, best["mean"], where="post" if judge.utility_better == "lower" else "pre",
                  color=FAINT, linewidth=6, alpha=0.18, zorder=1)  # fmt: skip
        for _, of in data[worst].groupby("family", sort=False):
            of = of.sort_values("utility")
            axis.plot(of.utility, of["mean"], color=look[of[judge.per].iloc[0]].colour, linewidth=1.2, zorder=2)
        for row in data.sort_values("kind").to_dict("records"):  # naive first, under the others
            colour, mark = look[row[judge.per]]
            if row["kind"] == "naive":
                axis.plot(row["utility"], row["mean"], mark, color=colour, fillstyle="none", markersize=6, zorder=3)
                continue
            axis.vlines(row["utility"], row["low"], row["high"], color=colour, linewidth=1.4, zorder=3)
            axis.plot(row["utility"], row["mean"], mark, color=colour, markersize=7, zorder=4)
        better = "lower" if judge.utility_better == "lower" else "higher"
        axis.set(xlabel=f"{titled(judge.utility)} ({better} is better for users)",
                 ylabel=f"student: {titled(judge.student)}")  # fmt: skip
        axis.margins(0.1)
        shown = data[worst] if worst.sum() <= 30 else data[worst & (data.front | ~data.family.duplicated())]
        _beside(
            figure,
            axis,
            [(row["utility"], row["mean"], brief(row[judge.per])) for row in shown.to_dict("records")],
            data,
        )
        if "naive" in kinds:
            from matplotlib.lines import Line2D

            marks = [Line2D([], [], color=FAINT, marker="o", linestyle="", fillstyle=fill) for fill in ("full", "none")]
            axis.legend(marks, ["worst attacker", "naive attacker"], loc="upper left", bbox_to_anchor=(0, 1.1), ncols=2)
    return figure, data[[judge.per, "family", "kind", "arm", "utility", "mean", "low", "high", "n", "front"]]


def heat_map(comparison: Comparison) -> tuple[Figure, pd.DataFrame]:
    """How close each attacker (a column) comes under each defense (a row); each row's worst is framed, controls, which
    meet no defense, lie beneath."""
    comparison, _ = narrowed(comparison)
    judge = comparison.judge
    rows, columns = in_order(comparison, [judge.per]), in_order(comparison, list(judge.over))
    if len(columns) < 2:
        raise NothingToDraw("there is only one attacker")
    frame = comparison.frame.assign(column=arms(comparison.frame, list(judge.over)))
    data = statistics.summarise(frame[frame.control == ""], [judge.per, "column"], judge.student)
    controls = statistics.summarise(frame[frame.control != ""], ["control"], judge.student)
    table = data.pivot(index=judge.per, columns="column", values="mean").reindex(index=rows, columns=columns)
    if not table.notna().any(axis=None):
        raise NothingToDraw(f"no run has {judge.student}")
    low, high = np.nanmin(table), np.nanmax(table)
    numbers = table.size <= 600
    bottom = len(rows) + 0.35

    names, heads = [brief(name) for name in [*rows, *controls.control]], [brief(name) for name in columns]
    width, height = 0.5 + 0.08 * max(map(len, names)), 0.5 + 0.05 * max(map(len, heads))
    width += 0.06 * max(map(len, heads))  # of the last head, which stands aslant
    with _canvas(width + 0.66 * len(columns), height + 0.34 * len(names)) as figure:
        from matplotlib.patches import Rectangle

        axis = figure.subplots()

        def cell(x: float, y: float, width: float, value: float, link: str | None = None) -> None:
            share = min(max((value - low) / (high - low or 1), 0), 1)  # controls may lie far off
            axis.add_patch(Rectangle((x, y), width, 1, facecolor=_shade(share), edgecolor=PAPER, linewidth=1.5))
            if numbers:
                text = axis.text(x + width / 2, y + 0.52, f"{value:.3f}", ha="center", va="center", fontsize=8)
                text.set_color("#fffffe" if share > 0.55 else "#1f2329")
                text.set_url(link and f"#{link}")

        for i, row in enumerate(table.to_numpy()):
            for j in np.flatnonzero(~np.isnan(row)):
                cell(int(j), i, 1, row[j], anchor(rows[i], columns[j]))
            for j in np.flatnonzero(np.isnan(row)):
                axis.text(j + 0.5, i + 0.52, "n/a", ha="center", va="center", fontsize=8, color=FAINT)
            if not np.isnan(row).all():
                worst = np.nanargmax(row)
                axis.add_patch(Rectangle((worst + 0.03, i + 0.04), 0.94, 0.92, fill=False, edgecolor=COLOURS[1],
                                         linewidth=2))  # fmt: skip
        for i, control in enumerate(controls.to_dict("records")):
            cell(0, bottom + i, len(columns), control["mean"])
        axis.set(xlim=(0, len(columns)), ylim=(bottom + len(controls) if len(controls) else len(rows), 0))
        axis.set_xticks(np.arange(len(columns)) + 0.5, heads, rotation=35, ha="left", rotation_mode="anchor")
        places = [*np.arange(len(rows)) + 0.5, *bottom + np.arange(len(controls)) + 0.5]
        axis.set_yticks(places, names)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.grid(False)
        axis.spines[:].set_visible(False)
    data = pd.concat([data.rename(columns={"column": TIE.join(judge.over)}), controls], ignore_index=True)
    return figure, data


def budget_curves(comparison: Comparison) -> tuple[Figure, pd.DataFrame]:
    """How close the student comes for how many queries: the mean over seeds with its interval; controls are dashed."""
    comparison = whole(comparison)
    judge, frame = comparison.judge, results.curves(comparison)
    budget = "cost/queries"
    if budget not in frame or judge.student not in frame:
        raise NothingToDraw("there is one budget only")
    if judge.budget in frame:  # runs of different budgets: each stands where the axis says
        asked = pd.to_numeric(frame[judge.budget], errors="coerce")
        frame[budget] = frame[budget].where(frame[budget] > 0, asked)
    frame = _in_panels(comparison, frame[(frame[budget] > 0) & frame[judge.student].notna()])
    if (frame.groupby(["facet", "line", "seed"])[budget].nunique() < 2).all():
        raise NothingToDraw("there is one budget only")
    data = statistics.summarise(frame, ["facet", "line", "control", budget], judge.student)
    return _lines(comparison, data, budget, titled(judge.student)), _named(comparison, data)


def learning_curves(comparison: Comparison) -> tuple[Figure, pd.DataFrame]:
    """The student's training loss, epoch by epoch, where the runs' `metrics.jsonl` are there."""
    comparison, _ = narrowed(comparison)
    frame = _in_panels(comparison, comparison.frame)
    read = [_losses(Path(folder) / "metrics.jsonl") for folder in frame.folder]
    if not any(read):
        raise NothingToDraw("no run has its metrics.jsonl")
    rows = frame[["facet", "line", "control", "seed"]].to_numpy().tolist()
    points = [(*row, epoch, loss) for row, of in zip(rows, read, strict=True) for epoch, loss in of.items()]
    tidy = pd.DataFrame(points, columns=["facet", "line", "control", "seed", "epoch", "loss"])
    data = statistics.summarise(tidy, ["facet", "line", "control", "epoch"], "loss")
    return _lines(comparison, data, "epoch", "training loss"), _named(comparison, data)


def _losses(path: Path) -> dict[int, float]:
    """The mean loss of the student in each epoch; of at most some 40 of them, evenly drawn."""
    losses: dict[int, list[float]] = {}
    if path.is_file():
        for text in path.read_text().splitlines():
            row = json.loads(text)
            if row.get("stage") == "student" and "loss" in row:
                losses.setdefault(int(row["epoch"]), []).append(row["loss"])
    step = -(-len(losses) // 40)
    return {epoch: float(np.mean(of)) for epoch, of in sorted(losses.items())[::-step][::-1]} if losses else {}


FIGURES: dict[str, tuple[Callable[[Comparison], tuple[Figure, pd.DataFrame]], str, str]] = {
    "pareto": (
        pareto_scatter,
        "What a {per} costs, and what it stops",
        "Each mark is a {per}: what honest users get (across) and how close a student comes (up). A good one "
        "lies low and near the users' better end. Filled marks are its worst attacker, with the 95 % interval; hollow "
        "marks the naive one. The grey stair is the front: no other {per} is better on both counts.",
    ),
    "heat_map": (
        heat_map,
        "Every {per} against every {over}",
        "How close the student comes for each {per} (rows) and {over} (columns); darker is closer. A frame marks the "
        "closest of each row, which is its worst attacker. Controls, which meet no {per}, lie beneath.",
    ),
    "budget_curves": (
        budget_curves,
        "What queries buy",
        "How close the student comes after so many queries: the mean over seeds, with the 95 % interval as a band. "
        "Dashed lines are controls.",
    ),
    "learning_curves": (
        learning_curves,
        "How the students learnt",
        "The training loss in each epoch, the mean over seeds with the 95 % interval as a band. Losses of different "
        "targets are not comparable in height; a curve that still falls at its end says that training was short.",
    ),
}


def drawn(comparison: Comparison) -> list[Drawn]:
    """Those of the figures for which this comparison has the numbers."""
    found, judge = [], whole(comparison).judge
    words = {"per": judge.per, "over": " and ".join(judge.over) if len(judge.over) < 3 else "attacker"}
    for name, (draw, title, text) in FIGURES.items():
        try:
            found.append(Drawn(name, title.format(**words), text.format(**words), *draw(comparison)))
        except NothingToDraw:
            continue
    return found


def export(comparison: Comparison, folder: Path) -> list[Path]:
    """Write each figure as SVG, with its CSV beside it. The same comparison gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for one in drawn(comparison):
        picture, numbers = folder / f"{one.name}.svg", folder / f"{one.name}.csv"
        picture.write_text(re.sub(r"</?a\b[^>]*>\n?", "", to_svg(one.figure)), encoding="utf-8")  # no page, no links
        one.data.to_csv(numbers, index=False, float_format="%.6g")
        paths += [picture, numbers]
    return paths


def to_svg(figure: Figure) -> str:
    """The figure as SVG, text as text, the same bytes each time."""
    import matplotlib

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what was laid out stays
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "distill", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.06,
                       metadata={"Date": None, "Creator": None})  # fmt: skip
    # A hundredth of a point is fine enough: in attributes, that is, not in what is written.
    return re.sub(r'="[^"]*"', lambda attribute: re.sub(r"\d+\.\d{3,}", _rounded, attribute[0]), buffer.getvalue())


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}"


# --- drawing --------------------------------------------------------------------------------------------------------


@contextmanager
def _canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches in the style of all of them; no window, no global state."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DistillError("figures need matplotlib; pip install 'distill-framework[figures]'", "figures") from None
    look: Any = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
        "font.size": 9,
        "text.color": INK,
        "text.parse_math": False,  # a name is a name, whatever it is made of
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.facecolor": PAPER,
        "figure.facecolor": PAPER,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "grid.color": FAINT,
        "grid.alpha": 0.22,
        "grid.linewidth": 0.6,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "legend.handletextpad": 0.5,
    }
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _family(value: str) -> str:
    """A value without its strength: ``mad 0.5`` → ``mad``."""
    return re.sub(r"(\s+\S*\d\S*)+$", "", value)


def _shade(share: float) -> tuple[float, float, float]:
    """One hue from light to dark, so that it is read without seeing colours."""
    light, middle, dark = np.array([(0.93, 0.95, 0.98), (0.36, 0.62, 0.80), (0.03, 0.22, 0.44)])
    colour = light + (middle - light) * share * 2 if share < 0.5 else middle + (dark - middle) * (share * 2 - 1)
    return tuple(colour)


def _beside(figure: Figure, axis: Axes, labels: list[tuple[float, float, str]], data: pd.DataFrame) -> None:
    """Write each text next to its point, where it covers no point and no other text; a line leads to one far away."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # what is measured now stays
    renderer, scale = canvas.get_renderer(), figure.dpi / 72
    inside = axis.get_window_extent()
    dots = axis.transData.transform(data[["utility", "mean"]].to_numpy(dtype=float))
    taken = np.concatenate([dots - 4.5 * scale, dots + 4.5 * scale], axis=1)  # x0, y0, x1, y1
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    offsets = np.array([(r * np.cos(a), r * np.sin(a)) for r in (7, 13, 22, 34, 48, 64) for a in turns]) * scale
    for x, y, text in sorted(labels, key=lambda label: (-label[1], label[0])):
        at = axis.transData.transform((x, y))
        note = axis.text(x, y, text, fontsize=8)
        box = note.get_window_extent(renderer)
        note.remove()
        # The text's nearest edge or corner lies at the offset.
        side = np.where(np.abs(offsets) < 0.4 * np.linalg.norm(offsets, axis=1, keepdims=True), 0.5, offsets < 0)
        corner = at + offsets - side * (box.width, box.height)
        boxes = np.concatenate([corner, corner + np.array([box.width, box.height])], axis=1)
        shared = np.minimum(boxes[:, None, 2:], taken[:, 2:]) - np.maximum(boxes[:, None, :2], taken[:, :2])
        covered = np.prod(np.maximum(shared, 0), axis=2).sum(axis=1)
        outside = np.maximum(boxes[:, 2] - inside.x1 - 60 * scale, 0) + np.maximum(inside.x0 - boxes[:, 0], 0)
        outside += np.maximum(boxes[:, 3] - inside.y1, 0) + np.maximum(inside.y0 - boxes[:, 1], 0)
        best = np.argmin(covered + 20 * outside + np.linalg.norm(offsets, axis=1))
        taken = np.concatenate([taken, boxes[best : best + 1]])
        far = np.linalg.norm(offsets[best]) > 15 * scale
        axis.annotate(
            text,
            (x, y),
            offsets[best] / scale,
            textcoords="offset points",
            fontsize=8,
            ha=("left", "center", "right")[int(2 * side[best, 0])],
            va=("bottom", "center", "top")[int(2 * side[best, 1])],
            arrowprops=line if far else None,
        )


def _panels_of(comparison: Comparison) -> tuple[list[str], list[str]]:
    """Which axes tell panels apart and which lines: there are fewer panels than lines, and at most nine."""
    per, over = [comparison.judge.per], list(comparison.judge.over)
    if not over:
        return [], per
    n_per, n_over = len(in_order(comparison, per)), len(in_order(comparison, over))
    if min(n_per, n_over) > 9:
        return [], per
    return (per, over) if n_per <= n_over else (over, per)


def _in_panels(comparison: Comparison, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with their panel (`facet`) and their `line`; where there are too many panels, those of the naive
    attacker in a single one. A control that is not crossed with the panels has a facet of its own."""
    facet, line = _panels_of(comparison)
    if not facet:
        frame = frame[frame.run.isin(comparison.frame.run[naive(comparison)]) | (frame.control != "")]
    return frame.assign(facet=arms(frame, facet), line=arms(frame, line).where(frame.control == "", frame.control))


def _lines(comparison: Comparison, data: pd.DataFrame, x: str, ylabel: str) -> Figure:
    """A panel for each facet, in each a line for each arm; a control that meets no facet is drawn in all of them."""
    facet, line = _panels_of(comparison)
    log = x.startswith("cost/")
    panels = [name for name in in_order(comparison, facet) if name in set(data.facet)] if facet else [""]
    order = [name for name in in_order(comparison, line) if name in set(data.line)]
    styles = {name: look for name, look in looks(comparison, line).items() if name in order}
    controls = sorted(set(data.line[data.control != ""]))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width = max(3.1 * columns, 6.6)
    legend = [*order, *controls]
    in_a_row = max(1, min(len(legend), int(width * 12 / (max(len(brief(name)) for name in legend) + 7))))
    with _canvas(width, (2.6 if rows > 1 else 3.2) * rows + 0.2 * -(-len(legend) // in_a_row)) as figure:
        from matplotlib.ticker import MaxNLocator

        grid = figure.subplots(rows, columns, sharex=True, sharey=log, squeeze=False)
        handles: dict[str, Any] = {}
        for axis, panel in zip(grid.flat, panels, strict=False):
            axis.set_title(
                brief(panel, 30) or next(iter(arms(comparison.frame[naive(comparison)], list(comparison.judge.over))))
            )
            axis.tick_params(labelbottom=True)
            for name in legend:
                of = data[(data.line == name) & ((data.facet == panel) | ~data.facet.isin(panels))].sort_values(x)
                if of.empty:
                    continue
                look = _look(name, styles, controls)
                some = max(1, len(of) // 6)
                handles[name] = axis.plot(of[x], of["mean"], markersize=4.5, linewidth=1.4, markevery=some, **look)[0]
                axis.fill_between(of[x], of.low, of.high, color=look["color"], alpha=0.12, linewidth=0)
            if log:
                _count_axis(axis, sorted(data[x].unique()))
            else:
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in list(grid.flat)[len(panels) :]:
            axis.set_visible(False)
        for axis in grid[:, 0]:
            axis.set_ylabel(ylabel)
        for axis in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
            axis.set_xlabel(titled(x))
        shown = [name for name in legend if name in handles]
        figure.legend([handles[name] for name in shown], [*map(brief, shown)], loc="outside lower center",
                      ncols=in_a_row, fontsize=8)  # fmt: skip
    return figure


def _look(name: str, styles: dict[str, Style], controls: list[str]) -> dict[str, Any]:
    """How a line is drawn: a control grey and dashed; strengths of one method differ in how their mark is filled."""
    if name not in styles:
        dashes = [(5, 2), (1, 1.5), (6, 2, 1, 2), (3, 1), (8, 2, 1, 2, 1, 2), (2, 4), (9, 3)]
        return {"color": FAINT, "marker": "", "linestyle": (0, dashes[controls.index(name) % len(dashes)])}
    colour, mark = styles[name]
    alike = [other for other, look in styles.items() if look == (colour, mark)]
    fills = ("full", "none", "left", "right", "top", "bottom")
    return {"color": colour, "marker": mark, "linestyle": "-", "fillstyle": fills[alike.index(name) % len(fills)]}


def _count_axis(axis: Axes, values: list[float]) -> None:
    """A logarithmic axis with the budgets themselves as its ticks, or some of them where they would touch."""
    axis.set_xscale("log")
    kept: list[float] = []
    for value in values[::-1]:  # the last one always
        if not kept or np.log(kept[-1] / value) > 0.22 * np.log(values[-1] / values[0]):
            kept.append(value)
    axis.set_xticks(kept, [f"{value:,.0f}" for value in kept])
    axis.minorticks_off()


def _named(comparison: Comparison, data: pd.DataFrame) -> pd.DataFrame:
    """The columns under the names of the axes."""
    facet, line = _panels_of(comparison)
    data = data if facet else data.drop(columns="facet")
    return data.rename(columns={"facet": TIE.join(facet), "line": TIE.join(line) or "arm"})
