"""The table that compares finished runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from distill.config import CONFIG_DIR, Config, query_id, run_id
from distill.errors import DistillError
from distill.records import Result
from distill.report import beyond_controls, load_runs, recovery_ratios, show_runs, varied

UNTRAINED = 0.125


@cache
def composed(experiment: str, *options: str) -> tuple[Any, dict[str, str]]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose("train", overrides=[f"+experiment={experiment}", *options], return_hydra_config=True)
    choices = {name: str(option) for name, option in config.hydra.runtime.choices.items()}
    HydraConfig.instance().set_config(config)
    return OmegaConf.to_container(OmegaConf.masked_copy(config, list(Config.__annotations__)), resolve=True), choices


def finished(accuracy: float, *options: str, defense: str = "none", queries: int = 4000, **values: Any) -> Result:
    """What a run of `lm_quickstart` with these options and values leaves, whose student has this accuracy."""
    resolved, choices = composed("lm_quickstart", f"defense={defense}", *options)
    config = OmegaConf.create(resolved)
    for name, value in values.items():
        OmegaConf.update(config, name.replace("__", "."), value)
    return Result(
        *(run_id(config), query_id(config), choices, OmegaConf.to_container(config), config.seed, "text"),
        fingerprints={"teacher": defense, "train": "a", "test": "b", "pool": "c"},
        accuracy={"student": {"accuracy": accuracy}, "untrained": {"accuracy": UNTRAINED}},
        cost={"queries": queries},
        test_rows=64,
    )


def truth(accuracy: float, **values: Any) -> Result:
    return finished(accuracy, "attack=ground_truth_answers", queries=0, **values)


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


def classified(accuracy: float, attack: str = "knockoff_random", *options: str, **changes: Any) -> Result:
    """What a run of `quickstart` leaves, whose student has this accuracy; `changes` of the result's own fields."""
    resolved, choices = composed("quickstart", f"attack={attack}", *options)
    config = OmegaConf.create(resolved)
    values: dict[str, Any] = {
        "fingerprints": {"teacher": "t", "train": "a", "test": "b", "pool": "c"},
        "classes": 10,
        "accuracy": {who: {"accuracy": accuracy} for who in ("teacher", "defended_teacher", "student")},
        "fidelity": {"agreement": 0.5, "kl": 0.25},
        "utility": {"l1_mean": 0.0},
        "cost": {"queries": 500, "usd": 0.0},
        "test_rows": 360,
    }
    return Result(run_id(config), query_id(config), choices, resolved, config.seed, "probs", **(values | changes))


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


def table_of(folder: Path, capsys: pytest.CaptureFixture[str], *runs: Result) -> list[str]:
    for number, run in enumerate(runs):
        (folder / f"run{number}").mkdir(exist_ok=True)
        (folder / f"run{number}" / "result.json").write_text(run.to_json())
    show_runs([folder])
    return [line for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_the_table_shows_own_students_and_worth_where_there_are_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = {"student/accuracy": 0.875, "fidelity/agreement": 0.5}
    own = {"own": True, "student/accuracy": 0.8125, "fidelity/agreement": 0.6875, "curve": []}
    runs = [
        classified(0.875, tracks={"A": fresh, "B": {"own": False, **fresh}}),
        classified(0.75, "random_labels"),
    ]
    head, _, *lines = table_of(tmp_path, capsys, *runs)
    assert "own" not in head
    assert "beyond truth" not in head
    assert "beyond random" in head
    assert [line.split()[-2:] for line in lines[:2]] == [["+0.1250", "run0"], ["–", "run1"]]
    head, _, *lines = table_of(tmp_path, capsys, *runs, classified(0.5, "copycat", tracks={"A": fresh, "B": own}))
    assert "own acc" in head
    assert "own agreement" in head
    assert ["0.8125" in line and "0.6875" in line for line in lines[:3]] == [False, False, True]


def test_the_table_shows_ratios_where_there_are_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*runs: Result) -> list[list[str]]:
        return [line.split() for line in table_of(tmp_path, capsys, *runs)]

    assert "ratio" not in shown(finished(0.5, defense="rounding"))[0]
    assert "ratio" not in shown(finished(0.875))[0], "of a run without a defense it is 1"
    lines = shown(finished(0.875), finished(0.6875, defense="rounding"), truth(0.3125))
    assert lines[0][-5:] == ["recovery", "ratio", "ground", "truth", "run"]
    assert [line[-3:] for line in lines[2:5]] == [
        ["1.0000", "0.2500", "run0"],
        ["0.7500", "0.2500", "run1"],
        ["–", "–", "run2"],
    ]
    (tmp_path / "run1" / "result.json").write_text("{")
    assert [path.name for path in load_runs([tmp_path])] == ["run0", "run2"]
    with pytest.raises(DistillError, match="make a run first"):
        show_runs([tmp_path / "nowhere"])


def test_options_in_which_runs_of_one_choice_differ_are_columns() -> None:
    runs = [
        finished(0.5, "defense.delta=1.0", defense="kgw"),
        finished(0.5, "defense.delta=2.0", defense="kgw", own_examples=100),
        finished(0.5, defense="length_cap"),
    ]
    assert varied(runs) == {"defense.delta": ["1.0", "2.0", "–"], "own_examples": ["0", "100", "0"]}
    assert varied(runs[::2]) == {}, "what differs because another component was chosen is told by its name"
    assert varied([finished(0.5), finished(0.5, budget__queries=10)]) == {"budget.queries": ["4000", "10"]}
    assert varied([finished(0.5), finished(0.5, seed=1)]) == {}, "seeds have a column of their own"
