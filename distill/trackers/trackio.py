from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.records import Result
from distill.trackers.rows import cells, flat, renamed


class Trackio:
    """trackio: a local dashboard without an account (`trackio show`).

    Args:
        project: trackio project.
        machine: Note the load of this machine too, which of a run that is sent later is not the run's.
    """

    def __init__(self, project: str = "distill", machine: bool = True) -> None:
        self.project, self.machine = project, machine
        self.where = f"trackio show --project {project}"
        self._run: Any = None

    def start(self, run_dir: Path, run_id: str, group: str, config: Mapping[str, Any]) -> None:
        self._open(run_id, group, config)

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(renamed(row))

    def finish(self, result: Result | None) -> None:
        if result is not None:
            self._run.log(flat(result))
        self._close()

    def held(self, folders: Mapping[str, Path]) -> set[str]:
        trackio = _trackio()
        try:
            runs = list(trackio.Api().runs(self.project))
        except ValueError:  # there is no such project yet
            return set()
        logged = {run.name: trackio.SQLiteStorage.get_logs(self.project, run.name, run_id=run.id) for run in runs}
        return {name for name, rows in logged.items() if name in folders and rows and "cost/seconds" in rows[-1]}

    def summarise(
        self, folder: Path, name: str, config: Mapping[str, Any], tables: Mapping[str, Any], images: Mapping[str, Any]
    ) -> None:
        trackio, run_id = _trackio(), f"summary-{name}"
        with contextlib.suppress(ValueError):  # there is no such project yet
            for earlier in [run for run in trackio.Api().runs(self.project) if run.name == run_id]:
                earlier.delete()
        self._open(run_id, name, config)
        row: dict[str, Any] = {}
        for title, table in tables.items():
            row[title] = trackio.Table(columns=list(table.columns), data=cells(table))
        row |= {title: trackio.Image(image) for title, image in images.items()}
        self._run.log(row)
        self._close()

    def _close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            _trackio().finish()  # not the run's own, after which trackio would finish it again at exit

    def _open(self, run_id: str, group: str, config: Mapping[str, Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints to a terminal, of every run
            self._run = _trackio().init(
                project=self.project,
                name=run_id,
                group=group,
                config=flat_config(config),
                resume="allow",
                embed=False,
                auto_log_cpu=None if self.machine else False,
                auto_log_gpu=None if self.machine else False,
            )


def _trackio() -> Any:
    try:
        import trackio
    except ImportError:
        raise RuntimeError("trackio is not installed: pip install 'distill-framework[trackio]'") from None
    return trackio


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """trackio shows scalars only."""
    return {name: value for name, value in config.items() if isinstance(value, (str, int, float, bool))}
