"""Files are the truth, trackers are views: every row goes to `metrics.jsonl`, then to the tracker if it can take it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distill.config import QUERY_GROUPS, STUDENT_GROUPS, build, run_id
from distill.contracts import Tracker
from distill.launch import RANK
from distill.records import Result

log = logging.getLogger(__name__)


class Tracking:
    """The rows of one run. A tracker that fails is dropped with one warning; the run goes on.

    Args:
        tracker: The view.
        run_dir: Where `metrics.jsonl` lies. Rows are appended: after an interruption the steps since the last
            checkpoint stand there twice, and the last row of a step counts.
        run_id: Identity of the run; the tracker's run has the same.
        group: The experiment.
        config: Flat scalars and the resolved config.
    """

    def __init__(self, tracker: Tracker, run_dir: Path, run_id: str, group: str, config: Mapping[str, Any]) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._tracker: Tracker | None = tracker if RANK == 0 else None
        self._try(lambda t: t.start(run_dir, run_id, group, config))

    @classmethod
    def open(cls, config: Any, run_dir: Path, choices: Mapping[str, str]) -> Tracking:
        """The tracking that a run's config asks for, with the flat scalars by which trackers group."""
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        tracker = build(config.tracker, "tracker")
        return cls(tracker, run_dir, run_id(config), group(choices), scalars(plain, choices) | {"config": plain})

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row (JSON-able, flat)."""
        if RANK == 0:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self._try(lambda t: t.log(row))

    def finish(self, result: Result | None) -> None:
        """Close the view; `result` is None where the run failed."""
        self._try(lambda t: t.finish(result))
        self._tracker = None

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:  # whatever a tracker does, the experiment is worth more
            log.warning("tracker %s failed and is left out: %s", type(self._tracker).__name__, error)
            self._tracker = None


def scalars(config: Mapping[Any, Any], choices: Mapping[str, str]) -> dict[str, Any]:
    """What trackers group runs by: the option chosen of each group, budgets and seed, side by side."""
    found: dict[str, Any] = {name: choices[name] for name in QUERY_GROUPS + STUDENT_GROUPS if name in choices}
    budget = {f"budget_{name}": config["budget"].get(name) for name in ("queries", "usd", "tokens")}
    return found | budget | {"seed": config["seed"]}


def group(choices: Mapping[str, str]) -> str:
    """What a run is one of: the benchmark, or the experiment."""
    return choices.get("benchmark") or choices.get("experiment", "train")
