"""Several teachers of one task, each of which answers its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack_toys import CLASSES, IMAGE, a_labelled_pool, extracted
from hydra import compose, initialize_config_dir
from toys import FEATURES, ToyTeacher, a_provider, tables

from distill.attacks.knockoff_random import KnockoffRandom
from distill.config import CONFIG_DIR, build
from distill.data.digits import Digits
from distill.errors import DistillError
from distill.provider.teachers.several import Several
from distill.provider.teachers.smollm2 import SmolLM2
from distill.records import Dataset, Examples, InputSpec, Reveals
from distill.training import Trainer

SPEC = InputSpec("table", (FEATURES,))
TRAIN = Examples(tables(4), SPEC, np.arange(4), tuple("abcd"))
DATA = Dataset("toy", SPEC, tuple("abcd"), TRAIN, TRAIN, TRAIN)


def toy(number: int, output: Reveals = Reveals.LOGITS, **attributes: Any) -> ToyTeacher:
    teacher = ToyTeacher(CLASSES, output)
    teacher.weights = np.random.default_rng(number).normal(size=(FEATURES, CLASSES))
    teacher.fingerprint = f"toy {number}"
    vars(teacher).update(attributes)
    return teacher


def several(*teachers: ToyTeacher) -> Several:
    together = Several({f"t{number}": teacher for number, teacher in enumerate(teachers)})
    together.prepare(DATA, None, Path("unused"))  # type: ignore[arg-type]
    return together


def test_each_query_is_answered_by_the_teacher_of_its_content() -> None:
    together, inputs = several(toy(0), toy(1), toy(2)), tables(900)
    routes = together.route(inputs)
    assert (np.abs(np.bincount(routes, minlength=3) - 300) < 85).all(), "six standard deviations"
    answers = together.predict(inputs)
    for number in range(3):
        rows = routes == number
        np.testing.assert_array_equal(answers[rows], toy(number).predict(inputs[rows]))
    order = np.random.default_rng(0).permutation(900)
    np.testing.assert_array_equal(together.predict(inputs[order]), answers[order])
    one_by_one = np.concatenate([together.predict(inputs[i : i + 1]) for i in range(50)])
    np.testing.assert_array_equal(one_by_one, answers[:50], "whatever else is in the batch")


@pytest.mark.parametrize("other", [Reveals.PROBS, Reveals.LABEL])
def test_answers_are_as_poor_as_the_poorest(other: Reveals) -> None:
    together, inputs = several(toy(0), toy(1, other)), tables(100)
    assert together.output is other
    answers = together.predict(inputs)
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-6)
    rich = together.route(inputs) == 0
    logits = toy(0).predict(inputs[rich])
    np.testing.assert_array_equal(answers[rich].argmax(axis=1), logits.argmax(axis=1))
    if other is Reveals.PROBS:
        np.testing.assert_allclose(
            np.log(answers[rich, 1:] / answers[rich, :1]), logits[:, 1:] - logits[:, :1], atol=1e-4
        )


def test_what_they_are_together() -> None:
    paid = toy(1, usd_per_query=0.5, remote=True, rows_at_once=16, parameters=30, flops_per_query=100.0)
    own = toy(0, parameters=12, flops_per_query=50.0)
    own.latency_s, paid.latency_s = (lambda one: 0.25), (lambda one: 0.5)  # type: ignore[attr-defined]
    together = several(own, paid)
    assert (together.usd_per_query, together.remote, together.rows_at_once) == (0.25, True, 16)
    assert (together.parameters, together.flops_per_query) == (42, 75.0)
    assert together.latency_s(tables(1)) == 0.5
    paid.parameters, paid.latency_s = None, lambda one: None  # type: ignore[attr-defined]
    assert several(own, paid).parameters is None
    assert several(own, paid).latency_s(tables(1)) is None
    fingerprints = {several(*parts).fingerprint for parts in
                    [(own, paid), (paid, own), (own, toy(2)), (own, paid, toy(2))]}  # fmt: skip
    assert len(fingerprints) == 4
    assert several(toy(0), toy(1)).fingerprint == several(toy(0), toy(1)).fingerprint


def test_one_alone_and_language_models_are_refused() -> None:
    with pytest.raises(DistillError, match=r"^teachers are at least two, not 1"):
        Several({"only": toy(0)})
    with pytest.raises(DistillError, match="two is a language model"):
        Several({"one": toy(0), "two": SmolLM2()})  # type: ignore[dict-item]


def test_behind_one_door_each_is_asked_its_share(tmp_path: Path) -> None:
    first, second = toy(0), toy(1)
    together: Any = several(first, second)
    together.weights = first.weights
    provider = a_provider(tmp_path, together)
    pool = a_labelled_pool("table", 100)
    asked, *_ = extracted(KnockoffRandom(), tmp_path / "run", "table", 80, pool, teacher=together)
    routes = together.route(asked.inputs(pool)[:])
    assert (first.forwards, second.forwards) == ((routes == 0).sum(), (routes == 1).sum())
    fresh = several(toy(0), toy(1)).predict(asked.inputs(pool)[:])
    np.testing.assert_array_equal(asked.posteriors.argmax(axis=1), fresh.argmax(axis=1))
    clean = provider.clean(asked.inputs(pool)).posteriors
    np.testing.assert_allclose(clean, asked.posteriors, atol=1e-6, err_msg="fidelity is to the same spread")


def test_two_real_teachers_of_different_architecture(tmp_path: Path) -> None:
    words = [
        "teacher=several",
        "student@teacher.teachers.second.architecture=mlp",
        "teacher.teachers.first.recipe.max_steps=30",
        "teacher.teachers.second.recipe.max_steps=30",
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        teacher: Several = build(compose("train", overrides=words).teacher, "teacher")
    data = Digits().load()
    assert data.spec == IMAGE
    teacher.prepare(data, Trainer(device="cpu", progress=False), tmp_path)
    first, second = teacher.teachers.values()
    assert len({first.fingerprint, second.fingerprint, teacher.fingerprint}) == 3
    assert teacher.parameters == (first.parameters or 0) + (second.parameters or 0)
    inputs = data.test.inputs[:50]
    np.testing.assert_allclose(
        teacher.predict(inputs),
        np.where(teacher.route(inputs)[:, None] == 0, first.predict(inputs), second.predict(inputs)),
        atol=1e-5,
    )
