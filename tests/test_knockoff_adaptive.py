"""The adaptive Knockoff: a policy that finds what is worth asking, and stays finite whatever the rewards are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_toys import CLASSES, NAMES, TABLE, ToyTeacherOf, a_labelled_pool, an_apprentice, extracted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.attacks import _own
from distill.attacks._bandit import Bandit, Standardised
from distill.attacks.knockoff_adaptive import KnockoffAdaptive
from distill.errors import DistillError
from distill.records import Examples, InterfaceProfile, Reveals

EXTREME = [0.0, 1.0, -1.0, 1e30, -1e30, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), 5e-324]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.sampled_from([1, CLASSES, 6, 7, 8, 21]), batch=st.sampled_from([1, 7, 50]))
def test_the_budget_is_spent_exactly(budget: int, batch: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    pool = a_labelled_pool("table", 20)
    folder = tmp_path_factory.mktemp("run")
    asked, provider, student = extracted(KnockoffAdaptive(batch=batch), folder, "table", budget, pool)
    spent = min(budget, 20)
    assert len(asked) == provider.cost().queries == len(set(asked.rows.tolist())) == spent
    assert student.shown[-1][0] == spent
    assert 1 <= len(student.shown) <= 10


def test_a_seed_reproduces_queries_and_student_and_the_global_state_is_left_alone(tmp_path: Path) -> None:
    pool = a_labelled_pool("image", 40)
    state = torch.random.get_rng_state()
    runs = [
        extracted(KnockoffAdaptive(batch=3), tmp_path / str(number), "image", 20, pool, seed=seed)
        for number, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    (first, _, own), (again, _, same), (other, *_) = runs
    np.testing.assert_array_equal(first.rows, again.rows)
    np.testing.assert_array_equal(own.shown[-1][1].predict(pool.inputs[:5]), same.shown[-1][1].predict(pool.inputs[:5]))
    assert not np.array_equal(first.rows, other.rows)


def test_a_pool_without_labels_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    pool = replace(a_labelled_pool("table", 20), labels=None)
    with pytest.raises(DistillError, match=r"attack: .*has no labels; choose another pool"):
        extracted(KnockoffAdaptive(), tmp_path, "table", 10, pool)
    assert not (tmp_path / "provider_log").exists()


@settings(max_examples=50, deadline=None)
@given(rewards=st.lists(st.sampled_from(EXTREME) | st.floats(), min_size=1, max_size=60), seed=st.integers(0, 9))
def test_policy_and_preferences_stay_finite(rewards: list[float], seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 4, 100)
    bandit, worth = Bandit(labels, 5, np.random.default_rng(seed)), Standardised()
    with np.errstate(all="raise", under="ignore"):
        for reward in rewards:
            bandit.draw(1)
            bandit.learn(worth(np.array([reward])))
        policy = bandit.policy()
    assert np.isfinite(bandit.preferences).all()
    assert np.isfinite(policy).all()
    assert policy.sum() == pytest.approx(1)


@pytest.mark.parametrize("preference", [800.0, 1e6, 1e300])
def test_a_preference_beyond_the_range_of_exp_is_a_sure_choice(preference: float) -> None:
    bandit = Bandit(np.repeat(np.arange(3), 2), 5, np.random.default_rng(0))
    bandit.preferences[1] = preference
    np.testing.assert_array_equal(bandit.policy(), [0, 1, 0])
    assert len(set(bandit.draw(6).tolist())) == 6  # the others' turn comes when the class is used up


def test_a_constant_reward_changes_nothing() -> None:
    bandit, worth = Bandit(np.arange(40) % 4, 5, np.random.default_rng(0)), Standardised()
    for _ in range(40):
        bandit.draw(1)
        bandit.learn(worth(np.array([0.7])))
    np.testing.assert_array_equal(bandit.preferences, np.zeros(4))


def test_an_update_by_hand() -> None:
    bandit = Bandit(np.arange(40) % 2, 5, np.random.default_rng(0))
    first = int(bandit.draw(1)[0]) % 2
    bandit.learn(np.array([1.0]))  # there is no baseline yet but the reward itself
    np.testing.assert_array_equal(bandit.preferences, [0, 0])
    second = int(bandit.draw(1)[0]) % 2
    bandit.learn(np.array([3.0]))
    step = (3.0 - 1.0) / (2 if second == first else 1)
    expected = np.full(2, -step * 0.5)
    expected[second] += step
    np.testing.assert_allclose(bandit.preferences, expected)


def test_the_running_scale_is_that_of_all_numbers_so_far() -> None:
    numbers = np.random.default_rng(0).normal(3, 2, 30)
    scaled = Standardised()(numbers)
    for i in range(1, 30):
        assert scaled[i] == pytest.approx((numbers[i] - numbers[: i + 1].mean()) / numbers[: i + 1].std())
    assert scaled[0] == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_policy_finds_a_planted_good_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bandit, worth = Bandit(np.arange(4000) % 4, 25, rng), Standardised()
    for _ in range(600):
        row = bandit.draw(1)
        bandit.learn(worth(float(row[0] % 4 == 2) + 0.1 * rng.normal(size=1)))
    assert bandit.policy()[2] > 0.6


def test_certain_answers_draw_the_attack_to_their_class(tmp_path: Path) -> None:
    """Of four classes of the pool, the teacher is sure of one alone."""
    random = np.random.default_rng(0)
    labels = np.arange(800) % 4
    inputs = random.normal(size=(800, *TABLE.shape)).astype(np.float32)
    inputs *= np.where(labels == 1, 4.0, 0.05)[:, None].astype(np.float32)
    pool = Examples(inputs, TABLE, labels, NAMES, "planted")
    asked, *_ = extracted(KnockoffAdaptive(reward="certainty", batch=4), tmp_path, "table", 300, pool)
    drawn = np.bincount(labels[asked.rows], minlength=4)
    assert drawn[1] > 1.5 * np.delete(drawn, 1).max()


def test_rewards_by_hand() -> None:
    attack, own = KnockoffAdaptive(window=2), an_apprentice("table").fresh()
    answers = np.array([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=np.float32)
    before = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], dtype=np.float32)
    inputs = torch.zeros(2, *TABLE.shape)
    earned = attack._earned(answers, before, own, inputs)
    np.testing.assert_allclose(earned["certainty"], [0.2, 1.0], atol=1e-6)
    # Means of the two answers before each: (.5, .5, 0, 0) and (.25, .65, .1, 0).
    np.testing.assert_allclose(earned["diversity"], [0.2, 1.0], atol=1e-6)
    logs = own.logits(inputs).log_softmax(1).detach().numpy()
    np.testing.assert_allclose(earned["loss"], -(answers * logs).sum(1), rtol=1e-5)


def test_labels_alone_leave_certainty_without_a_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earned: dict[str, list[float]] = {"certainty": [], "all": []}
    for reward, told in earned.items():
        learn = Bandit.learn
        with monkeypatch.context() as patched:
            patched.setattr(Bandit, "learn", lambda self, r, told=told, learn=learn: (told.extend(r), learn(self, r)))
            access = InterfaceProfile(Reveals.LABEL)
            attack, pool = KnockoffAdaptive(reward=reward), a_labelled_pool("table", 30)
            extracted(attack, tmp_path / reward, "table", 20, pool, access=access)
    assert set(earned["certainty"]) == {0.0}
    assert np.std(earned["all"]) > 0.1  # diversity and loss still tell answers apart


def test_the_attacks_own_student_learns(tmp_path: Path) -> None:
    pool = a_labelled_pool("table", 400)
    _, _, student = extracted(KnockoffAdaptive(lr=1e-2), tmp_path, "table", 300, pool)
    truth = ToyTeacherOf("table").predict(pool.inputs).argmax(axis=1)
    agreement = [(own.predict(pool.inputs).argmax(axis=1) == truth).mean() for _, own in student.shown]
    assert agreement[-1] > 0.8 > agreement[0]


def test_a_table_is_standardised_by_what_the_attacker_holds() -> None:
    table = np.random.default_rng(0).normal(50, 9, size=(200, *TABLE.shape)).astype(np.float32)
    standardise = next(iter(_own.begin(an_apprentice("table"), table).module.children()))
    np.testing.assert_allclose(standardise(torch.from_numpy(table)).mean(0), 0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"), [({"reward": "loses"}, "reward"), ({"batch": 0}, "batch"), ({"lr": 0}, "lr")]
)
def test_options_out_of_range_are_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} "):
        KnockoffAdaptive(**options)
