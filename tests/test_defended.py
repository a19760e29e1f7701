"""An experiment under a defense: what each side knows, what a defense remembers, and what honest users lose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import distill
from test_contracts import an_experiment
from toys import ToyTeacher, a_pool, a_provider, collect, tables

from distill.contracts import Defense, Knowledge, Lesson, NetworkDefense, StatefulDefense
from distill.errors import DistillError
from distill.metrics.ood_auroc import OODAUROC
from distill.query import query
from distill.randomness import KeyedRandom
from distill.records import Answers, Dataset, InputSpec, InterfaceProfile, Reveals, TransferSet, one_hot, softmax


class Counting:
    """Moves answer number i by i ten-thousandths of the mass: it depends on all that was answered before."""

    exposes = InterfaceProfile(Reveals.PROBS)
    keeps_argmax = deterministic = False
    l1_budget: float | None = None

    def __init__(self) -> None:
        self.answered = 0

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        share = (self.answered + np.arange(len(answers), dtype=np.float32)[:, None]) * np.float32(1e-4)
        self.answered += len(answers)
        return Answers(answers.posteriors * (1 - share) + share / answers.classes)

    def state(self) -> dict[str, np.ndarray]:
        return {"answered": np.array(self.answered)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.answered = int(state["answered"])


# --- a defense that remembers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 13, 25])
def test_a_defense_that_remembers_goes_on_after_an_interruption(tmp_path: Path, stop: int) -> None:
    assert isinstance(Counting(), StatefulDefense)
    pool, rows = a_pool(40), np.random.default_rng(0).integers(0, 40, size=40)
    whole = collect(a_provider(tmp_path / "whole", defense=Counting()), pool, rows, 40)
    collect(a_provider(tmp_path, defense=Counting()), pool, rows[:stop], 5)
    defense = Counting()
    again = collect(a_provider(tmp_path, defense=defense), pool, rows, 7)
    np.testing.assert_array_equal(again.posteriors, whole.posteriors)
    assert defense.answered == 40


def test_measuring_leaves_what_a_defense_remembers_as_it_was(tmp_path: Path) -> None:
    defense = Counting()
    provider = a_provider(tmp_path, defense=defense)
    collect(provider, a_pool(20), np.arange(20), 20)
    first, second = (provider.returned(tables(10, seed=3)).posteriors for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert provider.defense_latency_s(tables(1)) > 0
    assert defense.answered == 20
    assert not np.array_equal(first, a_provider(tmp_path / "x", defense=Counting()).returned(tables(10, 3)).posteriors)


def test_what_a_defense_remembers_is_saved_with_the_run(tmp_path: Path) -> None:
    words = ("+experiment=quickstart", "defense=modelguard_s", "budget.queries=100", "training.epochs=2", "curve=[]")
    distill("train", *words, cwd=tmp_path)
    (path,) = (tmp_path / "outputs").glob("*/*/result.json")
    before = json.loads(path.read_text())
    assert before["utility"]["l1_max"] > 0
    (state,) = (tmp_path / "outputs").glob("*/queries-*/defense_state.npz")
    assert path.parent.parent == state.parent.parent
    distill("evaluate", str(path.parent), cwd=tmp_path)
    after = json.loads(path.read_text())
    assert {**before["utility"], "latency_s": 0} == {**after["utility"], "latency_s": 0}
    state.write_bytes(state.read_bytes()[:40])
    said = distill("train", *words, "training.epochs=1", cwd=tmp_path).stderr
    assert "defense_state.npz is damaged" in said
    assert "made again from provider_log" in said
    with np.load(state) as whole:
        assert whole.files


# --- what an attacker knows -----------------------------------------------------------------------------------------


class Asking:
    """A recovery that keeps what it is told."""

    def __init__(self, knows: str) -> None:
        self.knows = knows
        self.told: list[Knowledge] = []

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        self.told.append(knowledge)
        return replace(transfer_set, targets=transfer_set.posteriors)


def told(experiment: Any, transfer_set: TransferSet, knows: str) -> Knowledge:
    recovery = Asking(knows)
    students = replace(experiment.students, recovery=recovery)
    if knows == "the clean answers":
        students.oracle = lambda inputs: (experiment.provider.clean(inputs).posteriors, experiment.defense)
    students.fit(transfer_set, experiment.pool)
    (knowledge,) = recovery.told
    return knowledge


def test_a_recovery_is_told_what_it_must_know_and_no_more(tmp_path: Path) -> None:
    experiment = an_experiment(tmp_path, "defense=mad", "student@defense.architecture=mlp")
    transfer_set, _ = query(experiment)
    inputs = transfer_set.inputs(experiment.pool)
    nothing = told(experiment, transfer_set, "nothing")
    assert nothing.pool is experiment.pool
    assert (nothing.defense, nothing.defense_name, nothing.clean) == (None, None, None)
    name = told(experiment, transfer_set, "the defense's name")
    assert (name.defense, name.defense_name, name.clean) == (None, "mad", None)
    code = told(experiment, transfer_set, "the defense's code")
    assert type(code.defense) is type(experiment.defense)
    assert code.clean is None
    assert isinstance(code.defense, NetworkDefense)
    assert isinstance(experiment.defense, NetworkDefense)
    assert code.defense.fingerprint != experiment.defense.fingerprint, "networks of its own, from a seed of its own"
    own, theirs = code.defense.query_info(inputs[:5]), experiment.defense.query_info(inputs[:5])
    assert own is not None
    assert not np.array_equal(own, theirs)
    oracle = told(experiment, transfer_set, "the clean answers")
    assert oracle.defense is experiment.defense
    np.testing.assert_array_equal(oracle.clean, experiment.provider.clean(inputs).posteriors)


def test_shadow_students_learn_given_targets_as_they_are(tmp_path: Path) -> None:
    experiment = an_experiment(tmp_path, "recovery=top1", "training.epochs=30")
    transfer_set, _ = query(experiment)
    knowledge = told(experiment, transfer_set, "nothing")
    always_3 = one_hot(np.full(len(transfer_set), 3), 10)
    shadow = knowledge.student.fit(replace(transfer_set, targets=always_3), experiment.pool)
    assert (shadow.predict(experiment.pool.inputs[:50]).argmax(axis=1) == 3).all()


class WithTwoMore:
    """A recovery that trains two outputs besides, towards nothing."""

    knows = "nothing"
    extra_outputs = 2

    def __init__(self) -> None:
        self.widths: set[int] = set()

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        return replace(transfer_set, targets=transfer_set.posteriors)

    def check(self, spec: InputSpec, defense: Defense) -> None:
        pass

    def lesson(self, transfer_set: TransferSet, objective: Any, knowledge: Knowledge) -> Lesson:
        outer = self

        class Both:
            def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
                outer.widths.add(output.shape[1])
                return objective.loss(output[:, :10], targets) + (output[:, 10:] ** 2).sum()

            def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
                return objective.positions(targets)

        return Lesson(transfer_set.inputs(knowledge.pool), objective.prepare(transfer_set), Both())


def test_outputs_that_help_to_train_are_cut_off_later(tmp_path: Path) -> None:
    experiment = an_experiment(tmp_path)
    transfer_set, _ = query(experiment)
    experiment.students.recovery = recovery = WithTwoMore()
    student = experiment.students.fit(transfer_set, experiment.pool)
    assert recovery.widths == {12}
    logits = student.predict(experiment.data.test.inputs)
    assert logits.shape == (360, 10)
    experiment.students.save(student, tmp_path / "student")
    loaded = experiment.students.load(tmp_path / "student")
    assert loaded is not None
    np.testing.assert_array_equal(loaded.predict(experiment.data.test.inputs), logits)


def test_defenses_and_recoveries_share_one_pass_of_the_teacher(tmp_path: Path) -> None:
    """Of all cells of a grid together, the teacher computes each query and each test row once."""
    forwards = []
    for defense in ("none", "rounding", "reverse_sigmoid", "modelguard_s"):
        for recovery in ("as_returned", "top1"):
            cell = tmp_path / f"{defense}-{recovery}"
            words = (f"defense={defense}", f"recovery={recovery}", "teacher.seed=77", "teacher.recipe.epochs=2")
            experiment = an_experiment(cell, *words)
            transfer_set, _ = query(experiment)
            experiment.students.fit(transfer_set, experiment.pool)
            experiment.provider.clean(experiment.data.test.inputs)
            experiment.provider.returned(experiment.data.test.inputs)
            forwards.append(experiment.provider.cost().teacher_forwards)
    assert forwards == [60 + 360, *[0] * 7]


def test_a_recovery_that_can_not_work_is_refused_before_a_query(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="draws new noise for each answer; use recovery=average"):
        an_experiment(tmp_path, "recovery=defense_in_loop", "defense=gaussian_noise")


# --- a defense of training ------------------------------------------------------------------------------------------


class Retraining:
    """Answers come from a teacher of other weights."""

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax, deterministic = False, True
    l1_budget: float | None = None
    fingerprint = ""

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return answers

    def prepare(self, teacher: Any, data: Dataset, trainer: Any, cache: Path, seed: int) -> Any:
        other = ToyTeacher()
        other.weights, other.fingerprint = -other.weights, "the other"
        return other


def test_the_evaluation_compares_with_the_undefended_teacher(tmp_path: Path) -> None:
    teacher, defense = ToyTeacher(), Retraining()
    serving = defense.prepare(teacher, None, None, tmp_path, 0)
    provider = a_provider(tmp_path, serving, defense, undefended=teacher)
    clean, returned = provider.clean(tables(30)).posteriors, provider.returned(tables(30)).posteriors
    np.testing.assert_array_equal(clean, softmax(teacher.predict(tables(30))))
    np.testing.assert_array_equal(returned, softmax(serving.predict(tables(30))))
    answered = collect(provider, a_pool(30), np.arange(30), 10)
    np.testing.assert_array_equal(answered.posteriors, softmax(serving.predict(tables(30))))


def test_honest_users_see_all_that_a_defense_costs(tmp_path: Path) -> None:
    words = ("+experiment=quickstart", "defense=reverse_sigmoid", "budget.queries=60", "training.epochs=2", "curve=[]")
    said = distill("train", *words, "pool@outliers=noise", cwd=tmp_path).stdout
    assert "honest users get: accuracy lost " in said
    assert ", OOD AUROC 0." in said
    (path,) = (tmp_path / "outputs").glob("*/*/result.json")
    result = json.loads(path.read_text())
    utility = result["utility"]
    assert {"accuracy", "accuracy_lost", "l1_mean", "l1_max", "kl", "ece", "nll", "ood_auroc", "latency_s"} <= set(
        utility
    )
    assert 0 < utility["l1_mean"] <= utility["l1_max"] <= 2
    assert utility["ood_auroc"] == result["calibration"]["defended_teacher"]["ood_auroc"]
    assert result["calibration"]["teacher"]["ood_auroc"] > 0.5, "noise is not answered with the confidence of a digit"
    assert "outliers" in result["fingerprints"]


def test_the_area_under_the_curve_by_hand() -> None:
    inside = np.array([[0.9, 0.1], [0.6, 0.4]], np.float32)
    outside = np.array([[0.5, 0.5], [0.3, 0.7]], np.float32)
    # Of the four pairs, (0.9, 0.5), (0.9, 0.7) and (0.6, 0.5) are in order.
    assert OODAUROC().measure(inside, outside) == {"ood_auroc": 0.75}
    assert OODAUROC().measure(inside, inside) == {"ood_auroc": 0.5}


def test_texts_have_no_outliers_to_be_measured_on(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="noise makes pictures and tables"):
        an_experiment(tmp_path, "data=reuters_r8", "student=text_encoder", "pool@outliers=noise")
