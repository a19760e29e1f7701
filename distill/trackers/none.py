from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.records import Result


class NoTracker:
    """The files of the run folder and nothing else."""

    def start(self, run_dir: Path, run_id: str, group: str, config: Mapping[str, Any]) -> None: ...

    def log(self, row: Mapping[str, Any]) -> None: ...

    def finish(self, result: Result | None) -> None: ...
