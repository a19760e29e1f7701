"""Attacks without data: the estimate of a gradient, the budget, what is kept, and that they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import IMAGE, ToyTeacherOf, a_labelled_pool, a_toy_provider, an_apprentice, extracted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_contracts import an_experiment

from distill.attacks._data_free import Game, Memory, cross_entropy, forward_differences, kl, l1, recovered
from distill.attacks._generator import Discriminator, Generator, squash
from distill.attacks.dfme import DFME
from distill.attacks.dfms_hl import DFMSHL
from distill.attacks.disguide import DisGUIDE
from distill.attacks.dual_students import DualStudents
from distill.attacks.maze import MAZE
from distill.errors import DistillError
from distill.provider.oracle import serve
from distill.records import Examples, InputSpec, InterfaceProfile, Reveals

BATCH = 4
SMALL: dict[str, Any] = {"batch_size": BATCH, "latent": 5, "width": 2}
ATTACKS: dict[str, Any] = {
    "dfme": lambda **options: DFME(**(SMALL | options)),
    "maze": lambda **options: MAZE(**(SMALL | {"directions": 2, "replay_steps": 2} | options)),
    "dfms_hl": lambda **options: DFMSHL(**(SMALL | {"initial_queries": 10} | options)),
    "disguide": lambda **options: DisGUIDE(**(SMALL | options)),
    "dual_students": lambda **options: DualStudents(**(SMALL | options)),
}
LABEL = InterfaceProfile(Reveals.LABEL)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 13, 3), (28, 28, 1), (32, 32, 3)])
def test_images_of_any_size_lie_in_the_pixel_box(shape: tuple[int, ...]) -> None:
    pixels = squash(50 * Generator(shape, latent=7, width=3)(torch.randn(6, 7)))
    assert pixels.shape == (6, *shape)
    assert 0 <= pixels.min() < 0.1 < 0.9 < pixels.max() <= 1
    assert Discriminator(shape, width=3)(pixels).shape == (6,)


# --- distances --------------------------------------------------------------------------------------------------------


def test_recovered_logits_are_the_teachers_but_for_a_constant_a_row() -> None:
    logits = torch.randn(50, 7, dtype=torch.float64) * 5
    torch.testing.assert_close(recovered(logits.softmax(1)), logits - logits.mean(1, keepdim=True))
    assert torch.isfinite(recovered(torch.eye(3))).all()


@pytest.mark.parametrize("distance", [l1, kl])
def test_a_perfect_student_is_at_no_distance(distance: Any) -> None:
    """Posteriors are taken for what they are: a second softmax would leave even a perfect student far away."""
    logits = torch.tensor([[3.0, -1.0, -2.0]], dtype=torch.float64)
    posteriors = logits.softmax(1)
    assert distance(logits, posteriors).abs() < 1e-12
    assert distance(logits, posteriors.softmax(1)) > 0.1
    assert cross_entropy(logits, posteriors) == -logits.log_softmax(1)[0, 0]


# --- the estimate of a gradient ---------------------------------------------------------------------------------------


class LinearStudent:
    """As a `Learner`, in any precision."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype) -> None:
        self.weights = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).to(dtype)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1) @ self.weights


def white_box(activations: torch.Tensor, student: LinearStudent) -> torch.Tensor:
    """What DFME's generator raises, with the toy teacher's weights at hand."""
    pixels = squash(activations)
    teacher = (pixels.flatten(1) - 0.5) @ torch.from_numpy(ToyTeacherOf("image").weights).to(pixels.dtype)
    return l1(student.logits(pixels), teacher.softmax(1))


def true_gradient(at: torch.Tensor, student: LinearStudent) -> torch.Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(white_box(at, student).sum(), at)[0]


def test_the_estimate_converges_to_the_gradient_as_one_over_the_root_of_the_directions() -> None:
    student, rng = LinearStudent(torch.float64), torch.Generator().manual_seed(0)
    at = torch.randn(8, *IMAGE.shape, dtype=torch.float64, generator=rng)
    truth = true_gradient(at, student)
    errors, cosines = [], []
    for directions in (64, 256, 1024, 4096):
        estimate = forward_differences(lambda x: white_box(x, student), at, directions, 1e-6, rng)
        errors.append(float((estimate - truth).norm() / truth.norm()))
        cosines.append(float(torch.cosine_similarity(estimate.flatten(), truth.flatten(), dim=0)))
    for directions, error in zip((64, 256, 1024, 4096), errors, strict=True):
        assert error == pytest.approx((at[0].numel() / directions) ** 0.5, rel=0.2)  # variance d/m of a unit gradient
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.98


def test_answers_are_exact_enough_for_the_papers_step(tmp_path: Path) -> None:
    """The same through the oracle: float32 pixels and posteriors, steps of 1e-3."""
    student, rng, at = LinearStudent(torch.float32), torch.Generator().manual_seed(0), torch.randn(2, *IMAGE.shape)
    with serve(a_toy_provider(tmp_path, "image", 10**6)) as oracle:
        game = Game(oracle, IMAGE.shape, [student], Generator(IMAGE.shape, 5, 2), 10, rng)  # type: ignore[list-item]

        def value(activations: torch.Tensor) -> torch.Tensor:
            pixels = squash(activations)
            return l1(student.logits(pixels), game.ask(pixels))

        estimate = forward_differences(value, at, 4000, 1e-3, rng)
        assert game.asked == oracle.spent().queries == 2 * 4001
    truth = true_gradient(at, student)
    assert torch.cosine_similarity(estimate.flatten(), truth.flatten(), dim=0) > 0.98
    assert estimate.norm() / truth.norm() == pytest.approx(1, abs=0.1)


# --- budget, seeds, what is kept --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.sampled_from([1, BATCH - 1, BATCH, BATCH + 1, 21, 28, 29]) | st.integers(1, 70))
def test_every_answer_of_the_budget_is_asked_for(
    name: str, tmp_path_factory: pytest.TempPathFactory, budget: int
) -> None:
    attack, pool = ATTACKS[name](), a_labelled_pool("image", 20)
    transfer_set, provider, student = extracted(attack, tmp_path_factory.mktemp("p"), "image", budget, pool)
    assert len(transfer_set) == provider.cost().queries == budget
    assert transfer_set.made is not None
    assert 0 <= transfer_set.made.min() <= transfer_set.made.max() <= 1
    expected = ToyTeacherOf("image").predict(transfer_set.made).argmax(1)
    np.testing.assert_array_equal(transfer_set.posteriors.argmax(1), expected, "each answer lies beside its query")
    shown = [queries for queries, _ in student.shown]
    assert len(shown) <= 10
    assert shown[-1] == budget


@pytest.mark.parametrize("name", ATTACKS)
def test_a_seed_reproduces_and_leaves_the_global_numbers_alone(name: str, tmp_path: Path) -> None:
    pool, runs = a_labelled_pool("image", 20), []
    for seed in (3, 3, 4):
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        transfer_set, _, student = extracted(ATTACKS[name](), tmp_path / str(len(runs)), "image", 60, pool, seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append((transfer_set.made, student.shown[-1][1].predict(pool.inputs)))
    for first, second, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
        assert (first != other).any()


@settings(max_examples=40, deadline=None)
@given(capacity=st.integers(1, 12), batches=st.lists(st.integers(0, 20), max_size=6))
def test_memory_is_the_end_of_all_that_was_seen(capacity: int, batches: list[int]) -> None:
    memory, seen = Memory(capacity, np.empty(0, dtype=np.int64), np.empty((0, 2))), 0
    for n in batches:
        rows = np.arange(seen, seen + n)
        memory.add(rows, np.stack([rows, -rows], axis=1))
        seen += n
    numbers, pairs = memory.in_order()
    assert numbers.tolist() == list(range(max(0, seen - capacity), seen))
    assert pairs[:, 1].tolist() == [-number for number in numbers]
    if seen:
        drawn, _ = memory.draw(50, torch.Generator().manual_seed(0))
        assert set(drawn.tolist()) <= set(numbers.tolist())


def test_the_last_queries_are_kept_and_all_are_paid_for(tmp_path: Path) -> None:
    pool = a_labelled_pool("image", 20)
    whole, *_ = extracted(ATTACKS["dfme"](), tmp_path / "whole", "image", 60, pool)
    cut, provider, _ = extracted(ATTACKS["dfme"](kept=25), tmp_path / "cut", "image", 60, pool)
    assert (len(cut), provider.cost().queries) == (25, 60)
    np.testing.assert_array_equal(cut.made, whole.made[-25:])
    np.testing.assert_array_equal(cut.posteriors, whole.posteriors[-25:])


def test_a_round_asks_twice(tmp_path: Path) -> None:
    """Once for all that the estimate takes, once for all batches of the student."""
    provider, asked = a_toy_provider(tmp_path, "image", 2 * 28), []
    answer = provider.answer
    provider.answer = lambda inputs, rows: (asked.append(len(inputs)), answer(inputs, rows))[1]  # type: ignore[method-assign]
    with serve(provider) as oracle:
        ATTACKS["dfme"]().extract(oracle, a_labelled_pool("image", 20), an_apprentice("image"), 0)
    assert asked == [2 * BATCH, 5 * BATCH] * 2


# --- whom they can ask, and whether they learn ------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["dfme", "maze"])
def test_labels_alone_are_refused_before_anything_is_asked(option: str, tmp_path: Path) -> None:
    with pytest.raises(
        DistillError, match=r"requires probs, .*compatible: .*dfms_hl, .*disguide, .*dual_students"
    ) as error:
        an_experiment(tmp_path, f"attack={option}", "access=label")
    assert error.value.key == "attack"
    assert not (tmp_path / "provider_log").exists()


def test_what_can_not_work_is_said(tmp_path: Path) -> None:
    tiny = Examples(np.zeros((2, 4, 4, 1), dtype=np.uint8), InputSpec("image", (4, 4, 1)))
    with serve(a_toy_provider(tmp_path, "image", 10, spec=tiny.spec)) as oracle:
        with pytest.raises(DistillError, match="images from 8×8, not 4×4"):
            ATTACKS["dfme"]().extract(oracle, tiny, an_apprentice("image"), 0)
        assert oracle.spent().queries == 0
    with pytest.raises(ValueError, match=r"^directions is at least 1"):
        DFME(directions=0)
    with pytest.raises(ValueError, match=r"^width is at least 1"):
        DualStudents(width=0)
    with pytest.raises(ValueError, match=r"^diversity is at least 0"):
        DFMSHL(diversity=-1)


@pytest.mark.parametrize(
    ("name", "access", "budget"),
    [
        ("dfme", None, 4000),
        ("maze", None, 2000),
        ("dfms_hl", LABEL, 2000),
        ("disguide", LABEL, 1000),
        ("dual_students", None, 4000),
    ],
)
def test_they_learn_without_a_single_image_of_the_pool(
    name: str, access: InterfaceProfile | None, budget: int, tmp_path: Path
) -> None:
    """Agreement with the teacher on images that nobody asked about, of which a quarter would be chance."""
    attack = ATTACKS[name](batch_size=32, latent=64, width=8, student_lr=0.1)
    pool = a_labelled_pool("image", 300)
    changes = {} if access is None else {"access": access}
    transfer_set, _, student = extracted(attack, tmp_path, "image", budget, pool, **changes)
    assert (transfer_set.rows == -1).all()
    assert (an_apprentice("image").fresh().predict(pool.inputs).argmax(1) == pool.labels).mean() < 0.3
    assert (student.shown[-1][1].predict(pool.inputs).argmax(1) == pool.labels).mean() > 0.38
