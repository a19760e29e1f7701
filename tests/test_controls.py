"""The controls: the very queries of another attack, with answers that are not the teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from attack_toys import CLASSES, ToyTeacherOf, a_labelled_pool, a_toy_provider, an_apprentice, extracted
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.attacks._relabelled import Relabelled, Silent
from distill.attacks.augmented_queries import AugmentedQueries
from distill.attacks.ground_truth_labels import GroundTruthLabels
from distill.attacks.knockoff_random import KnockoffRandom
from distill.attacks.no_teacher import NoTeacher
from distill.attacks.random_labels import RandomLabels
from distill.attacks.repeated_queries import RepeatedQueries
from distill.attacks.rounds import History, PoolAttack
from distill.attacks.self_taught import SelfTaught
from distill.attacks.weaker_model_labels import WeakerModelLabels
from distill.config import CONFIG_DIR, query_id
from distill.contracts import Apprentice, Oracle
from distill.errors import BudgetExceeded, DistillError
from distill.provider.oracle import serve
from distill.records import Examples, Queries, Reveals, TransferSet, one_hot

CONTROLS: dict[str, Any] = {
    "truth": GroundTruthLabels,
    "random": RandomLabels,
    "none": NoTeacher,
    "weaker": lambda attack: WeakerModelLabels(attack, examples=8),
    "self-taught": lambda attack: SelfTaught(attack, examples=8, rounds=1),
}
POOL = a_labelled_pool("table", 60)


class Follows(PoolAttack):
    """Asks next about the rows whose number has the parity of the labels so far, and hands in a student."""

    def __init__(self) -> None:
        super().__init__(rounds=2)

    def select(
        self, pool: Examples, history: History, n: int, student: Apprentice, rng: np.random.Generator
    ) -> np.ndarray:
        heard = 0 if history.answers is None else int(history.answers.labels.sum())
        left = np.setdiff1d(np.arange(len(pool)), history.rows)
        if history.answers is not None:
            student.show(student.fit(history.transfer_set(pool), pool), len(history))
        return left[np.argsort((left + heard) % 2, kind="stable")][:n]


class Dreams:
    """Asks about inputs of its own."""

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("table",)

    def __init__(self, adapts: bool = False) -> None:
        self.adapts = adapts

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        made = np.linspace(-1, 1, oracle.affordable() * 6, dtype=np.float32).reshape(-1, 6)
        answers = oracle.ask(Queries.made(made))
        rows = np.full(len(made), -1)
        return TransferSet(rows, answers.posteriors, made, pool=pool.fingerprint, profile=str(oracle.profile))


@pytest.mark.parametrize("control", CONTROLS)
@settings(max_examples=4, deadline=None)
@given(queries=st.sampled_from([1, CLASSES, 15, 16, 17, 52]))
def test_controls_take_the_very_queries(control: str, queries: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    for inner, bill in ((KnockoffRandom(), 0), (Follows(), queries)):
        folder = tmp_path_factory.mktemp("controls")
        asked, *_ = extracted(inner, folder / "inner", "table", queries, POOL)
        attack = CONTROLS[control](inner)
        relabelled, provider, student = extracted(attack, folder / "control", "table", queries, POOL)
        np.testing.assert_array_equal(relabelled.rows, asked.rows)
        assert provider.cost().queries == bill
        assert provider.teacher.forwards == bill
        assert attack.uses_teacher is bool(bill)
        assert not student.shown, "that student heard the teacher"
        assert relabelled.logits is None
        np.testing.assert_allclose(relabelled.posteriors.sum(axis=1), 1, atol=1e-5)


def test_the_real_answers_are_thrown_away(tmp_path: Path) -> None:
    """Whoever answers, the control's answers depend on the queries alone."""
    other = ToyTeacherOf("table")
    other.weights, other.fingerprint = -other.weights[:, ::-1], "other"
    for control, make in CONTROLS.items():
        folder = tmp_path / control
        heard, *_ = extracted(make(KnockoffRandom()), folder / "a", "table", 20, POOL)
        also, *_ = extracted(make(KnockoffRandom()), folder / "b", "table", 20, POOL, teacher=other)
        np.testing.assert_array_equal(heard.posteriors, also.posteriors)
        seeded, *_ = extracted(make(KnockoffRandom()), folder / "c", "table", 20, POOL, seed=1)
        assert not np.array_equal(heard.rows, seeded.rows)


def test_ground_truth_is_the_labels_of_the_pool(tmp_path: Path) -> None:
    truth, *_ = extracted(GroundTruthLabels(Follows()), tmp_path, "table", 20, POOL)
    assert POOL.labels is not None
    np.testing.assert_array_equal(truth.posteriors, one_hot(POOL.labels[truth.rows], CLASSES))


@pytest.mark.parametrize("inner", [Dreams(), Dreams(adapts=True), AugmentedQueries(KnockoffRandom())])
def test_made_inputs_have_no_true_label(inner: Any, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="a made one has no true label"):
        extracted(GroundTruthLabels(inner), tmp_path, "table", 20, POOL)
    assert not (tmp_path / "provider_log").exists(), "it is told before the first of them is asked"
    for control in ("random", "none", "weaker", "self-taught"):
        relabelled, provider, _ = extracted(CONTROLS[control](inner), tmp_path / control, "table", 18, POOL)
        assert len(relabelled.inputs(POOL)) == len(relabelled) == 18
        assert provider.cost().queries == (18 if inner.adapts else 0)


@pytest.mark.parametrize("control", ["truth", "weaker", "self-taught"])
def test_a_pool_without_the_teachers_labels_is_refused(control: str, tmp_path: Path) -> None:
    for pool in (Examples(POOL.inputs, POOL.spec), Examples(POOL.inputs, POOL.spec, POOL.labels, tuple("wxyz"))):
        with pytest.raises(DistillError, match="labelled with the teacher's classes"):
            extracted(CONTROLS[control](Follows()), tmp_path, "table", 5, pool)
    assert not (tmp_path / "provider_log").exists()


def test_random_labels_are_at_chance_and_an_inputs_own(tmp_path: Path) -> None:
    pool = a_labelled_pool("table", 4000)
    labels = extracted(RandomLabels(KnockoffRandom()), tmp_path, "table", 4000, pool)[0]
    drawn, rows = labels.posteriors.argmax(axis=1), labels.rows
    assert pool.labels is not None
    assert abs((drawn == pool.labels[rows]).mean() - 1 / CLASSES) < 0.04, "six standard deviations"
    assert (np.abs(np.bincount(drawn) / 4000 - 1 / CLASSES) < 0.04).all()
    fewer = extracted(RandomLabels(KnockoffRandom()), tmp_path / "fewer", "table", 50, pool)[0]
    np.testing.assert_array_equal(fewer.posteriors, labels.posteriors[:50])
    repeated = extracted(RandomLabels(RepeatedQueries(KnockoffRandom(), times=3)), tmp_path / "3", "table", 30, pool)[0]
    groups = repeated.posteriors.reshape(10, 3, CLASSES)
    assert (groups == groups[:, :1]).all()
    assert repeated.groups is not None


class Watches:
    """An apprentice that notes what it is trained on."""

    def __init__(self) -> None:
        self.real, self.trained_on = an_apprentice("table", epochs=60), []
        self.class_names = self.real.class_names

    def fit(self, transfer_set: TransferSet, pool: Examples) -> Any:
        self.trained_on.append(transfer_set)
        return self.real.fit(transfer_set, pool)


def watched(attack: Any, folder: Path, queries: int, pool: Examples) -> tuple[TransferSet, list[TransferSet]]:
    student: Any = Watches()
    with serve(a_toy_provider(folder, "table", queries)) as oracle:
        return attack.extract(oracle, pool, student, 0), student.trained_on


@pytest.mark.parametrize("inner", [KnockoffRandom, Follows])
def test_the_weaker_model_knows_rows_that_nobody_asks_about(inner: Any, tmp_path: Path) -> None:
    attack, pool = WeakerModelLabels(inner(), examples=20), a_labelled_pool("table", 300)
    asked, trained_on = watched(attack, tmp_path, 200, pool)
    own = trained_on[-1]
    assert len(own) == 20
    assert not set(own.rows) & set(asked.rows)
    assert pool.labels is not None
    np.testing.assert_array_equal(own.targets, one_hot(pool.labels[own.rows], CLASSES))
    right = (asked.posteriors.argmax(axis=1) == pool.labels[asked.rows]).mean()
    assert 0.4 < right < 0.99, "better than chance and worse than the truth"


def test_a_self_taught_student_learns_from_what_it_is_sure_of(tmp_path: Path) -> None:
    attack, pool = SelfTaught(KnockoffRandom(), examples=20, rounds=2, threshold=0.7), a_labelled_pool("table", 300)
    asked, (own, first, second) = watched(attack, tmp_path, 200, pool)
    weaker, _ = watched(WeakerModelLabels(KnockoffRandom(), examples=20), tmp_path / "weaker", 200, pool)
    sure = weaker.posteriors.max(axis=1) >= 0.7
    np.testing.assert_array_equal(first.rows, np.concatenate([own.rows, asked.rows[sure]]))
    assert first.targets is not None
    assert first.targets[:20].tolist() == own.posteriors.tolist()
    np.testing.assert_array_equal(first.targets[20:].argmax(axis=1), weaker.posteriors[sure].argmax(axis=1))
    assert len(second) > 20


def test_too_few_unasked_rows_are_told_before_anything_is_asked(tmp_path: Path) -> None:
    for inner in (KnockoffRandom(), Follows()):
        with pytest.raises(DistillError, match=r"leaves 7 of 60 pool rows .* learns from 8 .*examples") as refused:
            extracted(CONTROLS["weaker"](inner), tmp_path, "table", 53, POOL)
        assert refused.value.key == "budget"
    assert not (tmp_path / "provider_log").exists()


def test_options_out_of_range_are_refused() -> None:
    for make, words in (
        (lambda: GroundTruthLabels("copycat"), r"attack@attack\.attack=copycat"),  # type: ignore[arg-type]
        (lambda: RandomLabels(GroundTruthLabels(Follows())), "GroundTruthLabels is a control itself"),
        (lambda: RepeatedQueries(RandomLabels(Follows())), "RandomLabels is a control"),
        (lambda: WeakerModelLabels(Follows(), examples=0), "^examples is at least 1"),
        (lambda: SelfTaught(Follows(), rounds=0), "^rounds is at least 1"),
        (lambda: SelfTaught(Follows(), threshold=1.5), "^threshold is more than 0"),
    ):
        with pytest.raises(DistillError, match=words):
            make()


def test_an_instance_is_as_demanding_as_the_attack_inside() -> None:
    inner: Any = Dreams(adapts=True)
    inner.requires = Reveals.PROBS
    control = RandomLabels(inner)
    assert (control.requires, control.adapts, control.uses_teacher) == (Reveals.PROBS, True, True)
    assert control.inputs == ("table",)
    assert not Relabelled.uses_teacher


def test_a_silent_oracle_keeps_to_the_budget(tmp_path: Path) -> None:
    with serve(a_toy_provider(tmp_path, "table", 5)) as oracle:
        silent = Silent(oracle)
        assert len(silent.ask(Queries.of_pool(POOL, np.arange(3)))) == 3
        with pytest.raises(BudgetExceeded):
            silent.ask(Queries.of_pool(POOL, np.arange(3)))
        assert len(silent.ask(Queries.of_pool(POOL, np.arange(3)), partial=True)) == 2
        assert (silent.affordable(), silent.spent().queries, oracle.affordable()) == (0, 0, 5)


def test_the_identity_of_the_answers_holds_the_student_where_they_depend_on_it() -> None:
    def identity(*words: str) -> str:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            return query_id(compose("train", overrides=["+experiment=quickstart", *words]))

    for words, depends in (
        (["attack=ground_truth_labels"], False),
        (["attack=random_labels"], False),
        (["attack=weaker_model_labels"], True),
        (["attack=self_taught"], True),
        (["attack=ground_truth_labels", "attack@attack.attack=active_thief"], True),
    ):
        assert (identity(*words) != identity(*words, "student=lenet")) is depends, words
