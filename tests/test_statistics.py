"""Each statistic against an independent computation, or against a simulated truth that is known."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distill.errors import DistillError
from distill.statistics import (
    at_equal_utility,
    budget_area,
    estimate,
    holm,
    hypervolume,
    paired,
    pareto,
    queries_to_reach,
    savings,
    summarise,
    worst_case,
    worst_readings,
)

VALUE = "fidelity/agreement"
NAN = float("nan")


def a_frame(rows: list[tuple[Any, ...]], *names: str) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=[*names])


def grid(*values: list[Any], names: list[str], seed: int = 0) -> pd.DataFrame:
    """Every combination, with a random value."""
    frame = pd.DataFrame(list(product(*values)), columns=names)
    return frame.assign(**{VALUE: np.random.default_rng(seed).normal(size=len(frame))})


def test_statistics_load_no_torch() -> None:
    code = "import sys, distill.statistics; assert not {'torch', 'scipy.stats', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- means and intervals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "level"), [(2, 0.95), (3, 0.95), (3, 0.9), (10, 0.99)])
def test_the_interval_is_that_of_student(n: int, level: float) -> None:
    values = np.random.default_rng(n).normal(3, 2, size=n)
    got = estimate(values, level)
    low, high = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))
    assert (got.mean, got.std, got.n) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)), n)


def test_what_too_few_seeds_do_not_tell_is_not_told() -> None:
    one, none = estimate([0.5, NAN]), estimate([])
    assert (one.mean, one.n) == (0.5, 1)
    assert none.n == 0
    assert np.isnan([one.std, one.low, one.high, none.mean, none.std, none.low, none.high]).all()


def test_the_interval_covers_as_often_as_it_says() -> None:
    frame = grid(list(range(2000)), [0, 1, 2], names=["arm", "seed"])
    table = summarise(frame, ["arm"], VALUE)
    assert ((table["low"] <= 0) & (table["high"] >= 0)).mean() == pytest.approx(0.95, abs=0.015)


def test_n_counts_seeds_and_says_which() -> None:
    rows = [("b", 2, 1.0), ("b", 0, 3.0), ("a", 0, 1.0), ("a", 0, 3.0), ("a", 1, 6.0), ("a", 2, NAN), ("c", 0, NAN)]
    table = summarise(a_frame(rows, "arm", "seed", VALUE), ["arm"], VALUE).set_index("arm")
    assert list(table.index) == ["b", "a", "c"], "in the order of the frame"
    assert list(table["seeds"]) == ["0, 2", "0, 1", ""]
    assert list(table["n"]) == [2, 2, 0], "two runs of one seed are averaged, what was not measured is left out"
    assert table.loc["a", "mean"] == pytest.approx((2 + 6) / 2)
    assert table.loc["a", "std"] == pytest.approx(np.std([2, 6], ddof=1))
    assert table.loc["c"].drop(["n", "seeds"]).isna().all(), "an arm without a number is told as such"


def test_an_unknown_column_is_named() -> None:
    frame = grid(["a"], [0, 1], names=["arm", "seed"])
    with pytest.raises(DistillError, match=r"no run has 'fidelity/agrement'.*Did you mean 'fidelity/agreement'"):
        summarise(frame, ["arm"], "fidelity/agrement")
    with pytest.raises(DistillError, match="no run has arm 'nine'"):
        paired(frame, ["arm"], VALUE, "arm", "nine")


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_the_paired_t_test() -> None:
    frame = grid(["none", "mad", "edm"], ["soft", "top1"], [0, 1, 2, 3], names=["defense", "recovery", "seed"])
    table = paired(frame.sample(frac=1, random_state=0), ["defense", "recovery"], VALUE, "defense", "none")
    table = table.set_index(["defense", "recovery"])
    assert len(table) == 4
    wide = frame.pivot(index="seed", columns=["defense", "recovery"], values=VALUE)
    for defense, recovery in table.index:
        expected = stats.ttest_rel(wide[defense, recovery], wide["none", recovery])
        row, interval = table.loc[(defense, recovery)], expected.confidence_interval(0.95)
        assert row["p"] == pytest.approx(expected.pvalue)
        assert (row["low"], row["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
        assert row["difference"] == pytest.approx((wide[defense, recovery] - wide["none", recovery]).mean())
        assert row["n"] == 4
    assert list(table["p_holm"]) == pytest.approx(list(holm(table["p"].to_numpy())))


def test_only_seeds_that_both_have_are_paired() -> None:
    rows = [("none", 0, 0.5), ("none", 1, 0.7), ("none", 3, NAN), ("mad", 1, 0.6), ("mad", 0, 0.3), ("mad", 2, 9.0),
            ("mad", 3, 9.0), ("edm", 2, 0.1)]  # fmt: skip
    table = paired(a_frame(rows, "defense", "seed", VALUE), ["defense"], VALUE, "defense", "none").set_index("defense")
    assert table.loc["mad", ["difference", "n"]].tolist() == [pytest.approx(-0.15), 2]
    assert table.loc["edm", "n"] == 0
    assert table.loc["edm"].drop("n").isna().all()


def test_equal_differences_are_no_proof() -> None:
    """0.9 - 0.8 and 0.8 - 0.7 differ in their last bit, which is no standard deviation."""
    rows = [("none", 0, 0.8), ("none", 1, 0.7), ("none", 2, 0.6)]
    rows += [("same", seed, value) for _, seed, value in rows]
    rows += [
        ("above", 0, 0.9),
        ("above", 1, 0.8),
        ("above", 2, 0.7),
        ("near", 0, 0.8),
        ("near", 1, 0.7),
        ("near", 2, 0.61),
    ]
    table = paired(a_frame(rows, "defense", "seed", VALUE), ["defense"], VALUE, "defense", "none").set_index("defense")
    assert table.loc["same"].tolist() == [0, 0, 0, 3, 1, 1]
    assert table.loc["above", "difference"] == pytest.approx(0.1)
    assert np.isnan(table.loc["above", ["p", "p_holm"]].astype(float)).all()
    assert table.loc["near", "p_holm"] == pytest.approx(2 * table.loc["near", "p"]), "two p-values are in this table"


def test_holm_by_hand() -> None:
    """0.01 × 4, 0.02 × 3, 0.03 × 2 (which is not below the one before), 0.6 × 1."""
    assert holm(np.array([0.03, 0.01, NAN, 0.6, 0.02])) == pytest.approx([0.06, 0.04, NAN, 0.6, 0.06], nan_ok=True)
    assert holm(np.array([0.5, 0.9])) == pytest.approx([1.0, 1.0])
    assert list(holm(np.array([]))) == []


def test_a_table_without_differences_rarely_shows_one() -> None:
    rng, found, naive = np.random.default_rng(0), 0, 0
    for _ in range(40):
        frame = grid(["none", *"abcdefgh"], [0, 1, 2], names=["defense", "seed"], seed=int(rng.integers(1 << 31)))
        table = paired(frame, ["defense"], VALUE, "defense", "none")
        found, naive = found + (table["p_holm"].min() < 0.05), naive + (table["p"].min() < 0.05)
    assert found / 40 <= 0.12, "at most 5 %, and two standard errors of that"
    assert naive / 40 > 0.15, "uncorrected, such a table shows one far more often"


# --- the worst case -------------------------------------------------------------------------------------------------


def tables(truth: list[float], seeds: int, n: int = 400) -> pd.DataFrame:
    """n tables with these true means of arms, and seeds that spread by one."""
    frame = grid(list(range(n)), list(range(len(truth))), list(range(seeds)), names=["defense", "arm", "seed"])
    return frame.assign(**{VALUE: frame[VALUE] + np.array(truth)[frame["arm"]]})


@pytest.mark.parametrize(
    ("truth", "seeds"), [([0, 0, 0, 0, 0], 3), ([0, -0.5, -1, -1.5, -2], 3), ([0, -1, -5], 5)], ids=str
)
def test_the_largest_mean_is_too_large_and_the_corrected_one_is_not(truth: list[float], seeds: int) -> None:
    table = worst_case(tables(truth, seeds), "defense", ["arm"], VALUE)
    error = table["mean"].std() / 20  # 400 tables
    if truth[-1] > -5:
        assert table["largest"].mean() > 0.1, "biased upwards"
    assert table["mean"].mean() < 2 * error, "never upwards"
    chosen = worst_readings(tables(truth, seeds), "defense", ["arm"], VALUE)["arm"].astype(int)
    assert table["mean"].mean() == pytest.approx(np.array(truth)[chosen].mean(), abs=3 * error), "what it estimates"
    assert ((table["low"] <= 0) & (table["high"] >= 0)).mean() > 0.85


def test_the_arm_is_chosen_on_the_other_seeds() -> None:
    told = {("soft", "a"): [9, 2, 2], ("top1", "a"): [3, 3, 3], ("soft", "b"): [1, 1, NAN], ("top1", "b"): [0, 0, 5]}
    rows = [(r, d, seed, v) for (r, d), values in told.items() for seed, v in enumerate(values)]
    frame = a_frame(rows, "recovery", "defense", "seed", VALUE).assign(attack="random")
    readings = worst_readings(frame, "defense", ["attack", "recovery"], VALUE)
    # of a, seed 0: soft has 2 elsewhere and top1 3; seeds 1 and 2: soft has 5.5 elsewhere
    # of b, seed 0: soft has 1 elsewhere and top1 2.5; seed 1 the same; seed 2: soft is not there
    assert list(readings[VALUE]) == [3, 2, 2, 0, 0, 5]
    table = worst_case(frame, "defense", ["attack", "recovery"], VALUE).set_index("defense")
    assert list(table["arm"]) == ["random, soft", "random, top1"]
    assert list(table["largest"]) == pytest.approx([13 / 3, 5 / 3])
    assert list(table["mean"]) == pytest.approx([7 / 3, 5 / 3])
    assert list(table["n"]) == [3, 3]


def test_the_worst_case_of_one_seed_is_the_plain_largest() -> None:
    rows = [("a", "x", 0, 0.5), ("a", "y", 0, 0.7), ("b", "x", 0, 0.4), ("c", "x", 0, NAN)]
    table = worst_case(a_frame(rows, "defense", "arm", "seed", VALUE), "defense", ["arm"], VALUE).set_index("defense")
    assert table.loc["a", ["arm", "largest", "n"]].tolist() == ["y", 0.7, 0]
    assert table.loc["a", ["mean", "std", "low", "high"]].isna().all()
    assert table.loc["b", ["largest", "mean", "n"]].tolist() == [0.4, 0.4, 1], "nothing was chosen"
    assert table.loc["c", ["arm", "n"]].tolist() == ["", 0]


# --- equal utility --------------------------------------------------------------------------------------------------

UTILITY = "utility/l1_mean"


def defended(*rows: tuple[str, str, int, float, float], recovery: str = "soft") -> pd.DataFrame:
    return a_frame(list(rows), "defense", "choice/defense", "seed", UTILITY, VALUE).assign(recovery=recovery)


def test_families_are_compared_at_the_same_utility() -> None:
    frame = defended(
        ("none", "none", 0, 0.0, 0.9), ("none", "none", 1, 0.0, 0.8),
        ("mad 1", "mad", 0, 1.0, 0.5), ("mad 0.2", "mad", 0, 0.2, 0.7),
        ("mad 1", "mad", 1, 1.0, 0.4), ("mad 0.2", "mad", 1, 0.2, 0.7),
        ("noise", "noise", 0, 0.8, 0.6), ("noise", "noise", 1, 0.4, 0.6),
        ("edm", "edm", 0, 0.5999999, 0.3), ("edm", "edm", 1, 0.6, 0.5),
        ("rounding", "rounding", 0, 0.01, 0.9),
    )  # fmt: skip
    table = at_equal_utility(frame, "defense", "choice/defense", VALUE, UTILITY, 0.6, baseline="none")
    table = table.set_index("choice/defense")
    assert list(table.index) == ["mad", "noise", "edm", "rounding"]
    mad = estimate([0.6, 0.55])
    assert table.loc["mad"].tolist() == [pytest.approx(x) for x in (mad.mean, mad.low, mad.high, 2)] + ["interpolated"]
    # noise reaches the level with seed 0 alone: from (0, 0.9) to (0.8, 0.6)
    assert table.loc["noise", ["mean", "n", "how"]].tolist() == [pytest.approx(0.675), 1, "interpolated"]
    assert table.loc["edm", ["mean", "n", "how"]].tolist() == [pytest.approx(0.4), 2, "measured"]
    assert table.loc["rounding", ["n", "how"]].tolist() == [0, "out of range"]
    assert np.isnan(table.loc["rounding", "mean"])
    alone = at_equal_utility(frame, "defense", "choice/defense", VALUE, UTILITY, 0.1, baseline=None)
    assert set(alone["how"]) == {"out of range"}, "without a baseline nothing lies below the weakest"


def test_the_line_is_that_of_a_known_truth() -> None:
    """A student that falls linearly with what is taken from users, by a slope of its seed; utility is an accuracy."""
    strengths = product((("a", 2.0), ("b", 0.5)), (0.05, 0.1, 0.4), range(3))
    rows = [(f"{family} {lost}", family, seed, 0.9 - lost, 0.8 - slope * lost + 0.01 * seed)
            for (family, slope), lost, seed in strengths]  # fmt: skip
    rows += [("none", "none", seed, 0.9, 0.8 + 0.01 * seed) for seed in range(3)]
    frame = defended(*rows)
    for level in (0.88, 0.83, 0.55):
        table = at_equal_utility(frame, "defense", "choice/defense", VALUE, UTILITY, level, baseline="none")
        expected = [0.81 - 2.0 * (0.9 - level), 0.81 - 0.5 * (0.9 - level)]
        assert list(table["mean"]) == pytest.approx(expected)
        assert list(table["n"]) == [3, 3]


def test_at_equal_utility_the_worst_attacker_is_read() -> None:
    rows = [("none", "none", s, 0.0, 0.9) for s in range(3)] + [("mad", "mad", s, 1.0, 0.2) for s in range(3)]
    frame = pd.concat([defended(*rows), defended(*[(*row[:4], 0.8) for row in rows], recovery="top1")])
    table = at_equal_utility(
        frame, "defense", "choice/defense", VALUE, UTILITY, 0.5, baseline="none", over=["recovery"]
    )
    assert table["mean"].item() == pytest.approx((0.9 + 0.8) / 2)
    one = at_equal_utility(
        frame[frame["seed"] == 0], "defense", "choice/defense", VALUE, UTILITY, 0.5, over=["recovery"], baseline="none"
    )
    assert one[["n", "how"]].to_numpy().tolist() == [[0, "not measured"]], "no other seed to choose the attacker by"


# --- fronts ---------------------------------------------------------------------------------------------------------

points = st.lists(
    st.tuples(st.integers(0, 6).map(lambda x: x / 4), st.integers(0, 6).map(lambda x: x / 4)), min_size=1, max_size=8
)


@given(points, st.sampled_from(["lower", "higher"]))
@settings(max_examples=60, deadline=None)
def test_front_and_hypervolume_by_brute_force(defenses: list[tuple[float, float]], better: str) -> None:
    utility, value = map(np.array, zip(*defenses, strict=True))
    sign = 1 if better == "lower" else -1

    def dominates(i: int, j: int) -> bool:
        one, other = (sign * utility[i], value[i]), (sign * utility[j], value[j])
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    expected = [not any(dominates(i, j) for i in range(len(defenses))) for j in range(len(defenses))]
    assert pareto(utility, value, better).tolist() == expected
    reference = (1.25, 1.0) if better == "lower" else (0.25, 1.0)
    # All numbers are quarters, so the area is a number of small squares; each is dominated as a whole or not at all.
    squares = [(u, v) for u in np.arange(-8, 8) / 4 + 0.125 for v in np.arange(8) / 4 + 0.125]
    inside = [
        any(sign * a <= sign * u <= sign * reference[0] and b <= v <= reference[1] for a, b in defenses)
        for u, v in squares
    ]
    assert hypervolume(utility, value, better, reference) == pytest.approx(sum(inside) / 16)


def test_what_was_not_measured_is_on_no_front() -> None:
    assert pareto([0.0, NAN, 1.0], [0.5, 0.1, NAN], "lower").tolist() == [True, False, False]
    assert hypervolume([0.0, NAN], [0.5, 0.1], "lower", (2.0, 1.0)) == pytest.approx(1.0)
    with pytest.raises(DistillError, match=r"judge.utility_better: 'lower' or 'higher'"):
        pareto([0.0], [0.5], "less")


# --- budget curves --------------------------------------------------------------------------------------------------

BUDGET = "cost/queries"


def curves_of(**arms: dict[int, dict[int, float]]) -> pd.DataFrame:
    """attack -> seed -> queries -> value."""
    rows = [(a, s, q, v) for a, seeds in arms.items() for s, line in seeds.items() for q, v in line.items()]
    return a_frame(rows, "attack", "seed", BUDGET, VALUE)


def test_the_area_is_the_mean_height_over_log_budgets() -> None:
    frame = curves_of(
        rises={0: {10: 0.0, 100: 0.5, 1000: 1.0}, 1: {10: 0.2, 1000: 0.2}},
        flat={0: {1: 0.3, 10000: 0.3}, 1: {50: 0.9}},
        gone={0: {100: NAN}},
    )
    table = budget_area(frame, ["attack"], BUDGET, VALUE).set_index("attack")
    assert table.loc["rises", ["mean", "n"]].tolist() == [pytest.approx((0.5 + 0.2) / 2), 2]
    assert table.loc["flat", ["mean", "n"]].tolist() == [pytest.approx(0.3), 1], "one point is no curve"
    assert table.loc["gone", "n"] == 0
    assert table["from"].tolist() == pytest.approx([10] * 3)
    assert table["to"].tolist() == pytest.approx([1000] * 3)


def test_areas_are_taken_over_the_range_that_all_share() -> None:
    """y = log10 of the budget over every range; on 100 to 1,000 its mean is 2.5, whatever else a curve has."""
    ranges = {"short": (100, 10_000), "long": (1, 1000), "odd": (3, 30_000)}
    frame = curves_of(
        **{
            name: {0: {int(q): float(np.log10(int(q))) for q in np.geomspace(*ends, 5)}}
            for name, ends in ranges.items()
        }
    )
    table = budget_area(frame, ["attack"], BUDGET, VALUE)
    assert list(table["mean"]) == pytest.approx([2.5] * 3)
    apart = curves_of(a={0: {1: 0.0, 10: 1.0}}, b={0: {100: 0.0, 1000: 1.0}})
    assert budget_area(apart, ["attack"], BUDGET, VALUE)[["mean", "from", "to"]].isna().all().all()


def test_queries_to_reach_a_share() -> None:
    frame = curves_of(
        rises={0: {100: 0.0, 10_000: 1.0}, 1: {100: 0.4, 1000: 0.9, 10_000: 0.8}},
        early={0: {100: 0.95, 1000: 0.99}, 1: {100: 0.5, 1000: 0.9}},
        late={0: {100: 0.5, 1000: 0.95}, 1: {100: 0.5, 1000: 0.6}},
        never={0: {100: 0.1}},
    )
    table = queries_to_reach(frame, ["attack"], BUDGET, VALUE, 0.9).set_index("attack")
    first, second = 100 * 10 ** (2 * 0.9), 1000  # the first crossing counts
    assert table.loc["rises", "queries"] == pytest.approx(np.sqrt(first * second))
    interval = np.exp(stats.t.interval(0.95, 1, np.log([first, second]).mean(), stats.sem(np.log([first, second]))))
    assert table.loc["rises", ["low", "high"]].tolist() == pytest.approx(list(interval))
    assert list(table["how"]) == ["interpolated", "at most", "not reached", "not reached"]
    assert list(table["n"]) == [2, 2, 1, 0]
    assert list(table["of"]) == [2, 2, 2, 1]
    assert table.loc["early", "queries"] == pytest.approx(np.sqrt(100 * 1000))
    assert table.loc[["late", "never"], "queries"].isna().all()
    half = queries_to_reach(frame, ["attack"], BUDGET, VALUE, 0.5, best=0.8).set_index("attack")
    assert half.loc["never", "how"] == "not reached"
    assert half.loc["late", ["queries", "how"]].tolist() == [pytest.approx(100), "at most"]


# --- what stealing saved --------------------------------------------------------------------------------------------


def stolen(**reached: list[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Attacks with 1,000 queries at 0.01 usd, and what their students reached with each seed; the control's curve is
    0.2 times log10 of its labels, plus 0.1 with seed 1."""
    runs = [(f"{attack}{seed}", "", attack, seed, 1000, 10.0, 5.0, value)
            for attack, values in reached.items() for seed, value in enumerate(values)]  # fmt: skip
    truth = [(f"truth{seed}", "ground truth", "–", seed, 0, 0.0, 7.0 + seed, 0.8 + 0.1 * seed) for seed in (0, 1)]
    names = ["run", "control", "attack", "seed", BUDGET, "cost/usd", "cost/train_seconds", VALUE]
    frame = a_frame(runs + truth, *names)
    of_control = [(run, "ground truth", "–", seed, labels, 0.2 * np.log10(labels) + 0.1 * seed)
                  for run, _, _, seed, *_ in truth for labels in (100, 1000, 10_000)]  # fmt: skip
    of_attacks = [(run, control, attack, seed, q, v) for run, control, attack, seed, q, _, _, v in runs]
    of_attacks += [(run, *rest[:3], 10, 0.0) for run, *rest in of_attacks]
    return frame, a_frame(of_attacks + of_control, "run", "control", "attack", "seed", BUDGET, VALUE)


def test_savings_are_read_from_the_controls_curve() -> None:
    frame, curves = stolen(good=[0.7, 0.8], best=[0.9, 0.85], poor=[0.1, 0.45], mixed=[0.95, 0.1], extra=[0.7, 0.8, 1])
    table = savings(frame, curves, ["attack"], VALUE, usd_per_label=0.05).set_index("attack")
    labels = 10**3.5  # 0.2 × 3.5 is 0.7, with either seed
    assert table.loc["good", "labels"] == pytest.approx(labels)
    assert table.loc["good", ["low", "high"]].tolist() == pytest.approx([labels] * 2)
    assert table.loc["good", ["reached", "queries", "n"]].tolist() == [pytest.approx(0.75), 1000, 2]
    assert table.loc["good", ["usd", "label_usd", "usd_saved"]].tolist() == pytest.approx(
        [10, 0.05 * labels, 0.05 * labels - 10]
    )
    assert table.loc["good", ["seconds", "control_seconds", "seconds_saved"]].tolist() == pytest.approx([5, 7.5, 2.5])
    assert list(table["how"]) == ["interpolated", "at least", "at most", "unclear", "interpolated"]
    assert table.loc["best", "labels"] == pytest.approx(np.sqrt(10_000 * 10**3.75))
    assert np.isnan(table.loc[["best", "poor", "mixed"], "low"]).all()
    assert np.isnan(table.loc["mixed", "labels"])
    assert table.loc["extra", "n"] == 2, "the control has no third seed"


def test_savings_that_are_not_known_are_not_told() -> None:
    frame, curves = stolen(good=[0.7, 0.8])
    unpriced = savings(frame.drop(columns="cost/usd"), curves, ["attack"], VALUE).iloc[0]
    assert unpriced["labels"] == pytest.approx(10**3.5)
    assert np.isnan([unpriced["usd"], unpriced["label_usd"], unpriced["usd_saved"]]).all()
    without = savings(frame[frame["control"] == ""], curves[curves["control"] == ""], ["attack"], VALUE).iloc[0]
    assert without[["n", "how"]].tolist() == [0, ""]
    assert np.isnan(without["labels"])
