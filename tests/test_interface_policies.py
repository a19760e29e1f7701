"""What a provider does to the log-probabilities that come with a text, and to how it is drawn."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_language import characters, network

from distill.contracts import LanguageDefense
from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, texts
from distill.provider.defenses.language_chain import LanguageChain
from distill.provider.defenses.logprob_noise import LogprobNoise
from distill.provider.defenses.logprob_rounding import LogprobRounding
from distill.provider.defenses.logprob_temperature import LogprobTemperature
from distill.provider.defenses.logprob_truncation import LogprobTruncation
from distill.provider.defenses.sampling_floors import SamplingFloors
from distill.provider.language_provider import LanguageProvider
from distill.provider.ledger import Prices
from distill.provider.oracle import serve_text
from distill.randomness import KeyedRandom
from distill.records import Budget, InterfaceProfile, Reveals
from distill.speaker import CausalLM

TOKENIZER = characters()
VOCABULARY = len(TOKENIZER)
DRAWN = Sampling(max_tokens=12, temperature=1.0)
GREEDY = Sampling(max_tokens=12, temperature=0.0)
QUESTIONS = Prompts.of_users(["ab=", "1+2=?", "x", "what is 7-5"])


class Teacher(CausalLM):
    """A language model of random weights."""

    def __init__(self) -> None:
        super().__init__(batch_size=64)
        self.hold(network(VOCABULARY, seed=1), TOKENIZER)

    def prepare(self, task: Any, trainer: Any, cache: Path) -> None:
        pass


TEACHER = Teacher()


def answers(k: int, sampling: Sampling = DRAWN, repeats: int = 0, n: int = 4) -> Completions:
    return TEACHER.generate(QUESTIONS.take(slice(0, n)), sampling, np.full(n, repeats), k)


def rng(seed: int = 0, repeats: int = 0, n: int = 4) -> KeyedRandom:
    return KeyedRandom(seed, QUESTIONS.keys[:n], np.full(n, repeats))


def released(defense: LanguageDefense, given: Completions, **options: Any) -> Completions:
    n = len(given)
    return defense.release(QUESTIONS.take(slice(0, n)), given, DRAWN, rng(n=n, **options))


def is_what_an_api_says(given: Completions) -> None:
    """Sorted log-probabilities of a part of a distribution; the drawn token's is the same wherever it stands."""
    ids, logprobs, own = given.top_ids, given.top_logprobs, given.logprobs
    assert ids.dtype == np.int32
    assert logprobs.dtype == own.dtype == np.float32
    assert not np.isnan(logprobs).any()
    assert not np.isnan(own).any()
    assert (logprobs <= 0).all()
    assert (own <= 0).all()
    assert (logprobs[:, 1:] <= logprobs[:, :-1]).all()
    assert ((ids >= 0) == (logprobs > -np.inf)).all()
    here = ids == given.token_ids[:, None]
    at = here.any(axis=1)
    np.testing.assert_array_equal(logprobs[here], own[at])
    assert (own[~at] <= logprobs[~at, -1]).all(), "a drawn token that is not listed is rarer than those that are"
    whole = np.exp(logprobs.astype(np.float64)).sum(axis=1) + np.where(at, 0.0, np.exp(own.astype(np.float64)))
    assert (whole <= 1 + 1e-6).all()
    for row in ids:
        assert len(set(row[row >= 0])) == (row >= 0).sum()


POLICIES: list[Any] = [
    LogprobTruncation(3),
    LogprobRounding(1),
    LogprobRounding(0),
    LogprobRounding(1, of_probabilities=True),
    LogprobNoise(),
    LogprobNoise(2.0, "laplace", renormalise=False),
    LogprobNoise(1.0, per_repeat=False, key=7),
]


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{type(p).__name__} {vars(p)}")
def test_what_is_told_stays_a_part_of_a_distribution(policy: LanguageDefense, k: int) -> None:
    assert isinstance(policy, LanguageDefense)
    for sampling in (DRAWN, GREEDY):
        clean = answers(k, sampling)
        given = released(policy, clean)
        is_what_an_api_says(given)
        assert given.top_k == min(k, 3 if isinstance(policy, LogprobTruncation) else k)
        for name in ("column", "finish", "completion_tokens", "offsets", "token_ids"):
            np.testing.assert_array_equal(getattr(given, name), getattr(clean, name))
        # Nothing of it depends on what else is in the batch.
        alone = [released(policy, clean.take(slice(0, n))) for n in (1, 2)]
        for n, one in enumerate(alone, 1):
            np.testing.assert_array_equal(one.top_logprobs, given.take(slice(0, n)).top_logprobs)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_text_alone_passes(policy: LanguageDefense) -> None:
    text = answers(0).without_tokens()
    given = released(policy, text)
    assert given.column.tolist() == text.column.tolist()
    assert given.logprobs is given.top_ids is None


# --- truncation -----------------------------------------------------------------------------------------------------


def test_truncation_is_the_first_k_and_none_is_text() -> None:
    clean = answers(8)
    given = released(LogprobTruncation(3), clean)
    np.testing.assert_array_equal(given.top_ids, clean.top_ids[:, :3])
    np.testing.assert_array_equal(given.top_logprobs, clean.top_logprobs[:, :3])
    np.testing.assert_array_equal(given.logprobs, clean.logprobs)
    nothing = released(LogprobTruncation(0), clean)
    assert nothing.logprobs is nothing.top_ids is nothing.top_logprobs is None
    assert LogprobTruncation(0).exposes.reveals is Reveals.TEXT
    assert not LogprobTruncation(0).exposes.scores
    assert str(LogprobTruncation(3).exposes) == "top_3+bias+prompt_logprobs"
    with pytest.raises(DistillError, match=r"defense\.k"):
        LogprobTruncation(-1)


# --- rounding -------------------------------------------------------------------------------------------------------


def of_rows(rows: np.ndarray, drawn: np.ndarray) -> Completions:
    """One answer whose positions have these log-probabilities of tokens 0, 1, ... (sorted here)."""
    t = len(rows)
    order = np.argsort(-rows, axis=1, kind="stable").astype(np.int32)
    ones = np.ones(1, np.int64)
    return Completions(
        texts([""]),
        texts(["length"]),
        ones,
        t * ones,
        np.array([0, t]),
        drawn.astype(np.int32),
        rows[np.arange(t), drawn].astype(np.float32),
        order,
        np.take_along_axis(rows, order, axis=1).astype(np.float32),
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3), st.booleans(), st.floats(0.1, 6.0))
def test_rounding_lowers_as_few_as_it_takes(seed: int, decimals: int, of_probabilities: bool, spread: float) -> None:
    decimals = max(decimals, int(of_probabilities))
    some = np.random.default_rng(seed)
    rows = np.log(some.dirichlet(np.full(5, 1 / spread), 6).clip(1e-12))
    clean = of_rows(rows - np.logaddexp.reduce(rows, axis=1, keepdims=True), some.integers(0, 5, 6))
    given = released(LogprobRounding(decimals, of_probabilities), clean)
    is_what_an_api_says(given)
    step = 10.0**-decimals
    for row in range(6):
        exact = dict(zip(clean.top_ids[row].tolist(), clean.top_logprobs[row].astype(np.float64), strict=True))
        told = dict(zip(given.top_ids[row].tolist(), given.top_logprobs[row].astype(np.float64), strict=True))
        told = {token: told.get(token, -np.inf) for token in exact}
        scale = np.exp if of_probabilities else (lambda value: value)
        exact, counts = ({t: scale(v) / step for t, v in some.items()} for some in (exact, told))
        nearest = {token: round(value) for token, value in exact.items()}  # to the even digit, as numpy does
        below = {token: np.floor(value) for token, value in exact.items()}
        lowered = {token for token in exact if abs(counts[token] - nearest[token]) > 0.5}
        assert all(counts[token] == pytest.approx(below[token], abs=1e-3) for token in lowered)
        kept = [token for token in exact if token not in lowered]
        assert all(counts[token] == pytest.approx(nearest[token], abs=1e-3) for token in kept)

        def whole(down: set[int], nearest: Any = nearest, below: Any = below) -> float:
            numbers = np.array([below[t] if t in down else nearest[t] for t in nearest], dtype=np.float64) * step
            return float(numbers.sum() if of_probabilities else np.exp(numbers).sum())

        # Whoever was rounded up further goes first, and the last of them was needed.
        raised = sorted((t for t in exact if nearest[t] > below[t]), key=lambda t: exact[t] - below[t])
        assert lowered == set(raised[: len(lowered)]) or len({round(exact[t] - below[t], 4) for t in raised}) < len(
            raised
        )
        assert not lowered or whole(lowered - {raised[len(lowered) - 1]}) > 1


def test_rounding_by_hand() -> None:
    rows = np.log([[0.55, 0.37, 0.08], [0.26, 0.26, 0.48], [0.96, 0.03, 0.01], [0.9, 0.06, 0.04]])
    clean = of_rows(rows, np.array([2, 1, 2, 0]))
    given = released(LogprobRounding(1, of_probabilities=True), clean)
    # 0.6 + 0.4 + 0.1 is too much: of 0.55, 0.37 and 0.08 the first was rounded up by most.
    np.testing.assert_allclose(
        np.exp(given.top_logprobs), [[0.5, 0.4, 0.1], [0.5, 0.3, 0.2], [1, 0, 0], [0.9, 0.1, 0]], atol=1e-6
    )
    assert given.top_ids.tolist() == [[0, 1, 2], [2, 0, 1], [0, -1, -1], [0, 1, -1]]
    assert np.exp(given.logprobs[[0, 3]]) == pytest.approx([0.1, 0.9])
    assert given.logprobs[2] == -np.inf
    # exp(-0.1) + exp(-2.8) + exp(-3.2) is 1.006: of -0.105, -2.813 and -3.219 the last two were rounded up further.
    logs = released(LogprobRounding(1), of_rows(rows[3:], np.array([1])))
    np.testing.assert_allclose(logs.top_logprobs, [[-0.1, -2.9, -3.3]], atol=1e-6)
    exact = released(LogprobRounding(6), clean)
    np.testing.assert_allclose(exact.top_logprobs, clean.top_logprobs, atol=1.1e-6)
    for options in ({"decimals": -1}, {"decimals": 0, "of_probabilities": True}):
        with pytest.raises(DistillError, match=r"defense\.decimals"):
            LogprobRounding(**options)


# --- noise ----------------------------------------------------------------------------------------------------------


def by_token(given: Completions) -> np.ndarray:
    """(t, vocabulary) log-probabilities, NaN where not told."""
    table = np.full((len(given.top_ids), VOCABULARY), np.nan)
    np.put_along_axis(table, given.top_ids.astype(np.int64), given.top_logprobs.astype(np.float64), axis=1)
    return table


@pytest.mark.parametrize(("kind", "kurtosis"), [("gaussian", 3.0), ("laplace", 6.0)])
def test_noise_has_its_scale_and_its_tails(kind: str, kurtosis: float) -> None:
    many = Prompts.of_users([f"{i}" for i in range(300)])
    clean = Completions.join([of_rows(np.full((10, 40), -np.log(40)) - 5.0, np.zeros(10, int)) for _ in range(300)])
    noise = LogprobNoise(0.3, kind, renormalise=False)
    given = noise.release(many, clean, DRAWN, KeyedRandom(3, many.keys, np.zeros(300, int)))
    added = by_token(given)[:, :40] + np.log(40) + 5.0  # so little mass that nothing is scaled
    deviation = 0.3 * (1 if kind == "gaussian" else np.sqrt(2))
    assert abs(added.mean()) < 4 * deviation / np.sqrt(added.size)
    assert added.std() == pytest.approx(deviation, rel=0.01)
    assert ((added / added.std()) ** 4).mean() == pytest.approx(kurtosis, rel=0.05)
    assert abs(np.corrcoef(added[:, 0], added[:, 1])[0, 1]) < 0.1, "tokens are independent"
    assert abs(np.corrcoef(added[:-1, 0], added[1:, 0])[0, 1]) < 0.1, "positions are independent"


def test_noise_of_a_token_is_the_same_however_many_are_told() -> None:
    few, all_of_them = (
        by_token(released(LogprobNoise(1.0, renormalise=False), answers(k))) for k in (5, VOCABULARY)
    )  # seed and text are the same
    clean = by_token(answers(VOCABULARY))
    differs = []
    for row in range(len(few)):
        told = ~np.isnan(few[row])
        odds = [(table[row] - clean[row])[told] for table in (few, all_of_them)]
        differs.append(np.ptp(odds[0] - odds[1]))  # up to one constant, where a row was scaled
    assert max(differs) < 1e-5


def test_renormalised_noise_keeps_the_mass_and_the_other_scales_down_alone() -> None:
    clean = answers(5)
    before = np.exp(clean.top_logprobs.astype(np.float64)).sum(axis=1)
    inside = (clean.top_ids == clean.token_ids[:, None]).any(axis=1)
    kept = released(LogprobNoise(1.0), clean)
    after = np.exp(kept.top_logprobs.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(after[inside], before[inside], atol=1e-6)
    free = released(LogprobNoise(1.0, renormalise=False), clean)
    raw = by_token(free) - by_token(kept)  # one shift a position, where both tell a token
    both = ~np.isnan(raw).all(axis=1)
    assert np.nanmax(np.nanmax(raw[both], axis=1) - np.nanmin(raw[both], axis=1)) < 1e-5
    np.testing.assert_allclose(released(LogprobNoise(0.0), clean).top_logprobs, clean.top_logprobs, atol=1e-6)


def test_repeats_draw_new_noise_or_do_not() -> None:
    clean = answers(VOCABULARY, GREEDY)  # a repeated greedy request has the same text

    def draws(defense: LogprobNoise, seed: int = 0) -> np.ndarray:
        return np.stack([by_token(released(defense, clean, seed=seed, repeats=r)) for r in range(64)])

    new = draws(LogprobNoise(0.5))
    truth = by_token(clean)
    centred = new - new.mean(axis=2, keepdims=True)
    far = [
        np.sqrt(((some - (truth - truth.mean(axis=1, keepdims=True))) ** 2).mean())
        for some in (centred[0], centred.mean(axis=0))
    ]
    assert far == pytest.approx([0.5, 0.5 / 8], rel=0.1), "averaging works"
    fixed = draws(LogprobNoise(0.5, per_repeat=False))
    assert np.ptp(fixed, axis=0).max() == 0, "and here it doesn't"
    assert np.abs(draws(LogprobNoise(0.5, per_repeat=False), seed=5) - fixed).max() == 0
    assert np.abs(draws(LogprobNoise(0.5, per_repeat=False, key=1)) - fixed).max() > 0.1
    np.testing.assert_array_equal(draws(LogprobNoise(0.5)), new)
    assert np.abs(draws(LogprobNoise(0.5), seed=1) - new).max() > 0.1


def test_fixed_noise_depends_on_the_text_before_a_token() -> None:
    a, b = answers(VOCABULARY, repeats=0, n=1), answers(VOCABULARY, repeats=1, n=1)
    first = int((a.token_ids[:6] != b.token_ids[:6]).argmax())  # where two answers to one question part
    assert a.token_ids[first] != b.token_ids[first]
    noise = LogprobNoise(0.5, per_repeat=False)
    added = [by_token(released(noise, some)) - by_token(some) for some in (a, b)]
    np.testing.assert_allclose(added[0][: first + 1], added[1][: first + 1], atol=1e-4)
    assert np.abs(added[0][first + 1] - added[1][first + 1]).max() > 0.1


@pytest.mark.parametrize(
    ("options", "key"), [({"scale": -1.0}, "scale"), ({"kind": "cauchy"}, "kind"), ({"scale": float("nan")}, "scale")]
)
def test_noise_that_is_none_is_refused(options: dict, key: str) -> None:
    with pytest.raises(DistillError, match=rf"defense\.{key}"):
        LogprobNoise(**options)


# --- temperature ----------------------------------------------------------------------------------------------------


def decoded(defense: LanguageDefense, asked: Sampling, k: int, repeats: int = 0) -> Completions:
    """As the provider does it."""
    drawn, n = defense.sampling(asked), len(QUESTIONS)
    processor = defense.logits_processor(drawn)
    processors = [] if processor is None else [processor]
    return TEACHER.generate(QUESTIONS, drawn, np.full(n, repeats), k, processors)


@pytest.mark.parametrize("temperature", [0.3, 2.0, 7.0])
@pytest.mark.parametrize(
    "asked",
    [GREEDY, DRAWN, replace(DRAWN, temperature=0.7, top_p=0.8), replace(DRAWN, logit_bias=((9, 3.0),))],
    ids=str,
)
def test_a_temperature_on_what_is_told_leaves_the_text(temperature: float, asked: Sampling) -> None:
    for repeats in (0, 1):
        clean = TEACHER.generate(QUESTIONS, asked, np.full(len(QUESTIONS), repeats), VOCABULARY)
        given = decoded(LogprobTemperature(temperature), asked, 5, repeats)
        assert given.column.tolist() == clean.column.tolist()
        np.testing.assert_array_equal(given.token_ids, clean.token_ids)
        tempered = torch.from_numpy(by_token(clean)).div(temperature).log_softmax(dim=1).numpy()
        np.testing.assert_allclose(
            given.top_logprobs, np.take_along_axis(tempered, given.top_ids.astype(np.int64), axis=1), atol=2e-5
        )
        is_what_an_api_says(given)


def test_a_temperature_can_be_undone_by_who_is_told_everything() -> None:
    clean = by_token(answers(VOCABULARY))
    told = by_token(decoded(LogprobTemperature(3.0), DRAWN, VOCABULARY))
    np.testing.assert_allclose(torch.from_numpy(3.0 * told).log_softmax(dim=1), clean, atol=2e-4)
    for wrong in (0.0, -1.0, float("inf")):
        with pytest.raises(DistillError, match=r"defense\.temperature"):
            LogprobTemperature(wrong)


# --- floors ---------------------------------------------------------------------------------------------------------


def test_floors_hold_for_every_request() -> None:
    floors = SamplingFloors(0.8, 0.9)
    for temperature, top_p in [(0.0, 1.0), (0.3, 0.5), (1.5, 0.95), (0.8, 0.9)]:
        asked = replace(DRAWN, temperature=temperature, top_p=top_p, seed=4)
        drawn = floors.sampling(asked)
        assert drawn == replace(asked, temperature=max(0.8, temperature), top_p=max(0.9, top_p))
    assert SamplingFloors(0.0, 0.1).sampling(GREEDY) == GREEDY
    for options, key in [({"temperature": -0.1}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p")]:
        with pytest.raises(DistillError, match=rf"defense\.{key}"):
            SamplingFloors(**options)


# --- through the provider -------------------------------------------------------------------------------------------


def a_provider(cache: Path, defense: Any, access: InterfaceProfile, sampling: Sampling = DRAWN) -> LanguageProvider:
    return LanguageProvider(
        TEACHER,
        access=access,
        prices=Prices(usd_per_mtok_out=1.0),
        budget=Budget(queries=1_000),
        sampling=sampling,
        cache=cache,
        defense=defense,
        defense_id=type(defense).__name__,
    )


TOP_5 = InterfaceProfile(Reveals.TOP_K, 5)


@pytest.mark.parametrize("policy", [*POLICIES, LogprobTemperature()], ids=lambda p: type(p).__name__)
def test_the_provider_gives_out_no_more_than_the_policy_leaves(tmp_path: Path, policy: Any) -> None:
    with serve_text(a_provider(tmp_path, None, TOP_5)) as oracle:
        clean = oracle.ask(QUESTIONS).completions
    with serve_text(a_provider(tmp_path, policy, TOP_5)) as oracle:
        given = oracle.ask(QUESTIONS).completions
    assert given.column.tolist() == clean.column.tolist(), "interface policies leave the text"
    is_what_an_api_says(given)
    assert given.top_k == (3 if isinstance(policy, LogprobTruncation) else 5)
    assert not np.array_equal(given.top_logprobs, clean.top_logprobs)


def test_under_access_to_all_probabilities_a_policy_leaves_lists_of_all_tokens(tmp_path: Path) -> None:
    with serve_text(a_provider(tmp_path, LogprobRounding(1), InterfaceProfile(Reveals.PROBS))) as oracle:
        assert str(oracle.profile) == f"top_{VOCABULARY}+prompt_logprobs"
        given = oracle.ask(QUESTIONS).completions
        prompt = TEACHER.prompt_tokens(QUESTIONS, DRAWN)[0]
        scored = oracle.score([prompt + given.tokens(0).tolist()], [len(prompt)])[0]
    np.testing.assert_allclose(given.top_logprobs * 10, np.round(given.top_logprobs * 10), atol=1e-4)
    # Scored text goes through the policy too, as the same tokens of an answer did.
    own = slice(*given.offsets[:2])
    np.testing.assert_allclose(scored.logprobs, given.top_logprobs[own], atol=1e-4)
    np.testing.assert_array_equal(np.sort(scored.ids), np.sort(given.top_ids[own]))


def test_top_0_tells_nothing_and_floors_draw_greedy_requests(tmp_path: Path) -> None:
    silent = a_provider(tmp_path, LogprobTruncation(0), replace(TOP_5, prompt_logprobs=True))
    assert silent.profile.reveals is Reveals.TEXT
    with serve_text(silent) as oracle:
        assert oracle.ask(QUESTIONS).completions.token_ids is None
    with pytest.raises(DistillError, match="does not reveal"):
        silent.score([[5, 6, 7]], [1])
    with serve_text(a_provider(tmp_path, SamplingFloors(), InterfaceProfile(Reveals.TEXT), GREEDY)) as oracle:
        given = oracle.ask(QUESTIONS, samples=8).completions
        assert len(set(given.column[:8])) > 1, "a greedy request is drawn, anew each time"
    with serve_text(a_provider(tmp_path, None, InterfaceProfile(Reveals.TEXT), DRAWN)) as oracle:
        assert oracle.ask(QUESTIONS, samples=8).completions.column.tolist() == given.column.tolist()


def test_repeated_requests_average_noise_away_through_the_door(tmp_path: Path) -> None:
    def error(samples: int, per_repeat: bool) -> float:
        every = InterfaceProfile(Reveals.TOP_K, VOCABULARY)
        provider = a_provider(tmp_path, LogprobNoise(0.5, per_repeat=per_repeat), every, GREEDY)
        with serve_text(provider) as oracle:
            told = by_token(oracle.ask(QUESTIONS.take([0]), samples=samples).completions)
        told = told.reshape(samples, -1, VOCABULARY).mean(axis=0)
        truth = by_token(answers(VOCABULARY, GREEDY, n=1))
        told, truth = (some - some.mean(axis=1, keepdims=True) for some in (told, truth))
        return float(np.sqrt(((told - truth) ** 2).mean()))

    assert error(1, True) == pytest.approx(0.5, rel=0.15)
    assert error(25, True) == pytest.approx(0.1, rel=0.15)
    assert error(25, False) == pytest.approx(0.5, rel=0.15)


# --- one after the other --------------------------------------------------------------------------------------------


def in_turn(policies: Any, given: Completions) -> Completions:
    chain = LanguageChain(policies).release(QUESTIONS, given, DRAWN, rng())
    for i, policy in enumerate(policies):
        given = policy.release(QUESTIONS, given, DRAWN, rng().child(str(i)))
    np.testing.assert_array_equal(chain.top_logprobs, given.top_logprobs)
    return given


@pytest.mark.parametrize("pair", [*combinations(range(len(POLICIES)), 2)], ids=str)
def test_policies_compose_in_either_order(pair: tuple[int, int]) -> None:
    one, two = (POLICIES[i] for i in pair)
    for order in ((one, two), (two, one)):
        is_what_an_api_says(in_turn(order, answers(5)))


def test_the_order_of_policies_is_the_order_in_which_they_act() -> None:
    clean = answers(5)
    rounded_last = in_turn([LogprobNoise(1.0), LogprobRounding(1)], clean)
    noisy_last = in_turn([LogprobRounding(1), LogprobNoise(1.0)], clean)

    def off_the_grid(given: Completions) -> float:
        values = given.top_logprobs[np.isfinite(given.top_logprobs)].astype(np.float64) * 10
        return float(np.abs(values - np.round(values)).max())

    assert off_the_grid(rounded_last) < 1e-4 < 0.1 < off_the_grid(noisy_last)
    noise = LogprobNoise(3.0)
    before, after = in_turn([LogprobTruncation(2), noise], clean), in_turn([noise, LogprobTruncation(2)], clean)
    assert {tuple(row) for row in before.top_ids} != {tuple(row) for row in after.top_ids}
    assert before.top_k == after.top_k == 2
