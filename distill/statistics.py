"""What runs say together: means and intervals, paired differences, the worst case, equal utility, fronts and curves.

Frames are those of `distill.results`: a row a run (or a point of its curve), a column ``seed``, text columns that tell
arms apart, and columns of numbers. NaN means "not measured": such rows are left out, n says how many seeds are left,
and an arm without any stays in the table with n = 0. Runs of one arm with the same seed are averaged first, so n counts
seeds and nothing else: of two runs with one seed the second says little that is new.

From seed to seed the attack, the student and a defense's noise are drawn anew. The teacher and the test rows are not:
an interval says where the mean over many seeds lies, not how another teacher or other test rows would move it.

Intervals are Student's t, of the mean over seeds, and are not cut off where a share could not be. They hold for numbers
that spread as a normal variable does, which nobody can check on three seeds. A bootstrap does not help: its 95 %
intervals (percentile) from three normal values hold the mean in 76 % of cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from distill.errors import DistillError, nearest

SEED = "seed"
QUERIES = "cost/queries"
EQUAL = 1e-12  # floating-point numbers whose relative difference is smaller are the same number
SAME_UTILITY = 1e-3  # so near to the level (0.1 points of accuracy, 0.001 of L1) a defense lies on it
ESTIMATE = ["mean", "std", "n", "low", "high"]


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with its standard deviation and its interval. NaN: not enough seeds to tell."""

    mean: float
    std: float
    n: int
    low: float
    high: float


def estimate(values: Sequence[float] | np.ndarray | pd.Series, level: float = 0.95) -> Estimate:
    """Of (n,) values, one for each seed. The standard deviation is that of a sample (n - 1); both it and the interval
    need two values."""
    measured = np.asarray(values, dtype=float)
    measured = measured[~np.isnan(measured)]
    n = len(measured)
    mean = float(measured.mean()) if n else np.nan
    std = float(measured.std(ddof=1)) if n > 1 else np.nan
    half = float(_half_width(std, n, level))
    return Estimate(mean, std, n, mean - half, mean + half)


def summarise(frame: pd.DataFrame, by: list[str], value: str, level: float = 0.95) -> pd.DataFrame:
    """One row for each arm, told apart by the columns `by`: mean, std, n, low, high, and the seeds as text ("0, 1, 2").

    Raises:
        DistillError: There is no such column.
    """
    seeds = _by_seed(frame, by, value)
    arms = seeds.groupby(by, sort=False, dropna=False, observed=True)
    table = arms[value].agg(mean="mean", std="std", n="size").reset_index()
    table[SEED + "s"] = arms[SEED].agg(lambda column: ", ".join(map(str, sorted(column)))).to_numpy(dtype=object)
    table = frame[by].drop_duplicates().merge(table, on=by, how="left")
    return _with_bounds(table.fillna({"n": 0, "seeds": ""}), "mean", level)[[*by, *ESTIMATE, "seeds"]]


def paired(
    frame: pd.DataFrame, by: list[str], value: str, axis: str, baseline: str, level: float = 0.95
) -> pd.DataFrame:
    """By how much each arm lies above the arm that differs from it in `axis` alone and has `baseline` there.

    Differences are taken seed by seed, between arms that are equal in everything else that `by` names, which takes out
    whatever a seed does to both; seeds that only one of the two has are left out, and n says so. `p` is that of the
    two-sided paired t test. `p_holm` corrects it, by Holm's method, for all the p-values of this table: the chance that
    a table without a single real difference shows one p_holm below 0.05 is at most 5 %. With three seeds (two degrees
    of freedom) and fifty comparisons a difference has to be some thirty standard errors to pass: a large p_holm is no
    evidence of no difference; the interval, which is not corrected, says how large one may be.

    Where all differences are equal, t is no finite number, and n seeds say nothing of how others would spread: p is 1
    if they are zero (two arms that are one and the same) and NaN if not.

    Returns:
        Columns: `by`, difference, low, high, n, p, p_holm; no rows for `baseline` itself.

    Raises:
        DistillError: There is no such column; no run has `baseline` in `axis`.
    """
    seeds = _by_seed(frame, by, value)
    if baseline not in set(frame[axis]):
        raise DistillError(f"no run has {axis} '{baseline}'.{nearest(baseline, set(map(str, frame[axis])))}", "report")
    rest = [name for name in by if name != axis]
    base = seeds[seeds[axis] == baseline].drop(columns=axis)
    pairs = seeds[seeds[axis] != baseline].merge(base, on=[*rest, SEED], suffixes=("", " base"))
    pairs["difference"] = pairs[value] - pairs[f"{value} base"]
    pairs["size"] = pairs[[value, f"{value} base"]].abs().max(axis=1)
    arms = pairs.groupby(by, sort=False, dropna=False, observed=True)
    table = arms["difference"].agg(difference="mean", std="std", n="size").reset_index()
    smallest = EQUAL * arms["size"].max().to_numpy()
    for name in ("difference", "std"):  # what is left of equal numbers is rounding
        table[name] = table[name].where(~(table[name].abs() <= smallest), 0.0)
    everything = frame.loc[frame[axis] != baseline, by].drop_duplicates()
    table = _with_bounds(everything.merge(table, on=by, how="left").fillna({"n": 0}), "difference", level)
    difference, std, n = (table[name].to_numpy(dtype=float) for name in ("difference", "std", "n"))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stdtr(n - 1, -np.abs(difference) / (std / np.sqrt(n)))
    p[n < 2] = np.nan
    p[std == 0] = np.where(difference[std == 0] == 0, 1.0, np.nan)
    table["p"], table["p_holm"] = p, holm(p)
    return table[[*by, "difference", "low", "high", "n", "p", "p_holm"]]


def holm(p: np.ndarray) -> np.ndarray:
    """(m,) p-values, corrected for their number; NaN stays NaN and does not count.

    Paper: A Simple Sequentially Rejective Multiple Test Procedure, Holm, Scandinavian Journal of Statistics 1979.
    """
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)  # NaN last
    order = order[: int((~np.isnan(p)).sum())]
    steps = p[order] * (len(order) - np.arange(len(order)))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


# --- the worst case -------------------------------------------------------------------------------------------------


def worst_case(frame: pd.DataFrame, per: str, over: Sequence[str], value: str, level: float = 0.95) -> pd.DataFrame:
    """How close the best of several attackers comes to each defense: AutoAttack's score, with its error.

    Paper: Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, Croce and
    Hein, ICML 2020, which takes the worst input by input; here it is taken over whole students.

    Whoever takes the largest of several noisy means takes luck along: `largest` lies above the largest true mean, by
    more the more arms are nearly equal and the fewer seeds there are. So, for each seed, the arm is chosen on the
    *other* seeds and read on the one left out; `mean` is the mean of these readings.

    This estimates, without bias, what an attacker reaches who chooses the arm by n - 1 seeds and then runs it once.
    Such an attacker sometimes chooses an arm that is not the best, so `mean` lies *below* the largest true mean,
    which is on the average between `mean` and `largest`: both are told. (The test rows are the same in all seeds: what
    is corrected is the luck of seeds, not that of rows.)

    The interval is the t interval of the n readings, which are not quite independent: their choices share seeds.
    Simulated (five arms, normal seeds, 4,000 tables a case), it holds the largest true mean in 94 to 96 % of tables
    where one arm stands out by two standard deviations of a seed or more, and in 89 to 92 % (three seeds) or 86 to 91 %
    (five) where several are within one.

    Args:
        per: The column whose values are judged, such as the defense.
        over: The columns that tell the arms apart, such as attack and recovery.
        value: How close the student comes; higher is closer.

    Returns:
        A row for each value of `per`: `arm`, the one with the largest mean (its values of `over`), `largest`, and mean,
        std, n, low and high of the readings. With one seed, and more than one arm, nothing can be left out: only
        `largest` is a number, and n is 0. An arm that lacks a seed can't be read there: the second best is then.
    """
    readings = dict(iter(worst_readings(frame, per, over, value).groupby(per)[value]))
    seeds = _by_seed(frame.assign(arm=_arm(frame, over)), [per, "arm"], value)
    means, rows = seeds.groupby([per, "arm"], sort=False)[value].mean(), []
    for judged, of in means.groupby(per, sort=False):
        read = estimate(readings.get(judged, []), level)
        rows.append({per: judged, "arm": of.idxmax()[1], "largest": of.max(), **vars(read)})
    table = pd.DataFrame(rows, columns=[per, "arm", "largest", *ESTIMATE])
    table = frame[[per]].drop_duplicates().merge(table, on=per, how="left").fillna({"n": 0, "arm": ""})
    return table.astype({"n": int})


def worst_readings(frame: pd.DataFrame, per: str, over: Sequence[str], value: str) -> pd.DataFrame:
    """The readings behind `worst_case`. Columns: `per`, seed, arm, `value`. `paired` of these compares worst cases.

    An arm can be chosen for a seed that it has, if it has another one too; the first of equal ones is. Where there is
    but one arm nothing is chosen, and its own values are the readings.
    """
    seeds = _by_seed(frame.assign(arm=_arm(frame, over)), [per, "arm"], value)
    found = []
    for judged, part in seeds.groupby(per, sort=False):
        (arm, arms), (seed, numbers) = pd.factorize(part["arm"]), pd.factorize(part[SEED])
        told = np.full((len(numbers), len(arms)), np.nan)
        told[seed, arm] = part[value]
        have = ~np.isnan(told)
        others = have.sum(axis=0) - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            elsewhere = (np.nansum(told, axis=0) - told) / others  # the mean over the other seeds
        elsewhere[~have | (others == 0)] = -np.inf
        if len(arms) == 1:
            elsewhere[have] = 0.0
        for row in np.flatnonzero(elsewhere.max(axis=1) > -np.inf):
            chosen = elsewhere[row].argmax()
            found.append((judged, numbers[row], arms[chosen], told[row, chosen]))
    return pd.DataFrame(found, columns=[per, SEED, "arm", value])


def _arm(frame: pd.DataFrame, over: Sequence[str]) -> pd.Series:
    _check(frame, *over)
    words = pd.Series("", index=frame.index)
    for i, name in enumerate(over):
        words = words + (", " if i else "") + frame[name].astype(str)
    return words


# --- at equal utility -----------------------------------------------------------------------------------------------


def at_equal_utility(
    frame: pd.DataFrame,
    per: str,
    family: str,
    value: str,
    utility: str,
    level: float,
    *,
    over: Sequence[str] = (),
    baseline: str | None = None,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """What each family of defenses leaves to the student where it leaves honest users `level`.

    A family's strengths are points (utility, value). Seed by seed, straight lines between neighbours in utility are
    read at the level; the mean and the interval are over the seeds. Nothing is read beyond a family's weakest and
    strongest member.

    A straight line between two defenses is what a provider gets who draws one of them for each query: of an L1 distance
    or an accuracy, which are means over queries, exactly; of what a student learns, it is an assumption. For the same
    reason no defense at all (`baseline`) is a member of every family, with the utility that it has: of strength zero.

    Args:
        per: The column that names a defense with its strength.
        family: The column that names the family, such as ``choice/defense``.
        value: How close the student comes.
        utility: What honest users get, lower or higher being better.
        level: The utility to compare at.
        over: Columns that tell attackers apart; for each strength and seed the one that comes closest on the other
            seeds is read, as `worst_case` does. Without any, runs of one seed are averaged.
        baseline: The value of `per` of the undefended teacher; None where there is none.

    Returns:
        A row for each family, `baseline` apart: mean, low, high, n (the seeds in whose range the level lies), and how:
        "measured" (within 0.001 of a member's utility in all of them), "interpolated", "out of range", or "not
        measured" (no seed tells its members' value and utility; see `worst_readings` for one seed).
    """
    _check(frame, family)
    points = worst_readings(frame, per, over, value).merge(_by_seed(frame, [per], utility), on=[per, SEED])
    points = points.merge(frame[[per, family]].drop_duplicates(), on=per)
    undefended = points[points[per] == baseline]
    rows = []
    for name in frame.loc[frame[per] != baseline, family].unique():
        members = points[(points[family] == name) & (points[per] != baseline)]
        joined = pd.concat([members, undefended[undefended[SEED].isin(members[SEED])]])
        read, measured = [], []
        for _, seed in joined.groupby(SEED):
            at, reached = _means(seed[utility], seed[value])
            near = int(np.abs(at - level).argmin())
            if (on := bool(abs(at[near] - level) <= SAME_UTILITY)) or at[0] < level < at[-1]:
                measured.append(on)
                read.append(reached[near] if on else float(np.interp(level, at, reached)))
        how = "interpolated" if not all(measured) else "measured" if read else "out of range"
        how = how if len(members) else "not measured"
        there = estimate(read, confidence)
        rows.append((name, there.mean, there.low, there.high, there.n, how))
    return pd.DataFrame(rows, columns=[family, "mean", "low", "high", "n", "how"])


def pareto(
    utility: np.ndarray | pd.Series | Sequence[float],
    value: np.ndarray | pd.Series | Sequence[float],
    utility_better: str,
) -> np.ndarray:
    """Which defenses are on the front: no other gives honest users as much and students less, or more and as much.

    The numbers are taken as they are: where they are means over seeds, an error may put a defense on the front or keep
    it off.

    Args:
        utility: (n,) what honest users get.
        value: (n,) how close the student comes; a defense wants it low.
        utility_better: "lower" or "higher".

    Returns:
        (n,) bool. Equal ones are on it together; one with a NaN never is.
    """
    cost, close = _costs(utility, utility_better), np.asarray(value, dtype=float)
    no_worse = (cost[:, None] <= cost) & (close[:, None] <= close)  # [i, j]: i is at least as good as j
    better = (cost[:, None] < cost) | (close[:, None] < close)
    return ~(no_worse & better).any(axis=0) & ~np.isnan(cost) & ~np.isnan(close)


def hypervolume(
    utility: np.ndarray | pd.Series | Sequence[float],
    value: np.ndarray | pd.Series | Sequence[float],
    utility_better: str,
    reference: tuple[float, float],
) -> float:
    """The area that a set of defenses dominates: a larger one is better. Its unit is that of utility times value.

    Paper: Multiobjective Evolutionary Algorithms: A Comparative Case Study and the Strength Pareto Approach, Zitzler
    and Thiele, IEEE Transactions on Evolutionary Computation 1999.

    Args:
        utility, value, utility_better: As of `pareto`.
        reference: (utility, value), the worst that counts, such as (2, 1) for L1 and agreement; to be told with the
            number, which means nothing without it. Whatever is not better than it in both adds nothing.

    Returns:
        Float.
    """
    on = pareto(utility, value, utility_better)
    cost, close = _costs(utility, utility_better)[on], np.asarray(value, dtype=float)[on]
    worst = float(_costs([reference[0]], utility_better)[0])
    area, height = 0.0, reference[1]
    for i in np.argsort(cost):  # along the front the student falls, and each step adds the strip below the one before
        if cost[i] < worst and close[i] < height:
            area += (worst - cost[i]) * (height - close[i])
            height = close[i]
    return float(area)


def _costs(utility: np.ndarray | pd.Series | Sequence[float], better: str) -> np.ndarray:
    if better not in ("lower", "higher"):
        raise DistillError(f"'lower' or 'higher', not '{better}'", "judge.utility_better")
    return np.asarray(utility, dtype=float) * (1 if better == "lower" else -1)


# --- over the budget ------------------------------------------------------------------------------------------------


def budget_area(frame: pd.DataFrame, by: list[str], budget: str, value: str, level: float = 0.95) -> pd.DataFrame:
    """The mean height of each arm's budget curve: the area below it, over the width.

    Budgets are taken by their logarithms, as they are chosen in ratios: by their plain numbers, half of the area under
    250 to 10,000 queries would be that beyond 5,000, where little happens. Between points the curve is straight. All
    curves are read on the one range of budgets that every curve covers, which the table states, so that areas can be
    compared; a seed with less than two points has no curve.

    Returns:
        Columns: `by`, mean, std, n, low, high (over the seeds), from, to (the range; NaN where there is none).
    """
    curves = _curves(frame, by, budget, value)
    lines = {key: line for key, line in curves.items() if len(line[0]) > 1}
    start = max((np.log(x[0]) for x, _ in lines.values()), default=np.nan)
    stop = min((np.log(x[-1]) for x, _ in lines.values()), default=np.nan)
    areas: dict[tuple, list[float]] = {}
    for (arm, _), (x, y) in lines.items():
        if start < stop:
            inside = np.log(x)[(np.log(x) > start) & (np.log(x) < stop)]
            at = np.concatenate([[start], inside, [stop]])
            height = np.interp(at, np.log(x), y)
            area = float(((height[1:] + height[:-1]) / 2 * np.diff(at)).sum())
            areas.setdefault(arm, []).append(area / (stop - start))
    range_ = (np.exp(start), np.exp(stop)) if start < stop else (np.nan, np.nan)
    rows = [(*arm, *vars(estimate(areas.get(arm, []), level)).values(), *range_) for arm in _arms(frame, by)]
    return pd.DataFrame(rows, columns=[*by, *ESTIMATE, "from", "to"])


def queries_to_reach(
    frame: pd.DataFrame,
    by: list[str],
    budget: str,
    value: str,
    share: float,
    best: float = 1.0,
    level: float = 0.95,
) -> pd.DataFrame:
    """How many queries each arm needs until its student first has ``share * best``.

    Seed by seed, the curve is read between the last budget below and the first one that is not, straight in the
    logarithm of the budget; nothing is read beyond the budgets that were spent. The mean over seeds is the geometric
    one, and so is its interval: costs spread by factors.

    Args:
        share: Of `best`, such as 0.9.
        best: What would be everything: 1 for the agreement with the teacher, or the best that an undefended student
            has reached.

    Returns:
        Columns: `by`, queries, low, high, n (the seeds that reach it), of (all seeds) and how. "interpolated", or "at
        most": some seed is there at its first budget, which is taken, and there is no interval. "not reached": some
        seed is not, and `queries` is NaN, since the mean of the others would be too low.
    """
    reached: dict[tuple, list[tuple[float, str]]] = {}
    for (arm, _), (x, y) in _curves(frame, by, budget, value).items():
        reached.setdefault(arm, []).append(_first(x, y, share * best))
    rows = []
    for arm in _arms(frame, by):
        seeds = reached.get(arm, [])
        there = [(at, how) for at, how in seeds if how != "at least"]
        if there and len(there) == len(seeds):
            numbers, how = _geometric(there, level)
        else:
            numbers, how = (np.nan, np.nan, np.nan), "not reached" if seeds else ""
        rows.append((*arm, *numbers, len(there), len(seeds), how))
    return pd.DataFrame(rows, columns=[*by, "queries", "low", "high", "n", "of", "how"])


def savings(
    frame: pd.DataFrame,
    curves: pd.DataFrame,
    by: list[str],
    value: str,
    *,
    control: str = "ground truth",
    usd_per_label: float | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """What stealing saved, against somebody who has inputs of the same kind labelled and trains the same student.

    *Labels*: how many of them the control needs until its student has what the attack's has in the end, seed by seed,
    as `queries_to_reach` reads it. A control of one budget, or one that is better or worse throughout, gives a bound
    only, and `how` says which: "at least" (even with all its labels the control stays below), "at most" (it is above
    with its fewest), or "unclear" where seeds disagree; a bound has no interval.

    *Money*: `usd`, what the queries cost by the provider's prices, and `label_usd`, those labels at `usd_per_label`;
    their difference is a bound where the labels are.

    *Compute*: `seconds` of training the student on the answers, and `control_seconds`, the control's at its largest
    budget. Students that an attack trains to choose its queries are not in it. What training the *teacher* took is
    counted nowhere, as runs do not tell it: whoever steals saves that besides, and so does whoever buys labels.

    Args:
        frame: One row a run, with a column ``control``: `distill.results.Comparison.frame`.
        curves: `distill.results.curves` of it, which has a control's labels under ``cost/queries``.
        by: Tells arms apart; controls are paired with each of them by seed.
        value: What has to be reached, such as ``accuracy/student``.
        usd_per_label: What a label costs; None: not known.

    Returns:
        A row for each arm: reached, queries, labels, low, high, n (seeds that both have), how, usd, label_usd,
        usd_saved, seconds, control_seconds, seconds_saved; NaN where something is not known.
    """
    _check(frame, *by)
    _check(curves, "control", value)
    curves = curves[["run", "control", *by, SEED, QUERIES, value]]
    truth = curves[curves["control"] == control]
    costs = ["cost/usd", "cost/train_seconds"]
    spent = frame[["run"]].join(frame.reindex(columns=costs)).drop_duplicates("run")
    lines = {seed: line for (_, seed), line in _curves(truth, ["control"], QUERIES, value).items()}
    controls = truth.sort_values(QUERIES).groupby(SEED).tail(1).merge(spent, on="run").set_index(SEED)
    points = curves[(curves["control"] == "") & curves[value].notna()].sort_values(QUERIES)
    final = points.groupby([*by, SEED], dropna=False, observed=True).tail(1).merge(spent, on="run", how="left")
    final = final[final[SEED].isin(lines)]
    arms, rows = dict(iter(final.groupby(by, dropna=False, observed=True))), []
    for arm in _arms(frame[frame["control"] == ""], by):
        runs = arms.get(arm, final.iloc[:0])
        reads = [_first(*lines[seed], reached) for seed, reached in zip(runs[SEED], runs[value], strict=True)]
        (labels, low, high), how = _geometric(reads, level)
        usd, seconds = (float(runs[name].mean()) for name in costs)
        label_usd = np.nan if usd_per_label is None else labels * usd_per_label
        theirs = float(controls.loc[controls.index.isin(runs[SEED]), "cost/train_seconds"].mean())
        row = [runs[value].mean(), runs[QUERIES].mean(), labels, low, high, len(runs), how]
        rows.append((*arm, *row, usd, label_usd, label_usd - usd, seconds, theirs, theirs - seconds))
    numbers = ["reached", "queries", "labels", "low", "high", "n", "how", "usd", "label_usd", "usd_saved"]
    return pd.DataFrame(rows, columns=[*by, *numbers, "seconds", "control_seconds", "seconds_saved"])


def _first(budgets: np.ndarray, values: np.ndarray, wanted: float) -> tuple[float, str]:
    """The budget at which a curve first has what is wanted: "interpolated", or a bound."""
    there = np.flatnonzero(values >= wanted)
    if not len(there):
        return float(budgets[-1]), "at least"
    first = int(there[0])
    if values[first] == wanted:
        return float(budgets[first]), "interpolated"
    if first == 0:
        return float(budgets[0]), "at most"
    around = slice(first - 1, first + 1)
    return float(np.exp(np.interp(wanted, values[around], np.log(budgets[around])))), "interpolated"


def _geometric(reads: list[tuple[float, str]], level: float) -> tuple[tuple[float, float, float], str]:
    """Mean, low and high over seeds, by their logarithms, and how they were read. With bounds to one side among them
    the mean is such a bound."""
    hows = {how for _, how in reads} - {"interpolated"}
    if not reads or len(hows) > 1:
        return (np.nan, np.nan, np.nan), "unclear" if reads else ""
    logs = estimate([np.log(at) for at, _ in reads], level)
    if hows:
        return (float(np.exp(logs.mean)), np.nan, np.nan), hows.pop()
    return (float(np.exp(logs.mean)), float(np.exp(logs.low)), float(np.exp(logs.high))), "interpolated"


# --- what all of these need -----------------------------------------------------------------------------------------


def _check(frame: pd.DataFrame, *names: str) -> None:
    for name in names:
        if name not in frame.columns:
            raise DistillError(f"no run has '{name}'.{nearest(name, map(str, frame.columns))}", "report")


def _by_seed(frame: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """One row for each arm and seed that were measured, in the order of the frame: `by`, seed, `value`."""
    _check(frame, *by, SEED, value)
    measured = frame[frame[value].notna()]
    return measured.groupby([*by, SEED], sort=False, dropna=False, observed=True)[value].mean().reset_index()


def _curves(
    frame: pd.DataFrame, by: list[str], budget: str, value: str
) -> dict[tuple[tuple, int], tuple[np.ndarray, np.ndarray]]:
    """For each arm and seed the budgets, ascending, and what was reached with them. No budget, no point."""
    points = _by_seed(frame[frame[budget] > 0], [*by, budget], value).sort_values(budget, kind="stable")
    curves = points.groupby([*by, SEED], sort=False, dropna=False, observed=True)
    return {
        (key[:-1], key[-1]): (line[budget].to_numpy(dtype=float), line[value].to_numpy(dtype=float))
        for key, line in curves
    }


def _arms(frame: pd.DataFrame, by: list[str]) -> list[tuple]:
    return list(frame[by].drop_duplicates().itertuples(index=False, name=None))


def _means(at: pd.Series, values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Ascending places, and the mean of the values at each."""
    means = values.groupby(at).mean()
    return means.index.to_numpy(dtype=float), means.to_numpy(dtype=float)


def _half_width(std: np.ndarray | float, n: np.ndarray | int, level: float) -> np.ndarray:
    """Of the t interval. NaN for less than two seeds."""
    n = np.asarray(n, dtype=float)
    return np.where(n > 1, stdtrit(np.maximum(n - 1, 1), (1 + level) / 2) * std / np.sqrt(np.maximum(n, 1)), np.nan)


def _with_bounds(table: pd.DataFrame, mean: str, level: float) -> pd.DataFrame:
    half = _half_width(table["std"].to_numpy(dtype=float), table["n"].to_numpy(), level)
    return table.astype({"n": int}).assign(low=table[mean] - half, high=table[mean] + half)
