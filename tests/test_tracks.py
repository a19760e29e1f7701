"""Track A and track B, from an attack to `result.json`; and what identifies the queries of an attack that adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from test_contracts import an_experiment

from distill.attacks.knockoff_random import KnockoffRandom
from distill.config import CONFIG_DIR, query_id
from distill.contracts import Apprentice, Oracle
from distill.errors import DamagedTransferSet
from distill.evaluate import measure
from distill.experiment import Experiment
from distill.query import query
from distill.records import Examples, TransferSet


class SelfMade(KnockoffRandom):
    """Hands in a student of its own before and after it changed its weights."""

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        asked = super().extract(oracle, pool, student, seed)
        own = student.fresh()
        student.show(own, len(asked) // 2)
        with torch.no_grad():
            for parameter in own.module.parameters():
                parameter.zero_()
        student.show(own, len(asked))
        return asked


def measurable(queries: Path) -> Experiment:
    """An experiment whose configuration resolves without Hydra."""
    experiment = an_experiment(queries, "name=tracks")
    with open_dict(experiment.config):
        del experiment.config["hydra"]
    return experiment


def test_both_tracks_are_in_the_result(tmp_path: Path) -> None:
    experiment = measurable(tmp_path / "queries")
    experiment.attack = SelfMade()
    transfer_set, cost = query(experiment)
    student = experiment.fit(transfer_set, "student", tmp_path / "training")
    result = measure(experiment, student, transfer_set, cost, tmp_path)
    assert result.tracks["A"]["student/accuracy"] == result.accuracy["student"]["accuracy"]
    assert result.tracks["A"]["fidelity/kl"] == result.fidelity["kl"]
    own = result.tracks["B"]
    assert own["own"]
    assert [point["cost/queries"] for point in own["curve"]] == [30, 60]
    # Weights of nothing are as sure of each class; the student that was handed in before stays what it was.
    test = experiment.data.test
    untrained = experiment.students.untrained().predict(test.inputs)
    assert own["curve"][0]["student/accuracy"] == pytest.approx(
        (untrained.argmax(1) == experiment.data.test_labels).mean()
    )
    assert own["fidelity/agreement"] == pytest.approx(
        (experiment.provider.clean(test.inputs).labels == 0).mean(), abs=1e-6
    )
    assert result.cost["evaluation_seconds"] > 0

    again = measurable(tmp_path / "queries")
    again.attack = SelfMade()
    answers, _ = query(again)  # from the files: nothing is asked or trained
    assert measure(again, student, answers, cost, tmp_path).tracks == result.tracks
    (tmp_path / "queries" / "own_student.npz").write_bytes(b"damaged")
    with pytest.raises(DamagedTransferSet, match="own_student"):
        again.load_answers()


def test_an_attack_without_a_student_of_its_own_has_one_track(tmp_path: Path) -> None:
    experiment = measurable(tmp_path / "queries")
    transfer_set, cost = query(experiment)
    student = experiment.fit(transfer_set, "student", tmp_path / "training")
    tracks = measure(experiment, student, transfer_set, cost, tmp_path).tracks
    assert tracks["B"] == {"own": False, **tracks["A"]}


def composed(*overrides: str) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return compose("train", overrides=["+experiment=quickstart", *overrides])


@pytest.mark.parametrize(
    ("attack", "adapts"),
    [
        (["attack=knockoff_random"], False),
        (["attack=active_thief"], True),
        (["attack=repeated_queries"], False),
        (["attack=repeated_queries", "attack@attack.attack=active_thief"], True),
    ],
)
def test_students_share_the_queries_of_an_attack_that_does_not_learn_from_them(attack: list[str], adapts: bool) -> None:
    ids = {query_id(composed(*attack, f"student={student}")) for student in ("mlp", "lenet")}
    assert len(ids) == (2 if adapts else 1)


def test_untrained_students_differ_by_number(tmp_path: Path) -> None:
    students = an_experiment(tmp_path).students
    rows = np.zeros((2, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(students.fresh().predict(rows), students.untrained().predict(rows))
    np.testing.assert_array_equal(students.fresh(1).predict(rows), students.fresh(1).predict(rows))
    assert not np.array_equal(students.fresh().predict(rows), students.fresh(1).predict(rows))
    pixels = torch.rand(3, 8, 8, 1, requires_grad=True)
    students.fresh().logits(pixels).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
