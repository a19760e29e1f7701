"""SwiftThief: its losses by hand, its views, what it chooses, and the budget."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import CLASSES, IMAGE, ToyTeacherOf, a_labelled_pool, an_apprentice, extracted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from distill.attacks._contrastive import pair_weights, simsiam, soft_supervised
from distill.attacks._views import views
from distill.attacks.swift_thief import SwiftThief, _Thief, lacking
from distill.errors import DistillError
from distill.records import InputSpec
from distill.students.lenet import LeNet

SMALL: dict[str, Any] = {
    "contrastive_epochs": 1,
    "matching_epochs": 2,
    "unlabelled": 40,
    "batch_size": 16,
    "width": 16,
}


def test_simsiam_by_hand() -> None:
    p1, z2 = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    p2, z1 = torch.tensor([[0.0, 1.0], [5.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # Cosines: 1 and 1/√2 of the first pair, 0 and -1 of the second.
    expected = -((1 + 2**-0.5) / 2 + (0 - 1) / 2) / 2
    assert simsiam(p1, z1, p2, z2).item() == pytest.approx(expected)
    assert simsiam(p1, 4 * p1, p2, 4 * p2).item() != pytest.approx(-1)  # each looks at the other view
    assert simsiam(p1, p2, p2, p1).item() == pytest.approx(-1)


def test_projections_get_no_gradient() -> None:
    p, z = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    (simsiam(p, z, p, z) + soft_supervised(p, z, torch.ones(4, 4))).backward()
    assert z.grad is None
    assert p.grad is not None


def test_pair_weights_by_hand() -> None:
    answers = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.9, 0.1], [0.0, 1.0]])
    entropy = -(0.9 * log(0.9) + 0.1 * log(0.1))
    sure = 1 - entropy / log(2)
    weights = pair_weights(answers)
    cosine = 0.9 / (0.81 + 0.01) ** 0.5
    assert weights[0, 2].item() == pytest.approx(sure * cosine, rel=1e-4)
    assert weights[0, 3].item() == 0  # other labels have nothing to do with one another
    np.testing.assert_allclose(weights[1], 0, atol=1e-6)  # who is not sure at all, belongs nowhere
    np.testing.assert_array_equal(weights.diagonal(), 0)
    torch.testing.assert_close(weights, weights.T)
    assert torch.isfinite(pair_weights(torch.full((3, 4), 0.25))).all()


def test_the_soft_supervised_loss_by_hand() -> None:
    p, z = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [3.0, 3.0]])
    weights = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    assert soft_supervised(p, z, weights).item() == pytest.approx(-0.5 * 2**-0.5)
    weights[1, 0] = 0.25  # cos(p2, z1) = 1
    assert soft_supervised(p, z, weights).item() == pytest.approx(-(0.5 * 2**-0.5 + 0.25) / 2)
    assert soft_supervised(p, z, torch.zeros(2, 2)).item() == 0


@settings(max_examples=10, deadline=None)
@given(
    shape=st.sampled_from([(8, 8, 1), (9, 12, 3)]),
    crop=st.floats(0.1, 1),
    turn=st.floats(0, 180),
    intensity=st.floats(0, 0.99),
    mirror=st.booleans(),
)
def test_views_stay_in_the_pixel_box_and_leave_the_original_alone(
    shape: tuple[int, ...], crop: float, turn: float, intensity: float, mirror: bool
) -> None:
    pixels = torch.rand((5, *shape), generator=torch.Generator().manual_seed(0))
    before, rng = pixels.clone(), torch.Generator().manual_seed(1)
    seen = views(pixels, rng, crop=crop, turn=turn, intensity=intensity, mirror=mirror)
    assert seen.shape == pixels.shape
    assert 0 <= seen.min() <= seen.max() <= 1
    assert torch.equal(pixels, before)
    seen.zero_()
    assert torch.equal(pixels, before)


def test_a_view_that_may_not_change_is_the_image_and_a_mirrored_one_its_mirror() -> None:
    pixels, rng = torch.rand(40, 6, 10, 3), torch.Generator().manual_seed(1)
    torch.testing.assert_close(views(pixels, rng, crop=1, turn=0, intensity=0, mirror=False), pixels)
    seen = views(pixels, rng, crop=1, turn=0, intensity=0, mirror=True)
    same, turned = ((seen - other).abs().amax(dim=(1, 2, 3)) < 1e-5 for other in (pixels, pixels.flip(2)))
    assert (same ^ turned).all()
    assert same.any()
    assert turned.any()


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.sampled_from([1, 2, CLASSES, 11, 12, 13, 31]), rounds=st.sampled_from([1, 3]))
def test_the_budget_is_spent_exactly(budget: int, rounds: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    pool = a_labelled_pool("image", 30)
    attack = SwiftThief(rounds=rounds, **SMALL)
    asked, provider, student = extracted(attack, tmp_path_factory.mktemp("run"), "image", budget, pool)
    spent = min(budget, 30)
    assert len(asked) == provider.cost().queries == len(set(asked.rows.tolist())) == spent
    assert student.shown[-1][0] == spent
    assert len(student.shown) <= rounds


def test_a_seed_reproduces_and_the_global_state_is_left_alone(tmp_path: Path) -> None:
    pool, state = a_labelled_pool("image", 40), torch.random.get_rng_state()
    (first, _, own), (again, _, same), (other, *_) = (
        extracted(SwiftThief(rounds=3, **SMALL), tmp_path / str(number), "image", 20, pool, seed=seed)
        for number, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(first.rows, again.rows)
    images = pool.inputs[:5]
    np.testing.assert_array_equal(own.shown[-1][1].predict(images), same.shown[-1][1].predict(images))
    assert not np.array_equal(first.rows, other.rows)


def a_thief(student: Any = None, **options: Any) -> _Thief:
    apprentice = an_apprentice("image", **({"student": student} if student else {}))
    return _Thief(SwiftThief(**SMALL | options), apprentice.fresh(), a_labelled_pool("image", 40), CLASSES, 0)


@pytest.mark.parametrize("student", [None, LeNet()])
def test_representations_are_what_the_last_layer_sees(student: Any) -> None:
    thief = a_thief(student)
    thief.own.module.eval()
    images = torch.rand(6, *IMAGE.shape)
    torch.testing.assert_close(thief.last(thief.representations(images)), thief.own.logits(images))
    assert not thief.last._forward_pre_hooks


def test_a_student_without_a_linear_layer_is_refused() -> None:
    class Convolutional(LeNet):
        def build(self, spec: InputSpec, classes: int) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (64, 1)), nn.Conv1d(64, classes, 1), nn.Flatten())

    with pytest.raises(DistillError, match=r"^student: .*linear layer"):
        a_thief(Convolutional())


def test_the_unsure_images_are_asked_about_first() -> None:
    thief = a_thief()
    thief.take(np.arange(5), np.eye(CLASSES, dtype=np.float32)[np.arange(5) % CLASSES])
    chosen = thief.unsure(7)
    logits = thief.own.predict(thief.pool.inputs).astype(np.float64)
    posteriors = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    entropy = -(posteriors * np.log(posteriors)).sum(1)
    entropy[:5] = -1
    assert set(chosen.tolist()) == set(np.argsort(-entropy)[:7].tolist())


def test_the_rarest_class_draws_its_likes() -> None:
    thief = a_thief()
    images = thief.pool.inputs.copy()
    images[20:] = 255 - images[0] // 8  # twenty that look like nothing else …
    thief.pool = replace(thief.pool, inputs=images)
    labels = np.array([0] * 10 + [1] * 9 + [2])  # … and the one query of class 2 is among them
    rows = np.concatenate([np.arange(19), [20]])
    thief.take(rows, np.eye(CLASSES, dtype=np.float32)[labels])
    assert (thief.like_the_rarest(5) > 20).all()  # class 3, which was never answered, has no likes


def test_what_rare_classes_lack() -> None:
    answers = np.eye(4)[[0, 0, 0, 0, 0, 1, 1, 2]]
    assert lacking(answers) == (2 - 1) + (2 - 0)
    assert lacking(np.eye(4)) == 0


def test_contrastive_learning_learns_from_unqueried_images() -> None:
    """It lowers its own loss on images that were not asked about, and the student agrees with the teacher."""
    thief = a_thief(contrastive_epochs=40, matching_epochs=200, batch_size=32, weight=0.0)
    rows = np.arange(20)
    thief.take(rows, np.eye(CLASSES, dtype=np.float32)[ToyTeacherOf("image").predict(thief.pool.inputs[:20]).argmax(1)])

    def loss() -> float:
        with torch.no_grad():
            return float(np.mean([thief._self_supervised(thief.unqueried, 20).item() for _ in range(5)]))

    thief.own.module.train()
    before = loss()
    thief.contrast()
    assert loss() < before - 0.1
    thief.match()
    truth = ToyTeacherOf("image").predict(thief.pool.inputs).argmax(1)
    assert (thief.own.predict(thief.pool.inputs[:20]).argmax(1) == truth[:20]).mean() > 0.8


@pytest.mark.parametrize(
    ("options", "named"), [({"rounds": 0}, "rounds"), ({"batch_size": 1}, "batch_size"), ({"lr": 0}, "lr")]
)
def test_options_out_of_range_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} "):
        SwiftThief(**options)
