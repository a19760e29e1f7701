"""The tables of a comparison: what is in a row is decided here, once; a terminal, Markdown and LaTeX only print it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from pathlib import Path
from textwrap import wrap

import pandas as pd
from rich import box
from rich.console import RenderableType
from rich.table import Table as RichTable
from tabulate import LATEX_ESCAPE_RULES, tabulate

from distill import statistics
from distill.figures import narrowed, titled
from distill.results import BEYOND, RATIOS, UNKNOWN, Comparison

# Columns of the plain table: title -> column of `Comparison.frame`.
NUMBERS = {
    "teacher acc": "accuracy/teacher",
    "defended acc": "accuracy/defended_teacher",
    "student acc": "accuracy/student",
    "agreement": "fidelity/agreement",
    "own acc": "own/student/accuracy",
    "own agreement": "own/fidelity/agreement",
    "KL": "fidelity/kl",
    "mean L1": "utility/l1_mean",
    "queries": "cost/queries",
    "tokens": "cost/tokens",
    "usd": "cost/usd",
    **RATIOS,
    **BEYOND,
}
HONEST = ("utility/l1_mean", "accuracy/defended_teacher")  # what honest users get, besides what the judge reads
DECIMALS = 4  # at most
GAP = 3  # that rich leaves between columns
PAIRED = "paired by seed (the same queries and initial student); p of a t test, Holm-corrected over this table"


@dataclass(frozen=True)
class Table:
    """Text in rows, for any printer.

    Args:
        labels: How many of the first columns are names; the others are numbers, which stand to the right.
        notes: Sentences beneath: n, seeds, what a column is, why a cell is empty.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    labels: int
    notes: list[str]

    def rich(self, width: int) -> Iterator[RenderableType]:
        """As many tables, one beneath the other, as it takes to leave every cell on one line; then the notes."""
        columns = [*zip(self.columns, *self.rows, strict=True)]
        takes = [max(map(len, column)) for column in columns]
        width -= 1  # rich draws an edge
        if sum(takes) + GAP * len(takes) > width:  # titles may be folded
            takes = [max(map(len, [*head.split(), *cells])) for head, *cells in columns]
        names, rest = [*range(self.labels)], [*range(self.labels, len(columns))]
        while True:
            shown = list(names)
            while rest and (shown == names or sum(takes[i] + GAP for i in [*shown, rest[0]]) <= width):
                shown.append(rest.pop(0))
            table = RichTable(box=box.SIMPLE_HEAD, title=self.title or None, title_justify="left", title_style="bold")
            fits = sum(takes[i] + GAP for i in shown) <= width
            for i in shown:
                head = "\n".join(wrap(self.columns[i], takes[i]))
                table.add_column(head, justify="left" if i < self.labels else "right", no_wrap=fits)
            for row in self.rows:
                table.add_row(*(row[i] for i in shown))
            yield table
            if not rest:
                break
        yield "\n".join(self.notes)

    def markdown(self) -> str:
        rows = [[cell.replace("|", r"\|") for cell in row] for row in self.rows]
        body = tabulate(rows, self.columns, tablefmt="pipe", colalign=self._align(), disable_numparse=True)
        notes = "<br>\n".join(f"<sub>{escape(note, quote=False)}</sub>" for note in self.notes)
        parts = [f"**{self.title}**" if self.title else "", body, notes]
        return "\n\n".join(part for part in parts if part)

    def latex(self) -> str:
        """A float of booktabs."""
        body = tabulate(
            self.rows, self.columns, tablefmt="latex_booktabs", colalign=self._align(), disable_numparse=True
        )
        caption = " ".join(f"{part.rstrip('.')}." for part in [self.title, *self.notes] if part)
        caption = caption.translate(str.maketrans(LATEX_ESCAPE_RULES))
        text = f"\\begin{{table}}[t]\n\\centering\n\\caption{{{caption}}}\n{body}\n\\end{{table}}"
        return text.replace("\N{MINUS SIGN}", "$-$")  # which pdfTeX has outside of formulas under no name

    def _align(self) -> list[str]:
        return ["left"] * self.labels + ["right"] * (len(self.columns) - self.labels)


# --- numbers as text ------------------------------------------------------------------------------------------------


def plain(value: float | None, column: str) -> str:
    """One measured number, without an interval."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if column in ("cost/queries", "cost/tokens"):
        return f"{value:,.0f}"
    return f"{value:,.2f}" if column == "cost/usd" else f"{value:{_sign(column)}.{DECIMALS}f}"


def with_interval(mean: float, low: float, high: float, column: str = "", sign: str = "") -> str:
    """A mean with half of its interval's width, both to the digits that the width supports: one, or two where it begins
    with less than 3.5."""
    sign, half = sign or _sign(column), (high - low) / 2
    if math.isnan(mean) or math.isnan(half) or half < 0.5 * 10**-DECIMALS:
        text = plain(mean, column)
        return f"+{text}" if sign and mean > 0 and text[0] != "+" else text
    exponent = math.floor(math.log10(half))
    digits = 2 if half / 10**exponent < 3.5 else 1
    decimals = min(max(0, digits - 1 - exponent), DECIMALS)
    mean = round(mean, decimals) + 0.0  # no minus before a zero
    return f"{mean:{sign},.{decimals}f} ± {half:,.{decimals}f}"


def _sign(column: str) -> str:
    """Differences are told with theirs."""
    return "+" if column.startswith("beyond/") else ""


def p_value(p: float) -> str:
    """Without blanks, so that a narrow column does not fold it."""
    return "p<0.001" if p < 0.001 else f"p={p:.{3 if p < 0.1 else 2}f}"


def counted(frame: pd.DataFrame) -> str:
    """n and the seeds of these rows."""
    rows, seeds = sorted(frame["n"].unique()), sorted(frame["seed"].unique())
    n = ", ".join(f"{n:,}" for n in rows)
    return f"n = {n} test rows; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


# --- runs, as they are ----------------------------------------------------------------------------------------------


def runs(comparison: Comparison, single: bool = False) -> Table:
    """What differs between runs, and their numbers: one row for all seeds of an arm; with `single`, or where no arm has
    several seeds, one row a run."""
    frame, arms = _sorted(comparison), ["control", *comparison.axes]
    columns = {title: column for title, column in NUMBERS.items() if column in frame and frame[column].notna().any()}
    if (frame["choice/defense"] == "none").all():  # 1 by definition
        columns.pop("recovery ratio", None)
    shown = arms if frame["control"].any() else arms[1:]
    if single or not frame.duplicated(arms).any():
        head = [*shown, *(["seed"] if frame["seed"].nunique() > 1 else [])]
        rows = []
        for row in frame.to_dict("records"):
            measured = [plain(row[column], column) for column in columns.values()]
            rows.append([*(str(row[name]) or UNKNOWN for name in head), *measured, Path(row["folder"]).stem])
        return Table("", [*head, *columns, "run"], rows, len(head), [counted(frame)])
    means = {column: _means(frame, arms, column) for column in columns.values()}
    seeds = frame.groupby(arms, sort=False)["seed"].nunique().reset_index()
    rows = []
    for *arm, n in seeds.itertuples(index=False, name=None):
        names = [part or UNKNOWN for part in arm[len(arms) - len(shown) :]]
        rows.append([*names, *(means[column][tuple(arm)] for column in columns.values()), str(n)])
    note = f"{counted(frame)}; mean ± half of the 95 % interval over seeds"
    return Table("", [*shown, *columns, "seeds"], rows, len(shown), [note])


def _sorted(comparison: Comparison) -> pd.DataFrame:
    """The rows in the order of the axes' values, controls last, seeds in order."""
    frame = comparison.frame.copy()
    for axis, values in comparison.axes.items():
        frame[axis] = pd.Categorical(frame[axis], [*values, UNKNOWN], ordered=True)
    frame = frame.sort_values(["control", *comparison.axes, "seed"], kind="stable")
    return frame.astype(dict.fromkeys(comparison.axes, str))


def _means(frame: pd.DataFrame, by: list[str], column: str) -> dict[tuple[str, ...], str]:
    """The mean over seeds of each arm, as text."""
    found = statistics.summarise(frame, by, column)
    arms = zip(*(found[name] for name in by), strict=True)
    numbers = zip(found["mean"], found["low"], found["high"], strict=True)
    texts = {arm: with_interval(*number, column) for arm, number in zip(arms, numbers, strict=True)}
    return defaultdict(lambda: UNKNOWN, texts)


# --- what is judged -------------------------------------------------------------------------------------------------


def judged(comparison: Comparison) -> list[Table]:
    """How close students come to the teacher for each value that is judged, in every arm and in the worst; what honest
    users get; and the differences from the baseline. One such set for each combination of the axes that are neither
    judged nor ranged over, such as the budget."""
    return [table for one in _combinations(comparison) for table in one.tables()]


def headline(comparison: Comparison) -> Table:
    """What is judged, against the first and the worst attacker, at the largest budget."""
    (one,) = _combinations(narrowed(comparison)[0])
    return one.first()


def _combinations(comparison: Comparison) -> list[_Judged]:
    judge, axes, missing = comparison.judge, comparison.axes, comparison.missing
    outer = [axis for axis in axes if axis not in (judge.per, *judge.over)]
    found = []
    for values in product(*(axes[axis] for axis in outer)):
        at = dict(zip(outer, values, strict=True))
        frame, lacking = comparison.frame, missing[missing["control"] == ""]
        for axis, value in at.items():  # a control that was not crossed with an axis stands beside all of its values
            frame = frame[(frame[axis] == value) | ((frame["control"] != "") & (frame[axis] == UNKNOWN))]
            lacking = lacking[lacking[axis] == value]
        if (frame["control"] == "").any():
            found.append(_Judged(comparison, frame, lacking, at))
    return found


class _Judged:
    """The tables of one combination. Arms are told by the judged value and those of the axes that are ranged over, of
    which the last stands across."""

    def __init__(self, comparison: Comparison, frame: pd.DataFrame, missing: pd.DataFrame, at: dict[str, str]) -> None:
        self.judge, self.axes = comparison.judge, comparison.axes
        self.arms, self.controls = frame[frame["control"] == ""], frame[frame["control"] != ""]
        self.per, self.over = self.judge.per, [axis for axis in self.judge.over if axis in self.axes]
        self.by = [self.per, *self.over]
        self.student = titled(self.judge.student)
        self.where = "".join(f", {axis} {value}" for axis, value in at.items())
        self.counts = f"{counted(self.arms)}; mean ± half of the 95 % interval over seeds"
        self.students = _means(self.arms, self.by, self.judge.student)
        self.missing = missing
        self.empty = dict(zip(missing[self.by].itertuples(index=False, name=None), missing["status"], strict=True))
        there = {*self.arms[self.by].itertuples(index=False, name=None), *self.empty}
        self.cells = [arm for arm in product(*(self.axes[axis] for axis in self.by)) if arm in there]
        self.across = [v for v in self.axes[self.over[-1]] if any(a[-1] == v for a in self.cells)] if self.over else []

    def tables(self) -> list[Table]:
        if len(self.over) < 2:  # all arms fit into the first table
            found = [self._worst(self.across, self._reasons())]
        else:
            title = f"{_capital(self.student)}{self.where}"
            found = [self._worst([]), self._grid(title, self.students, [self.counts, *self._reasons()])]
        if self.judge.baseline in set(self.arms[self.per]) and self.arms[self.per].nunique() > 1:
            found.append(self._differences())
        return found

    def first(self) -> Table:
        return self._worst(self.across[:1] if len(self.over) < 2 else [])

    def _worst(self, across: list[str], reasons: Sequence[str] = ()) -> Table:
        """One row for each value that is judged, then the controls; with some of the arms."""
        honest = [
            c for c in dict.fromkeys((self.judge.utility, *HONEST)) if c in self.arms and self.arms[c].notna().any()
        ]
        users = {column: _means(self.arms, [self.per], column) for column in honest}
        worst = statistics.worst_case(self.arms, self.per, self.over, self.judge.student).set_index(self.per)
        differences = self._from_baseline()
        ends = ["worst case", "reached by"] if self.over else [self.student]
        against = [f"from {self.judge.baseline}"] if differences else []
        rows = []
        for value in dict.fromkeys(arm[0] for arm in self.cells):
            row = [value, *(users[column][(value,)] for column in honest)]
            if value in worst.index:
                of = worst.loc[value]
                mean = of["mean"] if of["n"] else of["largest"]
                row += [with_interval(mean, of["low"], of["high"], self.judge.student), of["arm"]][: len(ends)]
            else:
                row += [UNKNOWN] * len(ends)
            row += [differences.get(value, UNKNOWN)] * len(against)
            rows.append([*row, *(self._cell(self.students, (value, name)) for name in across)])
        beside = _means(self.controls, ["control"], self.judge.student)
        for control in self.controls["control"].unique():
            row = [f"control: {control}", *[UNKNOWN] * len(honest), beside[(control,)]]
            rows.append([*row, *[UNKNOWN] * (len(ends) - 1 + len(against) + len(across))])
        notes = [self.counts, *reasons]
        if self.over:
            how = "chosen on the other seeds, read on the one left out"
            if self.arms["seed"].nunique() == 1:
                how = "chosen and read on the same seed, so that it takes luck along"
            notes.append(f"Worst case: the arm that comes closest, {how}")
        if against:
            notes.append(f"From {self.judge.baseline}: the difference, {PAIRED}")
        columns = [self.per, *map(titled, honest), *ends, *against, *across]
        return Table(f"{_capital(self.student)} for each {self.per}{self.where}", columns, rows, 1, notes)

    def _from_baseline(self) -> dict[str, str]:
        """The differences of worst cases, seed by seed; none where there is nothing to pair."""
        readings = statistics.worst_readings(self.arms, self.per, self.over, self.judge.student)
        if self.judge.baseline not in set(readings[self.per]) or readings[self.per].nunique() == 1:
            return {}
        return {arm[0]: text for arm, text in self._paired(readings, [self.per]).items()}

    def _paired(self, frame: pd.DataFrame, by: list[str]) -> dict[tuple[str, ...], str]:
        """The difference of each arm from the baseline, as text."""
        pairs = statistics.paired(frame, by, self.judge.student, self.per, self.judge.baseline)
        texts = {}
        for *arm, difference, low, high, _, _, p in pairs.itertuples(index=False, name=None):
            text = with_interval(difference, low, high, self.judge.student, sign="+")
            texts[tuple(arm)] = f"{text} ({p_value(p)})" if low < high else text
        return texts

    def _differences(self) -> Table:
        """Of each arm from the baseline."""
        texts = self._paired(self.arms, self.by)
        note = _capital(PAIRED)
        title = f"{_capital(self.student)}: difference from {self.per} {self.judge.baseline}{self.where}"
        return self._grid(title, texts, [note])

    def _grid(self, title: str, texts: Mapping[tuple[str, ...], str], notes: list[str]) -> Table:
        """All arms, in those rows of which there is a text."""
        down = self.by[:-1] if self.over else self.by
        across = self.across or [self.student]
        keys = [arm[: len(down)] for arm in self.cells if arm in texts]
        rows = [
            [*key, *(self._cell(texts, (*key, *([name] if self.over else []))) for name in across)]
            for key in dict.fromkeys(keys)
        ]
        return Table(title, [*down, *across], rows, len(down), notes)

    def _cell(self, texts: Mapping[tuple[str, ...], str], arm: tuple[str, ...]) -> str:
        return texts[arm] if arm in texts else self.empty.get(arm, UNKNOWN)

    def _reasons(self) -> list[str]:
        """Why cells are empty, or rest on fewer seeds."""
        notes = []
        for (status, reason), of in self.missing.groupby(["status", "reason"], sort=False):
            arms = list(dict.fromkeys(of[self.by].itertuples(index=False, name=None)))
            first = " × ".join(arms[0])
            what = first if len(arms) == 1 else f"{len(arms)} cells, such as {first}"
            notes.append(f"{status}: {what}{f' ({reason})' if reason else ''}")
        return notes


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
