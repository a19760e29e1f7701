"""Attacks that move inputs along a student's gradient: their steps, their bounds, and the errors of published code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import CLASSES, ToyTeacherOf, a_labelled_pool, a_toy_provider, an_apprentice, extracted
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.attacks import _moves
from distill.attacks._moves import Box, as_floats, away_from, moved, towards
from distill.attacks.cloud_leak import CloudLeak, least_sure, triplet
from distill.attacks.jb_self import JBSelf
from distill.attacks.jb_top_k import JBTopK
from distill.attacks.jbda import JBDA
from distill.attacks.jbda_tr import JBDATR
from distill.attacks.knockoff_random import KnockoffRandom
from distill.attacks.prada import Prada
from distill.contracts import Learner
from distill.errors import DistillError
from distill.provider.oracle import serve
from distill.records import Answers, Examples, InputSpec, InterfaceProfile, Reveals, TransferSet, content_keys, one_hot

SEEDS, POOL = 6, 20
ATTACKS = {
    "jbda": lambda **o: JBDA(seeds=SEEDS, **o),
    "jb_self": lambda **o: JBSelf(seeds=SEEDS, **o),
    "jb_top_k": lambda **o: JBTopK(seeds=SEEDS, **o),
    "jbda_tr": lambda **o: JBDATR(seeds=SEEDS, **o),
    "prada": lambda **o: Prada(seeds=SEEDS, **o),
    "cloud_leak": lambda **o: CloudLeak(seeds=SEEDS, rounds=2, candidates=2, steps=4, **o),
}
REACH = {"jbda": 0.1, "jb_self": 0.1, "jb_top_k": 0.1, "jbda_tr": 0.1, "prada": 64 / 255}
EVERY = pytest.mark.parametrize("name", ATTACKS)
PIXELS = InputSpec("image", (3, 3, 1))
UNIT_BOX = Box.around(PIXELS, np.zeros((1, 3, 3, 1), np.float32))


class Normalising(torch.nn.Module):
    """A small network that normalises its pixels itself, as trained ones do."""

    def __init__(self, seed: int, classes: int = CLASSES) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(9, 8, generator=random)
        self.out = torch.randn(8, classes, generator=random)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(((inputs - 0.3) / 0.3).flatten(1) @ self.hidden) @ self.out


@dataclass
class Fixed:
    """A learner that nobody trained."""

    module: torch.nn.Module
    device: torch.device = torch.device("cpu")

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.module(inputs)

    def predict(self, inputs: Any) -> np.ndarray:
        with torch.no_grad():
            return self.module(torch.from_numpy(inputs[:])).numpy()


def pictures(rows: int, seed: int = 0) -> np.ndarray:
    """Many of whose pixels are at the ends of the box."""
    drawn = np.random.default_rng(seed).uniform(-0.5, 1.5, (rows, 3, 3, 1))
    return drawn.clip(0, 1).astype(np.float32)


def answers_to(inputs: np.ndarray, seed: int = 0) -> Answers:
    labels = np.random.default_rng(seed).integers(0, CLASSES, len(inputs))
    return Answers(one_hot(labels, CLASSES))


def lengths(changes: np.ndarray, norm: str) -> np.ndarray:
    flat = changes.reshape(len(changes), -1).astype(np.float64)
    return np.abs(flat).max(axis=1) if norm == "linf" else np.sqrt((flat**2).sum(axis=1))


class Watched:
    """An apprentice that remembers what it was handed and what it made of it."""

    def __init__(self, kind: str) -> None:
        self.own = an_apprentice(kind)
        self.class_names = self.own.class_names
        self.rounds: list[tuple[TransferSet, np.ndarray, Learner]] = []

    def fit(self, transfer_set: TransferSet, pool: Examples) -> Learner:
        learner = self.own.fit(transfer_set, pool)
        self.rounds.append((transfer_set, as_floats(transfer_set.inputs(pool)[:]), learner))
        return learner

    def fresh(self, number: int = 0) -> Learner:
        raise AssertionError("not by these attacks")

    def show(self, own: Any, queries: int) -> None:
        raise AssertionError("what they train is track A")


def logged(folder: Path, column: str) -> np.ndarray:
    """A column of the provider's log, in the order of asking."""
    parts = []
    for path in sorted((folder / "provider_log").glob("*.npz")):
        with np.load(path) as shard:
            parts.append(shard[column])
    return np.concatenate(parts)


# --- steps --------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 1000),
    st.sampled_from(["linf", "l2"]),
    st.floats(0.01, 2),
    st.floats(0.01, 2),
    st.integers(1, 5),
    st.sampled_from([towards, away_from]),
)
@settings(max_examples=40, deadline=None)
def test_moves_stay_in_the_box_and_in_the_ball_of_their_norm(
    seed: int, norm: str, radius: float, step: float, steps: int, aim: Any
) -> None:
    starts, labels = pictures(5, seed), answers_to(pictures(5), seed).labels
    kept = starts.copy()
    learner = Fixed(Normalising(seed))
    made = moved(learner, starts, aim, (labels,), UNIT_BOX, norm=norm, radius=radius, step=step, steps=steps)
    assert made.dtype == np.float32
    assert ((made >= 0) & (made <= 1)).all()
    assert (lengths(made - starts, norm) <= min(radius, step * steps) + 1e-5).all()
    np.testing.assert_array_equal(starts, kept)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_inside_the_box_has_exactly_its_length(norm: str) -> None:
    starts = np.full((6, 3, 3, 1), 0.5, np.float32)
    made = JBDA(step=0.07, norm=norm).moves(
        Fixed(Normalising(1)), starts, answers_to(starts), 0, UNIT_BOX, np.random.default_rng(0)
    )
    np.testing.assert_allclose(lengths(made - starts, norm), 0.07, rtol=1e-4)
    if norm == "linf":
        np.testing.assert_allclose(np.abs(made - starts), 0.07, rtol=1e-4)


@pytest.mark.parametrize(("number", "toward_label", "sign"), [(0, True, 1), (2, True, 1), (3, True, -1), (6, True, 1),
                                                              (0, False, -1), (3, False, 1)])  # fmt: skip
def test_jbda_is_the_papers_formula_one_input_at_a_time(number: int, toward_label: bool, sign: int) -> None:
    starts, answers = pictures(7), answers_to(pictures(7))
    module = Normalising(2)
    attack = JBDA(toward_label=toward_label)
    made = attack.moves(Fixed(module), starts, answers, number, UNIT_BOX, np.random.default_rng(0))
    for start, label, one in zip(starts, answers.labels, made, strict=True):
        pixels = torch.from_numpy(start[None])
        jacobian = torch.autograd.functional.jacobian(lambda x: module(x).softmax(dim=1)[0], pixels)
        expected = np.clip(start + sign * 0.1 * np.sign(jacobian[label, 0].numpy()), 0, 1)
        np.testing.assert_allclose(one, expected, atol=1e-6)


def test_jb_self_moves_into_the_own_class_in_every_round() -> None:
    starts, answers = pictures(20), answers_to(pictures(20))
    learner = Fixed(Normalising(3))
    for number in (0, 3, 5):
        made = JBSelf(step=0.01).moves(learner, starts, answers, number, UNIT_BOX, np.random.default_rng(0))
        before, after = (
            towards(torch.from_numpy(learner.predict(x)), torch.from_numpy(answers.labels)) for x in (starts, made)
        )
        assert (after < before).all()


def by_hand(learner: Fixed, start: np.ndarray, target: int, radius: float, step: float, steps: int) -> np.ndarray:
    """Targeted projected descent in L2, of one input."""
    x = start.copy()
    for _ in range(steps):
        pixels = torch.from_numpy(x[None]).requires_grad_()
        (gradient,) = torch.autograd.grad(learner.logits(pixels).log_softmax(dim=1)[0, target], pixels)
        by = x + step * (gradient[0] / gradient.norm()).numpy() - start
        x = np.clip(start + by * min(1.0, radius / np.linalg.norm(by)), 0, 1).astype(np.float32)
    return x


@pytest.mark.parametrize(
    ("attack", "k", "step", "steps", "radius"),
    [
        (JBTopK(k=2, norm="l2"), 2, 0.01, 8, 0.1),
        (JBDATR(k=3, norm="l2"), 3, 1.85 * 0.1 / 8, 8, 0.1),
        (JBDATR(k=9, norm="l2"), 3, 1.85 * 0.1 / 8, 8, 0.1),
        (Prada(norm="l2"), 1, 64 / 255 / 11, 11, 64 / 255),
    ],
)
def test_trap_targets_redrawn_at_each_step(attack: Any, k: int, step: float, steps: int, radius: float) -> None:
    """Each new input is what one class alone leads to, from the first step to the last; never the label's own."""
    starts, answers = pictures(8), answers_to(pictures(8))
    learner = Fixed(Normalising(4))
    made = attack.moves(learner, starts, answers, 0, UNIT_BOX, np.random.default_rng(5))
    assert len(made) == k * len(starts)
    likely = np.argsort(-learner.predict(starts), axis=1)
    chosen = []
    for i, start in enumerate(starts):
        others = [c for c in likely[i] if c != answers.labels[i]]
        ends = {c: by_hand(learner, start, c, radius, step, steps) for c in others}
        found = [[c for c, end in ends.items() if np.abs(end - made[j]).max() < 1e-5] for j in range(i * k, i * k + k)]
        assert all(len(each) == 1 for each in found), "one target leads there"
        targets = [each[0] for each in found]
        assert len(set(targets)) == k, "those of one input differ"
        if isinstance(attack, JBTopK):
            assert targets == others[:k]
        chosen += targets
    assert len(set(chosen)) > 1


def test_rows_do_not_depend_on_what_else_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, answers = pictures(7), answers_to(pictures(7))
    whole = JBDATR().moves(Fixed(Normalising(6)), starts, answers, 0, UNIT_BOX, np.random.default_rng(0))
    monkeypatch.setattr(_moves, "ROWS_AT_ONCE", 3)
    parts = JBDATR().moves(Fixed(Normalising(6)), starts, answers, 0, UNIT_BOX, np.random.default_rng(0))
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert moved(Fixed(Normalising(6)), starts[:0], towards, (answers.labels[:0],), UNIT_BOX,
                 norm="l2", radius=1, step=1, steps=1).shape == (0, 3, 3, 1)  # fmt: skip


def test_a_table_is_measured_in_deviations_and_stays_in_the_range_of_its_seeds() -> None:
    columns = np.random.default_rng(0).normal(size=(50, 3)) * [1, 100, 0] + [0, 0, 7]
    seeds = columns.astype(np.float32)
    box = Box.around(InputSpec("table", (3,)), seeds)
    learner = Fixed(torch.nn.Linear(3, CLASSES))
    with torch.no_grad():
        learner.module.weight.div_(torch.tensor([1.0, 100.0, 1.0]))
    made = JBDA().moves(learner, seeds, answers_to(seeds), 0, box, np.random.default_rng(0))
    assert ((made >= seeds.min(axis=0)) & (made <= seeds.max(axis=0))).all()
    change = np.abs(made - seeds) / seeds.std(axis=0).clip(1e-9)
    np.testing.assert_allclose(np.median(change[:, :2], axis=0), 0.1, rtol=1e-3)
    np.testing.assert_array_equal(made[:, 2], 7)


# --- the traps of published code ----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_trap_clipping_in_normalised_space(name: str, norm: str) -> None:
    """A black background, which normalisation makes negative, can stay black, and nothing moves further than it may."""
    starts = np.zeros((12, 3, 3, 1), np.float32)
    learner, random = Fixed(Normalising(7)), np.random.default_rng(0)
    attack = ATTACKS[name](norm=norm)
    if isinstance(attack, CloudLeak):
        goal, about = triplet, (learner.predict(starts), learner.predict(pictures(12)), np.ones(12, np.float32))
        made = moved(learner, starts, goal, about, UNIT_BOX, norm=norm, radius=0.1, step=0.05, steps=4)
    else:
        made = attack.moves(learner, starts, answers_to(starts), 0, UNIT_BOX, random)
    assert (made == 0).any()
    assert (made > 0).any()
    assert (lengths(made, norm) <= REACH.get(name, 0.1) + 1e-6).all()


@EVERY
@pytest.mark.parametrize("kind", ["image", "table"])
def test_trap_something_else_is_stored_than_was_asked(name: str, kind: str, tmp_path: Path) -> None:
    pool = a_labelled_pool(kind, POOL)
    transfer_set, provider, _ = extracted(ATTACKS[name](), tmp_path, kind, 33, pool)
    provider.close()
    assert transfer_set.made is not None
    assert (transfer_set.rows[:SEEDS] >= 0).all()
    assert (transfer_set.rows[SEEDS:] == -1).all()
    asked = np.concatenate([content_keys(pool.inputs[transfer_set.rows[:SEEDS]]), content_keys(transfer_set.made)])
    np.testing.assert_array_equal(logged(tmp_path, "key"), asked)
    told = torch.from_numpy(ToyTeacherOf(kind).predict(transfer_set.inputs(pool)[:])).softmax(dim=1).numpy()
    np.testing.assert_allclose(transfer_set.posteriors, told, atol=1e-5)


@EVERY
@pytest.mark.parametrize("kind", ["image", "table"])
def test_trap_earlier_samples_and_the_pool_are_overwritten(name: str, kind: str, tmp_path: Path) -> None:
    pool = a_labelled_pool(kind, POOL)
    before = np.array(pool.inputs[:], copy=True)
    student = Watched(kind)
    with serve(a_toy_provider(tmp_path, kind, 60)) as oracle:
        final = ATTACKS[name]().extract(oracle, pool, student, seed=0)
    inputs = np.array(final.inputs(pool)[:])
    assert len(student.rounds) >= 2
    for transfer_set, as_it_was, _ in student.rounds:
        np.testing.assert_array_equal(inputs[: len(transfer_set)], as_it_was)
        np.testing.assert_array_equal(as_floats(transfer_set.inputs(pool)[:]), as_it_was)
        np.testing.assert_array_equal(final.posteriors[: len(transfer_set)], transfer_set.posteriors)
    np.testing.assert_array_equal(pool.inputs[:], before)
    assert len(np.unique(content_keys(inputs))) > 2 * SEEDS, "the new samples are new"


@EVERY
def test_trap_a_round_goes_on_from_the_model_of_the_last_one(name: str, tmp_path: Path) -> None:
    pool, student = a_labelled_pool("table", POOL), Watched("table")
    with serve(a_toy_provider(tmp_path, "table", 60)) as oracle:
        ATTACKS[name]().extract(oracle, pool, student, seed=0)
    sizes = [len(transfer_set) for transfer_set, *_ in student.rounds]
    assert sizes == sorted(set(sizes))
    assert len({id(learner.module) for *_, learner in student.rounds}) == len(sizes)
    for transfer_set, _, learner in student.rounds:
        alone = an_apprentice("table").fit(transfer_set, pool)
        np.testing.assert_array_equal(learner.predict(pool.inputs), alone.predict(pool.inputs))


@pytest.mark.parametrize("name", ["jb_top_k", "jbda_tr"])
def test_trap_more_answers_than_are_paid_for(name: str, tmp_path: Path) -> None:
    """k new inputs for each are k answers, and the round that the budget cuts short is cut inside an input's k."""
    pool, student = a_labelled_pool("table", POOL), Watched("table")
    provider = a_toy_provider(tmp_path, "table", 50)
    with serve(provider) as oracle:
        final = ATTACKS[name]().extract(oracle, pool, student, seed=0)
    assert [len(transfer_set) for transfer_set, *_ in student.rounds] == [6, 24]
    assert len(final) == provider.cost().queries == 50


# --- budgets ------------------------------------------------------------------------------------------------------


@EVERY
@given(
    queries=st.sampled_from([SEEDS, SEEDS + 1, 2 * SEEDS - 1, 2 * SEEDS, 2 * SEEDS + 1, POOL, POOL + 1, 55])
    | st.integers(SEEDS, 70),
    seed=st.integers(0, 3),
)
@settings(max_examples=5, deadline=None)
def test_the_budget_is_spent_to_the_last_answer(name: str, queries: int, seed: int) -> None:
    pool = a_labelled_pool("table", POOL)
    with TemporaryDirectory() as folder:
        transfer_set, provider, student = extracted(ATTACKS[name](), Path(folder), "table", queries, pool, seed)
        assert len(transfer_set) == provider.cost().queries == queries
        assert len(transfer_set.inputs(pool)) == queries
        assert student.shown == []
        provider.close()


@EVERY
@pytest.mark.parametrize("queries", [1, CLASSES, SEEDS - 1])
def test_a_budget_smaller_than_the_seeds_is_refused(name: str, queries: int, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=rf"pays for {queries} answers, but .* starts from 6 \(attack.seeds\)") as e:
        extracted(ATTACKS[name](), tmp_path, "table", queries, a_labelled_pool("table", POOL))
    assert e.value.key == "budget"
    assert not (tmp_path / "provider_log").exists()


def test_a_pool_smaller_than_the_seeds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"holds 5 inputs, but Prada starts from 6 \(attack.seeds\)"):
        extracted(ATTACKS["prada"](), tmp_path, "table", 30, a_labelled_pool("table", 5))
    assert not (tmp_path / "provider_log").exists()


@EVERY
def test_labels_are_enough_and_the_seed_decides(name: str, tmp_path: Path) -> None:
    pool, access = a_labelled_pool("image", POOL), InterfaceProfile(Reveals.LABEL)
    first, again, other = (
        extracted(ATTACKS[name](), tmp_path / str(i), "image", 40, pool, seed, access=access)[0]
        for i, seed in enumerate((0, 0, 1))
    )
    assert set(np.unique(first.posteriors)) == {0, 1}
    assert first.profile == "label"
    np.testing.assert_array_equal(again.rows, first.rows)
    np.testing.assert_array_equal(again.made, first.made)
    assert not np.array_equal(other.rows, first.rows)
    random, *_ = extracted(KnockoffRandom(), tmp_path / "random", "image", 40, pool, 0, access=access)
    np.testing.assert_array_equal(first.rows[:SEEDS], random.rows[:SEEDS])


def test_a_reservoir_bounds_the_later_rounds(tmp_path: Path) -> None:
    student = Watched("table")
    with serve(a_toy_provider(tmp_path, "table", 40)) as oracle:
        JBDA(seeds=SEEDS, reservoir=5, reservoir_after=1).extract(oracle, a_labelled_pool("table", POOL), student, 0)
    assert [len(transfer_set) for transfer_set, *_ in student.rounds] == [6, 12, 17, 22, 27, 32, 37]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jbda", {"step": 0.0}),
        ("jbda", {"flip_every": 0}),
        ("jbda", {"norm": "l1"}),
        ("jb_self", {"reservoir": 0}),
        ("jb_top_k", {"k": 0}),
        ("jb_top_k", {"step": -1.0}),
        ("jbda_tr", {"steps": 0}),
        ("prada", {"epsilon": float("inf")}),
        ("prada", {"reservoir_after": -1}),
        ("cloud_leak", {"alpha": 0.0}),
        ("cloud_leak", {"norm": "l1"}),
    ],
)
def test_options_out_of_range_are_named(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is "):
        ATTACKS[name](**options)


# --- CloudLeak ----------------------------------------------------------------------------------------------------


def test_cloud_leak_moves_inputs_to_where_the_student_hesitates_and_asks_the_least_sure(tmp_path: Path) -> None:
    class Seen(CloudLeak):
        def fooling(self, learner, starts, asked, box, rng):  # type: ignore[no-untyped-def]
            made = super().fooling(learner, starts, asked, box, rng)
            seen.append((learner.predict(starts), learner.predict(made), made))
            return made

    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    pool = a_labelled_pool("image", 60)
    provider = a_toy_provider(tmp_path, "image", 30)
    with serve(provider) as oracle:
        final = Seen(seeds=20, rounds=1, candidates=4).extract(oracle, pool, an_apprentice("image", epochs=30), 0)
    ((before, after, made),) = seen
    assert len(made) == 40
    gap = lambda logits: np.abs(np.diff(np.sort(torch.from_numpy(logits).softmax(1).numpy(), axis=1)[:, -2:]))[:, 0]  # noqa: E731
    assert gap(after).mean() < 0.8 * gap(before).mean()
    asked = content_keys(final.made)
    np.testing.assert_array_equal(asked, content_keys(made)[np.argsort(gap(after), kind="stable")[:10]])


def test_an_input_rests_once_it_is_near_enough_to_its_guide() -> None:
    learner, starts = Fixed(Normalising(8)), pictures(4)
    about = (learner.predict(starts), learner.predict(pictures(4, 1)), np.float32([-1e6, -1e6, 1e6, 1e6]))
    made = moved(learner, starts, triplet, about, UNIT_BOX, norm="l2", radius=0.5, step=0.1, steps=3)
    np.testing.assert_array_equal(made[:2], starts[:2])
    assert (made[2:] != starts[2:]).any(axis=(1, 2, 3)).all()


def test_the_least_sure_come_first() -> None:
    logits = np.log(np.array([[0.9, 0.1, 0], [0.4, 0.35, 0.25], [0.5, 0.5, 0], [0.6, 0.3, 0.1]]) + 1e-9)
    np.testing.assert_array_equal(least_sure(logits.astype(np.float32), 3), [2, 1, 3])
