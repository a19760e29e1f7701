"""What the README says is run."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def examples() -> dict[str, str]:
    return dict(re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", README.read_text(), re.DOTALL))


def test_the_defense_of_the_readme_runs_outside_of_the_tree(tmp_path: Path) -> None:
    found = examples()
    run = found.pop("run")
    assert len(found) == 2
    for name, text in found.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = next(text for name, text in found.items() if name.endswith(".py"))
    body = [line for line in code[code.index("class") :].splitlines() if line.strip()]
    assert len(body) <= 15, "a complete defense in 15 lines"
    small = " training.epochs=3 budget.queries=100 curve=[] run.progress=false\n"
    done = subprocess.run(["bash", "-ec", run.rstrip() + small], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("outputs/knockoff_random-vs-flip/*/result.json")
    result = json.loads(path.read_text())
    assert 0 < result["utility"]["agreement"] < 1, "some labels were swapped, most were not"


@pytest.mark.parametrize(
    "flag", re.findall(r"\(\{README\}#([\w-]+)\)", (README.parent / "distill/checks.py").read_text())
)
def test_every_note_has_its_anchor(flag: str) -> None:
    assert f"\n### {flag}\n" in README.read_text()


def test_the_readme_names_every_experiment() -> None:
    text = README.read_text()
    for path in (README.parent / "configs/experiment").glob("*.yaml"):
        assert f"`{path.stem}`" in text
