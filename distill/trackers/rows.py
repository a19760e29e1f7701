"""The names that a tracker shows, with one spelling everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.records import Result


def renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `metrics.jsonl` with its stage in front: ``{"stage": "student", "loss": 1}`` → ``{"student/loss": 1}``.

    Names that already have a section, such as ``fidelity/kl``, stay as they are.
    """
    stage = row.get("stage", "run")
    return {
        name if "/" in name else f"{stage}/{name}": value
        for name, value in row.items()
        if name != "stage" and isinstance(value, (int, float))
    }


def flat(result: Result) -> dict[str, float]:
    """The headline numbers: ``accuracy/student``, ``fidelity/agreement``, ``utility/l1_mean``, ``cost/queries`` …"""
    numbers = {f"accuracy/{who}": row["accuracy"] for who, row in result.accuracy.items() if "accuracy" in row}
    numbers |= {f"calibration/{who}_{name}": v for who, row in result.calibration.items() for name, v in row.items()}
    for section, row in (("fidelity", result.fidelity), ("utility", result.utility), ("cost", result.cost)):
        numbers |= {f"{section}/{name}": value for name, value in row.items()}
    return numbers


def cells(frame: Any) -> list[list[Any]]:
    """The rows of a ``pandas.DataFrame`` as plain values: None where there is none, a list as text."""
    rows = frame.astype(object).where(frame.notna(), None).to_numpy().tolist()
    return [[", ".join(map(str, value)) if isinstance(value, list) else value for value in row] for row in rows]
