"""Attacks that alter images of the pool: copies that cost nothing, and erased images that are asked about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import CLASSES, IMAGE, a_labelled_pool, an_apprentice, extracted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from distill.attacks.blackbox_dissector import BlackboxDissector, attention_to, erase
from distill.attacks.copycat import Copycat
from distill.attacks.copycat_augmented import CopycatAugmented
from distill.records import one_hot
from distill.students.lenet import LeNet

# --- Copycat's copies -------------------------------------------------------------------------------------------------


def test_copies_are_neither_asked_nor_billed_nor_kept(tmp_path: Path) -> None:
    pool = a_labelled_pool("image", 30)
    before = pool.inputs.copy()
    plain, *_ = extracted(Copycat(), tmp_path / "plain", "image", 12, pool)
    asked, provider, student = extracted(CopycatAugmented(copies=3), tmp_path / "augmented", "image", 12, pool)
    assert provider.cost().queries == provider.undefended.forwards == len(asked) == 12
    assert asked.made is None
    np.testing.assert_array_equal(asked.rows, plain.rows)
    np.testing.assert_array_equal(asked.posteriors, plain.posteriors)
    assert [queries for queries, _ in student.shown] == [12]
    np.testing.assert_array_equal(pool.inputs, before)


def test_the_attacks_own_student_learns_from_images_and_copies(tmp_path: Path) -> None:
    pool = a_labelled_pool("image", 30)
    attack = CopycatAugmented(copies=2)
    asked, _, student = extracted(attack, tmp_path, "image", 12, pool)
    augmented = attack.augmented(asked, pool, 0)
    inputs = augmented.inputs(pool)[:]
    assert inputs.shape == (36, *IMAGE.shape)
    assert inputs.dtype == np.uint8
    np.testing.assert_array_equal(inputs[:12], pool.inputs[asked.rows])
    assert not any(np.array_equal(copy, image) for copy, image in zip(inputs[12:24], inputs[:12], strict=True))
    assert not np.array_equal(inputs[12:24], inputs[24:])
    np.testing.assert_array_equal(augmented.targets, np.tile(asked.posteriors, (3, 1)))
    ((_, shown),) = student.shown
    expected = an_apprentice("image").fit(augmented, pool)
    np.testing.assert_array_equal(shown.predict(pool.inputs), expected.predict(pool.inputs))
    alone = an_apprentice("image").fit(asked, pool)
    assert not np.array_equal(shown.predict(pool.inputs), alone.predict(pool.inputs))


# --- Black-box Dissector ----------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.sampled_from([1, CLASSES, 5, 6, 7, 19]), erased=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_budget_is_spent_exactly(budget: int, erased: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Beyond the pool's size too: an erased image is a new one."""
    pool = a_labelled_pool("image", 18)
    before = pool.inputs.copy()
    attack = BlackboxDissector(rounds=3, erased=erased, proposals=2)
    asked, provider, student = extracted(attack, tmp_path_factory.mktemp("run"), "image", budget, pool)
    assert len(asked) == provider.cost().queries == budget
    whole = asked.rows[asked.rows >= 0]
    assert len(set(whole.tolist())) == len(whole)
    made = 0 if asked.made is None else len(asked.made)
    assert made == (asked.rows < 0).sum()
    if budget == 19 and erased > 0:
        assert made > 0
    inputs = asked.inputs(pool)[:]
    assert inputs.dtype == np.uint8  # whatever is asked lies in the pixel box
    np.testing.assert_array_equal(pool.inputs, before)
    np.testing.assert_array_equal(asked.posteriors, one_hot(asked.posteriors.argmax(1), CLASSES))
    assert student.shown[-1][0] == budget


def test_a_seed_reproduces_and_labels_are_all_it_keeps(tmp_path: Path) -> None:
    pool = a_labelled_pool("image", 40)
    (first, *_), (again, *_), (other, *_) = (
        extracted(BlackboxDissector(rounds=2), tmp_path / str(number), "image", 20, pool, seed=seed)
        for number, seed in enumerate((0, 0, 1))
    )
    np.testing.assert_array_equal(first.inputs(pool)[:], again.inputs(pool)[:])
    assert not np.array_equal(first.inputs(pool)[:], other.inputs(pool)[:])
    assert (first.profile, first.logits) == ("label", None)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), floats=st.booleans(), nothing=st.booleans())
def test_one_rectangle_is_erased_and_the_original_is_untouched(seed: int, floats: bool, nothing: bool) -> None:
    rng = np.random.default_rng(seed)
    images: Any = rng.random((6, 20, 30, 2), dtype=np.float32)
    if not floats:
        images = (255 * images).astype(np.uint8)
    before = images.copy()
    attention = np.zeros((6, 20, 30))
    if not nothing:
        attention[:, 14, 7] = 3.0
    erased = erase(images, attention, rng)
    assert erased.dtype == images.dtype
    assert not np.shares_memory(erased, images)
    np.testing.assert_array_equal(images, before)
    assert erased.min() >= 0
    assert erased.max() <= (1 if floats else 255)
    for changed in (erased != images).any(axis=3):
        down, across = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        if nothing and not changed.any():
            continue  # a byte may be drawn again
        box = changed[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
        assert box.mean() > 0.85
        assert changed.mean() <= 0.5
        if not nothing:
            assert down[0] <= 14 <= down[-1]
            assert across[0] <= 7 <= across[-1]


def test_grad_cam_by_hand() -> None:
    """On a network whose last maps are known: the gradient of a mean is one over the number of its pixels."""

    class Known(LeNet):
        def build(self, spec: Any, classes: int) -> nn.Module:
            return Network(classes)

    class Network(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)
            self.out = nn.Linear(2, classes, bias=False)
            with torch.no_grad():
                self.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
                self.out.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [2.0, 1.0]]))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.out(self.conv(inputs.permute(0, 3, 1, 2)).mean(dim=(2, 3)))

    own = an_apprentice("image", student=Known()).fresh()
    image = np.random.default_rng(0).random((1, *IMAGE.shape)).astype(np.float32)
    maps = np.stack([image[0, :, :, 0], -image[0, :, :, 0]])
    for label, weights in enumerate(([1, 0], [0, 1], [-1, 0], [2, 1])):
        expected = np.maximum(0, np.tensordot(np.array(weights) / 64, maps, axes=1))
        np.testing.assert_allclose(attention_to(own, image, np.array([label]))[0], expected, atol=1e-7)
    assert not own.module.conv._forward_hooks


@pytest.mark.parametrize("student", [LeNet(), None])
def test_every_student_shows_where_it_looks(student: Any) -> None:
    own = an_apprentice("image", **({"student": student} if student else {})).fresh()
    attention = attention_to(own, a_labelled_pool("image", 5).inputs, np.arange(5) % CLASSES)
    assert attention.shape == (5, 8, 8)
    assert (attention >= 0).all()
    assert attention.any()


def test_the_least_sure_variants_are_asked_about() -> None:
    """Of one proposal each, those that leave the student least sure; of many, one that leaves it less sure."""
    own, pool = an_apprentice("image").fresh(), a_labelled_pool("image", 30)
    labels = own.predict(pool.inputs).argmax(axis=1)
    rows = np.arange(30)

    def sure(proposals: int, n: int) -> np.ndarray:
        attack = BlackboxDissector(proposals=proposals)
        logits = own.predict(attack._erased(own, pool, rows, labels, n, np.random.default_rng(0))).astype(np.float64)
        return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(axis=1)

    np.testing.assert_allclose(sure(1, 10), np.sort(sure(1, 30))[:10], rtol=1e-5)
    assert sure(10, 30).mean() < sure(1, 30).mean()


def test_pseudo_labels_are_of_unqueried_images_alone(tmp_path: Path) -> None:
    pool = a_labelled_pool("image", 30)
    told, *_ = extracted(Copycat(), tmp_path, "image", 10, pool)
    own, attack = an_apprentice("image").fresh(), BlackboxDissector(pseudo_labelled=0.5)
    unqueried = np.setdiff1d(np.arange(30), told.rows)
    rng = np.random.default_rng(0)
    taught = attack._with_pseudo_labels(told, own, pool, unqueried, rng)
    np.testing.assert_array_equal(taught.rows, np.concatenate([told.rows, unqueried[:5]]))
    np.testing.assert_array_equal(taught.targets[:10], told.posteriors)
    np.testing.assert_allclose(taught.targets.sum(axis=1), 1, atol=1e-5)
    assert len(attack._with_pseudo_labels(told, None, pool, unqueried, rng)) == 10


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: BlackboxDissector(rounds=0), "rounds"),
        (lambda: BlackboxDissector(erased=1.5), "erased"),
        (lambda: BlackboxDissector(proposals=0), "proposals"),
    ],
)
def test_options_out_of_range_are_named(build: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} "):
        build()
