"""The notebooks run from top to bottom, leave nothing behind, and show what they were committed with."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# What a reader has to find in the outputs.
SHOWN = {
    "quickstart": ("agreement", "gaussian_noise", "posterior"),
    "read_results": ("p_holm", "top-1", "largest", "posterior"),
    "write_a_defense": ("keeps_argmax", "decoy 1", "p_holm", "largest"),
    "write_an_attack": ("true labels of border", "p_holm"),
}


def kinds(notebook: Any) -> list[list[Any]]:
    """Of what kind each cell's outputs are, and how large a table is."""
    found = []
    for cell in notebook.cells:
        outputs = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
        found.append([(out.output_type, *sorted(out.get("data", {})), *size(out)) for out in outputs])
    return found


def size(out: Any) -> list[str]:
    """Which columns a table has, and how many rows."""
    html = out.get("data", {}).get("text/html", "")
    return [*re.findall(r"<th>(.*?)</th>", html.partition("</thead>")[0]), str(html.count("<tr>"))]


def text(notebook: Any) -> str:
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "\n".join(out.get("text") or out.data.get("text/plain", "") for out in outputs)


def test_all_are_known() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    notebook = copy.deepcopy(committed)
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    how = {"timeout": 240, "kernel_name": "python3", "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(here)}}, **how).execute()

    assert kinds(notebook) == kinds(committed), "run it again and commit its outputs"
    for word in SHOWN[name]:
        assert word in text(notebook)
    assert not [*here.iterdir()], "what it makes lies in a temporary folder"


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_committed_is_one_run_from_top_to_bottom(name: str) -> None:
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert not [cell.metadata for cell in notebook.cells if cell.metadata]
    outputs = [out for cell in code for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|Users|var)/", str(outputs)), "a path of some machine"
    assert path.stat().st_size < 60_000, "the outputs that are committed stay small"
