"""Students that also learn from inputs nobody answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack_toys import CLASSES, IMAGE, NAMES, a_labelled_pool, an_apprentice

from distill.contracts import Knowledge
from distill.errors import DistillError
from distill.records import Examples, TransferSet, one_hot, softmax
from distill.recovery.pseudo_labels import PseudoLabels
from distill.students.mlp import MLP
from distill.training import Recipe, Trainer

SIGNAL = 0.4  # of a pixel's noise


def clusters(rows: int, seed: int) -> Examples:
    """Noisy copies of one 8×8 picture for each class."""
    prototypes = np.random.default_rng(5).normal(size=(CLASSES, 64))
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, rows)
    pixels = 128 + 40 * (SIGNAL * prototypes[labels] + random.normal(size=(rows, 64)))
    return Examples(np.clip(pixels, 0, 255).astype(np.uint8).reshape(-1, 8, 8, 1), IMAGE, labels, NAMES)


def answered(pool: Examples, rows: np.ndarray) -> TransferSet:
    assert pool.labels is not None
    return TransferSet(rows, one_hot(pool.labels[rows], CLASSES), pool=pool.fingerprint, profile="label")


def knowing(pool: Examples, student: Any) -> Knowledge:
    return Knowledge(pool, student, Trainer(device="cpu", progress=False), 0, Path("unused"))


class Certain:
    """An apprentice whose students know the labels of the pool by its first pixel, surely or hardly; notes its sets."""

    class_names = NAMES

    def __init__(self, sure: float = 9.0) -> None:
        self.sure, self.sets, self.shown = sure, [], []

    def fit(self, transfer_set: TransferSet, pool: Examples) -> Any:
        self.sets.append(transfer_set)
        return self

    def predict(self, inputs: Any) -> np.ndarray:
        self.shown.append(inputs)
        if inputs.dtype == object:
            return np.array([[self.sure * (len(text) % CLASSES == k) for k in range(CLASSES)] for text in inputs])
        first = np.abs(inputs.reshape(len(inputs), -1)[:, 0] * 10).astype(np.int64)
        return self.sure * one_hot(first % CLASSES, CLASSES)


def test_a_student_with_few_answers_gains() -> None:
    pool, test = clusters(400, 1), clusters(1000, 2)
    assert pool.labels is not None
    parts = {"student": MLP(hidden=(64,)), "recipe": Recipe(epochs=25, batch_size=8, lr=3e-3)}
    reached = []
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(400)
        few = answered(pool, np.concatenate([order[pool.labels[order] == k][:3] for k in range(CLASSES)]))
        for threshold in (1.0, 0.8):  # nothing is ever so certain: the answers alone, as often
            recovery = PseudoLabels(rounds=1, ratio=10, threshold=threshold, shift=0, cutout=0.25)
            student = an_apprentice("image", seed, recovery=recovery, **parts).fit(few, pool)
            reached.append((student.predict(test.inputs).argmax(axis=1) == test.labels).mean())
    alone, gained = np.reshape(reached, (2, 2)).T
    assert gained.mean() > alone.mean() + 0.02


@pytest.mark.parametrize("kind", ["image", "table", "text"])
def test_the_set_grows_by_unasked_rows_with_targets_that_are_distributions(kind: str) -> None:
    pool, student = a_labelled_pool(kind, 50), Certain()
    given = answered(pool, np.arange(10))
    recovery = PseudoLabels(rounds=2, ratio=3, shift=0)
    grown = recovery.targets(given, knowing(pool, student))
    assert grown.targets is not None
    assert len(grown) == 60, "all guesses are certain, and 30 rows were looked at"
    np.testing.assert_allclose(grown.targets.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(grown.targets[:30], np.tile(given.posteriors, (3, 1)))
    np.testing.assert_array_equal(grown.rows[:10], given.rows)
    np.testing.assert_array_equal(grown.inputs(pool)[np.arange(30)], np.concatenate([given.inputs(pool)[:]] * 3))
    assert [len(each) for each in student.sets] == [30, 60], "each round learns from what the one before added"
    assert "30 of 30" in grown.note
    assert len(grown.inputs(pool)) == 60
    if kind == "image":
        assert (grown.rows[10:] == -1).all()
        assert len(student.shown) == 4, "two weak augmentations in each of two rounds"
    else:
        assert not set(grown.rows[30:]) & set(given.rows)
    assert given.targets is None
    again = recovery.targets(given, knowing(pool, Certain()))
    np.testing.assert_array_equal(again.inputs(pool)[:], grown.inputs(pool)[:])


def test_only_confident_guesses_count_and_are_sharpened() -> None:
    pool = a_labelled_pool("table", 50)
    given = answered(pool, np.arange(10))
    unsure = PseudoLabels(ratio=1).targets(given, knowing(pool, Certain(sure=1.0)))
    np.testing.assert_array_equal(unsure.rows, given.rows)
    bold = PseudoLabels(ratio=4, threshold=0.4, temperature=0.5).targets(given, knowing(pool, Certain(sure=1.0)))
    assert len(bold) == 80
    assert bold.targets is not None
    guess = softmax(np.eye(CLASSES)[:1])[0]
    np.testing.assert_allclose(bold.targets[40:].max(axis=1), guess[0] ** 2 / (guess**2).sum(), rtol=1e-5)


def test_nothing_is_left_to_guess() -> None:
    pool, student = a_labelled_pool("image", 20), Certain()
    given = replace(answered(pool, np.arange(20)), logits=np.zeros((20, CLASSES), dtype=np.float32))
    grown = PseudoLabels().targets(given, knowing(pool, student))
    np.testing.assert_array_equal(grown.targets, given.posteriors)
    assert not student.sets
    assert grown.logits is None


def test_beside_inputs_that_the_attack_made() -> None:
    pool = a_labelled_pool("image", 30)
    made = np.random.default_rng(0).random((3, 8, 8, 1), dtype=np.float32)
    rows = np.array([4, -1, 7, -1, -1])
    given = replace(answered(pool, rows), made=made)
    grown = PseudoLabels(ratio=2, shift=0).targets(given, knowing(pool, Certain()))
    inputs = grown.inputs(pool)[:]
    assert (len(inputs), inputs.dtype) == (20, np.float32)
    np.testing.assert_array_equal(inputs[1], made[0])
    np.testing.assert_allclose(inputs[2] * 255, pool.inputs[7], atol=1e-4)
    assert inputs.min() >= 0
    assert inputs.max() <= 1


def test_augmentations_stay_pictures() -> None:
    rng, images = np.random.default_rng(0), clusters(200, 3).inputs[:200]
    still = PseudoLabels(shift=0, mirror=False)
    np.testing.assert_array_equal(still._weak(images, rng), images)
    mirrored = PseudoLabels(shift=0, mirror=True)._weak(images, rng)
    as_is, turned = ((mirrored == other).all(axis=(1, 2, 3)) for other in (images, images[:, :, ::-1]))
    assert (as_is ^ turned).all()
    assert 60 < turned.sum() < 140
    shifted = PseudoLabels(shift=0.125)._weak(images, rng)
    assert (shifted[:, 1:-1, 1:-1] != images[:, 1:-1, 1:-1]).any()
    for dtype, top in ((np.uint8, 255), (np.float32, 1)):
        strong = still._strong((images / (255 / top)).astype(dtype), rng)
        assert strong.dtype == dtype
        assert strong.min() >= 0
        assert strong.max() <= top
    square = PseudoLabels(cutout=0.5)._square((1000, 8, 8, 1), rng)
    assert square.sum(axis=(1, 2, 3)).max() == 16
    assert not PseudoLabels(cutout=0)._square((10, 8, 8, 1), rng).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 0}, "^rounds is at least 1"),
        ({"guesses": 0}, "^guesses is at least 1"),
        ({"ratio": 0}, "^ratio is more than 0"),
        ({"temperature": float("inf")}, "^temperature is more than 0"),
        ({"threshold": 1.2}, "^threshold lies between 0 and 1"),
        ({"cutout": -0.1}, "^cutout lies between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DistillError, match=words):
        PseudoLabels(**options)
