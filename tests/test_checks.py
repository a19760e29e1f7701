"""The notes on a result, and the warnings about a table: each on one that is in the trap, and on one that is not."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from distill.checks import flags, warnings
from distill.provider.defenses.gaussian_noise import GaussianNoise
from distill.provider.defenses.none import NoDefense
from distill.provider.defenses.rounding import Rounding
from distill.records import Result
from distill.results import Judge

README = Path(__file__).parents[1] / "README.md"
ANCHORS = {
    *("few-seeds", "control-ahead", "random-defense", "top1", "defended-below-student", "selected-on-test", "unpaired"),
    "non-monotone",
}
JUDGE = Judge(over=("recovery",))
RANDOM = "a random defense was attacked without averaging (README.md#random-defense)"
ARG_MAX = "a defense that keeps the arg-max was attacked without recovery=top1 (README.md#top1)"


def test_checks_load_neither_torch_nor_pandas() -> None:
    """Every run imports them."""
    code = "import sys, distill.checks; assert not {'torch', 'pandas', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("anchor", sorted(ANCHORS))
def test_every_anchor_of_a_warning_is_in_the_readme(anchor: str) -> None:
    assert f"\n### {anchor}\n" in README.read_text()


# --- one result -----------------------------------------------------------------------------------------------------


def a_result(**values: Any) -> Result:
    result = Result(
        *("run", "queries", {}, {"access": {"profile": "probs"}}, 0, "probs"),
        fingerprints={"teacher": "a", "train": "b", "test": "c", "pool": "d"},
        accuracy={"student": {"accuracy": 0.8}, "defended_teacher": {"accuracy": 0.9}, "teacher": {"accuracy": 0.9}},
        utility={"l1_max": 0.1},
        sizes={"student": {"flops_per_query": 1.0}, "teacher": {"flops_per_query": 2.0}},
        training={"epochs": 9, "selected_epoch": 9, "validation_rows": 0},
    )
    for name, value in values.items():
        setattr(result, name, value)
    return result


def anchors(found: list[str]) -> list[str]:
    return [line[line.index("#") + 1 : -1] for line in found]


def test_a_result_in_no_trap_has_no_notes() -> None:
    assert flags(a_result(utility={}), NoDefense(), "as_returned") == []
    assert anchors(flags(a_result(), Rounding(1), "as_returned")) == ["top1"]
    assert flags(a_result(), Rounding(1), "top1") == []
    assert "random-defense" in anchors(flags(a_result(), GaussianNoise(0.1), "as_returned"))


@pytest.mark.parametrize(
    "values",
    [
        {"fingerprints": {"train": "b", "test": "c", "pool": "c"}},
        {"fingerprints": {"train": "c", "test": "c", "pool": "d"}},
        {"training": {"epochs": 9, "selected_epoch": 4, "validation_rows": 0}},
    ],
    ids=["the pool", "the teacher's", "an epoch"],
)
def test_test_rows_that_had_a_part_are_told(values: dict[str, Any]) -> None:
    assert anchors(flags(a_result(utility={}, **values), NoDefense(), "as_returned")) == ["selected-on-test"]


def test_an_epoch_may_be_selected_on_rows_of_ones_own() -> None:
    training = {"epochs": 9, "selected_epoch": 4, "validation_rows": 100}
    assert flags(a_result(utility={}, training=training), NoDefense(), "as_returned") == []
    assert flags(a_result(utility={}, training={}), NoDefense(), "as_returned") == [], "a student that is solved for"


# --- a table --------------------------------------------------------------------------------------------------------


def a_table(
    defenses: tuple[str, ...] = ("none", "mad"),
    recoveries: tuple[str, ...] = ("as_returned", "top1", "average"),
    seeds: tuple[int, ...] = (0, 1, 2),
) -> pd.DataFrame:
    """A benchmark in no trap, with a control of its own."""
    rng, rows = np.random.default_rng(0), []
    for defense, recovery, seed in product(defenses, recoveries, seeds):
        row = {"control": "", "defense": defense, "recovery": recovery, "seed": seed, "flags": []}
        row |= {"choice/defense": defense.partition(" ")[0], "choice/recovery": recovery, "choice/attack": "random"}
        row |= {"fidelity/agreement": 0.8 + 0.01 * rng.normal()}
        rows.append(row | {"accuracy/student": 0.75})
    for seed in seeds:
        row = {"control": "no teacher", "defense": "–", "recovery": "–", "seed": seed, "flags": []}
        rows.append(row | {"fidelity/agreement": 0.1, "choice/attack": "no_teacher", "choice/recovery": "as_returned"})
    return pd.DataFrame(rows).assign(
        **{"n": 1000, "cost/queries": 500, "accuracy/defended_teacher": 0.9, "profile": "probs"}
    )


def at(frame: pd.DataFrame, **places: str) -> pd.Series:
    return pd.concat([frame[name] == value for name, value in places.items()], axis=1).all(axis=1)


def found(frame: pd.DataFrame, judge: Judge = JUDGE, curves: pd.DataFrame | None = None) -> dict[str, str]:
    """Anchor -> where."""
    warned = warnings(frame, judge, curves)
    assert {warning.anchor for warning in warned} <= {f"README.md#{anchor}" for anchor in ANCHORS}
    return {warning.anchor.partition("#")[2]: warning.where for warning in warned}


def test_a_table_in_no_trap_has_no_warnings() -> None:
    assert warnings(a_table(), JUDGE) == []
    assert warnings(a_table().query("control == ''"), JUDGE) == []


def test_few_seeds_are_told() -> None:
    frame = a_table()
    assert found(frame[~(at(frame, defense="mad", recovery="top1") & (frame.seed == 2))]) == {
        "few-seeds": "mad / top1",
        "unpaired": "mad / top1",
    }
    without = frame.copy()
    without.loc[at(without, defense="mad", recovery="top1") & (without.seed == 2), "fidelity/agreement"] = np.nan
    assert found(without)["few-seeds"] == "mad / top1", "a run that has not measured it is no seed"
    assert found(a_table(seeds=(0, 1))) == {"few-seeds": "all 7"}
    controls = frame[(frame.control == "") | (frame.seed == 0)]
    assert found(controls) == {"few-seeds": "the control 'no teacher'"}
    (text,) = map(str, warnings(a_table(seeds=(3, 4)), JUDGE))
    assert text == "fewer than three seeds: all 7 (README.md#few-seeds)"


def test_a_control_ahead_of_every_arm_is_told() -> None:
    frame = a_table()
    frame.loc[at(frame, defense="mad"), "fidelity/agreement"] = [0.05] * 3 + [0.2] * 3 + [0.05] * 3
    assert found(frame) == {}, "one arm is ahead of it"
    frame.loc[at(frame, defense="mad"), "fidelity/agreement"] = 0.05
    assert found(frame) == {"control-ahead": "mad"}
    frame.loc[at(frame, defense="none"), "fidelity/agreement"] = 0.05
    assert found(frame) == {"control-ahead": "all 2"}
    frame.loc[frame["control"] != "", "fidelity/agreement"] = [0.04, 0.04, 0.9]
    frame.loc[(frame["control"] == "") & (frame["seed"] == 2), "fidelity/agreement"] = np.nan
    assert "control-ahead" not in found(frame), "with the seeds that both have it is behind"


def test_a_control_is_compared_at_the_same_budget() -> None:
    small = a_table().assign(budget="100")
    large = a_table().assign(budget="1000")
    large.loc[large.control != "", "fidelity/agreement"] = 0.9
    frame = pd.concat([small, large], ignore_index=True)
    frame["cost/queries"] = frame["budget"].astype(int)
    judge = Judge(over=("recovery",), budget="budget")
    assert found(frame, judge) == {"control-ahead": "none / 1000, mad / 1000"}


@pytest.mark.parametrize(
    ("flag", "anchor", "answer"),
    [(RANDOM, "random-defense", "average"), (ARG_MAX, "top1", "top1")],
    ids=["random", "arg-max"],
)
def test_one_arm_that_knows_better_is_enough(flag: str, anchor: str, answer: str) -> None:
    frame = a_table(("none", "mad 0.5", "mad 1"))
    trapped = frame["defense"].isin(["mad 0.5", "mad 1"]) & (frame["recovery"] == "as_returned")
    frame["flags"] = [[flag] if there else [] for there in trapped]
    assert found(frame) == {}
    frame = frame[~at(frame, defense="mad 1", recovery=answer)]
    assert found(frame) == {anchor: "mad 1"}, "of that strength no arm averages (takes the label)"
    unnamed = frame.rename(columns={"defense": "attack"})
    assert found(unnamed, Judge("attack", ("recovery",))) == {}, "of mad as a whole there is one"


def test_an_attack_that_keeps_labels_alone_is_one_that_knows_better() -> None:
    frame = a_table(recoveries=("as_returned",)).assign(recovery="copycat")
    others = a_table(recoveries=("as_returned",))
    others["flags"] = [[ARG_MAX] if defense == "mad" else [] for defense in others["defense"]]
    both = pd.concat([frame.assign(profile="label"), others], ignore_index=True)
    assert found(others) == {"top1": "mad"}
    assert found(both) == {}
    assert found(both.assign(profile="probs")) == {"top1": "mad"}


def test_students_above_what_users_get_are_told_once() -> None:
    frame = a_table()
    frame.loc[at(frame, defense="mad"), "accuracy/defended_teacher"] = 0.7
    assert found(frame) == {"defended-below-student": "mad"}
    assert found(frame.drop(columns="accuracy/defended_teacher")) == {}, "not measured"


def test_numbers_that_the_test_rows_chose_are_told() -> None:
    frame = a_table()
    frame["flags"] = [["the test rows had a part in the training (README.md#selected-on-test)"] if i == 0 else []
                      for i in range(len(frame))]  # fmt: skip
    assert found(frame) == {"selected-on-test": "none"}
    assert found(a_table(seeds=(0,)))["selected-on-test"] == "all 2", "the worst of three arms, with one seed"
    assert "selected-on-test" not in found(a_table(recoveries=("top1",), seeds=(0,))), "nothing was chosen"


def test_what_is_not_paired_is_told() -> None:
    frame = a_table()
    other = frame.copy()
    other.loc[at(other, defense="mad", recovery="top1"), "seed"] = [3, 4, 5]
    assert found(other) == {"unpaired": "mad / top1"}
    frame.loc[at(frame, defense="mad"), "cost/queries"] = 250
    assert found(frame) == {"unpaired": "250 and 500"}
    frame.loc[at(frame, defense="mad"), "cost/queries"] = 498
    assert found(frame) == {}, "the rest of 500 by three"
    assert found(a_table().assign(n=[999, *[1000] * 20])) == {"unpaired": "999 and 1,000"}


def a_curve(attack: str, falls: float, sd: float, seeds: int = 3, control: str = "") -> pd.DataFrame:
    rng = np.random.default_rng(0)
    means = {100: 0.5, 1000: 0.8, 10_000: 0.8 - falls}
    rows = [(control, "none", attack, seed, queries, mean + sd * rng.normal() + 0.1 * seed)
            for seed in range(seeds) for queries, mean in means.items()]  # fmt: skip
    return pd.DataFrame(rows, columns=["control", "defense", "recovery", "seed", "cost/queries", "fidelity/agreement"])


def test_a_curve_that_falls_beyond_its_noise_is_told() -> None:
    """Seeds differ by 0.1, which pairs do not see."""
    curves = pd.concat([
        *(a_curve("falls", 0.05, 0.001), a_curve("noisy", 0.05, 0.2), a_curve("rises", -0.05, 0.001)),
        *(a_curve("once", 0.05, 0.001, seeds=1), a_curve("–", 0.05, 0.001, control="no teacher")),
    ])  # fmt: skip
    assert found(a_table(), JUDGE, curves) == {"non-monotone": "none / falls from 1,000 to 10,000 queries"}


def test_flat_curves_are_seldom_told_to_fall() -> None:
    rng = np.random.default_rng(0)
    rows = [
        ("", f"d{i}", "x", seed, queries, rng.normal()) for i, seed, queries in product(range(100), range(3), (1, 2))
    ]
    names = ["control", "defense", "recovery", "seed", "cost/queries", "fidelity/agreement"]
    where = found(a_table(), JUDGE, pd.DataFrame(rows, columns=names)).get("non-monotone", "")
    named = where.count("from") + int((re.search(r"and (\d+) more", where) or [0, 0])[1])
    assert 0 < named <= 8, "one in forty of 100"


def test_many_arms_are_counted() -> None:
    frame = a_table(tuple("abcdefgh"))
    frame.loc[frame["defense"].isin([*"abcdef"]), "accuracy/defended_teacher"] = 0.5
    assert found(frame) == {"defended-below-student": "a, b, c, d and 2 more"}
