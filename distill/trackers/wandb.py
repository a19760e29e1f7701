from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.errors import DistillError
from distill.records import Result
from distill.trackers.rows import cells, flat, renamed

WHOLE = "whole"  # in the folder of a run that its result was added to


class WandB:
    """Weights & Biases: one run a run, with the same id; offline where no key is found, and never a prompt.

    Under a sweep's agent (`scripts/sweep.yaml`) project, entity and id are the agent's.

    Args:
        project: W&B project.
        entity: W&B entity, or None for the default one.
        mode: "auto" (online with a key, else offline), "online", "offline" or "disabled".
        job_type: What the run is filed under.
        init_timeout_s: How long an online start may take before the run goes on without W&B.
        machine: Note the load and the state of this machine too, which of a run that is sent later are not the run's.
    """

    def __init__(
        self,
        project: str = "distill",
        entity: str | None = None,
        mode: str = "auto",
        job_type: str = "train",
        init_timeout_s: float = 60,
        machine: bool = True,
    ) -> None:
        if mode not in ("auto", "online", "offline", "disabled"):
            raise DistillError(f"auto, online, offline or disabled, not '{mode}'", "tracker.mode")
        self.project, self.entity, self.mode, self.job_type = project, entity, mode, job_type
        self.init_timeout_s, self.machine = init_timeout_s, machine
        self.where = ""
        self._run: Any = None
        self._dir, self._kept = Path(), False

    def start(self, run_dir: Path, run_id: str, group: str, config: Mapping[str, Any]) -> None:
        name = f"{config['attack']}-vs-{config['defense']}/s{config['seed']}"
        self._open(run_dir, run_id, group, self.job_type, name, config)
        self._run.define_metric("fidelity/*", step_metric="cost/queries")

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(renamed(row))

    def finish(self, result: Result | None) -> None:
        import wandb

        if result is not None:
            self._run.summary.update(flat(result))
            samples = self._dir / "samples.jsonl"
            if samples.exists():
                rows = [json.loads(line) for line in samples.read_text().splitlines()]
                columns = list(rows[0])
                table = wandb.Table(columns=columns, data=[[_cell(row[c]) for c in columns] for row in rows])
                self._run.log({"samples": table})
            transfer_set = self._dir / "transfer_set"
            if transfer_set.exists():
                artifact = wandb.Artifact(f"transfer-set-{result.query_id}", type="transfer-set")
                artifact.add_reference(f"file://{transfer_set.resolve()}")
                self._run.log_artifact(artifact)
            self._run.config.update({"environment": asdict(result)["environment"]}, allow_val_change=True)
        self._run.finish(exit_code=0 if result is not None else 1)
        if result is not None and self._kept:
            Path(self._run.dir).with_name(WHOLE).touch()

    def held(self, folders: Mapping[str, Path]) -> set[str]:
        """Online what the project has, offline what waits in `folders` to be uploaded."""
        if self._mode() != "online":
            return {run_id for run_id, folder in folders.items() if any(folder.glob(f"wandb/*-{run_id}/{WHOLE}"))}
        import wandb

        project = f"{self.entity}/{self.project}" if self.entity else self.project
        try:
            return {run.id for run in wandb.Api().runs(project, per_page=1000) if run.state == "finished"}
        except ValueError:  # there is no such project yet
            return set()

    def summarise(
        self, folder: Path, name: str, config: Mapping[str, Any], tables: Mapping[str, Any], images: Mapping[str, Any]
    ) -> None:
        import wandb

        run_id = f"summary-{name}"
        for earlier in folder.glob(f"wandb/offline-run-*-{run_id}"):
            shutil.rmtree(earlier)
        self._open(folder, run_id, name, "summary", f"{name}: summary", config)
        row: dict[str, Any] = {}
        for title, table in tables.items():
            row[title] = wandb.Table(columns=list(table.columns), data=cells(table), allow_mixed_types=True)
        row |= {title: wandb.Image(image) for title, image in images.items()}
        self._run.log(row)
        self._run.finish()

    def _mode(self) -> str:
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        mode = os.environ.get("WANDB_MODE") or self.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        return mode

    def _open(self, folder: Path, run_id: str, group: str, job_type: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        mode = self._mode()
        self._dir, self._kept = folder, mode != "disabled"
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,  # type: ignore[arg-type]
            id=run_id,
            resume="allow",
            group=group,
            job_type=job_type,
            name=name,
            dir=folder,
            config=dict(config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=self.init_timeout_s,
                x_disable_stats=not self.machine,
                x_disable_meta=not self.machine,
                x_save_requirements=self.machine,
            ),
        )
        self.where = self._run.project_url if mode == "online" else "offline; scripts/wandb_sync.sh uploads them"


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
