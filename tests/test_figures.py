"""Figures: what they show is what statistics say, and the same bytes each time."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from distill import figures, page, results, statistics
from distill.launch import options
from distill.records import Result

DEFENSES = {"none": 0.0, "mad 0.5": 0.5, "mad 1.0": 1.0, "rounding": 0.1}
RECOVERIES = ("as returned", "top-1")
HOSTILE = "needs <script>alert('pbayes')</script> & a posterior"
TREND = [(50, 0.6), (100, 0.8), (200, 1.0)]  # queries, and the share of the last agreement


def agreement(defense: str, recovery: str, seed: int) -> float:
    """MAD is strong against the naive attacker, and stays strong; labels undo most of what rounding does."""
    naive = {"none": 0.9, "rounding": 0.8, "mad 0.5": 0.7, "mad 1.0": 0.5}
    aware = {"none": 0.88, "rounding": 0.89, "mad 0.5": 0.75, "mad 1.0": 0.6}
    noise = np.random.default_rng([seed, len(recovery)]).normal(0, 0.003)
    return round((aware if recovery == "top-1" else naive)[defense] + noise, 6)


def result(run: str, seed: int, reached: float, l1: float, choices: dict[str, str], queries: int) -> Result:
    def point(asked: int, share: float) -> dict[str, float]:
        return {"cost/queries": asked, "fidelity/agreement": share * reached, "student/accuracy": share * reached}

    defense, attack = choices["defense"], choices["attack"]
    return Result(
        *(run, "q", {"data": "digits", "recovery": "as_returned", **choices}),
        config={
            "attack": {"_target_": f"distill.attacks.{attack}.X"},
            "defense": {"_target_": f"distill.provider.defenses.{defense}.X", "l1_budget": l1},
            "budget": {"queries": 200},
            "seed": seed,
        },
        seed=seed,
        profile="probs",
        fingerprints={"test": "t", "pool": "p", "train": "r"},
        classes=10,
        accuracy={
            "teacher": {"accuracy": 0.95},
            "defended_teacher": {"accuracy": 0.95 if l1 < 0.9 else 0.5},
            "student": {"accuracy": reached},
        },
        fidelity={"agreement": reached, "kl": 1 - reached},
        utility={"l1_mean": l1, "l1_max": l1},
        cost={"queries": queries, "usd": 0.0, "seconds": 2.0, "train_seconds": 1.5},
        curve=[point(asked, share) for asked, share in TREND[:-1]],
        test_rows=360,
        flags=["the student is not cheaper (README.md#student-not-cheaper)"] if defense == "mad" else [],
    )  # fmt: skip


def leave_benchmark(folder: Path, seeds: int = 3) -> Path:
    """A published benchmark's folder, except that runs lie in folders of their own, with what a run leaves."""
    home = folder / "benchmarks" / "made_up"
    home.mkdir(parents=True)
    cells: list[dict[str, Any]] = []

    def leave(at: dict[str, str], control: str, one: Result) -> None:
        place = folder / "runs" / one.run_id
        place.mkdir(parents=True)
        (place / "result.json").write_text(one.to_json())
        (place / "samples.jsonl").write_text("{}\n")
        losses = [{"stage": "student", "epoch": epoch, "step": epoch, "loss": 2 / epoch} for epoch in range(1, 6)]
        (place / "metrics.jsonl").write_text("\n".join(map(json.dumps, losses)) + "\n")
        where = f"../../runs/{one.run_id}"
        cells.append({"at": at, "control": control, "run": one.run_id, "folder": where, "status": "done", "reason": ""})

    for seed in range(seeds):
        for i, (defense, l1) in enumerate(DEFENSES.items()):
            for j, recovery in enumerate(RECOVERIES):
                choices = {"attack": "knockoff_random", "defense": defense.split()[0]}
                run = result(f"{seed}{i}{j}", seed, agreement(defense, recovery, seed), l1, choices, 200)
                leave({"defense": defense, "recovery": recovery, "seed": str(seed)}, "", run)
        truth = {"attack": "ground_truth_labels", "defense": "none"}
        leave({"seed": str(seed)}, "ground truth", result(f"{seed}c", seed, 0.7 + seed / 100, 0.0, truth, 0))
        at = {"defense": "label_only", "recovery": "pbayes", "seed": str(seed)}
        cells.append({"at": at, "control": "", "run": "", "folder": "", "status": "n/a", "reason": HOSTILE})
    manifest = {
        "schema": 1,
        "name": "made_up",
        "title": "A made-up benchmark <i>of</i> tests",
        "experiment": "quickstart",
        "axes": {
            "defense": [*DEFENSES, "label_only"],
            "recovery": [*RECOVERIES, "pbayes"],
            "seed": [str(seed) for seed in range(seeds)],
        },
        "judge": {"per": "defense", "over": ["recovery"]},
        "controls": ["ground truth"],
        "cells": cells,
        "made": {"commit": "abc", "dirty": False, "date": "2026-11-25", "hardware": "two cores", "seconds": 60.0},
    }
    (home / results.MANIFEST).write_text(json.dumps(manifest))
    return home


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> results.Comparison:
    return results.compare([leave_benchmark(tmp_path_factory.mktemp("outputs"))])


def test_a_method_looks_the_same_everywhere() -> None:
    for group in ("defense", "recovery", "attack", "objective"):
        looks = [figures.style(name) for name in options(group) if name != "none"]
        assert len(set(looks)) == len(looks), f"two options of {group} look alike"
    assert figures.style("mad 0.5") == figures.style("mad 1.0") == figures.style("mad") != figures.style("mad_argmax")
    assert figures.style("as returned") == figures.style("as_returned")
    assert figures.style("top-1") == figures.style("top1")
    assert figures.style("none").colour == figures.INK
    assert figures.style("of another package") == figures.style("of another package")
    assert figures.style("top-3", "top_k") == figures.style("top_k"), "a name of its own has its option's style"
    assert figures.style("GRAD² 0.5", "grad2") == figures.style("grad2")
    assert figures.style("D-DAE+") == figures.style("ddae_plus") != figures.style("ddae")
    assert figures.style("label only", "none") == figures.style("label_only"), "though no defense was chosen"
    assert figures.style("undefended", "none") != figures.style("none", "none")


def test_the_style_of_an_arm_is_that_of_its_parts(made_up: results.Comparison) -> None:
    look = figures.looks(made_up, ["defense", "recovery"])
    assert look["mad 1.0, top-1"] == (figures.style("mad").colour, figures.style("top1").mark)


def test_pareto_scatter_shows_the_worst_case_and_the_front(made_up: results.Comparison) -> None:
    _, data = figures.pareto_scatter(made_up)
    worst = data[data.kind == "worst"].set_index("defense")
    runs = made_up.frame[made_up.frame.control == ""]
    told = statistics.worst_case(runs, "defense", ["recovery"], "fidelity/agreement").set_index("defense")
    pd.testing.assert_series_equal(worst["mean"], told["mean"], check_like=True)
    assert worst.utility.to_dict() == pytest.approx(DEFENSES)
    assert worst.front.to_dict() == {"none": True, "mad 0.5": True, "mad 1.0": True, "rounding": True}
    assert worst.arm["mad 1.0"] == "top-1"
    assert worst.family["mad 0.5"] == worst.family["mad 1.0"] == "mad"
    naive = data[data.kind == "naive"].set_index("defense")
    expected = np.mean([agreement("rounding", "as returned", seed) for seed in range(3)])
    assert naive["mean"]["rounding"] == pytest.approx(expected)
    dear = replace(made_up, frame=made_up.frame.assign(**{"utility/l1_mean": 1.0}))
    with pytest.raises(figures.NothingToDraw):
        figures.pareto_scatter(dear)


def test_labels_of_a_scatter_do_not_cover_one_another(made_up: results.Comparison) -> None:
    rng = np.random.default_rng(0)
    frame = made_up.frame[made_up.frame.control == ""]
    names = list(options("defense"))[:20]
    crowd = pd.concat([frame[frame.defense == "none"].assign(defense=name) for name in names])
    place = dict(zip(names, rng.uniform(0, 1, (20, 2)), strict=True))
    crowd["utility/l1_mean"] = [place[name][0] for name in crowd.defense]
    crowd["fidelity/agreement"] += [place[name][1] for name in crowd.defense]
    axes = {"defense": names, "recovery": list(RECOVERIES)}
    figure, _ = figures.pareto_scatter(replace(made_up, axes=axes, frame=crowd))
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 20
    clashes = [i for i, box in enumerate(boxes) for other in boxes[:i] if box.padded(-1).overlaps(other.padded(-1))]
    assert not clashes


def test_heat_map_has_every_arm_and_the_controls(made_up: results.Comparison) -> None:
    figure, data = figures.heat_map(made_up)
    arms = data[data.defense.notna()].set_index(["defense", "recovery"])
    assert len(arms) == len(DEFENSES) * len(RECOVERIES)
    assert arms["mean"]["mad 1.0", "top-1"] == pytest.approx(
        np.mean([agreement("mad 1.0", "top-1", s) for s in range(3)])
    )
    assert data.set_index("control")["mean"]["ground truth"] == pytest.approx(0.71)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert f"{arms['mean']['mad 1.0', 'top-1']:.3f}" in written
    assert "0.710" in written
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert ticks == [*DEFENSES, "ground truth"]


def test_seeds_that_asked_other_numbers_of_queries_are_no_curve(made_up: results.Comparison) -> None:
    """As where a budget is money, and answers are of different lengths."""
    seeds = made_up.frame.set_index("folder")["seed"]
    found = {
        folder: replace(result, curve=[], cost=result.cost | {"queries": 100 + int(seeds[folder])})
        for folder, result in made_up.results.items()
    }
    apart = replace(made_up, results=found)
    with pytest.raises(figures.NothingToDraw):
        figures.budget_curves(apart)
    assert not page.over_budgets(apart)["rows"]
    assert page.over_budgets(made_up)["rows"]


def test_budget_curves_have_intervals_and_dashed_controls(made_up: results.Comparison) -> None:
    figure, data = figures.budget_curves(made_up)
    queries = [asked for asked, _ in TREND]
    line = data[(data.defense == "mad 0.5") & (data.recovery == "top-1")].sort_values("cost/queries")
    reached = np.array([agreement("mad 0.5", "top-1", seed) for seed in range(3)])
    assert list(line["cost/queries"]) == queries
    for mean, low, (_, share) in zip(line["mean"], line.low, TREND, strict=True):
        assert mean == pytest.approx(share * reached.mean())
        assert low == pytest.approx(share * statistics.estimate(reached).low)
    assert [axis.get_title("left") for axis in figure.axes] == list(RECOVERIES), (
        "there are fewer recoveries than defenses"
    )
    axis = figure.axes[0]
    assert axis.get_xscale() == "log"
    dashed = [one for one in axis.lines if one.get_linestyle() == "--"]
    assert len(dashed) == 1
    assert len(axis.lines) == len(DEFENSES) + 1
    assert list(dashed[0].get_xdata()) == queries, "a control is where its queries would have been"
    looks = {one.get_label(): (one.get_color(), one.get_fillstyle()) for one in axis.lines}
    assert len(set(looks.values())) == len(looks), "strengths of one defense are told apart"


def test_learning_curves_need_the_files(made_up: results.Comparison, tmp_path: Path) -> None:
    _, data = figures.learning_curves(made_up)
    line = data[(data.defense == "none") & (data.recovery == "top-1")]
    assert list(line.epoch) == [1, 2, 3, 4, 5]
    assert list(line["mean"]) == pytest.approx([2 / epoch for epoch in range(1, 6)])
    published = replace(made_up, frame=made_up.frame.assign(folder=str(tmp_path / "run.json")))
    with pytest.raises(figures.NothingToDraw):
        figures.learning_curves(published)


def test_export_writes_the_same_bytes_and_the_numbers(made_up: results.Comparison, tmp_path: Path) -> None:
    paths = figures.export(made_up, tmp_path / "first")
    again = figures.export(made_up, tmp_path / "second")
    names = [f"{name}.{kind}" for name in figures.FIGURES for kind in ("svg", "csv")]
    assert [path.name for path in paths] == names
    for one, other in zip(paths, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.stat().st_size > 100
    for path in paths[::2]:
        assert "<a " not in path.read_text()
        root = ElementTree.fromstring(path.read_text())
        assert root.tag.endswith("svg")
        words = [element.text for element in root.iter() if element.tag.endswith("text")]
        assert "rounding" in words, "text stays text"
    _, data = figures.heat_map(made_up)
    written = pd.read_csv(io.StringIO((tmp_path / "first" / "heat_map.csv").read_text()))
    np.testing.assert_allclose(written["mean"], data["mean"], rtol=1e-4)


def test_a_crowd_of_panels_becomes_one_of_the_naive_attacker(made_up: results.Comparison) -> None:
    frame = made_up.frame[made_up.frame.control == ""]
    recoveries = ["as_returned", *(f"recovery {i}" for i in range(11))]
    defenses = ["none", *(f"defense {i}" for i in range(10))]
    one = frame.iloc[:1]
    crowd = pd.concat(
        [one.assign(defense=d, recovery=r, run=f"{d}{r}") for d in defenses for r in recoveries], ignore_index=True
    )
    axes = {"defense": defenses, "recovery": recoveries}
    figure, data = figures.budget_curves(replace(made_up, axes=axes, frame=crowd))
    assert [axis.get_title("left") for axis in figure.axes] == ["as_returned"]
    assert set(data.defense) == set(defenses)
    assert len(data) == len(defenses) * len(TREND)
