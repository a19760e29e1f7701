"""The grid: cells are the runs that Hydra would compose, and survive what becomes of the processes that run them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from assets import need
from commands import Running, command, distill
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from distill.benchmark import (
    ATTEMPT,
    DONE,
    FAILED,
    OPEN,
    BenchmarkConfig,
    State,
    chosen,
    expected,
    in_order,
    open_grid,
    price,
)
from distill.config import CONFIG_DIR, query_id, run_id
from distill.errors import DistillError, MissingAsset
from distill.grid import SEED, Cell, Grid, values_of
from distill.launch import options
from distill.results import MANIFEST, compare

TINY = ["training.epochs=1", "budget.queries=30", "teacher.recipe.epochs=2", "curve=[]"]
BASE = ["+experiment=quickstart", "defense=none", *TINY]


@pytest.fixture(autouse=True)
def hydra() -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        yield


def composed(cell: Cell) -> Any:
    config = compose("train", overrides=list(cell.overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


# --- cells ----------------------------------------------------------------------------------------------------------


def test_cells_are_the_runs_that_hydra_composes() -> None:
    axes = {
        "defense": {"none": [], "noise": ["defense=gaussian_noise", "defense.sd=0.1"], "rounding": "defense=rounding"},
        "recovery": {"as returned": "recovery=as_returned", "average": ["attack=repeated_queries", "recovery=average"]},
        "times": {"2": ["attack=repeated_queries", "attack.times=2"], "as it is": []},  # the attack of another axis
        "budget.queries": [20, 30],
        "access.profile": ["probs", "label"],
        "seed": [0, 3],
    }
    grid = Grid("some", BASE, axes, {"ground truth": "attack=ground_truth_labels"}, ("budget.queries", "seed"))
    cells = grid.cells
    assert len(cells) == 3 * 2 * 2 * 2 * 2 * 2 + 2 * 2
    for cell in cells[::7] + cells[-2:]:
        config = composed(cell)
        assert (cell.run, cell.query) == (run_id(config), query_id(config)), cell.at
        assert cell.name == config.name
        chosen = {group: str(option) for group, option in config.hydra.runtime.choices.items()}
        assert cell.choices == chosen | {"benchmark": "some"}
        mine = OmegaConf.to_container(cell.full_config, resolve=True)
        whole = OmegaConf.to_container(OmegaConf.masked_copy(config, list(mine)), resolve=True)
        assert mine == whole


def test_parts_that_refer_to_one_another_are_composed_as_one() -> None:
    refers = [*BASE, "budget.queries=${training.batch_size}"]
    for cell in Grid("some", refers, {"training.batch_size": [8, 16], "seed": [0, 1]}, {}).cells:
        assert cell.config["budget"]["queries"] == int(cell.at["training.batch_size"])
        assert cell.run == run_id(composed(cell))


def test_values_of_an_axis(tmp_path: Path) -> None:
    assert values_of("seed", [0, None]) == {"0": ("seed=0",), "null": ("seed=null",)}
    assert values_of("attack", {"a": ["attack=copycat", "seed=1"], "b": None}) == {
        "a": ("attack=copycat", "seed=1"),
        "b": (),
    }
    assert list(values_of("defense", "glob(mad*)")) == ["mad", "mad_argmax"]
    (tmp_path / "defense").mkdir()
    (tmp_path / "defense/madder.yaml").touch()
    assert list(values_of("defense", "glob(madd*)", [CONFIG_DIR, tmp_path])) == ["madder"]
    with pytest.raises(DistillError, match=r"axes\.defense: no option matches"):
        values_of("defense", "glob(nothing*)")
    with pytest.raises(DistillError, match=r"axes\.seed"):
        values_of("seed", 3)


def configured(**changes: Any) -> Any:
    axes = {"defense": ["none", "rounding"], "recovery": ["as_returned", "top1"], "seed": [0, 1]}
    config = {"name": "some", "title": "t", "experiment": "quickstart", "overrides": TINY, "axes": axes}
    return OmegaConf.merge(OmegaConf.structured(BenchmarkConfig), OmegaConf.create(config | changes))


def test_controls_and_what_is_left_out() -> None:
    config = configured(
        controls={"ground truth": "attack=ground_truth_labels"}, skip=[{"defense": "rounding", "seed": [1]}]
    )
    grid = open_grid(config)
    cells = grid.cells
    assert len(cells) == 8 - 2 + 2
    assert [(cell.at, cell.control) for cell in cells[-2:]] == [({"seed": seed}, "ground truth") for seed in "01"]
    assert {cell.choices["defense"] for cell in cells[-2:]} == {"none"}, "quickstart has rounding; a control has none"
    assert not any(cell.at == {"defense": "rounding", "recovery": "top1", "seed": "1"} for cell in cells)
    some = chosen(cells, {"defense": ["rounding"], "recovery": "top1"}, grid)
    assert [cell.at.get("seed") for cell in some] == ["0", "0", "1"], "and the controls, which lie on neither axis"
    with pytest.raises(DistillError, match=r"only.defense: no value 'runding'. Did you mean 'rounding'"):
        chosen(cells, {"defense": ["runding"]}, grid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {}}, "judge.per: no axis 'defense'"),
        ({"judge": {"baseline": "non"}}, "judge.baseline: is a value of defense. Did you mean 'none'"),
        ({"judge": {"over": ["atack"]}}, "judge.over: no axis 'atack'"),
        ({"judge": {"budget": "queries"}}, "judge.budget: no axis 'queries'"),
        ({"skip": [{"sead": 1}]}, "skip: no axis 'sead'. Did you mean 'seed'"),
        ({"skip": [{"seed": 7}]}, "skip: no value '7' on seed"),
        ({"overrides": ["nothing=1"]}, "nothing"),
    ],
)
def test_what_is_wrong_with_a_grid_is_told_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        assert open_grid(configured(**changes)).cells


def test_cells_whose_parts_do_not_fit_have_a_reason() -> None:
    axes = {
        "defense": ["none", "gaussian_noise", "kgw"],
        "recovery": ["as_returned", "defense_in_loop"],
        "access": ["probs", "label"],
        "objective": ["soft_cross_entropy", "logit_mse"],
        "seed": [0, 1],
    }
    reasons = {tuple(cell.at.values())[:4]: cell.reason for cell in Grid("some", BASE, axes, {}).checked()}
    assert reasons["none", "as_returned", "probs", "soft_cross_entropy"] == ""
    assert (
        "can't follow a defense that draws"
        in reasons["gaussian_noise", "defense_in_loop", "probs", "soft_cross_entropy"]
    )
    assert "logit_mse requires probs" in reasons["none", "as_returned", "label", "logit_mse"]
    assert "other domain" in reasons["kgw", "as_returned", "probs", "soft_cross_entropy"]
    wrong = {"defense": {"none": [], "odd": ["defense=rounding", "+defense.digits=1"]}, "seed": [0]}
    with pytest.raises(DistillError, match=r"has no option 'digits'.*the cell of defense odd"):
        Grid("some", BASE, wrong, {}).checked()


@pytest.mark.parametrize("name", options("benchmark"))
def test_shipped_benchmarks_are_right(name: str) -> None:
    grid = open_grid(compose("benchmark", overrides=[f"+benchmark={name}"]))
    try:
        cells = grid.checked()
    except MissingAsset as error:
        need(False, str(error))
    assert grid.benchmark == name
    assert {cell.at[SEED] for cell in cells} == {"0", "1", "2"}
    assert any(cell.control == "ground truth" for cell in cells)
    assert len({cell.run for cell in cells}) == len(cells)
    assert len([cell for cell in cells if cell.reason]) < len(cells) / 3


def test_what_shares_an_evaluation_is_run_together() -> None:
    axes = {"defense": ["none", "rounding"], "recovery": ["as_returned", "top1"], "seed": [0, 1]}
    cells = in_order(Grid("some", BASE, axes, {"ground truth": "attack=ground_truth_labels"}).cells, ["recovery"])
    told = [" ".join([*cell.at.values(), cell.control]) for cell in cells]
    assert told[:4] == ["none as_returned 0 ", "none top1 0 ", "none as_returned 1 ", "none top1 1 "]
    assert told[-2:] == ["0 ground truth", "1 ground truth"]
    assert len(told) == 10


def test_expected_time_and_money(tmp_path: Path) -> None:
    axes = {"defense": ["none", "rounding"], "budget.queries": [20, 30], "seed": [0, 1]}
    priced = [*BASE, "access.usd_per_query=0.5"]
    cells = Grid("some", priced, axes, {}).cells
    at = {tuple(cell.at.values()): cell for cell in cells}
    taken = [(at["none", "20", "0"], 1.0), (at["none", "30", "0"], 5.0), (at["none", "30", "1"], 7.0)]
    assert expected([at["none", "20", "1"]], taken) == 1.0
    assert expected([at["rounding", "30", "0"]], taken) == 6.0, "the median of those at the same budget"
    assert price(cells[0]) == 10.0
    cells[0].config["budget"]["usd"] = 3.0
    assert price(cells[0]) == 3.0
    cells[0].config["budget"].update(usd=None, queries=None)
    assert price(cells[0]) is None


# --- running --------------------------------------------------------------------------------------------------------

SMALL = {
    "name": "small",
    "title": "t",
    "experiment": "quickstart",
    "overrides": TINY,
    "workers": 1,
    "progress": False,
    "axes": {"defense": ["none", "rounding"], "recovery": ["as_returned", "defense_in_loop"], "seed": [0]},
    "controls": {"no teacher": "attack=no_teacher"},
}


def words(cwd: Path, **changes: Any) -> list[str]:
    """What starts a small grid from this folder."""
    folder = cwd / "my/benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(SMALL | changes)))
    return ["+benchmark=small", f"hydra.searchpath=[file://{cwd}/my]"]


def states(cwd: Path) -> list[tuple[str, str]]:
    manifest = json.loads((cwd / "outputs/benchmarks/small" / MANIFEST).read_text())
    return [(cell["status"], cell["reason"]) for cell in manifest["cells"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished grid, published."""
    cwd = tmp_path_factory.mktemp("grid")
    GlobalHydra.instance().clear()
    done = distill("benchmark", *words(cwd), "publish=results", cwd=cwd)
    assert "defense" in done.stdout
    return cwd


def test_a_grid_is_its_runs(finished: Path) -> None:
    assert [status for status, _ in states(finished)] == [DONE] * 5
    runs = sorted((finished / "outputs").glob("*-vs-*/*/result.json"))
    assert len(runs) == 5
    assert not list((finished / "outputs").rglob(ATTEMPT))
    grid = Grid("small", ["+experiment=quickstart", *TINY], {"defense": ["rounding"], "seed": [0]}, {})
    (cell,) = grid.cells
    again = distill("train", *cell.overrides, cwd=finished)
    assert "finished before" in again.stderr, "the same words to distill.train are the same run"
    for name in ("train.log", ".hydra/config.yaml", "student/model.safetensors", "transfer_set", "metrics.jsonl"):
        assert (finished / "outputs" / cell.name / cell.run / name).exists(), name


def test_what_is_finished_is_not_run_again(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "outputs").glob("*-vs-*/*/result.json")}
    plan = distill("benchmark", *words(finished), "--dry-run", cwd=finished)
    assert "5 cells: 5 done, 0 failed, 0 n/a, 0 open" in plan.stdout
    distill("benchmark", *words(finished), cwd=finished)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_published_grid_is_small_and_whole(finished: Path) -> None:
    published, running = compare([finished / "results/small"]), compare([finished / "outputs/benchmarks/small"])
    assert len(published.frame) == 5
    assert sorted(published.frame["run"]) == sorted(running.frame["run"])
    assert published.axes == running.axes
    assert published.frame["accuracy/student"].tolist() == running.frame["accuracy/student"].tolist()
    for path in (finished / "results/small").glob("*.json"):
        assert path.stat().st_size < 12_000, path
    assert (finished / "results/small" / MANIFEST).exists()


def test_a_grid_may_be_published_in_parts(finished: Path, tmp_path: Path) -> None:
    """Machines that share no folder publish to the same place; cells that the grid no longer has go."""
    before = compare([finished / "results/small"]).frame.set_index("run")["accuracy/student"]
    shutil.copytree(finished / "results", tmp_path / "results")
    published = tmp_path / "results/small"
    manifest = json.loads((published / MANIFEST).read_text())
    missing = manifest["cells"][0]
    assert missing["at"]["defense"] == "none"
    missing["status"] = OPEN
    (published / MANIFEST).write_text(json.dumps(manifest))
    (published / f"{missing['run']}.json").rename(published / "0123abcd.json")
    distill("benchmark", *words(tmp_path), "only={defense:[none]}", "publish=results", cwd=tmp_path)
    assert compare([published]).frame.set_index("run")["accuracy/student"].to_dict() == before.to_dict()
    assert not (published / "0123abcd.json").exists()
    rounding = Grid("small", ["+experiment=quickstart", *TINY], {"defense": ["rounding"], "seed": [0]}, {}).cells[0]
    assert not (tmp_path / "outputs" / rounding.name / rounding.run).exists(), "taken from what was published"


BREAKS = """
import os, signal
from pathlib import Path

from distill.provider.defenses.rounding import Rounding


class Breaks(Rounding):
    def perturb(self, answers, info, rng):
        tries = Path("tries")
        tries.write_text((tries.read_text() if tries.exists() else "") + "x")
        how = Path("how").read_text()
        if how == "killed" or (how == "killed once" and len(tries.read_text()) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "error" or (how == "error once" and len(tries.read_text()) == 1):
            raise ZeroDivisionError("by accident")
        return super().perturb(answers, info, rng)
"""


@pytest.mark.parametrize("how", ["killed once", "killed", "error"])
def test_a_cell_that_fails_or_kills_its_worker_is_tried_again_and_stops_nothing_else(how: str, tmp_path: Path) -> None:
    (tmp_path / "breaking.py").write_text(BREAKS)
    (tmp_path / "my/defense").mkdir(parents=True)
    (tmp_path / "my/defense/breaks.yaml").write_text("_target_: breaking.Breaks\ndecimals: 1\n")
    (tmp_path / "how").write_text(how)
    axes = {"defense": ["none", "breaks"], "seed": [0]}
    env: dict[str, str | None] = {"PYTHONPATH": str(tmp_path), "DISTILL_ALLOW_TARGETS": "breaking."}
    distill("benchmark", *words(tmp_path, axes=axes, judge={"over": []}), cwd=tmp_path, env=env, fresh=True)
    ended = states(tmp_path)
    assert ended[0] == (DONE, "")
    assert len((tmp_path / "tries").read_text()) >= 2
    if how == "killed once":
        assert ended[1] == (DONE, "")
    else:
        assert ended[1][0] == FAILED
        assert ("killed each time" if how == "killed" else "ZeroDivisionError: by accident") in ended[1][1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_grid_goes_on_where_it_was(sent: signal.Signals, tmp_path: Path) -> None:
    axes, longer = {"defense": ["none"], "seed": list(range(8))}, [*TINY, "training.epochs=25"]
    started = words(tmp_path, axes=axes, controls={}, judge={"over": []}, overrides=longer)
    running = Running(command, "benchmark", *started, cwd=tmp_path)
    until = time.monotonic() + 120
    while not list((tmp_path / "outputs").glob("*-vs-*/*/result.json")):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert running.process.pid is not None
    workers = psutil.Process(running.process.pid).children(recursive=True)
    os.kill(running.process.pid, sent)
    ended = running.end()
    assert not psutil.wait_procs(workers, timeout=30)[1], "nobody goes on alone"
    assert ended.returncode == 130
    assert "the same command goes on from here" in ended.stderr
    counted = [status for status, _ in states(tmp_path)]
    assert 1 <= counted.count(DONE) < 8
    assert set(counted) == {DONE, OPEN}, "what was interrupted has not failed"
    distill("benchmark", *started, cwd=tmp_path)
    assert [status for status, _ in states(tmp_path)] == [DONE] * 8


def test_a_failed_cell_is_tried_again_by_the_next_launch() -> None:
    failed = State(FAILED, "why", attempts=2, launch="one")
    assert failed.ended("one", retries=1)
    assert not failed.ended("one", retries=2)
    assert not failed.ended("two", retries=1)
