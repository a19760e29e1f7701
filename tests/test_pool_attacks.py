"""Attacks that rank the pool with students of their own: the rankings against brute force, the rounds, the budgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import CLASSES, NAMES, a_labelled_pool, an_apprentice, extracted
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import entropy

from distill.attacks import _active
from distill.attacks.active_thief import STRATEGIES, ActiveThief
from distill.attacks.disagreement import Disagreement, disagreement
from distill.attacks.knockoff_random import KnockoffRandom
from distill.attacks.margin import Margin, margins
from distill.attacks.marich import Marich, losses, of_all_kinds
from distill.experiment import StudentTrainer
from distill.records import Answers, Examples, InterfaceProfile, Queries, Reveals, TransferSet, one_hot, softmax
from distill.students.lenet import LeNet

POOL = 40
SMALL: dict[str, Any] = {"rounds": 3, "first_share": 0.2}
ATTACKS = {
    **{name: lambda name=name: ActiveThief(name, entropy_share=0.5, prefilter=1.5, **SMALL) for name in STRATEGIES},
    "margin": lambda: Margin(**SMALL),
    "disagreement": lambda: Disagreement(members=2, **SMALL),
    "marich": lambda: Marich(growth="geometric", **SMALL),
}


class Fixed(torch.nn.Module):
    """A student that is a given function of its inputs, an apprentice that trains nothing, an oracle that tells it."""

    class_names = NAMES
    device = torch.device("cpu")
    profile = InterfaceProfile(Reveals.PROBS)
    classes = CLASSES

    def __init__(self, function: Any, queries: int = 0) -> None:
        super().__init__()
        self.function, self.queries, self.module = function, queries, torch.nn.Identity()

    def fit(self, transfer_set: TransferSet, pool: Examples) -> Fixed:
        return self

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.function(inputs)

    def predict(self, inputs: Any) -> np.ndarray:
        return self.function(_active.numbers(inputs[:], torch.device("cpu"))).detach().numpy()

    def affordable(self) -> int:
        return self.queries

    def ask(self, queries: Queries) -> Answers:
        return Answers(softmax(self.predict(queries.inputs())))


def first_columns(inputs: torch.Tensor) -> torch.Tensor:
    return 2 * inputs[:, :CLASSES]


def second_round(attack: Any, function: Any = first_columns, kind: str = "table") -> tuple[np.ndarray, ...]:
    """The rows of the first and of the second round of 30 % each, and the posteriors of the pool."""
    pool, world = a_labelled_pool(kind, POOL), Fixed(function, queries=24)
    rows = attack.extract(world, pool, world, 0).rows
    return rows[:12], rows[12:], softmax(world.predict(pool.inputs))


# --- rankings -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), centres=st.integers(1, 6), classes=st.integers(2, 10))
@settings(max_examples=40, deadline=None)
def test_k_centre_is_brute_force(seed: int, n: int, centres: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    candidates, begun = random.dirichlet(np.ones(classes), 12), random.dirichlet(np.ones(classes), centres)
    plain: list[int] = []
    for _ in range(n):
        away = cdist(candidates, np.concatenate([begun, candidates[plain]])).min(axis=1)
        plain.append(int(away.argmax()))
    chosen = _active.k_centre(candidates, begun, n)
    np.testing.assert_array_equal(chosen, plain)
    one_by_one = begun
    for best in chosen:  # from scratch at each step, as incrementally
        assert _active.k_centre(candidates, one_by_one, 1)[0] == best
        one_by_one = np.concatenate([one_by_one, candidates[[best]]])


def test_k_centre_never_chooses_a_row_twice() -> None:
    same = np.full((9, 4), 0.25)
    assert sorted(_active.k_centre(same, same[:2], 9)) == list(range(9))


def test_distances_in_blocks_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    points, centres = random.normal(size=(2 * _active.CHUNK + 3, 5)), random.normal(size=(7, 5))
    found = _active.nearest_squares(points, centres)
    np.testing.assert_allclose(found, cdist(points, centres, "sqeuclidean").min(axis=1), atol=1e-12)


WEIGHTS = torch.from_numpy(np.random.default_rng(3).normal(size=(64, CLASSES))).float()


def normalised_linear(inputs: torch.Tensor) -> torch.Tensor:
    """A linear model of pixels that it normalises itself, with statistics far from those of a box of [0, 1]."""
    return ((inputs.flatten(1) - 0.13) / 0.31) @ WEIGHTS


@pytest.mark.parametrize("made", [False, True])
def test_deepfool_on_a_linear_model_is_the_distance_to_its_nearest_boundary(made: bool) -> None:
    """In pixel space, on the rim of the box too, and across it: nothing is clipped, least of all normalised pixels."""
    pixels = np.concatenate(
        [a_labelled_pool("image", 20).inputs[:], np.zeros((1, 8, 8, 1), np.uint8), np.full((1, 8, 8, 1), 255, np.uint8)]
    )
    world = Fixed(normalised_linear)
    logits = world.predict(pixels).astype(np.float64)
    top = logits.argmax(axis=1)
    slopes = WEIGHTS.numpy().T.astype(np.float64) / 0.31
    expected = [
        min((row[k] - other) / np.linalg.norm(slopes[k] - slopes[j]) for j, other in enumerate(row) if j != k)
        for row, k in zip(logits, top, strict=True)
    ]
    found = _active.deepfool(world, pixels.astype(np.float32) / 255 if made else pixels)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_deepfool_of_a_row_does_not_depend_on_the_others_and_is_infinite_without_a_boundary() -> None:
    pool, student = a_labelled_pool("image", 12), an_apprentice("image", student=LeNet(), epochs=30)
    learner = student.fit(TransferSet(np.arange(12), one_hot(pool.labels, CLASSES), pool=pool.fingerprint), pool)
    together = _active.deepfool(learner, pool.inputs)
    assert (together > 0).all()
    assert np.isfinite(together).all()
    alone = np.concatenate([_active.deepfool(learner, pool.inputs[[row]]) for row in range(12)])
    np.testing.assert_allclose(together, alone, rtol=1e-3)
    flat = Fixed(lambda inputs: torch.eye(CLASSES)[:1] + 0 * inputs.flatten(1)[:, :CLASSES])
    assert np.isinf(_active.deepfool(flat, pool.inputs)).all()


def test_entropy_slopes_are_finite_differences() -> None:
    world, at = Fixed(lambda inputs: inputs.double() @ WEIGHTS[:6].double()), np.full((1, 6), 0.2, np.float32)
    slopes = _active.entropy_slopes(world, at)[0]

    def value(point: np.ndarray) -> float:
        return float(entropy(torch.softmax(torch.from_numpy(point) @ WEIGHTS[:6].double(), 1).numpy(), axis=1)[0])

    moves = 1e-5 * np.eye(6)
    expected = [(value(at + move) - value(at - move)) / 2e-5 for move in moves]
    np.testing.assert_allclose(slopes, expected, rtol=1e-3, atol=1e-5)


def test_scores_are_those_of_scipy() -> None:
    committee = np.random.default_rng(0).dirichlet(np.ones(CLASSES), (3, 20))
    consensus = committee.mean(axis=0)
    divergence = np.mean([entropy(member, consensus, axis=1) for member in committee], axis=0)
    np.testing.assert_allclose(disagreement(committee, "kl"), divergence, atol=1e-9)
    votes = np.stack([np.bincount(column, minlength=CLASSES) for column in committee.argmax(axis=2).T]) / 3
    np.testing.assert_allclose(disagreement(committee, "vote_entropy"), entropy(votes, axis=1), atol=1e-9)
    np.testing.assert_allclose(_active.entropies(consensus), entropy(consensus, axis=1))
    np.testing.assert_allclose(margins(consensus), np.diff(np.sort(consensus, axis=1)[:, -2:], axis=1)[:, 0])
    labels = one_hot(np.arange(20) % CLASSES, CLASSES)
    np.testing.assert_allclose(losses(consensus, labels), -np.log(consensus[labels == 1]), rtol=1e-6)


def test_clusters_take_turns() -> None:
    """Of clusters of 20, 6 and 3 points, each gives as many while it has some, the nearest to its centre first."""
    random, sizes = np.random.default_rng(0), (20, 6, 3)
    points = np.concatenate([100 * k + random.normal(size=(size, 2)) for k, size in enumerate(sizes)])
    cluster = np.repeat(np.arange(3), sizes)
    chosen = of_all_kinds(points, 3, 13, seed=0)
    np.testing.assert_array_equal(np.bincount(cluster[chosen]), [5, 5, 3])
    away = np.linalg.norm(points[:20] - points[:20].mean(axis=0), axis=1)
    np.testing.assert_array_equal(chosen[:5], np.sort(away.argsort()[:5]))


@pytest.mark.parametrize(
    ("attack", "score"),
    [
        (ActiveThief(rounds=2, first_share=0.5), lambda p: entropy(p, axis=1)),
        (Margin(rounds=2, first_share=0.5), lambda p: np.diff(np.sort(p, axis=1)[:, -2:], axis=1)[:, 0] * -1),
    ],
)
def test_the_highest_scores_of_what_is_left_are_asked_first(attack: Any, score: Any) -> None:
    first, second, posteriors = second_round(attack)
    left = np.setdiff1d(np.arange(POOL), first)
    np.testing.assert_array_equal(second, left[np.argsort(-score(posteriors[left]))[:12]])


@pytest.mark.parametrize("share", [1.0, 0.9, 0.1])
def test_k_center_looks_at_the_uncertain_share_and_starts_from_what_was_asked(share: float) -> None:
    first, second, posteriors = second_round(ActiveThief("k_center", rounds=2, first_share=0.5, entropy_share=share))
    left = np.setdiff1d(np.arange(POOL), first)
    left = left[np.argsort(-entropy(posteriors[left], axis=1))[: max(24, round(share * len(left)))]]
    for i, row in enumerate(second):
        away = cdist(posteriors[left], posteriors[np.concatenate([first, second[:i]])]).min(axis=1)
        assert left[away.argmax()] == row


def test_dfal_asks_the_nearest_to_a_boundary_and_k_center_chooses_among_them() -> None:
    first, second, _ = second_round(ActiveThief("dfal", rounds=2, first_share=0.5), normalised_linear, "image")
    pool = a_labelled_pool("image", POOL)
    near = _active.deepfool(Fixed(normalised_linear), pool.inputs)
    left = np.setdiff1d(np.arange(POOL), first)
    by_distance = left[near[left].argsort()]
    np.testing.assert_array_equal(second, by_distance[:12])
    both = ActiveThief("dfal_k_center", rounds=2, first_share=0.5, prefilter=1.5)
    _, second, _ = second_round(both, normalised_linear, "image")
    assert set(second) <= set(by_distance[:18])
    assert set(second) != set(by_distance[:12])


# --- rounds and budgets -----------------------------------------------------------------------------------------------


@given(total=st.integers(0, 300), rounds=st.integers(1, 12), share=st.floats(0.001, 1), equal=st.booleans())
@settings(max_examples=60, deadline=None)
def test_rounds_grow_and_end_with_the_budget(total: int, rounds: int, share: float, equal: bool) -> None:
    ends = Margin(rounds, share, "equal" if equal else "geometric").ends(total)
    assert len(ends) <= rounds
    assert ends[-1] == total
    assert (np.diff(ends) >= 0).all()
    assert ends[0] >= min(2, total)
    if not equal and len(ends) > 2 and ends[0] > 20:
        np.testing.assert_allclose(ends[1:] / ends[:-1], (total / ends[0]) ** (1 / (rounds - 1)), rtol=0.1)


@pytest.mark.parametrize("name", ATTACKS)
@given(budget=st.sampled_from([1, 2, CLASSES, 15, 16, 17, POOL - 1, POOL, POOL + 1]), seed=st.integers(0, 3))
@settings(max_examples=5, deadline=None)
def test_budgets_are_exact_and_seeds_reproduce(name: str, budget: int, seed: int) -> None:
    pool = a_labelled_pool("table", POOL)
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        found, provider, student = extracted(ATTACKS[name](), Path(one), "table", budget, pool, seed)
        again, *_ = extracted(ATTACKS[name](), Path(other), "table", budget, pool, seed)
    spent = min(budget, POOL)
    assert len(found) == len(np.unique(found.rows)) == provider.cost().queries == spent
    assert not student.shown
    np.testing.assert_array_equal(again.rows, found.rows)
    np.testing.assert_array_equal(again.posteriors, found.posteriors)


@dataclass
class Recording(StudentTrainer):
    """An apprentice that keeps what it was asked to train on, and what came of it."""

    fits: list[tuple[TransferSet, Any]] = field(default_factory=list)

    def fit(self, transfer_set: TransferSet, pool: Examples, *rest: Any) -> Any:
        learner = super().fit(transfer_set, pool, *rest)
        self.fits.append((transfer_set, learner))
        return learner


@pytest.mark.parametrize("name", ATTACKS)
def test_no_student_is_used_again_at_a_larger_budget(name: str) -> None:
    """Each is what a fresh one becomes on the same answers; the answers are the first ones, all but a committee's."""
    pool, world = a_labelled_pool("image", POOL), Fixed(normalised_linear, queries=30)
    parts = vars(an_apprentice("image"))
    student = Recording(**parts)
    found = ATTACKS[name]().extract(world, pool, student, 0)
    random = KnockoffRandom().extract(world, pool, student, 0)
    np.testing.assert_array_equal(found.rows[:6], random.rows[:6])
    assert len(student.fits) == (2 * 2 if name == "disagreement" else 2)
    for learnt, learner in student.fits:
        again = StudentTrainer(**parts).fit(learnt, pool)
        np.testing.assert_array_equal(learner.predict(pool.inputs), again.predict(pool.inputs))
        if name == "disagreement":
            assert np.isin(learnt.rows, found.rows).all()
        else:
            np.testing.assert_array_equal(learnt.rows, found.rows[: len(learnt)])
    assert len({len(learnt) for learnt, _ in student.fits}) == 2


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("kind", ["image", "text"])
def test_labels_are_enough_and_texts_have_no_gradient(name: str, kind: str, tmp_path: Path) -> None:
    attack = ATTACKS[name]()
    assert ("text" in attack.inputs) is (name not in ("dfal", "dfal_k_center", "marich"))
    if kind in attack.inputs:
        access = InterfaceProfile(Reveals.LABEL)
        found, *_ = extracted(attack, tmp_path, kind, 25, a_labelled_pool(kind, POOL), access=access)
        assert set(np.unique(found.posteriors)) == {0, 1}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ActiveThief("best"), "strategy"),
        (lambda: ActiveThief(entropy_share=0), "entropy_share"),
        (lambda: ActiveThief(prefilter=0.5), "prefilter"),
        (lambda: Margin(rounds=0), "rounds"),
        (lambda: Margin(first_share=0), "first_share"),
        (lambda: Margin(growth="fast"), "growth"),
        (lambda: Disagreement(members=1), "members"),
        (lambda: Disagreement(member_share=1), "member_share"),
        (lambda: Disagreement(measure="l1"), "measure"),
        (lambda: Marich(gradient_share=0), "gradient_share"),
        (lambda: Marich(loss_share=2), "loss_share"),
    ],
)
def test_options_out_of_range_are_named(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} "):
        make()
