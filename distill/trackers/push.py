"""Finished runs sent to a dashboard later, from their files, and one run more for what they are together."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distill.config import CONFIG_DIR, build
from distill.contracts import Dashboard
from distill.errors import DistillError, nearest
from distill.results import Comparison
from distill.tracking import group, scalars

SUMMARY = "summary"


@dataclass
class Pushed:
    """What was sent, by run id, what was there before, and what was not sent, with the reason."""

    where: str = ""
    made: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        said = f"{len(self.made):,} runs sent, {len(self.there):,} were there"
        said += f"; {self.where}" if self.where else ""
        reasons: dict[str, list[str]] = {}
        for run, reason in self.failed.items():
            reasons.setdefault(reason, []).append(run)
        for reason, runs in reasons.items():
            named = ", ".join(runs[:5]) + (f" and {len(runs) - 5:,} more" if len(runs) > 5 else "")
            said += f"\nnot sent: {named} ({reason})"
        return said


def push(comparison: Comparison, tracker: str = "wandb", project: str = "distill") -> Pushed:
    """Send each run that the dashboard has not, then the summary: the tables and figures of a report, and all numbers.

    Args:
        comparison: Finished runs. One that was published without its folder has no curves.
        tracker: An option of the config group, such as wandb.
        project: Where the runs go. What W&B has to upload later lies in each run's folder, that of the summary and of
            published runs under ``outputs/benchmarks``.

    Returns:
        What became of each. Where one can't be sent, the others are all the same.

    Raises:
        DistillError: There is no such tracker, or it shows no comparisons.
    """
    beside = Path("outputs", "benchmarks", re.sub(r"[^\w.-]+", "-", comparison.name))
    frame = comparison.frame.drop_duplicates("run")
    folders = {
        run: Path(place) if Path(place).is_dir() else beside
        for run, place in zip(frame["run"], frame["folder"], strict=True)
    }
    job_type = "benchmark" if comparison.benchmark else "train"
    view, pushed = _dashboard(tracker, project=project), Pushed()
    try:
        held = view.held(folders)
    except Exception as error:
        pushed.failed = dict.fromkeys([*folders, SUMMARY], _reason(error))
        return pushed
    pushed.there = [run for run in folders if run in held]
    for row in _shown([row for row in frame.to_dict("records") if row["run"] not in held]):
        view = _dashboard(tracker, project=project, job_type=job_type, machine=False)
        try:
            _send(view, comparison, row, folders[row["run"]])
            pushed.made.append(row["run"])
        except Exception as error:  # whatever becomes of one, the others can be sent
            pushed.failed[row["run"]] = _reason(error)
            with contextlib.suppress(Exception):
                view.finish(None)
    try:
        _summarise(view := _dashboard(tracker, project=project, machine=False), comparison, beside)
    except Exception as error:
        pushed.failed[SUMMARY] = _reason(error)
    pushed.where = view.where
    return pushed


def _dashboard(name: str, **options: Any) -> Dashboard:
    """A tracker by its option's name, with those of these options that it has."""
    known = {path.stem: path for path in (CONFIG_DIR / "tracker").glob("*.yaml")}
    if name not in known:
        raise DistillError(f"no option '{name}'.{nearest(name, known)}", "tracker")
    node = OmegaConf.to_container(OmegaConf.load(known[name]))
    assert isinstance(node, dict)
    view = build(node | {option: value for option, value in options.items() if option in node}, "tracker")
    if not isinstance(view, Dashboard):
        raise DistillError(f"'{name}' shows no comparisons; wandb and trackio do", "tracker")
    return view


def _send(view: Dashboard, comparison: Comparison, row: Mapping[Any, Any], folder: Path) -> None:
    """One run, as it would have been shown while it was made, and where it lies in the comparison."""
    result = comparison.results[row["folder"]]
    folder.mkdir(parents=True, exist_ok=True)
    of = comparison.name if comparison.benchmark else group(result.choices)
    place = {f"axis/{axis}": row[axis] for axis in comparison.axes} | {"control": row["control"]}
    view.start(folder, row["run"], of, scalars(result.config, result.choices) | place | {"config": result.config})
    metrics = Path(row["folder"], "metrics.jsonl")
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            view.log(json.loads(line))
    view.finish(result)


def _summarise(view: Dashboard, comparison: Comparison, folder: Path) -> None:
    import pandas as pd

    from distill import tables
    from distill.figures import drawn

    shown = tables.judged(comparison) if comparison.benchmark else [tables.runs(comparison)]
    frames = {f"table/{one.title or 'runs'}": pd.DataFrame(one.rows, columns=one.columns) for one in shown}
    frames["runs"] = comparison.frame.drop(columns="folder")
    images = {f"figure/{one.name}": _image(one.figure) for one in drawn(comparison)}
    config = {"title": comparison.title, "runs": len(comparison.frame), "missing": len(comparison.missing)}
    axes = {f"axis/{axis}": ", ".join(values) for axis, values in comparison.axes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    view.summarise(folder, folder.name, config | axes | comparison.made, frames, images)


def _image(figure: Any) -> Any:
    from PIL import Image

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150, bbox_inches="tight")
    return Image.open(png)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _shown(rows: list[dict[Any, Any]]) -> Any:
    from tqdm.auto import tqdm

    return tqdm(rows, unit="run", mininterval=0.5 if sys.stderr.isatty() else 60, disable=not rows)
