from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.errors import DistillError
from distill.records import Result
from distill.trackers.rows import flat, renamed


class WandB:
    """Weights & Biases: one run a run, with the same id; offline where no key is found, and never a prompt.

    Args:
        project: W&B project.
        entity: W&B entity, or None for the default one.
        mode: "auto" (online with a key, else offline), "online", "offline" or "disabled".
        job_type: What the run is filed under.
        init_timeout_s: How long an online start may take before the run goes on without W&B.
    """

    def __init__(
        self,
        project: str = "distill",
        entity: str | None = None,
        mode: str = "auto",
        job_type: str = "train",
        init_timeout_s: float = 60,
    ) -> None:
        if mode not in ("auto", "online", "offline", "disabled"):
            raise DistillError(f"auto, online, offline or disabled, not '{mode}'", "tracker.mode")
        self.project, self.entity, self.mode, self.job_type = project, entity, mode, job_type
        self.init_timeout_s = init_timeout_s
        self._run: Any = None
        self._dir = Path()

    def start(self, run_dir: Path, run_id: str, group: str, config: Mapping[str, Any]) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or self.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        self._dir = run_dir
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,  # type: ignore[arg-type]
            id=run_id,
            resume="allow",
            group=group,
            job_type=self.job_type,
            name=f"{config['attack']}-vs-{config['defense']}/s{config['seed']}",
            dir=run_dir,
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", init_timeout=self.init_timeout_s),
        )
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


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
