"""Finished runs, read and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finished_runs import AGREEMENT, UNTRAINED, benchmark, classified, finished, leave, truth

from distill.errors import DistillError
from distill.results import Judge, beyond_controls, compare, curves, load_runs, numbers, recovery_ratios, varied


def test_the_recovery_ratio_is_that_of_its_formula() -> None:
    top_k = ["access=top_k", "access.top_k=5", "signal=top_k", "objective=token_forward_kl"]
    runs = [finished(0.875, *top_k), finished(0.5, *top_k, defense="rounding"), truth(0.3125)]
    clean, defended, control = recovery_ratios(runs)
    assert clean == {"recovery ratio": 1.0, "ground truth": 0.25}
    assert defended == {"recovery ratio": 0.5, "ground truth": 0.25}, "(0.5 − 0.125)/(0.875 − 0.125), (0.3125 − …)/…"
    assert control == {}, "a control has no undefended teacher"
    assert recovery_ratios(runs[:2]) == [{"recovery ratio": 1.0}, {"recovery ratio": 0.5}]
    assert recovery_ratios(runs[1:]) == [{}, {}]


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"budget__queries": 100}, {"student__width": 32}, {"training__epochs": 1}, {"samples": 2}]
)
def test_runs_that_differ_in_more_than_the_defense_are_not_compared(other: dict[str, Any]) -> None:
    runs = [finished(0.875), finished(0.5, defense="rounding", **other)]
    assert recovery_ratios(runs) == [{"recovery ratio": 1.0}, {}]


def test_each_seed_has_its_own_ratio() -> None:
    runs = [finished(a, seed=seed, defense=d) for seed, a, d in
            [(0, 0.875, "none"), (1, 0.625, "none"), (1, 0.25, "rounding"), (0, 0.25, "rounding")]]  # fmt: skip
    runs.append(truth(0.375, seed=1))
    _, _, one, zero, _ = recovery_ratios(runs)
    assert one == {"recovery ratio": 0.25, "ground truth": 0.5}
    assert zero == {"recovery ratio": pytest.approx(1 / 6)}


def test_where_and_how_fast_does_not_matter() -> None:
    runs = [finished(0.875, run__workers=2, training__checkpoint_steps=7), finished(0.5, defense="rounding")]
    runs[1].fingerprints["defense"] = "a network of its own"
    assert recovery_ratios(runs)[1] == {"recovery ratio": 0.5}
    runs[0].fingerprints["train"] = "other rows"
    assert recovery_ratios(runs)[1] == {}


def test_nothing_to_recover() -> None:
    assert recovery_ratios([finished(UNTRAINED), finished(0.5, defense="rounding")]) == [{}, {}]
    classifier = finished(0.5)
    del classifier.accuracy["untrained"]
    assert recovery_ratios([classifier]) == [{}]
    speechless = finished(0.5)
    speechless.accuracy = {"student": {"perplexity": 9.0}, "untrained": {"perplexity": 99.0}}
    assert recovery_ratios([speechless]) == [{}]


def test_what_answers_are_worth_beyond_the_controls() -> None:
    runs = [
        classified(0.875),
        classified(0.75, "ground_truth_labels"),
        classified(0.5, "weaker_model_labels"),
        classified(0.625, "self_taught"),
        classified(0.125, "random_labels"),
        classified(0.1, "no_teacher"),
    ]
    worth = {"beyond truth": 0.125, "beyond weaker": 0.375, "beyond self-taught": 0.25, "beyond random": 0.75}
    assert beyond_controls(runs) == [worth, {}, {}, {}, {}, {}]
    assert beyond_controls(runs[:2]) == [{"beyond truth": 0.125}, {}]
    assert beyond_controls(runs[::-1])[-1] == worth, "in any order"
    poorer = classified(0.25, "weaker_model_labels", "attack.examples=10")
    assert beyond_controls([*runs, poorer])[0] == worth, "the best of several"
    runs[1].config["attack"] = {"_target_": "one that wraps nothing"}
    assert "beyond truth" not in beyond_controls(runs)[0]


def test_controls_are_those_of_the_attack_that_they_wrap() -> None:
    inside = "attack@attack.attack=active_thief"
    runs = [
        classified(0.875),
        classified(0.75, "active_thief"),
        classified(0.5, "active_thief", "attack.rounds=3"),
        classified(0.25, "ground_truth_labels", inside),
        classified(0.125, "ground_truth_labels", inside, "attack.attack.rounds=3"),
    ]
    assert beyond_controls(runs) == [{}, {"beyond truth": 0.5}, {"beyond truth": 0.375}, {}, {}]


@pytest.mark.parametrize(
    "other", ["seed=1", "budget.queries=100", "recovery=top1", "defense=none", "student=lenet", "training.epochs=3"]
)
def test_controls_differ_in_nothing_but_the_answers(other: str) -> None:
    runs = [classified(0.875), classified(0.75, "ground_truth_labels", other), classified(0.5, "copycat", other)]
    assert beyond_controls(runs) == [{}, {}, {}]
    assert beyond_controls([classified(0.875, "knockoff_random", other), runs[1]])[0] == {"beyond truth": 0.125}


def test_options_in_which_runs_of_one_choice_differ_are_named() -> None:
    runs = [
        finished(0.5, "defense.delta=1.0", defense="kgw"),
        finished(0.5, "defense.delta=2.0", defense="kgw", own_examples=100),
        finished(0.5, defense="length_cap"),
    ]
    assert varied(runs) == {"defense.delta": ["1.0", "2.0", "–"], "own_examples": ["0", "100", "0"]}
    assert varied(runs[::2]) == {}, "what differs because another component was chosen is told by its name"
    assert varied([finished(0.5), finished(0.5, budget__queries=10)]) == {"budget.queries": ["4000", "10"]}
    assert varied([finished(0.5), finished(0.5, seed=1)]) == {}, "seeds have a column of their own"
    follows = [finished(0.5, seed=s, sampling__seed=s) for s in (0, 1)]
    assert varied(follows) == {}, "and so has an inner seed that follows it"
    assert varied([*follows, finished(0.5, sampling__seed=7)]) == {"sampling.seed": ["0", "1", "7"]}


def test_numbers_are_those_that_were_measured() -> None:
    speechless = finished(0.5)
    speechless.accuracy = {"student": {"perplexity": 9.0}}
    speechless.cost |= {"tokens_in": 10, "tokens_out": 5}
    assert numbers(speechless) == {**{f"cost/{n}": v for n, v in speechless.cost.items()}, "cost/tokens": 15}
    own = {"own": True, "student/accuracy": 0.8125, "curve": []}
    found = numbers(classified(0.75, tracks={"A": {}, "B": own}))
    assert (found["accuracy/student"], found["own/student/accuracy"]) == (0.75, 0.8125)
    assert "cost/tokens" not in found


def test_runs_are_found_at_and_below_folders_and_damage_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(tmp_path / "outputs", finished(0.5), finished(0.6, seed=1))
    assert [path.name for path in load_runs([tmp_path])] == ["run0", "run1"]
    assert [path.name for path in load_runs([tmp_path / "outputs/run1", tmp_path / "nowhere"])] == ["run1"]
    (tmp_path / "outputs/run0/result.json").write_text("{")
    assert [path.name for path in load_runs([tmp_path])] == ["run1"]
    assert "run0" in caplog.text


def test_axes_are_what_differs_with_the_options_of_a_choice_in_its_name(tmp_path: Path) -> None:
    runs = [
        classified(0.9, "knockoff_random", f"defense={defense}", *options, seed=seed)
        for seed in (0, 1)
        for defense, *options in [("mad", "defense.l1_budget=0.5"), ("mad", "defense.l1_budget=10"), ("none",)]
    ]
    found = compare([leave(tmp_path, *runs)])
    assert found.axes == {"defense": ["none", "mad l1_budget=0.5", "mad l1_budget=10"]}
    assert sorted(found.frame["choice/defense"].unique()) == ["mad", "none"]
    assert found.judge == Judge(over=())
    assert sorted(found.frame["seed"].unique()) == [0, 1]
    assert found.missing.empty
    assert found.results[str(tmp_path / "run0")].run_id == runs[0].run_id
    budgets = [classified(0.9, "knockoff_random", f"budget.queries={n}") for n in (500, 50, 1000)]
    found = compare([leave(tmp_path / "more", *budgets)])
    assert found.axes == {"budget.queries": ["50", "500", "1000"]}, "by size"
    assert found.judge.budget == "budget.queries"


def test_controls_stand_apart_from_the_attacks(tmp_path: Path) -> None:
    runs = [classified(0.875), classified(0.75, "ground_truth_labels"), classified(0.5, "random_labels")]
    found = compare([leave(tmp_path, *runs)])
    assert found.axes == {}
    assert list(found.frame["control"]) == ["", "ground truth", "random labels"]
    assert list(found.frame["beyond/random_labels"].fillna(-1)) == [0.375, -1, -1]
    runs += [classified(0.5, "copycat"), classified(0.5, "random_labels", "attack@attack.attack=copycat")]
    found = compare([leave(tmp_path, *runs)])
    assert found.axes == {"attack": ["copycat", "knockoff_random"]}
    assert list(found.frame["attack"]) == ["knockoff_random", "–", "–", "copycat", "–"]
    assert list(found.frame["control"])[2::2] == [
        "random labels attack=knockoff_random",
        "random labels attack=copycat",
    ]
    alone = compare([tmp_path / "run1", tmp_path / "run2"])
    assert alone.axes == {"attack": ["ground_truth_labels", "random_labels"]}, "with nothing to control"


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"seed": ["1"]}, [1]),
        ({"defense": ["mad"]}, [2, 3]),
        ({"defense": ["rounding", "mad"], "seed": ["0"]}, [0, 2, 3]),
        ({"defense.l1_budget": ["1"]}, [3]),
        ({"defense": ["mad"], "budget.queries": ["500"]}, [2]),
    ],
)
def test_runs_are_kept_that_match_every_key(tmp_path: Path, where: dict[str, list[str]], kept: list[int]) -> None:
    runs = [
        classified(0.5),
        classified(0.5, seed=1),
        classified(0.5, "knockoff_random", "defense=mad", "defense.l1_budget=0.5"),
        classified(0.5, "knockoff_random", "defense=mad", "defense.l1_budget=1.0", "budget.queries=50"),
    ]
    found = compare([leave(tmp_path, *runs)], where)
    assert list(found.frame["run"]) == [runs[i].run_id for i in kept]


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ({"defence": ["mad"]}, "no run has 'defence'. Did you mean 'defense'?"),
        ({"defense": ["roundng"]}, "no run has defense=roundng. Did you mean 'rounding'?"),
        ({"seed": ["3"]}, "no run has seed=3"),
        ({"seed": ["1"], "defense": ["none"]}, "has seed=1 defense=none"),
    ],
)
def test_what_no_run_has_is_told(tmp_path: Path, where: dict[str, list[str]], told: str) -> None:
    leave(
        tmp_path,
        classified(0.5),
        classified(0.5, "knockoff_random", "defense=none"),
        classified(0.5, "copycat", "seed=1"),
    )
    with pytest.raises(DistillError, match=told.replace("?", r"\?")):
        compare([tmp_path], where)


@pytest.mark.parametrize("published", [False, True])
def test_a_benchmark_says_what_was_varied(tmp_path: Path, published: bool) -> None:
    found = compare([benchmark(tmp_path, published)])
    assert (found.name, found.benchmark) == ("small", True)
    assert found.axes == {"defense": ["none", "mad 0.5"], "recovery": ["as returned", "top-1", "pBayes"]}
    assert found.judge.over == ("recovery",)
    runs = found.frame[found.frame["control"] == ""]
    got = {
        arm: tuple(of.sort_values("seed")["fidelity/agreement"]) for arm, of in runs.groupby(["defense", "recovery"])
    }
    assert got == AGREEMENT
    controls = found.frame[found.frame["control"] == "ground truth"]
    assert set(controls["defense"]) == {"–"}
    assert list(controls["seed"]) == [0, 1, 2]
    assert list(found.missing["status"]) == ["n/a", "n/a", "failed"]
    assert all(Path(folder).exists() for folder in found.frame["folder"])


def test_cells_are_kept_that_match_and_controls_that_were_not_crossed(tmp_path: Path) -> None:
    home = benchmark(tmp_path)
    found = compare([home], {"recovery": ["top-1"], "seed": ["0", "2"]})
    assert found.axes == {"defense": ["none", "mad 0.5"], "recovery": ["top-1"]}
    assert sorted(found.frame["seed"].unique()) == [0, 2]
    assert (found.frame["control"] != "").sum() == 2
    assert found.missing.empty
    assert set(compare([home], {"defense": ["mad"]}).frame["defense"]) == {"mad 0.5", "–"}, "or by the choice"
    with pytest.raises(DistillError, match="Did you mean 'top-1'"):
        compare([home], {"recovery": ["top-2"]})


def test_cells_whose_results_are_gone_are_open(tmp_path: Path) -> None:
    home = benchmark(tmp_path)
    gone = compare([home]).frame["folder"][0]
    (Path(gone) / "result.json").unlink()
    found = compare([home])
    assert len(found.frame) == 14
    assert found.missing.iloc[0][["defense", "recovery", "status"]].to_list() == ["none", "as returned", "open"]


def test_benchmarks_are_read_one_at_a_time_and_whole(tmp_path: Path) -> None:
    home = benchmark(tmp_path)
    with pytest.raises(DistillError, match="one benchmark at a time"):
        compare([home, tmp_path])
    with pytest.raises(DistillError, match=f"name one benchmark: {home}"):
        compare([home.parent])
    with pytest.raises(DistillError, match="make a run first"):
        compare([tmp_path / "nowhere"])
    manifest = json.loads((home / "benchmark.json").read_text())
    (home / "benchmark.json").write_text(json.dumps(manifest | {"schema": 2}))
    with pytest.raises(DistillError, match="schema 2"):
        compare([home])
    manifest["judge"]["per"] = "defence"
    (home / "benchmark.json").write_text(json.dumps(manifest))
    with pytest.raises(DistillError, match="judges defence, which is no axis"):
        compare([home])
    del manifest["judge"]
    (home / "benchmark.json").write_text(json.dumps(manifest))
    with pytest.raises(DistillError, match="judge"):
        compare([home])


def test_curves_have_a_row_for_each_budget(tmp_path: Path) -> None:
    points = [{"cost/queries": n, "fidelity/agreement": n / 1000, "student/accuracy": 0.5, "student/ece": 0.1}
              for n in (250, 50)]  # fmt: skip
    runs = [classified(0.875, curve=points), classified(0.75, "ground_truth_labels", cost={"queries": 0})]
    found = curves(compare([leave(tmp_path, *runs)]))
    attack, control = (found[found["control"] == name] for name in ("", "ground truth"))
    assert list(attack["cost/queries"]) == [50, 250, 500]
    assert list(attack["fidelity/agreement"]) == [0.05, 0.25, 0.5]
    assert list(attack["accuracy/student"]) == [0.5, 0.5, 0.875]
    assert list(attack["calibration/student_ece"][:2]) == [0.1, 0.1]
    assert list(control["cost/queries"]) == [500], "it would have asked as many"
