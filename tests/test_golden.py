"""A golden trajectory: what a short training computed when it was last looked at, to the fourth digit.

It catches what no property catches: a changed default, order, initialisation or preprocessing. When such a change is
meant, DISTILL_UPDATE_SNAPSHOTS=1 writes the new numbers and the diff shows them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from test_contracts import an_experiment

from distill.config import CONFIG_DIR, build
from distill.query import query

GOLDEN = Path(__file__).parent / "snapshots" / "golden.json"


def test_a_short_experiment_takes_the_path_it_took(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = build(yaml.safe_load((CONFIG_DIR / "training" / "small.yaml").read_text()), "training")
    assert recipe.batch_size == 32
    words = ["teacher.recipe.epochs=2", "training.epochs=4", "training.validation_share=0.2"]
    experiment = an_experiment(tmp_path, "defense=gaussian_noise", *words)
    transfer_set, _ = query(experiment)
    student = experiment.students.fit(transfer_set, experiment.pool)
    now = {
        "rows": transfer_set.rows[:8].tolist(),
        "answer": transfer_set.posteriors[0].tolist(),
        "curve": student.history["curve"],
        "logits": student.predict(experiment.data.test.inputs[:2]).tolist(),
    }
    if os.environ.get("DISTILL_UPDATE_SNAPSHOTS") == "1":
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
    then = json.loads(GOLDEN.read_text())
    assert now["rows"] == then["rows"]
    assert now["answer"] == pytest.approx(then["answer"], abs=1e-4)
    for ours, theirs in zip(now["curve"], then["curve"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for ours, theirs in zip(now["logits"], then["logits"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
