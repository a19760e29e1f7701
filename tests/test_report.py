"""The tables of finished runs, in every format; and what experiments state against what was measured."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from finished_runs import benchmark, classified, finished, leave, truth
from hypothesis import given
from hypothesis import strategies as st

from distill import report, stated
from distill.config import CONFIG_DIR
from distill.errors import DistillError
from distill.records import Result
from distill.report import markdown, show, show_runs, update_readme
from distill.results import compare
from distill.tables import Table, judged, runs, with_interval

# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (0.83219, 0.0123, "0.832 ± 0.012"),
        (0.83219, 0.0074, "0.832 ± 0.007"),
        (0.83219, 0.16, "0.83 ± 0.16"),
        (-0.0001, 0.004, "0.000 ± 0.004"),
        (0.5, math.nan, "0.5000"),
        (0.5, 0.0, "0.5000"),
        (0.5, 0.00001, "0.5000"),
        (71_156.0, 2427.0, "71,156 ± 2,427"),
        (math.nan, math.nan, "–"),
    ],
)
def test_no_more_digits_than_the_interval_supports(mean: float, half: float, text: str) -> None:
    assert with_interval(mean, mean - half, mean + half) == text


@given(st.floats(-2, 2), st.floats(1e-4, 3))
def test_what_is_shown_is_the_number_to_a_tenth_of_its_interval(mean: float, half: float) -> None:
    shown, width = with_interval(mean, mean - half, mean + half).split(" ± ")
    assert abs(float(shown) - mean) <= 0.15 * half + 1e-9 or abs(float(shown) - mean) <= 0.5e-4
    assert abs(float(width) - half) <= 0.15 * half + 1e-9 or abs(float(width) - half) <= 0.5e-4
    assert len(shown.partition(".")[2]) == len(width.partition(".")[2]) <= 4


# --- runs -----------------------------------------------------------------------------------------------------------


def table_of(folder: Path, capsys: pytest.CaptureFixture[str], *found: Result) -> list[str]:
    show_runs([leave(folder, *found)])
    return [line for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_the_table_shows_own_students_and_worth_where_there_are_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = {"student/accuracy": 0.875, "fidelity/agreement": 0.5}
    own = {"own": True, "student/accuracy": 0.8125, "fidelity/agreement": 0.6875, "curve": []}
    some = [
        classified(0.875, tracks={"A": fresh, "B": {"own": False, **fresh}}),
        classified(0.75, "random_labels"),
    ]
    head, _, *lines = table_of(tmp_path, capsys, *some)
    assert "own" not in head
    assert "beyond truth" not in head
    assert "beyond random" in head
    assert [line.split()[-2:] for line in lines[:2]] == [["+0.1250", "run0"], ["–", "run1"]]
    head, _, *lines = table_of(tmp_path, capsys, *some, classified(0.5, "copycat", tracks={"A": fresh, "B": own}))
    assert "own acc" in head
    assert "own agreement" in head
    assert ["0.8125" in line and "0.6875" in line for line in lines[:3]] == [True, False, False], "copycat first"
    assert [line.split()[0] for line in lines[:3]] == ["–", "–", "random"]


def test_the_table_shows_ratios_where_there_are_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*found: Result) -> list[list[str]]:
        return [line.split() for line in table_of(tmp_path, capsys, *found)]

    assert "ratio" not in shown(finished(0.5, defense="rounding"))[0]
    assert "ratio" not in shown(finished(0.875))[0], "of a run without a defense it is 1"
    lines = shown(finished(0.875), finished(0.6875, defense="rounding"), truth(0.3125))
    assert lines[0][-5:] == ["recovery", "ratio", "ground", "truth", "run"]
    assert [line[-3:] for line in lines[2:5]] == [
        ["1.0000", "0.2500", "run0"],
        ["0.7500", "0.2500", "run1"],
        ["–", "–", "run2"],
    ]
    with pytest.raises(DistillError, match="make a run first"):
        show_runs([tmp_path / "nowhere"])


def test_seeds_of_an_arm_are_one_row_unless_runs_are_asked_for(tmp_path: Path) -> None:
    values = {("rounding", 0): 0.8, ("rounding", 1): 0.9, ("rounding", 2): 1.0, ("none", 0): 0.5}
    some = [classified(v, "knockoff_random", f"defense={d}", seed=s) for (d, s), v in values.items()]
    some.append(classified(0.25, "random_labels", "defense=none"))
    found = compare([leave(tmp_path, *some)])
    table = runs(found)
    assert table.columns[:2] == ["control", "defense"]
    rows = {(row[0], row[1]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == [("–", "none"), ("–", "rounding"), ("random labels", "none")], "the baseline first"
    assert rows["–", "rounding"]["student acc"] == "0.90 ± 0.25", "t = 4.303, sd 0.1, n = 3"
    assert rows["–", "none"]["student acc"] == "0.5000", "one seed has no interval"
    assert [row["seeds"] for row in rows.values()] == ["1", "3", "1"]
    assert table.notes == ["n = 360 test rows; seeds 0, 1, 2; mean ± half of the 95 % interval over seeds"]
    single = runs(found, single=True)
    assert "seed" in single.columns
    assert [row[-1] for row in single.rows] == [f"run{i}" for i in (3, 0, 1, 2, 4)]


# --- a benchmark ----------------------------------------------------------------------------------------------------


def test_a_benchmark_is_judged_with_its_worst_case_users_controls_and_missing_cells(tmp_path: Path) -> None:
    students, differences = judged(compare([benchmark(tmp_path)]))
    rows = {row[0]: dict(zip(students.columns, row, strict=True)) for row in students.rows}
    assert list(rows) == ["none", "mad 0.5", "control: ground truth"]
    defended = rows["mad 0.5"]
    assert (defended["as returned"], defended["top-1"]) == ("0.52 ± 0.05", "0.870 ± 0.025")
    assert (defended["worst case"], defended["reached by"]) == ("0.870 ± 0.025", "top-1")
    # 0.86 - 0.90, 0.87 - 0.92, 0.88 - 0.91: mean -0.04, sd 0.01, half 4.303 · 0.01/√3, t = 6.93
    assert (rows["none"]["from none"], defended["from none"]) == ("–", "-0.040 ± 0.025 (p=0.020)")
    assert defended["mean L1 change of an answer"] == "0.5000"
    assert defended["accuracy of the defended answers"] == "0.9000"
    assert (rows["none"]["pBayes"], defended["pBayes"]) == ("failed", "–")
    assert rows["control: ground truth"]["worst case"] == "0.810 ± 0.025"
    assert students.notes[0].startswith("n = 360 test rows; seeds 0, 1, 2; mean ±")
    assert "n/a: none × pBayes (pbayes needs posteriors)" in students.notes
    assert "failed: none × pBayes (out of memory)" in students.notes
    assert differences.columns == ["defense", "as returned", "top-1", "pBayes"]
    (row,) = differences.rows
    # as returned: differences -0.4, -0.38, -0.39: mean -0.39, sd 0.01, half 4.303 · 0.01/√3, t = 67.5, p = 0.00022;
    # top-1: -0.02, -0.03, -0.01: p = 0.074; Holm doubles the smaller one
    assert row == ["mad 0.5", "-0.390 ± 0.025 (p<0.001)", "-0.020 ± 0.025 (p=0.074)", "–"]
    assert "Holm" in differences.notes[0]


def test_several_axes_of_attackers_lie_down_and_budgets_make_tables_of_their_own(tmp_path: Path) -> None:
    found = compare([benchmark(tmp_path)])
    twice = [found.frame.assign(attack=attack, budget=budget) for attack in "ab" for budget in ("10", "20")]
    frame = pd.concat(twice, ignore_index=True)
    frame.loc[frame["control"] != "", ["attack", "budget"]] = "–"
    frame.loc[(frame["attack"] == "b") & (frame["defense"] == "none"), "fidelity/agreement"] += 0.05
    axes = found.axes | {"attack": ["a", "b"], "budget": ["10", "20"]}
    judge = type(found.judge)(over=("attack", "recovery"), budget="budget")
    missing = found.missing.assign(attack="a", budget="20")
    wide = type(found)("x", "y", axes, frame, judge, missing, {}, found.results, benchmark=True)
    tables = judged(wide)
    assert [table.title.rpartition(", budget ")[2] for table in tables] == ["10"] * 3 + ["20"] * 3
    worst, students, differences = tables[3:]
    assert worst.rows[0][-3:] == ["0.960 ± 0.025", "b, as returned", "–"]
    assert worst.rows[-1][0] == "control: ground truth", "beside every budget"
    assert students.columns[:3] == ["defense", "attack", "as returned"]
    assert [row[:2] for row in students.rows] == [[d, a] for d in ("none", "mad 0.5") for a in "ab"]
    assert students.rows[0][-1] == "failed"
    assert tables[1].columns == ["defense", "attack", "as returned", "top-1"], "no such cell at the other budget"
    assert [row[:2] for row in differences.rows] == [["mad 0.5", "a"], ["mad 0.5", "b"]]


def test_one_seed_has_a_worst_case_without_an_interval(tmp_path: Path) -> None:
    students, differences = judged(compare([benchmark(tmp_path)], {"seed": ["1"]}))
    assert students.rows[1][3:5] == ["0.8700", "top-1"]
    assert students.columns[5] == "as returned", "no seed is left to read a difference on"
    assert "takes luck along" in students.notes[-1]
    assert differences.rows[0][1] == "-0.3800", "nothing to test"


# --- printing -------------------------------------------------------------------------------------------------------

TABLE = Table("What 5 % are", ["name_1", "value of x"], [["a|b", "1 ± 2"], ["mad_argmax & co", "–"]], 1, ["n = 10"])


def test_markdown_and_latex_escape_what_they_must() -> None:
    assert TABLE.markdown().splitlines() == [
        "**What 5 % are**",
        "",
        "| name_1          |   value of x |",
        "|:----------------|-------------:|",
        r"| a\|b            |        1 ± 2 |",
        "| mad_argmax & co |            – |",
        "",
        "<sub>n = 10</sub>",
    ]
    lines = [line.strip() for line in TABLE.latex().splitlines()]
    assert r"\caption{What 5 \% are. n = 10.}" in lines
    assert r"\begin{tabular}{lr}" in lines
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert any(re.fullmatch(r"mad\\_argmax \\& co +& +– \\\\", line) for line in lines)


def test_a_narrow_terminal_gets_several_tables_and_every_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    table = judged(compare([benchmark(tmp_path)]))[0]
    for width in (60, 200):
        Console(width=width).print(*table.rich(width))
        out = capsys.readouterr().out
        assert (out.count("mad 0.5") == 1) == (width == 200)
        assert max(map(len, out.splitlines())) <= width
        for cell in (cell for row in table.rows for cell in row):
            assert cell in out


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    report._console().print(*Table("[b]", ["[/c]"], [["curve=[0.1] :smile:"]], 1, ["[/d]"]).rich(80))
    assert [line.strip() for line in capsys.readouterr().out.split("\n") if line.strip(" ─")] == [
        *("[b]", "[/c]", "curve=[0.1] :smile:", "[/d]")
    ]


def command(*words: str, monkeypatch: pytest.MonkeyPatch, cwd: Path) -> int:
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["report", *words])
    with pytest.raises(SystemExit) as end:
        report.main()
    return end.value.code


def test_the_command_writes_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path / "outputs", classified(0.5), classified(0.75, seed=1))

    def run(*words: str) -> str:
        assert command(*words, monkeypatch=monkeypatch, cwd=tmp_path) == 0
        return capsys.readouterr().out

    assert "student acc" in run()
    assert "run1" not in run("seed=0", "--runs")
    assert run("--markdown").startswith("# 2 runs under outputs\n\n|")
    assert run("outputs", "--latex", "table.tex") == ""
    assert (tmp_path / "table.tex").read_text().count(r"\bottomrule") == 1
    assert run("--csv", "runs.csv", "--parquet", "runs.parquet", "seed=1") == ""
    for frame in (pd.read_csv("runs.csv"), pd.read_parquet("runs.parquet")):
        assert frame[["seed", "accuracy/student", "cost/queries"]].to_numpy().tolist() == [[1, 0.75, 500]]
    assert run("--html", "page.html") == ""
    assert "2 runs under outputs" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sed=1"], "no run has 'sed'. Did you mean 'seed'?"),
        (["--markdown", "outputs"], "outputs is no place for a file"),
        (["--csv", "no/where.csv"], "no/where.csv is no place for a file"),
        (["--check", "quickstrat"], "no experiment 'quickstrat'. Did you mean 'quickstart'?"),
        (["seed=0", "--check"], "--readme and --check compare what they name; leave out seed"),
        (["--readme", "R.md"], "R.md has no <!-- benchmark: NAME -->"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path / "outputs", classified(0.5))
    (tmp_path / "R.md").write_text("nothing\n")
    assert command(*words, monkeypatch=monkeypatch, cwd=tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: report: {told}")


def test_a_benchmark_is_shown_with_its_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = benchmark(tmp_path)
    show(compare([home], {"seed": ["0"]}))
    out = capsys.readouterr().out
    assert "worst case" in out
    assert "README.md#few-seeds" in out
    text = markdown(compare([home]))
    assert text.startswith("# Two defenses, two recoveries\n")
    assert "few-seeds" not in text
    assert f"commit `{'a' * 12}`" in text


# --- the README -----------------------------------------------------------------------------------------------------


def test_the_readme_is_renewed_between_its_marks(tmp_path: Path) -> None:
    benchmark(tmp_path, published=True)
    readme = tmp_path / "README.md"
    before, after = "# a\n\n<!-- benchmark: small -->\n", "<!-- /benchmark -->\n\nthe rest\n"
    readme.write_text(f"{before}what was here{after}")
    assert update_readme(readme) == ["small"]
    text = readme.read_text()
    assert text.startswith(before)
    assert text.endswith(after)
    assert "what was here" not in text
    assert "| mad 0.5" in text
    assert "top-1" in text, "the worst"
    assert "pBayes" not in text, "not every arm"
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (tmp_path / picture).read_text().count("<svg") == 1
    assert (tmp_path / picture).with_suffix(".csv").exists()
    for word in ("commit", "cpu", "2026-11-25", "n = 360", "seeds 0, 1, 2"):
        assert word in text
    update_readme(readme)
    assert readme.read_text() == text, "the same again"
    readme.write_text(text.replace("benchmark: small -->", "benchmark: small heat_map -->"))
    update_readme(readme)
    assert "results/small/heat_map.svg" in readme.read_text()
    readme.write_text(text.replace("benchmark: small -->", "benchmark: small heatmap -->"))
    with pytest.raises(DistillError, match="Did you mean 'heat_map'"):
        update_readme(readme)


# --- stated values --------------------------------------------------------------------------------------------------


def test_every_stated_value_can_be_read() -> None:
    found = {path.stem: stated.stated(path) for path in (CONFIG_DIR / "experiment").glob("*.yaml")}
    assert sum(map(bool, found.values())) >= 3
    quick = found["quickstart"]
    assert any(one.half is not None and one.seeds == (0, 1, 2) for one in quick)


def header(folder: Path, *lines: str) -> Path:
    path = folder / "quickstart.yaml"
    path.write_text("\n".join([*lines, "defaults: []\n"]))
    return path


def test_stated_lines_are_parsed_and_mistakes_told(tmp_path: Path) -> None:
    lines = [
        "# reproduced: defense=mad recovery=top1 · accuracy/student 0.784 ± 0.004 (seeds 0, 1, 2; n = 10,000)",
        "# reported: accuracy/student 0.698 (table 3)",
    ]
    first, second = stated.stated(header(tmp_path, "# a title", *lines))
    assert first == stated.Stated(
        *("quickstart", "reproduced", ("defense=mad", "recovery=top1"), "accuracy/student", 0.784, 0.004, (0, 1, 2))
    )
    assert (second.kind, second.overrides, second.half, second.seeds) == ("reported", (), None, None)
    with pytest.raises(DistillError, match=r"experiment/quickstart: can't read '# reproduced: 0\.9'"):
        stated.stated(header(tmp_path, "# reproduced: 0.9"))


@pytest.mark.parametrize(
    ("values", "code", "verdict"),
    [((0.78, 0.80), 0, "within"), ((0.70, 0.76), 1, "outside"), ((), 3, "not run")],
)
def test_stated_values_are_checked_against_the_runs_of_that_very_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: tuple[float, ...], code: int, verdict: str
) -> None:
    monkeypatch.setattr(
        stated,
        "stated",
        lambda path: [
            stated.Stated(path.stem, "reproduced", ("defense=mad",), "accuracy/student", 0.79, 0.02, (0, 1)),
            stated.Stated(path.stem, "reported", (), "accuracy/student", 0.5, None, None),
        ],
    )
    mad = ["knockoff_random", "defense=mad"]
    some = [classified(value, *mad, seed=seed) for seed, value in enumerate(values)]
    # what is none of it: another seed, another option, another defense
    some += [classified(0.1, *mad, seed=2), classified(0.1, *mad, "defense.l1_budget=0.1"), classified(0.75)]
    table, found = stated.check([leave(tmp_path, *some)], ["quickstart"])
    assert found == code
    first, second = table.rows
    assert first[-1] == verdict
    assert first[-2] == (", ".join(map(str, range(len(values)))) or "–")
    assert (second[-1], second[-3]) == ("+0.250", "0.7500"), "a paper's number demands nothing"


def test_a_metric_that_no_run_measures_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stated.Stated("quickstart", "reproduced", (), "accuracy/studnt", 0.5, 0.1, None)
    monkeypatch.setattr(stated, "stated", lambda path: [one])
    with pytest.raises(DistillError, match=r"experiment/quickstart: .* has no 'accuracy/studnt'. Did you mean 'accu"):
        stated.check([leave(tmp_path, classified(0.5))], ["quickstart"])


def test_published_cells_count_as_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark(tmp_path, published=True)
    one = stated.Stated("quickstart", "reproduced", ("defense=none",), "fidelity/agreement", 0.91, 0.001, (0, 1, 2))
    monkeypatch.setattr(stated, "stated", lambda path: [one])
    table, code = stated.check([tmp_path / "outputs", tmp_path / "results"], ["quickstart"])
    assert code == 0, table.rows
