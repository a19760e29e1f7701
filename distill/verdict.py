"""What a comparison comes to: a row for each value that is judged, and a few sentences for whoever reads no tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from distill import figures, statistics
from distill.figures import titled
from distill.results import Comparison
from distill.tables import p_value, with_interval

SURE = 0.05  # a Holm-corrected p below it is called a difference
USELESS = {"utility/l1_mean": 2.0}  # the worst that such a number can be
DEAR = 0.01  # a defense that costs honest users more accuracy than this does not keep its answers right
PARTS = ("mean", "low", "high")
ACCURACY = "accuracy/defended_teacher"


def judged(comparison: Comparison) -> pd.DataFrame:
    """One row for each value of `judge.per`, best first: those that leave least to the student, or, where it is not
    defenses that are judged, those that come closest.

    Columns: `per`; arm, mean, low, high, n of the worst case; ``naive …``, of the attacker who believes what is
    returned; ``difference …`` and p_holm, from the worst case of the baseline, paired by seed and corrected over these
    rows; and for each column of `of_users` ``<column> …``; where … is mean, low and high. Of a single seed the largest
    mean stands for the worst case, from which no seed can be left out.
    """
    judge, frame = comparison.judge, comparison.frame[comparison.frame.control == ""]
    per, over, student = judge.per, list(judge.over), judge.student

    def added(table: pd.DataFrame, of: pd.DataFrame, name: str, *more: str) -> pd.DataFrame:
        part = of[[per, *PARTS, *more]].rename(columns={part: f"{name} {part}" for part in PARTS})
        return table.merge(part, on=per, how="left")

    table = statistics.worst_case(frame, per, over, student)
    table["mean"] = table["mean"].fillna(table.largest)
    naive = comparison.frame[figures.naive(comparison)]
    table = added(table, statistics.summarise(naive, [per], student), "naive")
    readings = statistics.worst_readings(frame, per, over, student)
    if judge.baseline in set(readings[per]):
        pairs = statistics.paired(readings, [per], student, per, judge.baseline)
        table = added(table, pairs.rename(columns={"difference": "mean"}), "difference", "p_holm")
    else:
        table = table.assign(**{f"difference {part}": np.nan for part in PARTS}, p_holm=np.nan)
    for column in of_users(comparison):
        table = added(table, statistics.summarise(frame, [per], column), column)
    return table.sort_values("mean", kind="stable", ascending=per == "defense", ignore_index=True)


def of_users(comparison: Comparison) -> list[str]:
    """The columns that say what honest users get, those that were measured."""
    names = dict.fromkeys([comparison.judge.utility, ACCURACY])
    return [name for name in names if name in comparison.frame and comparison.frame[name].notna().any()]


def number(row: Mapping[str, Any] | pd.Series, name: str, column: str) -> str:
    """One of the numbers of a row of `judged`, with its interval: "" for the worst case, or the beginning of its
    columns' names; `column` is what was measured."""
    mean, low, high = (row[f"{name} {part}".strip()] for part in PARTS)
    return with_interval(mean, low, high, column, "+" if name == "difference" else "").replace("-", "−")


def uneven(comparison: Comparison) -> bool:
    """Whether some of what is judged met other attackers than the rest, which makes worst cases hard to compare. A
    benchmark says why; of runs that somebody left in a folder nobody knows."""
    frame = comparison.frame[comparison.frame.control == ""]
    met = figures.arms(frame, list(comparison.judge.over)).groupby(frame[comparison.judge.per]).agg(frozenset)
    return met.nunique() > 1


def headline(comparison: Comparison, table: pd.DataFrame) -> list[Markup]:
    """The answer in a few sentences, worded from the numbers of `judged`: what holds best and at which cost, or that
    nothing measurably does. Nothing is said of runs in a folder that are `uneven`. Names are escaped."""
    judge = comparison.judge
    base, others = table[table[judge.per] == judge.baseline], table[table[judge.per] != judge.baseline]
    if others.empty or others["mean"].isna().all() or (uneven(comparison) and not comparison.benchmark):
        return []
    defenses = judge.per == "defense"
    best = others.iloc[0] if defenses or base.empty else table.iloc[0]
    reached = Markup("<b>{}</b> {}: {} {}").format(
        best[judge.per],
        "has the lowest worst case" if defenses else "comes closest",
        titled(judge.student),
        number(best, "", judge.student),
    )
    if others.n.max() < 2:
        return [reached + ". With one seed nobody can tell this from chance; run three or more."]
    if base.empty:
        without = "without a defense" if defenses else f"with {judge.baseline}"
        return [reached + f". No run {without} says what that is worth."]
    if defenses:
        return _of_defenses(comparison, others, base.iloc[0]) + _of_front(comparison, table)
    if best[judge.per] == judge.baseline:
        second = others.iloc[0]
        return [reached + f"; next is {second[judge.per]} with {number(second, '', judge.student)}."]
    chance = f" ({_change(best, judge.student)})" if best.p_holm < SURE else ", which may be chance"
    return [reached + f" instead of {number(base.iloc[0], '', judge.student)} with {judge.baseline}{chance}."]


def _of_defenses(comparison: Comparison, others: pd.DataFrame, base: pd.Series) -> list[Markup]:
    """First of those that keep their answers right, then of one that does more at a higher price, then of the one that
    the naive attacker flatters."""
    judge = comparison.judge
    per, student = judge.per, judge.student
    hold = others[(others.p_holm < SURE) & (others["difference mean"] < 0)]
    kept = others
    if f"{ACCURACY} mean" in others:
        kept = others[~(base[f"{ACCURACY} mean"] - others[f"{ACCURACY} mean"] > DEAR)]
    right = hold[hold[per].isin(kept[per])]
    said = []
    if len(right):
        which = "" if len(right) == len(hold) else " of those that keep their answers right"
        said.append(Markup("<b>{}</b> holds best{}. ").format(right.iloc[0][per], which))
        said[0] += _what(comparison, right.iloc[0], base)
    else:
        among = kept if len(hold) and len(kept) else others
        none = "No defense" if len(among) == len(others) else "No defense that keeps its answers right"
        low = among.iloc[0]
        said.append(Markup("<b>{} measurably holds.</b> ").format(none))
        said[0] += f"The lowest worst case of {len(among)} is {low[per]}’s: {titled(student)} "
        said[0] += f"{number(low, '', student)} instead of {number(base, '', student)} without one "
        said[0] += f"({_change(low, student)})."
    if len(hold) and (right.empty or hold.iloc[0][per] != right.iloc[0][per]):
        most = Markup("<b>{}</b> takes more from the student, and from honest users. ").format(hold.iloc[0][per])
        said.append(most + _what(comparison, hold.iloc[0], base))
    gaps = others["mean"] - others["naive mean"]
    if gaps.max() > DEAR:
        row = others.loc[gaps.idxmax()]
        flattered = Markup("Judged by the naive attacker alone, <b>{}</b> would have looked ").format(row[per])
        said.append(flattered + f"better than it is: {number(row, 'naive', student)} instead of "
                    f"{number(row, '', student)}.")  # fmt: skip
    return said


def _of_front(comparison: Comparison, table: pd.DataFrame) -> list[Markup]:
    """Which defenses are on the front of users' cost and the worst attacker's student, and how much that dominates of
    what lies between perfect answers and no student, and useless answers and a perfect one."""
    judge = comparison.judge
    if f"{judge.utility} mean" not in table:
        return []
    table = table.sort_values(f"{judge.utility} mean", ascending=judge.utility_better == "lower")
    users, students = table[f"{judge.utility} mean"].to_numpy(), table["mean"].to_numpy()
    worst = (USELESS.get(judge.utility, float(users.max())) if judge.utility_better == "lower" else 0.0), 1.0
    area = statistics.hypervolume(users, students, judge.utility_better, worst)
    base = (table[judge.per] == judge.baseline).to_numpy()
    alone = statistics.hypervolume(users[base], students[base], judge.utility_better, worst)
    front = table[judge.per][statistics.pareto(users, students, judge.utility_better)]
    text = Markup("On the front, where no other gives users as much and students less: {}. ").format(", ".join(front))
    reference = f"{titled(judge.utility)} {worst[0]:g}, {titled(judge.student)} 1"
    return [text + f"Hypervolume {area:.3f}, without a defense {alone:.3f} (from {reference})."]


def _what(comparison: Comparison, row: pd.Series, base: pd.Series) -> str:
    """What one defense leaves to the student of its worst attacker, and to honest users."""
    student = comparison.judge.student
    against = f"Against its worst attacker ({row.arm}) the" if row.arm else "The"
    users = []
    for name in of_users(comparison):
        here, there = number(row, name, name), number(base, name, name)
        users.append(f"{titled(name)} {here}" + (f" instead of {there}" if here != there else ""))
    whose = "" if titled(student).startswith("student") else "student’s "
    told = f"{against} {whose}{titled(student)} is {number(row, '', student)} instead of "
    told += f"{number(base, '', student)} without one ({_change(row, student)})."
    return told + (f" Honest users get: {'; '.join(users)}." if users else "")


def _change(row: pd.Series, column: str) -> str:
    chance = "" if np.isnan(row.p_holm) else f", Holm-corrected {p_value(row.p_holm)}"
    return f"difference {number(row, 'difference', column)}{chance}"
