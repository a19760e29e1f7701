"""The provider of text: what is billed and what is spent, what is asked once, what is revealed, what survives."""

from __future__ import annotations

import json
import random
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_one_door
from commands import Running
from hypothesis import given, settings
from hypothesis import strategies as st
from language_toys import SAMPLING, Parrot, a_text_provider, asked_in_all, query_stage, questions
from toys import flip_a_bit

from distill.errors import BadAnswer, BudgetExceeded, DistillError
from distill.language import Completions, Prompts, Sampling, SyntheticSet, encode_messages, texts
from distill.provider.language_provider import LanguageProvider
from distill.provider.ledger import LanguageLedger, Prices
from distill.provider.oracle import LanguageOracle, serve_text
from distill.provider.requests import RequestCache
from distill.records import Answers, Budget, InterfaceProfile, Reveals


def ask(provider: LanguageProvider, prompts: Prompts, **options: object) -> SyntheticSet:
    with serve_text(provider) as oracle:
        return oracle.ask(prompts, **options)


def same(a: Completions, b: Completions) -> None:
    for name in Completions.__dataclass_fields__:
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


# --- money, tokens, queries -----------------------------------------------------------------------------------------


def test_every_answer_is_billed_but_each_request_is_made_once(tmp_path: Path) -> None:
    first, second = Parrot(), Parrot()
    prices = Prices(usd_per_query=0.001, usd_per_mtok_in=0.15, usd_per_mtok_out=0.6)
    for teacher in (first, second):
        provider = a_text_provider(tmp_path, teacher, prices=prices)
        given = ask(provider, questions(10), samples=3)
        cost = provider.cost()
        assert cost.queries == len(given) == 30
        tokens = int(given.completions.prompt_tokens.sum()), int(given.completions.completion_tokens.sum())
        assert (cost.tokens_in, cost.tokens_out) == tokens
        expected = 30 * Fraction("0.001") + (tokens[0] * Fraction("0.15") + tokens[1] * Fraction("0.6")) / 1_000_000
        assert cost.usd == pytest.approx(float(expected), abs=1e-15)
        assert given.usd.sum() == pytest.approx(cost.usd, abs=1e-12)
    assert (first.asked, second.asked) == (30, 0), "the second run finds every answer in the cache"
    assert provider.cost().spent_usd == 0 == provider.cost().teacher_tokens


def test_what_is_really_spent_is_at_the_teachers_prices(tmp_path: Path) -> None:
    provider = a_text_provider(tmp_path, prices=Prices(usd_per_query=5.0))
    given = ask(provider, questions(6))
    tokens_in, tokens_out = (int(column.sum()) for column in (given.completions.prompt_tokens,
                                                              given.completions.completion_tokens))  # fmt: skip
    assert provider.cost().usd == 30.0
    assert provider.cost().spent_usd == pytest.approx((1.0 * tokens_in + 2.0 * tokens_out) / 1e6)
    assert provider.cost().teacher_tokens == tokens_out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 40)),
    st.one_of(st.none(), st.integers(1, 500)),
    st.one_of(st.none(), st.floats(1e-5, 1e-3)),
)
def test_no_budget_is_ever_passed(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: int,
    samples: int,
    queries: int | None,
    tokens: int | None,
    usd: float | None,
) -> None:
    if queries is tokens is usd is None:
        return
    budget, prices = Budget(queries, usd, tokens), Prices(1e-6, 1.0, 3.0)
    provider = a_text_provider(tmp_path_factory.mktemp("cache"), budget=budget, prices=prices)
    with serve_text(provider) as oracle:
        given = oracle.ask(questions(prompts), samples=samples, partial=True)
        # What is left does not pay for the longest answer to the next question, or everything was answered.
        if len(given) < prompts * samples:
            with pytest.raises(BudgetExceeded):
                oracle.ask(questions(prompts).take([len(given) // samples]))
    cost = provider.cost()
    assert cost.queries == len(given)
    assert queries is None or cost.queries <= queries
    assert tokens is None or cost.tokens_in + cost.tokens_out <= tokens
    assert usd is None or Fraction(cost.usd) <= Fraction(str(usd)) + Fraction(1, 10**15)


def test_what_can_not_be_paid_for_is_not_asked(tmp_path: Path) -> None:
    teacher = Parrot()
    with serve_text(a_text_provider(tmp_path, teacher, budget=Budget(queries=5))) as oracle:
        with pytest.raises(BudgetExceeded, match=r"affords only 5 .*budget\.queries=5"):
            oracle.ask(questions(6))
        assert teacher.asked == 0
        assert len(oracle.ask(questions(6), partial=True)) == 5
        assert oracle.affordable() == 0
        assert len(oracle.ask(questions(6), partial=True)) == 0


@pytest.mark.parametrize(
    ("budget", "prices", "key"),
    [
        ({"usd": 1.0}, Prices(), r"budget\.usd"),
        ({}, Prices(), "budget"),
        ({"tokens": 0}, Prices(), r"budget\.tokens"),
    ],
)
def test_budgets_that_bound_nothing_are_refused(budget: dict, prices: Prices, key: str) -> None:
    with pytest.raises(DistillError, match=key):
        LanguageLedger(Budget(**budget), prices)
    with pytest.raises(DistillError, match=r"access\.usd_per_mtok_out"):
        Prices(usd_per_mtok_out=-1.0)


def test_the_log_has_a_line_for_each_answer_also_after_a_playback(tmp_path: Path) -> None:
    for _ in range(2):
        provider = a_text_provider(tmp_path, prices=Prices(usd_per_query=0.5), log=tmp_path / "provider_log")
        ask(provider, questions(3), samples=2)
        lines = [json.loads(line) for line in (tmp_path / "provider_log/answers.jsonl").read_text().splitlines()]
        assert [line["repeat"] for line in lines] == [0, 1] * 3
        assert sum(line["usd"] for line in lines) == provider.cost().usd == 3.0
        assert len({line["request"] for line in lines}) == 6


# --- requests -------------------------------------------------------------------------------------------------------


def test_repeats_differ_and_greedy_answers_do_not(tmp_path: Path) -> None:
    teacher = Parrot()
    with serve_text(a_text_provider(tmp_path, teacher)) as oracle:
        drawn = oracle.ask(questions(1), samples=5)
        assert drawn.repeats.tolist() == [0, 1, 2, 3, 4]
        assert len(set(drawn.completions.column)) > 1
        again = oracle.ask(questions(1))
        assert again.repeats.tolist() == [5]
        asked = teacher.asked
        greedy = oracle.ask(questions(1), Sampling(max_tokens=9, temperature=0.0), samples=4)
        assert len(set(greedy.completions.column)) == 1
        assert teacher.asked == asked + 1, "a greedy answer is always the same"
    assert oracle_cost(tmp_path, 4) == 4


def oracle_cost(tmp_path: Path, n: int) -> int:
    provider = a_text_provider(tmp_path)
    ask(provider, questions(1), samples=n)
    return provider.cost().queries


def test_answers_do_not_depend_on_how_the_questions_are_put(tmp_path: Path) -> None:
    whole = ask(a_text_provider(tmp_path / "a"), questions(11)).completions
    with serve_text(a_text_provider(tmp_path / "b", Parrot(requests_at_once=3))) as oracle:
        parts = [oracle.ask(questions(11).take([row])).completions for row in range(11)]
    same(Completions.join(parts), whole)


def test_more_log_probabilities_are_asked_for_and_fewer_are_not(tmp_path: Path) -> None:
    def made(k: int | None) -> tuple[Completions, int]:
        teacher = Parrot()
        access = InterfaceProfile(Reveals.LABEL) if k is None else InterfaceProfile(Reveals.TOP_K, k)
        return ask(a_text_provider(tmp_path, teacher, access=access), questions(4)).completions, teacher.asked

    assert made(None)[1] == 4
    rich, asked = made(5)
    assert (asked, rich.top_k) == (4, 5)
    poorer, asked = made(2)
    assert (asked, poorer.top_k) == (0, 2)
    np.testing.assert_array_equal(poorer.top_ids, rich.top_ids[:, :2])
    assert made(None)[1] == 0


@pytest.mark.parametrize("bytes_of", ["truncated", "flipped"])
def test_a_damaged_shard_is_named_and_only_its_requests_are_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bytes_of: str
) -> None:
    before = ask(a_text_provider(tmp_path), questions(12)).completions
    shards = sorted((tmp_path / "requests" / "parrot").glob("*.npz"))
    assert len(shards) == 3
    if bytes_of == "flipped":
        flip_a_bit(shards[1])
    else:
        shards[1].write_bytes(shards[1].read_bytes()[:-5])
    teacher = Parrot()
    same(ask(a_text_provider(tmp_path, teacher), questions(12)).completions, before)
    assert teacher.asked == 4
    assert any(shards[1].name in record.getMessage() for record in caplog.records)


def test_a_failure_keeps_what_was_answered_before_it(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="teacher: the API is down"):
        ask(a_text_provider(tmp_path, Parrot(fails_after=9)), questions(20))
    teacher = Parrot()
    assert len(ask(a_text_provider(tmp_path, teacher), questions(20))) == 20
    assert teacher.asked == 12, "two batches of four had been stored"


def test_killed_at_random_moments_nothing_is_asked_twice(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(4):
        running = Running(query_stage, tmp_path, 0.01, cwd=tmp_path)
        deadline = time.monotonic() + 60
        goal = asked_in_all(tmp_path / "tally") + rng.randint(1, 9)
        while asked_in_all(tmp_path / "tally") < goal and running.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        running.process.kill()
        running.end()
    assert Running(query_stage, tmp_path, 0.01, cwd=tmp_path).end().returncode == 0
    # A kill between an answer and its storing loses that one; each of the four kills can do so once.
    assert 40 <= asked_in_all(tmp_path / "tally") <= 44
    teacher = Parrot()
    ask(a_text_provider(tmp_path / "cache", teacher), questions(40))
    assert teacher.asked == 0


def test_two_processes_make_each_request_once(tmp_path: Path) -> None:
    for running in [Running(query_stage, tmp_path, 0.005, cwd=tmp_path) for _ in range(2)]:
        assert running.end().returncode == 0
    assert asked_in_all(tmp_path / "tally") == 40


def test_texts_of_any_kind_survive_the_cache(tmp_path: Path) -> None:
    odd = texts(["", "a\nb\0c", "héllo 🙂", "\ud800 a lone surrogate", " " * 3])
    made = Completions(odd, texts(["stop"] * 5), np.arange(5), np.arange(5))
    keys = np.array([bytes([i]) * 16 for i in range(1, 6)], dtype="S16")
    RequestCache(tmp_path).get_or_generate(keys, 0, lambda rows: made.take(rows), 2)
    back = RequestCache(tmp_path).get_or_generate(keys[::-1], 0, lambda rows: pytest.fail("asked again"), 2)
    same(back, made.take(np.arange(5)[::-1]))


# --- the door and bad answers ---------------------------------------------------------------------------------------


def test_an_answer_is_no_richer_than_the_profile(tmp_path: Path) -> None:
    text = ask(a_text_provider(tmp_path), questions(3))
    assert text.profile == "text"
    assert text.completions.token_ids is None is text.completions.logprobs
    top = ask(a_text_provider(tmp_path, access=InterfaceProfile(Reveals.TOP_K, 3)), questions(3))
    assert (top.profile, top.completions.top_k) == ("top_3", 3)
    with pytest.raises(DistillError, match=r"access\.top_k: the teacher tells at most 20"):
        a_text_provider(tmp_path, access=InterfaceProfile(Reveals.TOP_K, 21))
    with pytest.raises(DistillError, match=r"access\.profile: the teacher does not tell whole distributions"):
        a_text_provider(tmp_path, access=InterfaceProfile(Reveals.PROBS))


def hoard(oracle: LanguageOracle) -> dict[str, Any]:
    """All that an attack is given, and what it can get by going wrong."""
    handed: dict[str, Any] = {"oracle": oracle, "ask": oracle.ask, "spent": oracle.spent()}
    handed["answers"] = oracle.ask(questions(3))
    try:
        oracle.ask(questions(3))
    except BudgetExceeded as error:
        handed["error"] = error
    return handed


def test_the_oracle_leads_to_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden = (Parrot, LanguageProvider, RequestCache, LanguageLedger)
    monkeypatch.setattr(test_one_door, "FORBIDDEN", forbidden)
    nothing = Answers(np.zeros((1, 1), dtype=np.float32))
    provider = a_text_provider(tmp_path, budget=Budget(queries=4))
    with serve_text(provider) as oracle:
        handed = hoard(oracle)
        assert "error" in handed
        assert test_one_door.leaks(handed, nothing) == []
    assert handed["spent"].spent_usd == 0, "what the provider pays is no business of the attacker"
    assert test_one_door.leaks({"provider": provider}, nothing), "the walk would have found one"


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda made: made.take(slice(0, 1)), "gave 1 answers to 3 requests"),
        (lambda made: Completions(**(vars(made) | {"logprobs": made.logprobs * np.nan})), "no log-probabilities"),
        (lambda made: Completions(**(vars(made) | {"top_logprobs": 1 - made.top_logprobs})), "no log-probabilities"),
    ],
)
def test_answers_that_are_none_are_refused_in_one_line(tmp_path: Path, spoil: object, what: str) -> None:
    class Broken(Parrot):
        def generate(self, *arguments: object, **options: object) -> Completions:
            return spoil(super().generate(*arguments, **options))

    access = InterfaceProfile(Reveals.TOP_K, 2)
    with pytest.raises(BadAnswer, match=f"teacher: .*{what}"):
        ask(a_text_provider(tmp_path, Broken(), access=access), questions(3))


def test_an_empty_prompt_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    teacher = Parrot()
    with pytest.raises(DistillError, match="pool: prompt 1 is empty"):
        ask(a_text_provider(tmp_path, teacher), Prompts.of_users(["a", ""]))
    assert teacher.asked == 0


# --- records --------------------------------------------------------------------------------------------------------


def test_rows_of_completions_are_taken_with_their_tokens() -> None:
    made = Parrot().generate(questions(7), SAMPLING, np.zeros(7, dtype=np.int64), 3)
    rows = np.array([5, 0, 0, 6])
    taken = made.take(rows)
    for i, row in enumerate(rows.tolist()):
        np.testing.assert_array_equal(taken.tokens(i), made.tokens(row))
    same(Completions.join([made.take(slice(0, 3)), made.take(slice(3, None))]), made)
    same(made.take(np.arange(7) < 2), made.take([0, 1]))


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "ends with a message of the user"),
        ([{"role": "assistant", "content": "a"}], "ends with a message of the user"),
        ([{"role": "robot", "content": "a"}], "a message has a role"),
        ([{"role": "user"}], "a message has a role"),
        ([{"role": "user", "content": 3}], "content is a text"),
    ],
)
def test_chats_are_checked(messages: list, what: str) -> None:
    with pytest.raises(DistillError, match=what):
        encode_messages(messages)


def test_a_system_prompt_is_put_before_chats_without_one() -> None:
    prompts = Prompts(
        texts(
            [
                encode_messages([{"role": "user", "content": "a"}]),
                encode_messages([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]),
            ]
        )
    )
    sampling = Sampling(system_prompt="be brief")
    assert [sampling.conversation(prompts, row)[0]["content"] for row in range(2)] == ["be brief", "s"]
    plain = Prompts(texts(["a"]), chat=False)
    assert prompts.keys[0] != plain.keys[0]
    assert prompts.fingerprint != prompts.take([1, 0]).fingerprint


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_sampling_out_of_range(option: dict, key: str) -> None:
    with pytest.raises(DistillError, match=rf"sampling\.{key}"):
        Sampling(**option)
