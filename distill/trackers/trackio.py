from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.records import Result
from distill.trackers.rows import flat, renamed


class Trackio:
    """trackio: a local dashboard without an account (`trackio show`).

    Args:
        project: trackio project.
    """

    def __init__(self, project: str = "distill") -> None:
        self.project = project
        self._run: Any = None

    def start(self, run_dir: Path, run_id: str, group: str, config: Mapping[str, Any]) -> None:
        try:
            import trackio
        except ImportError:
            raise RuntimeError("trackio is not installed: pip install 'distill-framework[trackio]'") from None

        self._run = trackio.init(
            project=self.project, name=run_id, group=group, config=flat_config(config), resume="allow", embed=False
        )

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(renamed(row))

    def finish(self, result: Result | None) -> None:
        if result is not None:
            self._run.log(flat(result))
        self._run.finish()


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """trackio shows scalars only."""
    return {name: value for name, value in config.items() if isinstance(value, (str, int, float, bool))}
