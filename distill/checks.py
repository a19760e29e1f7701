"""Warnings about results that are easily misread, each with an anchor of the README that says what to do."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.contracts import Defense
from distill.records import Result

if TYPE_CHECKING:  # a run that trains needs none of it
    import pandas as pd

    from distill.results import Judge

README = "README.md"
SHOWN = 4  # so many arms are named
SEEDS = 3  # fewer tell nothing of how far another seed would move a number
AVERAGING = ("average", "majority_vote")  # recoveries that ask several times
OF_LABELS = ("top1", "label_smoothing")  # and those that learn from the label alone
LABELS = ("label", "top_1")  # profiles of transfer sets with no more than it, whatever the interface told


# --- one result -----------------------------------------------------------------------------------------------------


def flags(result: Result, defense: Defense, recovery: str) -> list[str]:
    """One line for each trap that this result is in."""
    found = []
    teacher, student = result.sizes["teacher"], result.sizes["student"]
    small, large = student["flops_per_query"], teacher["flops_per_query"]
    if small is not None and large is not None and small >= large:
        found.append(f"the student is not cheaper than its teacher ({README}#student-not-cheaper)")
    if recovery == "as_returned" and result.profile != "label" and not defense.deterministic:
        found.append(f"a random defense was attacked without averaging ({README}#random-defense)")
    moved = result.utility.get("l1_max", 0) > 0 and result.profile not in LABELS
    if recovery == "as_returned" and moved and defense.keeps_argmax:
        found.append(f"a defense that keeps the arg-max was attacked without recovery=top1 ({README}#top1)")
    if result.config["access"]["profile"] == "weights":
        found.append(f"the student may copy its teacher's weights, which no attacker has ({README}#white-box)")
    accuracy = {who: row["accuracy"] for who, row in result.accuracy.items() if "accuracy" in row}
    if accuracy and accuracy["student"] > accuracy["defended_teacher"]:
        found.append(f"the student is more accurate than what honest users get ({README}#defended-below-student)")
    if _saw_test(result):
        found.append(f"the test rows had a part in the training ({README}#selected-on-test)")
    return found


def _saw_test(result: Result) -> bool:
    """Whether a result shows that its test rows were trained on or selected by.

    What can be seen: the pool, or the teacher's training data, are the test rows (as a whole; an overlap is not seen),
    and an epoch was selected although no row was held out of the attacker's own. The shipped loop can't do the latter:
    it holds out of the transfer set, and refuses to select without.
    """
    same = result.fingerprints["test"] in (result.fingerprints["pool"], result.fingerprints["train"])
    history = result.training
    selected = history.get("selected_epoch", 0) < history.get("epochs", 0)
    return same or (selected and not history.get("validation_rows", 0))


# --- a table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warning:
    """A trap that a table is in.

    Args:
        text: What is wrong, in one line.
        anchor: Where it says what to do, such as ``README.md#few-seeds``.
        where: The arms that it is about.
    """

    text: str
    anchor: str
    where: str

    def __str__(self) -> str:
        return f"{self.text}: {self.where} ({self.anchor})"


def warnings(frame: pd.DataFrame, judge: Judge, curves: pd.DataFrame | None = None) -> list[Warning]:
    """What to know before a table is believed: one warning for each kind of trap, naming the arms in it.

    Args:
        frame: One row a run, controls among them: `distill.results.Comparison.frame`.
        judge: What is judged.
        curves: `distill.results.curves`, where there are several budgets.
    """
    from distill.statistics import summarise

    runs, controls = frame[frame["control"] == ""], frame[frame["control"] != ""]
    budget = [] if judge.budget is None or judge.budget not in frame else [judge.budget]
    arm = list(dict.fromkeys(name for name in (judge.per, *judge.over, *budget) if name in frame))
    arms = summarise(runs, arm, judge.student).set_index(arm)
    found = [
        *_few_seeds(arms["n"], summarise(controls, ["control"], judge.student).set_index("control")["n"]),
        *_control_ahead(runs, controls, arm, budget, judge),
        *_unanswered(runs),
        *_below_student(runs, arm, judge),
        *_on_test(runs, judge),
        *_unpaired(runs, arms["seeds"], budget),
    ]
    return found if curves is None else found + _non_monotone(curves, arm, budget, judge)


def _few_seeds(arms: pd.Series, controls: pd.Series) -> list[Warning]:
    where = [*arms[arms < SEEDS].index, *(f"the control '{name}'" for name in controls[controls < SEEDS].index)]
    return _warn("fewer than three seeds", "few-seeds", where, len(arms) + len(controls))


def _control_ahead(
    runs: pd.DataFrame, controls: pd.DataFrame, arm: list[str], budget: list[str], judge: Judge
) -> list[Warning]:
    """Controls whose mean is above those of all arms against a defense (with one budget), over the seeds of both."""
    found, judged = [], [judge.per, *(name for name in budget if name != judge.per)]
    for name, control in controls.groupby("control", sort=False):
        reached = control.groupby(["seed", *budget])[judge.student].mean().rename("reached").reset_index()
        pairs = runs.merge(reached, on=["seed", *budget]).dropna(subset=[judge.student, "reached"])
        means = pairs.groupby(arm, sort=False)[[judge.student, "reached"]].mean()
        ahead = (means["reached"] > means[judge.student]).groupby(judged, sort=False).all()
        text = f"the control '{name}' comes closer than every attack"
        found += _warn(text, "control-ahead", ahead[ahead].index, len(ahead))
    return found


def _unanswered(runs: pd.DataFrame) -> list[Warning]:
    """Defenses that only met attackers who do not know better. Of a defense, its runs' own flags say what it is; so of
    one that no `recovery=as_returned` was run against nothing is known, and nothing is said."""
    recovery = runs["choice/recovery"]
    of_labels = recovery.isin(OF_LABELS) | runs["profile"].isin(LABELS)
    traps = [
        ("a random defense was attacked without averaging", "random-defense", recovery.isin(AVERAGING)),
        ("a defense that keeps the arg-max was attacked without its labels", "top1", of_labels),
    ]
    of = "defense" if "defense" in runs else "choice/defense"  # an axis of defenses tells strengths apart too
    found = []
    for text, anchor, answers in traps:
        is_one = _flagged(runs, anchor).groupby(runs[of], sort=False).any()
        answered = answers.groupby(runs[of], sort=False).any()
        found += _warn(text, anchor, is_one[is_one & ~answered].index, len(is_one))
    return found


def _below_student(runs: pd.DataFrame, arm: list[str], judge: Judge) -> list[Warning]:
    if "accuracy/student" not in runs or "accuracy/defended_teacher" not in runs:
        return []
    means = runs.groupby(arm, sort=False)[["accuracy/student", "accuracy/defended_teacher"]].mean()
    above = (means["accuracy/student"] > means["accuracy/defended_teacher"]).groupby(judge.per, sort=False).any()
    text = "a student is more accurate than what honest users get"
    return _warn(text, "defended-below-student", above[above].index, len(above))


def _on_test(runs: pd.DataFrame, judge: Judge) -> list[Warning]:
    """Runs that say so of themselves, and worst cases that were chosen on the very numbers that they are."""
    saw = runs.loc[_flagged(runs, "selected-on-test"), judge.per].unique()
    found = _warn("the test rows had a part in the training", "selected-on-test", saw, runs[judge.per].nunique())
    over = [name for name in judge.over if name in runs]
    if over:
        told = runs[runs[judge.student].notna()].groupby(judge.per, sort=False)
        chosen = (told["seed"].nunique() == 1) & (told[over].nunique().max(axis=1) > 1)
        text = "the worst case of one seed was chosen on the test rows that it was read on"
        found += _warn(text, "selected-on-test", chosen[chosen].index, len(chosen))
    return found


def _unpaired(runs: pd.DataFrame, seeds: pd.Series, budget: list[str]) -> list[Warning]:
    """Arms whose seeds are not those of most, and runs of one seed that differ in their queries or test rows. That two
    sets of queries are as large does not make them the same; that they are not is all that a table can see. A fiftieth
    is let pass: who asks each query three times has a rest."""
    odd = seeds[seeds != seeds.mode().iloc[0]].index if len(seeds) else []
    found = _warn("arms have other seeds than most", "unpaired", odd)
    for name, what, rest in (("cost/queries", "queries", 0.02), ("n", "test rows", 0.0)):
        counts = runs[runs[name].notna()].groupby(["seed", *budget])[name].unique()
        apart = [sorted(numbers) for numbers in counts if max(numbers) > (1 + rest) * min(numbers)]
        several = {" and ".join(f"{n:,.0f}" for n in numbers) for numbers in apart}
        found += _warn(f"runs of one seed have different numbers of {what}", "unpaired", sorted(several))
    return found


def _non_monotone(curves: pd.DataFrame, arm: list[str], budget: list[str], judge: Judge) -> list[Warning]:
    """Curves that fall from one budget to the next, by more than seeds differ: the 95 % interval of the paired fall is
    above zero. With one seed nothing is known of that and nothing is said; of flat steps, one in forty is named by
    chance."""
    from distill.statistics import QUERIES, summarise

    line = [name for name in arm if name not in budget]
    points = curves[(curves["control"] == "") & curves[judge.student].notna()]
    points = points.groupby([*line, "seed", QUERIES], as_index=False)[judge.student].mean()  # by queries, ascending
    before = points.groupby([*line, "seed"])[[QUERIES, judge.student]].shift()
    steps = points.assign(before=before[QUERIES], fall=before[judge.student] - points[judge.student]).dropna()
    steps = summarise(steps, [*line, "before", QUERIES], "fall").set_index(line)
    found = [
        f"{_name(key)} from {before:,.0f} to {after:,.0f} queries"
        for key, before, after, low in zip(steps.index, steps["before"], steps[QUERIES], steps["low"], strict=True)
        if low > 0
    ]
    return _warn("more queries made the student worse", "non-monotone", found)


# --- what all of these need -----------------------------------------------------------------------------------------


def _flagged(runs: pd.DataFrame, anchor: str) -> pd.Series:
    return runs["flags"].map(lambda lines: any(f"#{anchor})" in line for line in lines)).astype(bool)


def _warn(text: str, anchor: str, where: Iterable[Hashable], of: int = 0) -> list[Warning]:
    """None where there is nothing to name. All `of` several arms are not named one by one."""
    named = [_name(key) for key in where]
    if not named:
        return []
    shown = f"all {of}" if len(named) == of > 1 else ", ".join(named[:SHOWN])
    more = "" if len(named) <= SHOWN or len(named) == of else f" and {len(named) - SHOWN} more"
    return [Warning(text, f"{README}#{anchor}", shown + more)]


def _name(key: Hashable) -> str:
    return " / ".join(map(str, key)) if isinstance(key, tuple) else str(key)
