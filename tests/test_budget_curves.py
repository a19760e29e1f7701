"""The picture of a budget's curves, from files."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

from distill.records import Result

SCRIPT = Path(__file__).parent.parent / "scripts" / "budget_curves.py"


def point(queries: int, agreement: float) -> dict[str, Any]:
    return {"cost/queries": queries, "fidelity/agreement": agreement, "student/accuracy": agreement / 2}


def leave(folder: Path, attack: str, seed: int, last: float, billed: int = 100, own: float | None = None) -> None:
    target = f"distill.attacks.{attack}.Any"
    result = Result(
        *(f"{attack}{seed}", "q", {"attack": attack, "data": "digits", "defense": "none"}),
        config={"attack": {"_target_": target}, "budget": {"queries": 100}},
        seed=seed,
        profile="probs",
        fingerprints={},
        cost={"queries": billed},
        curve=[point(50, last / 2)],
        tracks={
            "A": point(100, last),
            "B": {"own": False, **point(100, last)} if own is None else {"own": True, "curve": [point(100, own)]},
        },
        test_rows=360,
    )
    (folder / f"{attack}{seed}").mkdir(parents=True)
    (folder / f"{attack}{seed}" / "result.json").write_text(result.to_json())


def drawn(tmp_path: Path, *options: str) -> dict[tuple[str, int], dict[str, str]]:
    picture = tmp_path / "curves.svg"
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "outputs"), str(picture), *options], check=True)
    assert "knockoff_random" not in picture.read_text()[:200]
    assert picture.read_text().count("<svg") == 1
    with (tmp_path / "curves.csv").open() as file:
        return {(row["attack"], int(row["queries"])): row for row in csv.DictReader(file)}


def test_a_line_is_the_mean_over_seeds(tmp_path: Path) -> None:
    for seed, last in ((0, 0.5), (1, 0.75)):
        leave(tmp_path / "outputs", "knockoff_random", seed, last, own=0.25)
    leave(tmp_path / "outputs", "ground_truth_labels", 0, 0.5, billed=0)
    rows = drawn(tmp_path)
    assert {(key, row["seeds"]) for key, row in rows.items()} == {
        (("knockoff_random", 50), "0 1"),
        (("knockoff_random", 100), "0 1"),
        (("ground_truth_labels", 50), "0"),
        (("ground_truth_labels", 100), "0"),
    }
    assert float(rows["knockoff_random", 100]["fidelity/agreement"]) == 0.625
    assert abs(float(rows["knockoff_random", 100]["fidelity/agreement sd"]) - 0.125 * 2**0.5) < 1e-9
    assert rows["ground_truth_labels", 100]["student/accuracy sd"] == "", "one seed has no spread"
    own = drawn(tmp_path, "--track", "B")
    assert float(own["knockoff_random", 100]["fidelity/agreement"]) == 0.25
    assert float(own["ground_truth_labels", 50]["fidelity/agreement"]) == 0.25, "it has no student of its own"
