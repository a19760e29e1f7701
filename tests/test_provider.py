"""Provider, ledger, journal and oracle: what is billed, what is logged, and that an interrupted attack goes on."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from commands import Running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import ToyTeacher, a_pool, a_provider, collect, flip_a_bit, query_stage, tables, tallied, truncate

from distill import transfer
from distill.errors import BadAnswer, BudgetExceeded, DistillError
from distill.provider.defenses.gaussian_noise import GaussianNoise
from distill.provider.defenses.none import NoDefense
from distill.provider.defenses.rounding import Rounding
from distill.provider.defenses.top_k import TopK
from distill.provider.ledger import Ledger
from distill.provider.oracle import serve
from distill.randomness import KeyedRandom
from distill.records import Answers, Budget, InterfaceProfile, Queries, Reveals, softmax

PROBS = InterfaceProfile(Reveals.PROBS)


# --- ledger ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usd", "price", "answers"),
    [(0.3, 0.1, 3), (0.7, 0.1, 7), (1.0, 0.001, 1000), (0.0999, 0.1, 0), (1e20, 1e-10, sys.maxsize)],
)
def test_money_is_counted_in_the_decimals_that_were_typed(usd: float, price: float, answers: int) -> None:
    ledger = Ledger(Budget(usd=usd), price)
    assert ledger.affordable() == answers
    for _ in range(min(answers, 1000)):
        ledger.bill(1)
    if 0 < answers <= 1000:
        assert ledger.cost().usd == usd


@settings(max_examples=200, deadline=None)
@given(
    queries=st.none() | st.integers(1, 50),
    cents=st.none() | st.integers(1, 500),
    price_cents=st.integers(0, 30),
    asks=st.lists(st.integers(0, 30), max_size=20),
)
def test_no_sequence_of_bills_passes_the_budget(
    queries: int | None, cents: int | None, price_cents: int, asks: list[int]
) -> None:
    if queries is None and (cents is None or price_cents == 0):
        return
    budget = Budget(queries, None if cents is None else cents / 100)
    ledger = Ledger(budget, price_cents / 100)
    for asked in asks:
        before = ledger.queries
        affordable = ledger.affordable()
        if asked > affordable:
            with pytest.raises(BudgetExceeded) as caught:
                ledger.bill(asked)
            assert (caught.value.affordable, ledger.queries) == (affordable, before)
        else:
            ledger.bill(asked)
            assert ledger.queries == before + asked
        assert queries is None or ledger.queries <= queries
        assert cents is None or Fraction(price_cents) * ledger.queries <= cents


@pytest.mark.parametrize(
    ("budget", "price", "key"),
    [(Budget(usd=1.0), 0.0, "budget.usd"), (Budget(queries=1), -0.1, "access.usd_per_query")],
)
def test_budgets_that_bound_nothing_are_refused(budget: Budget, price: float, key: str) -> None:
    with pytest.raises(DistillError) as caught:
        Ledger(budget, price)
    assert caught.value.key == key


# --- the oracle -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.integers(1, 40), asks=st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=8))
def test_an_attacker_never_gets_more_answers_than_it_can_pay_for(
    tmp_path_factory: pytest.TempPathFactory, budget: int, asks: list[tuple[int, bool]]
) -> None:
    pool = a_pool(30)
    provider = a_provider(tmp_path_factory.mktemp("p"), budget=Budget(queries=budget), usd_per_query=0.1)
    received = 0
    with serve(provider) as oracle:
        for asked, partial in asks:
            affordable = oracle.affordable()
            queries = Queries.of_pool(pool, np.arange(asked))
            if asked > affordable and not partial:
                with pytest.raises(BudgetExceeded) as caught:
                    oracle.ask(queries)
                assert (caught.value.asked, caught.value.affordable) == (asked, affordable)
            else:
                answers = oracle.ask(queries, partial=partial)
                assert len(answers) == min(asked, affordable)
                received += len(answers)
            assert oracle.spent().queries == received <= budget
            assert oracle.spent().usd == pytest.approx(received * 0.1)
            assert oracle.affordable() == budget - received


def test_answers_are_the_teachers_whatever_the_size_of_the_question(tmp_path: Path) -> None:
    teacher, pool = ToyTeacher(), a_pool(50)
    expected = softmax(teacher.predict(pool.inputs))
    for step in (1, 7, 50):
        provider = a_provider(tmp_path / str(step))
        provider.rows_at_once = 9
        got = collect(provider, pool, np.arange(50), step)
        np.testing.assert_array_equal(got.posteriors, expected)


@pytest.mark.parametrize(("remote", "price"), [(True, 0.0), (False, 0.01), (False, 0.0)])
def test_answers_to_made_inputs_are_kept_before_they_are_handed_on_if_they_were_paid_for(
    tmp_path: Path, remote: bool, price: float
) -> None:
    """A free teacher of one's own answers again, where the journal does not: nobody else asks about such an input."""
    teacher, paid, answers = ToyTeacher(remote=remote), remote or price > 0, []
    teacher.usd_per_query = price
    provider = a_provider(tmp_path, teacher, GaussianNoise())
    for ask in range(3):
        answers.append(provider.answer(tables(10, seed=ask), np.full(10, -1)).posteriors)
        stored = sum(int(path.name.split("-")[1]) for path in (tmp_path / "cache").rglob("*.npz"))
        assert stored == (10 * (ask + 1) if paid else 0)
    provider.close()
    assert teacher.forwards == 30
    again = a_provider(tmp_path, teacher, GaussianNoise())
    for ask in range(3):
        np.testing.assert_array_equal(again.answer(tables(10, seed=ask), np.full(10, -1)).posteriors, answers[ask])
    assert teacher.forwards == 30, "played back"
    anew = a_provider(tmp_path, teacher, GaussianNoise(), log=tmp_path / "another_log")
    np.testing.assert_array_equal(anew.answer(tables(10, seed=2), np.full(10, -1)).posteriors, answers[2])
    assert teacher.forwards - 30 == anew.cost().teacher_forwards == (0 if paid else 10)


def test_what_can_not_be_paid_for_is_not_even_computed(tmp_path: Path) -> None:
    provider = a_provider(tmp_path, budget=Budget(queries=5))
    with pytest.raises(BudgetExceeded):
        provider.answer(tables(6), np.arange(6))
    assert provider.cost().teacher_forwards == provider.cost().queries == 0


def test_every_answer_is_billed_but_the_teacher_works_once(tmp_path: Path) -> None:
    pool = a_pool(20)
    provider = a_provider(tmp_path, usd_per_query=0.01)
    collect(provider, pool, np.tile(np.arange(20), 3), 11)
    assert (provider.cost().queries, provider.cost().usd) == (60, 0.6)
    assert provider.cost().teacher_forwards == provider.teacher.forwards == 20
    other = a_provider(tmp_path, defense=Rounding(), log=tmp_path / "other_log")
    collect(other, pool, np.arange(20), 20)
    assert (other.cost().queries, other.cost().teacher_forwards) == (20, 0)


@pytest.mark.parametrize(
    ("output", "access", "defense", "profile"),
    [
        (Reveals.LOGITS, InterfaceProfile(Reveals.LOGITS), NoDefense(), "logits"),
        (Reveals.LOGITS, InterfaceProfile(Reveals.LOGITS), Rounding(), "logits"),
        (Reveals.PROBS, InterfaceProfile(Reveals.LOGITS), NoDefense(), "probs"),
        (Reveals.LOGITS, InterfaceProfile(Reveals.TOP_K, 3), TopK(2), "top_2"),
        (Reveals.LOGITS, InterfaceProfile(Reveals.TOP_K, 2), NoDefense(), "top_2"),
        (Reveals.LOGITS, PROBS, NoDefense(), "probs"),
        (Reveals.LOGITS, InterfaceProfile(Reveals.LABEL), NoDefense(), "label"),
        (Reveals.LABEL, PROBS, NoDefense(), "label"),
    ],
)
def test_an_answer_is_no_richer_than_access_defense_and_teacher_allow(
    tmp_path: Path, output: Reveals, access: InterfaceProfile, defense: object, profile: str
) -> None:
    provider = a_provider(tmp_path, ToyTeacher(output=output), defense, access=access)
    assert str(provider.profile) == profile
    with serve(provider) as oracle:
        answers = oracle.ask(Queries.made(tables(40)))
        nothing = oracle.ask(Queries.made(tables(0)))
    assert len(nothing) == 0
    assert (answers.logits is not None) == (nothing.logits is not None) == (profile == "logits")
    if answers.logits is not None:
        np.testing.assert_allclose(softmax(answers.logits), answers.posteriors, atol=1e-6)
    if profile == "top_2":
        assert ((answers.posteriors > 0).sum(axis=1) <= 2).all()
    if profile == "label":
        assert set(np.unique(answers.posteriors)) == {0.0, 1.0}


def test_a_defense_that_hands_on_the_clean_logits_is_refused(tmp_path: Path) -> None:
    class Leaky(NoDefense):
        def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
            return Answers(np.full_like(answers.posteriors, 0.25), answers.logits)

    provider = a_provider(tmp_path, defense=Leaky(), access=InterfaceProfile(Reveals.LOGITS))
    with pytest.raises(BadAnswer, match=r"defense: .*logits that do not belong"):
        provider.answer(tables(3), np.arange(3))


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        (tables(2).astype(np.float64), "float64"),
        (tables(2)[:, :3], r"\(3,\)"),
        (np.array(["a", "b"], dtype=object), "object"),
    ],
)
def test_inputs_of_another_kind_are_refused_and_cost_nothing(tmp_path: Path, inputs: np.ndarray, what: str) -> None:
    provider = a_provider(tmp_path)
    with serve(provider) as oracle:
        with pytest.raises(DistillError, match=what):
            oracle.ask(Queries.made(inputs))
        assert oracle.spent().queries == 0
        assert len(oracle.ask(Queries.made(tables(2)))) == 2


def test_a_closed_oracle_says_so(tmp_path: Path) -> None:
    with serve(a_provider(tmp_path)) as oracle:
        pass
    with pytest.raises(DistillError, match="closed"):
        oracle.affordable()


def test_ctrl_c_reaches_an_attack_that_waits_for_a_slow_teacher(tmp_path: Path) -> None:
    provider = a_provider(tmp_path, ToyTeacher(seconds_per_call=1.0))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    started = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt), serve(provider) as oracle:
            oracle.ask(Queries.made(tables(ToyTeacher().rows_at_once * 2)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - started < 4


# --- bad answers ----------------------------------------------------------------------------------------------------


def _spoil(how: str, values: np.ndarray) -> np.ndarray:
    values = values.copy()
    match how:
        case "NaN":
            values[2, 1] = np.nan
        case "negative":
            values[2] = [1.2, -0.2, 0, 0]
        case "sum":
            values[2] *= 0.9
        case "(5, 3)":
            values = values[:, :3]
    return values


class Spoiled(ToyTeacher):
    how = ""

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return _spoil(self.how, super().predict(inputs))


@pytest.mark.parametrize("how", ["NaN", "negative", "sum", "(5, 3)"])
@pytest.mark.parametrize("who", ["teacher", "defense"])
def test_an_answer_that_is_no_distribution_is_refused_in_one_line(tmp_path: Path, who: str, how: str) -> None:
    class SpoiledDefense(NoDefense):
        def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
            return Answers(_spoil(how, answers.posteriors))

    teacher = Spoiled(output=Reveals.PROBS) if who == "teacher" else ToyTeacher(output=Reveals.PROBS)
    teacher.how = how
    provider = a_provider(tmp_path, teacher, SpoiledDefense() if who == "defense" else None)
    pool = a_pool(100)
    with pytest.raises(BadAnswer) as caught, serve(provider) as oracle:  # noqa: PT012
        with pytest.raises(DistillError, match="the provider failed"):
            oracle.ask(Queries.of_pool(pool, np.arange(70, 75)))
        with pytest.raises(DistillError, match="the provider failed"):  # and so does every later question
            oracle.affordable()
    assert caught.value.key == who
    assert "\n" not in str(caught.value)
    assert how in str(caught.value)
    assert how == "(5, 3)" or "row 72" in str(caught.value)
    if who == "teacher":  # nothing bad is kept
        good = a_provider(tmp_path, ToyTeacher(output=Reveals.PROBS))
        assert len(good.clean(pool.inputs)) == 100
        assert good.cost().teacher_forwards == 100


def test_sums_that_are_nearly_one_are_mended(tmp_path: Path) -> None:
    class Sloppy(ToyTeacher):
        def predict(self, inputs: np.ndarray) -> np.ndarray:
            return super().predict(inputs) * 1.0005

    clean = a_provider(tmp_path, Sloppy(output=Reveals.PROBS)).clean(tables(10))
    np.testing.assert_allclose(clean.posteriors.sum(axis=1), 1, atol=1e-6)


def test_the_teachers_own_exception_ends_the_run_even_if_the_attack_swallows_the_message(tmp_path: Path) -> None:
    class Broken(ToyTeacher):
        def predict(self, inputs: np.ndarray) -> np.ndarray:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), serve(a_provider(tmp_path, Broken())) as oracle:  # noqa: PT012
        with pytest.raises(DistillError) as told:
            oracle.ask(Queries.made(tables(3)))
        assert "memory" not in str(told.value)


@pytest.mark.parametrize(
    ("access", "defense", "key"),
    [(InterfaceProfile(Reveals.TOP_K, 5), NoDefense(), "access.top_k"), (PROBS, TopK(5), "defense")],
)
def test_top_k_beyond_the_number_of_classes_is_refused_before_any_query(
    tmp_path: Path, access: InterfaceProfile, defense: object, key: str
) -> None:
    with pytest.raises(DistillError, match="only 4 classes") as caught:
        a_provider(tmp_path, defense=defense, access=access)
    assert caught.value.key == key


# --- defenses behind the door ---------------------------------------------------------------------------------------


def test_noise_depends_on_content_and_repeat_not_on_batches(tmp_path: Path) -> None:
    pool, rows = a_pool(30), np.random.default_rng(3).integers(0, 30, size=200)
    sets = [
        collect(a_provider(tmp_path / str(step), defense=GaussianNoise()), pool, rows, step) for step in (1, 13, 200)
    ]
    for other in sets[1:]:
        np.testing.assert_array_equal(other.posteriors, sets[0].posteriors)
    first, again = np.flatnonzero(rows == rows[0])[:2]
    assert (sets[0].posteriors[first] != sets[0].posteriors[again]).any()


def test_honest_users_get_the_first_answer_unbilled_and_unlogged(tmp_path: Path) -> None:
    pool = a_pool(30)
    provider = a_provider(tmp_path, defense=GaussianNoise())
    honest = provider.returned(pool.inputs)
    asked = collect(provider, pool, np.arange(30), 7)
    np.testing.assert_array_equal(honest.posteriors, asked.posteriors)
    np.testing.assert_array_equal(provider.returned(pool.inputs).posteriors, honest.posteriors)
    np.testing.assert_array_equal(provider.clean(pool.inputs).posteriors, softmax(ToyTeacher().predict(pool.inputs)))
    assert (provider.cost().queries, provider.cost().teacher_forwards) == (30, 30)
    assert len(provider.clean(tables(0))) == 0


def test_query_information_is_computed_once_for_each_query(tmp_path: Path) -> None:
    class Mixing(NoDefense):
        asked = 0

        def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
            Mixing.asked += len(inputs)
            return 1 / (1 + np.exp(-inputs[:, :1]))

        def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
            assert info is not None
            return Answers((1 - info) * answers.posteriors + info / answers.classes)

    pool = a_pool(30)
    first = collect(a_provider(tmp_path, defense=Mixing()), pool, np.arange(30), 7)
    probes = 1
    assert Mixing.asked == 30 + probes
    second = collect(a_provider(tmp_path, defense=Mixing(), log=tmp_path / "log2"), pool, np.arange(30), 30)
    assert Mixing.asked == 30 + 2 * probes
    np.testing.assert_array_equal(first.posteriors, second.posteriors)


# --- the journal: an attack that was interrupted goes on -------------------------------------------------------------


def _noisy(folder: Path, **changes: object) -> tuple[ToyTeacher, object]:
    teacher = ToyTeacher()
    return teacher, a_provider(folder, teacher, GaussianNoise(), **changes)


def test_a_replayed_attack_costs_the_teacher_nothing_and_is_billed_once(tmp_path: Path) -> None:
    pool, rows = a_pool(40), np.random.default_rng(0).integers(0, 40, size=100)
    first = collect(_noisy(tmp_path)[1], pool, rows, 9)
    log = {path.name for path in (tmp_path / "provider_log").iterdir()}
    teacher, provider = _noisy(tmp_path, cache=tmp_path / "another_cache")
    second = collect(provider, pool, rows, 9)
    np.testing.assert_array_equal(first.posteriors, second.posteriors)
    assert (teacher.forwards, provider.cost().queries) == (0, 100)
    assert {path.name for path in (tmp_path / "provider_log").iterdir()} == log


def test_an_attack_goes_on_after_the_end_of_the_log(tmp_path: Path) -> None:
    pool, rows = a_pool(40), np.arange(40)
    collect(_noisy(tmp_path)[1], pool, rows[:15], 5)
    teacher, provider = _noisy(tmp_path, cache=tmp_path / "another_cache")
    resumed = collect(provider, pool, rows, 10)
    np.testing.assert_array_equal(resumed.posteriors, collect(_noisy(tmp_path / "x")[1], pool, rows, 40).posteriors)
    assert (teacher.forwards, provider.cost().queries) == (25, 40)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_damaged_part_of_the_log_is_answered_again_and_the_same(
    tmp_path: Path, damage, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.provider.journal.FLUSH_S", 0.0)  # a shard for each question
    pool, rows = a_pool(40), np.random.default_rng(0).integers(0, 40, size=30)
    first = collect(_noisy(tmp_path)[1], pool, rows, 10)
    monkeypatch.undo()
    damage(sorted((tmp_path / "provider_log").glob("*.npz"))[which])
    for again in ("repaired", "whole"):
        teacher, provider = _noisy(tmp_path, cache=tmp_path / again)
        np.testing.assert_array_equal(collect(provider, pool, rows, 7).posteriors, first.posteriors)
        damaged_rows = len(set(rows[10 * which : 10 * which + 10].tolist()))
        assert teacher.forwards == (damaged_rows if again == "repaired" else 0)
        assert provider.cost().queries == 30


@pytest.mark.parametrize("changed", [0, 4, 10, 17])
def test_another_attack_drops_the_log_from_where_it_differs(
    tmp_path: Path, changed: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.provider.journal.FLUSH_S", 0.0)
    pool, rows = a_pool(60), np.arange(30)
    collect(_noisy(tmp_path)[1], pool, rows, 10)
    other = rows.copy()
    other[changed:] += 30
    for again in ("first", "second"):
        teacher, provider = _noisy(tmp_path, cache=tmp_path / again)
        got = collect(provider, pool, other, 7)
        np.testing.assert_array_equal(
            got.posteriors, collect(_noisy(tmp_path / f"x{again}")[1], pool, other, 30).posteriors
        )
        assert teacher.forwards == (30 - changed if again == "first" else 0)
    assert f"query {changed} is not the one that was logged" in caplog.text


def test_the_log_of_another_provider_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = a_pool(10)
    first = collect(_noisy(tmp_path)[1], pool, np.arange(10), 10)
    second = collect(_noisy(tmp_path, seed=1)[1], pool, np.arange(10), 10)
    assert "another provider" in caplog.text
    assert (first.posteriors != second.posteriors).any()


# --- kill -9 --------------------------------------------------------------------------------------------------------

ROWS, STEP = 1_200, 50


def _stage(folder: Path, remote: bool, seconds_per_call: float = 0.002) -> Running:
    folder.mkdir(exist_ok=True)
    return Running(query_stage, folder, ROWS, STEP, remote, seconds_per_call, cwd=folder)


@pytest.mark.parametrize("remote", [False, True])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(tmp_path: Path, remote: bool) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _stage(whole, remote, 0.0).end().returncode == 0
    dice = random.Random(4)
    kills = 0
    # The moment is drawn in work done, not in seconds: a busy machine would be killed before it began.
    goals = sorted(dice.randrange(1, tallied(whole / "tally")) for _ in range(6))
    for goal in goals:
        running = _stage(killed, remote)
        while running.process.is_alive() and tallied(killed / "tally") < goal:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.01)
        running.process.kill()
        done = running.end()
        assert "Traceback" not in done.stderr
        kills += done.returncode == -signal.SIGKILL
    last = _stage(killed, remote).end()
    assert (last.returncode, last.stderr) == (0, "")
    assert kills >= 4
    names = {path.name for path in (whole / "transfer_set").iterdir()}
    assert {path.name for path in (killed / "transfer_set").iterdir()} == names
    for name in names:
        assert (whole / "transfer_set" / name).read_bytes() == (killed / "transfer_set" / name).read_bytes()
    assert transfer.load(killed / "transfer_set").posteriors.shape == (ROWS, 4)
    # Each kill loses the chunk that was being computed, and no other.
    chunk = min(STEP, ToyTeacher(remote=remote).rows_at_once)
    assert tallied(killed / "tally") <= tallied(whole / "tally") + kills * chunk
