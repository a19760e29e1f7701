"""Attacks that repeat queries, and the recoveries that average, smooth and invert answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from test_contracts import Quick as Still
from test_defenses import Shift
from toys import FEATURES, a_pool, a_provider

from distill.attacks._repeats import Repeating
from distill.attacks.augmented_queries import AugmentedQueries
from distill.attacks.copycat import Copycat
from distill.attacks.knockoff_random import KnockoffRandom
from distill.attacks.no_teacher import NoTeacher
from distill.attacks.repeated_queries import RepeatedQueries
from distill.config import CONFIG_DIR
from distill.contracts import Defense, Knowledge
from distill.errors import BudgetExceeded, DistillError
from distill.provider.defenses.gaussian_noise import GaussianNoise
from distill.provider.defenses.modelguard_s import ModelGuardS
from distill.provider.defenses.none import NoDefense
from distill.provider.defenses.reverse_sigmoid import ReverseSigmoid
from distill.provider.defenses.rounding import Rounding
from distill.provider.defenses.temperature import Temperature
from distill.provider.oracle import serve
from distill.randomness import KeyedRandom
from distill.records import (
    Answers,
    Budget,
    Cost,
    Examples,
    InputSpec,
    InterfaceProfile,
    Queries,
    Reveals,
    TransferSet,
    content_keys,
    one_hot,
    softmax,
)
from distill.recovery._bayes import SLACK, draw, own, shared
from distill.recovery.average import Average
from distill.recovery.label_smoothing import LabelSmoothing
from distill.recovery.pbayes import PBayes
from distill.recovery.pbayes_oracle import PBayesOracle

# --- the attacks ----------------------------------------------------------------------------------------------------


class Scribe:
    """An oracle over any inputs that writes down what it is asked, and answers from it."""

    classes = 3

    def __init__(self, queries: int, reveals: Reveals = Reveals.PROBS) -> None:
        self.profile, self.left, self.asked = InterfaceProfile(reveals), queries, []

    def affordable(self) -> int:
        return self.left

    def spent(self) -> Cost:
        return Cost()

    def ask(self, queries: Queries, *, partial: bool = False) -> Answers:
        if len(queries) > self.left:
            raise BudgetExceeded(len(queries), self.left, "a test")
        self.left -= len(queries)
        self.asked.append(queries.inputs())
        seeds = np.frombuffer(content_keys(self.asked[-1]).tobytes(), dtype="<u8").reshape(-1, 2) % 997
        logits = np.stack([seeds[:, 0], seeds[:, 1], seeds.sum(axis=1)], axis=1).astype(np.float32) / 997
        return self.profile.truncate(Answers(softmax(logits), logits))


def pictures(rows: int = 12) -> Examples:
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 20, 10, 2)).astype(np.uint8)
    return Examples(pixels, InputSpec("image", (20, 10, 2)), name="pictures")


def sentences(rows: int = 12) -> Examples:
    words = np.random.default_rng(0).choice(list("abcdefgh"), (rows, 30))
    texts = np.array([" ".join(line) for line in words], dtype=object)
    return Examples(texts, InputSpec("text"), name="sentences")


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 60),
    rows=st.integers(1, 20),
    times=st.integers(2, 7),
    augmented=st.booleans(),
    kind=st.sampled_from([a_pool, pictures, sentences]),
    inner=st.sampled_from([KnockoffRandom, Copycat]),
)
def test_the_budget_is_spent_in_full_groups(
    queries: int, rows: int, times: int, augmented: bool, kind: Any, inner: Any
) -> None:
    attack, pool, oracle = (AugmentedQueries if augmented else RepeatedQueries)(inner(), times), kind(rows), Scribe(
        queries
    )  # fmt: skip
    if queries < times:
        with pytest.raises(DistillError, match=f"budget: pays for {queries} answers, but every query takes {times}"):
            attack.extract(oracle, pool, Still(), 0)
        assert oracle.left == queries
        return
    transfer_set = attack.extract(oracle, pool, Still(), 0)
    groups = min(queries // times, rows)
    assert queries - oracle.left == len(transfer_set) == groups * times
    np.testing.assert_array_equal(transfer_set.groups, np.repeat(np.arange(groups), times))
    inputs = transfer_set.inputs(pool)[:]
    np.testing.assert_array_equal(inputs, np.concatenate(oracle.asked))
    assert inputs.dtype == pool.inputs[:1].dtype
    # The queries themselves are those of the attack inside, with the budget that is left to it.
    plain = inner().extract(Scribe(groups), pool, Still(), 0)
    np.testing.assert_array_equal(transfer_set.rows[::times], plain.rows)
    assert transfer_set.profile == plain.profile
    if inner is Copycat:
        assert set(np.unique(transfer_set.posteriors)) <= {0, 1}


@pytest.mark.parametrize("kind", [a_pool, pictures, sentences])
def test_variants_are_keyed_by_seed_content_and_place(kind: Any) -> None:
    attack, pool = AugmentedQueries(KnockoffRandom(), times=4), kind(40)
    once, again, other = (attack.extract(Scribe(80), pool, Still(), seed).inputs(pool)[:] for seed in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    vary, elsewhere = attack.variants(pool, 0), attack.variants(pool, 1)
    first = vary(pool.inputs[:40], 1)
    backwards = vary(pool.inputs[:40][::-1], 1)[::-1]
    np.testing.assert_array_equal(first, backwards, "a variant does not depend on its batch")
    for different in (vary(pool.inputs[:40], 2), elsewhere(pool.inputs[:40], 1)):
        assert (content_keys(different) != content_keys(first)).mean() > 0.5
    assert len(set(content_keys(once[:4]))) > 1
    assert len(other) == 80


def test_pictures_are_shifted_and_mirrored_in_pixels() -> None:
    pool = pictures(400)
    plain, mirrored = (
        AugmentedQueries(KnockoffRandom(), mirror=mirror, shift=0.1).variants(pool, 0)(pool.inputs[:], 1)
        for mirror in (False, True)
    )
    seen = set()
    for image, variant, other in zip(pool.inputs[:], plain, mirrored, strict=True):
        padded = np.pad(image, ((2, 2), (1, 1), (0, 0)), mode="edge")
        moved = {(y, x): padded[y : y + 20, x : x + 10] for y in range(5) for x in range(3)}
        (place,) = [at for at, expected in moved.items() if np.array_equal(expected, variant)]
        seen.add(place)
        assert np.array_equal(other, variant) or np.array_equal(other, variant[:, ::-1])
    assert len(seen) == 15, "up to a tenth of 20 and of 10 pixels, either way"
    assert 0.3 < np.mean([np.array_equal(a, b) for a, b in zip(plain, mirrored, strict=True)]) < 0.7
    floats = (pool.inputs[:20] / 255).astype(np.float32)
    varied = AugmentedQueries(KnockoffRandom()).variants(pool, 0)(floats, 1)
    assert varied.dtype == np.float32
    assert 0 <= varied.min() <= varied.max() <= 1


def test_tables_get_noise_in_units_of_the_pool_and_texts_lose_words() -> None:
    pool = a_pool(4000)
    scale = np.arange(1, FEATURES + 1, dtype=np.float32)
    pool = dataclasses.replace(pool, inputs=pool.inputs * scale)
    moved = AugmentedQueries(KnockoffRandom(), jitter=0.2).variants(pool, 0)(pool.inputs, 1) - pool.inputs
    np.testing.assert_allclose(moved.std(axis=0), 0.2 * pool.inputs.std(axis=0), rtol=0.05)
    texts = sentences(200)
    thinned = AugmentedQueries(KnockoffRandom(), dropped=0.3).variants(texts, 0)(texts.inputs, 1)
    assert np.mean([len(text.split()) for text in thinned]) == pytest.approx(0.7 * 30, rel=0.05)
    one = np.array(["word", ""], dtype=object)
    assert AugmentedQueries(KnockoffRandom(), dropped=0.999).variants(texts, 0)(one, 1).tolist() == ["word", ""]


@pytest.mark.parametrize("reveals", [Reveals.LABEL, Reveals.PROBS, Reveals.LOGITS])
def test_the_attack_inside_is_told_the_mean_in_the_words_of_the_profile(reveals: Reveals) -> None:
    pool, oracle = a_pool(9), Scribe(100, reveals)
    repeating = Repeating(oracle, 3, lambda inputs, variant: inputs + np.float32(variant))
    told = repeating.ask(Queries.of_pool(pool, np.arange(9)))
    answers = Scribe(100, reveals).ask(Queries.made(np.concatenate(oracle.asked)))
    mean = answers.posteriors.reshape(9, 3, 3).mean(axis=1)
    if reveals is Reveals.LABEL:
        np.testing.assert_array_equal(told.posteriors, one_hot(mean.argmax(axis=1), 3))
    else:
        np.testing.assert_allclose(told.posteriors, mean, atol=1e-6)
    assert (told.logits is not None) == (reveals is Reveals.LOGITS)
    if told.logits is not None:
        np.testing.assert_allclose(softmax(told.logits), told.posteriors, atol=1e-6)
    assert (repeating.affordable(), oracle.left) == (24, 73)
    with pytest.raises(BudgetExceeded):
        repeating.ask(Queries.of_pool(pool, np.arange(9).repeat(3)))
    assert len(repeating.ask(Queries.of_pool(pool, np.arange(9).repeat(3)), partial=True)) == 24
    assert oracle.left == 1


class Seeds(KnockoffRandom):
    """Asks about rows of the pool, then about inputs of its own made of them, as floats."""

    def extract(self, oracle: Any, pool: Examples, student: Any, seed: int) -> TransferSet:
        oracle.ask(Queries.of_pool(pool, np.arange(2)))
        answers = oracle.ask(Queries.made(pool.inputs[2:4] / np.float32(510)))
        return TransferSet(np.full(2, -1), answers.posteriors, pool=pool.fingerprint, profile=str(oracle.profile))


@pytest.mark.parametrize("kind", [RepeatedQueries, AugmentedQueries])
def test_inputs_that_the_attack_inside_makes_are_repeated_too(kind: Any) -> None:
    pool, oracle = pictures(), Scribe(12)
    transfer_set = kind(Seeds(), times=3).extract(oracle, pool, Still(), 0)
    assert (transfer_set.rows >= 0).sum() == (6 if kind is RepeatedQueries else 2)
    asked = [inputs / np.float32(255) if inputs.dtype == np.uint8 else inputs for inputs in oracle.asked]
    np.testing.assert_array_equal(transfer_set.inputs(pool)[:], np.concatenate(asked))


def test_repeats_of_what_asks_nothing_are_refused() -> None:
    with pytest.raises(DistillError, match="NoTeacher is a control"):
        RepeatedQueries(NoTeacher(KnockoffRandom()))
    with pytest.raises(DistillError, match=r"attack@attack\.attack=copycat"):
        AugmentedQueries("copycat")  # type: ignore[arg-type]
    with pytest.raises(DistillError, match="times is at least 2"):
        RepeatedQueries(KnockoffRandom(), times=1)


# --- averaging and smoothing ----------------------------------------------------------------------------------------


def knowing(defense: Defense | None = None, clean: np.ndarray | None = None, pool: Examples | None = None) -> Knowledge:
    return Knowledge(pool or a_pool(1), Still(), None, 3, Path("nowhere"), defense=defense, clean=clean)


def asked(rows: list[int], posteriors: np.ndarray, **columns: Any) -> TransferSet:
    return TransferSet(np.array(rows), posteriors.astype(np.float32), pool="p", profile="probs", **columns)


def test_the_mean_of_repeats_approaches_the_clean_answer(tmp_path: Path) -> None:
    pool = a_pool(300)
    with serve(a_provider(tmp_path / "clean")) as oracle:
        clean = oracle.ask(Queries.of_pool(pool, np.arange(300))).posteriors
    inside = (clean.min(axis=1) > 0.1).nonzero()[0]  # where the noise is never cut off at 0
    errors = []
    for times in (2, 8, 32):
        provider = a_provider(tmp_path / str(times), defense=GaussianNoise(0.02), budget=Budget(queries=300 * times))
        with serve(provider) as oracle:
            transfer_set = RepeatedQueries(KnockoffRandom(), times).extract(oracle, pool, Still(), 0)
        assert provider.cost().queries == len(transfer_set) == 300 * times
        recovered = Average().targets(transfer_set, knowing(pool=pool))
        assert sorted(recovered.rows) == list(range(300))
        assert recovered.targets is not None
        kept = np.isin(recovered.rows, inside)
        errors.append(np.sqrt(np.mean((recovered.targets - clean[recovered.rows])[kept] ** 2)))
    np.testing.assert_allclose(errors, 0.02 * np.sqrt(3 / 4) / np.sqrt([2, 8, 32]), rtol=0.2)


def test_groups_count_before_content_and_content_without_groups() -> None:
    posteriors = np.eye(6)
    made = np.array([[1.0], [2.0], [1.0]], np.float32)
    transfer_set = asked([5, -1, 5, -1, -1, 0], posteriors, made=made, logits=posteriors.astype(np.float32))
    by_content = Average().targets(transfer_set, knowing())
    assert by_content.rows.tolist() == [5, -1, -1, 0]
    assert by_content.made is not None
    assert by_content.made.tolist() == [[1.0], [2.0]]
    expected = [posteriors[[0, 2]].mean(0), posteriors[[1, 4]].mean(0), posteriors[3], posteriors[5]]
    np.testing.assert_array_equal(by_content.targets, np.array(expected, np.float32))
    np.testing.assert_array_equal(by_content.posteriors, posteriors[[0, 1, 3, 5]])
    assert by_content.logits is None
    grouped = Average().targets(dataclasses.replace(transfer_set, groups=np.array([9, 9, 4, 4, 4, 0])), knowing())
    assert grouped.rows.tolist() == [5, 5, 0]
    np.testing.assert_array_equal(grouped.targets[1], posteriors[2:5].mean(0).astype(np.float32))
    cut = Average().targets(dataclasses.replace(transfer_set, groups=np.arange(6) // 4).head(5), knowing())
    np.testing.assert_array_equal(cut.targets[1], posteriors[4])


def test_nothing_changes_where_every_query_was_asked_once() -> None:
    transfer_set = asked([3, -1, 4], np.eye(3), made=np.ones((1, 2), np.float32), logits=np.eye(3, dtype=np.float32))
    recovered = Average().targets(transfer_set, knowing())
    assert recovered.targets is transfer_set.posteriors
    assert recovered.logits is transfer_set.logits


def test_smoothed_labels_by_hand() -> None:
    answers = np.array([[0.4, 0.4, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]])
    recovered = LabelSmoothing(alpha=0.3).targets(asked([0, 1], answers), knowing())
    np.testing.assert_allclose(recovered.targets, [[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]], atol=1e-7)
    assert recovered.targets.dtype == np.float32
    with pytest.raises(DistillError, match="alpha lies between 0 and 1"):
        LabelSmoothing(alpha=1.0)


# --- Bayes ----------------------------------------------------------------------------------------------------------


def scanned(received: np.ndarray, simulated: np.ndarray, posteriors: np.ndarray, tolerance: float) -> np.ndarray:
    """The definition, one answer after the other against the whole table."""
    means = []
    for answer in received.astype(np.float64):
        distance = np.abs(simulated - answer).sum(axis=1)
        other = simulated.argmax(axis=1) != answer.argmax()
        if not other.all():
            distance[other] = np.inf
        means.append(posteriors[distance <= max(tolerance, distance.min()) + SLACK].astype(np.float64).mean(axis=0))
    return np.array(means)


@settings(max_examples=40, deadline=None)
@given(
    classes=st.sampled_from([2, 3, 10, 30]),
    alpha=st.sampled_from([0.05, 1.0, 20.0]),
    tolerance=st.sampled_from([0.01, 0.1, 1.0]),
    decimals=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 999),
)
def test_bayes_equals_a_scan_of_the_whole_table(
    classes: int, alpha: float, tolerance: float, decimals: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    posteriors = draw(np.full((1, 20, classes), alpha), 10, rng)
    simulated = np.round(posteriors, decimals).astype(np.float32)
    received = np.concatenate([np.round(rng.dirichlet(np.full(classes, alpha), 20), decimals), np.eye(classes)])
    received = received.astype(np.float32)
    got = shared(received, simulated, posteriors, tolerance)
    np.testing.assert_allclose(got, scanned(received, simulated, posteriors, tolerance), rtol=1e-7, atol=1e-9)
    of_each = own(received[:20], simulated, posteriors, tolerance)
    for i in range(20):
        expected = scanned(received[i : i + 1], simulated[i::20], posteriors[i::20], tolerance)
        np.testing.assert_allclose(of_each[i : i + 1], expected, rtol=1e-7, atol=1e-9)


def test_the_cut_into_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    posteriors = draw(np.full((1, 50, 5), 1.0), 10, rng)
    whole = shared(posteriors[:50], posteriors, posteriors, 0.1)
    monkeypatch.setattr("distill.recovery._bayes.PAIRS", 700)
    monkeypatch.setattr("distill.recovery._bayes.ENTRIES", 700)
    np.testing.assert_allclose(shared(posteriors[:50], posteriors, posteriors, 0.1), whole, atol=1e-6)
    np.testing.assert_array_equal(draw(np.full((1, 50, 5), 1.0), 10, np.random.default_rng(0)), posteriors)


def attacked(defense: Defense, queries: int = 300, classes: int = 10) -> tuple[TransferSet, np.ndarray, Examples]:
    """Clean posteriors, most of them confident, behind a defense."""
    rng = np.random.default_rng(11)
    clean = softmax(rng.normal(size=(queries, classes)) * 3)
    inputs = rng.integers(0, classes, (queries, 1)).astype(np.float32) + np.arange(queries)[:, None] * classes
    pool = Examples(inputs, InputSpec("table", (1,)))
    noise = KeyedRandom(77, content_keys(inputs), np.zeros(queries))
    returned = defense.perturb(Answers(clean), defense.query_info(inputs), noise).posteriors
    return TransferSet(np.arange(queries), returned, pool=pool.fingerprint, profile="probs"), clean, pool


def away(targets: np.ndarray | None, clean: np.ndarray) -> float:
    assert targets is not None
    return float(np.abs(targets - clean).sum(axis=1).mean())


@pytest.mark.parametrize(
    ("defense", "left"),
    [  # what is left of the mean L1 distance to the clean answers, at most: observed prior, oracle prior
        (ReverseSigmoid(0.21, 0.2), (0.4, 0.25)),
        (ReverseSigmoid(1.0, 0.1), (0.6, 0.42)),
        (Temperature(2.0), (0.2, 0.15)),
        (Rounding(1), (0.92, 0.55)),
        (Shift(0.3), (0.25, 0.1)),
        (ModelGuardS(1.0), (0.9, 0.88)),
    ],
    ids=["reverse_sigmoid", "loud_reverse_sigmoid", "temperature", "rounding", "informed", "stateful"],
)
def test_bayes_finds_the_clean_posteriors_behind_a_known_defense(defense: Defense, left: tuple[float, float]) -> None:
    transfer_set, clean, pool = attacked(defense)
    returned, samples = away(transfer_set.posteriors, clean), 60_000
    honest = PBayes(samples=samples).targets(transfer_set, knowing(defense, pool=pool))
    bound = PBayesOracle(samples=samples).targets(transfer_set, knowing(defense, clean, pool))
    for recovered, most in zip((honest, bound), left, strict=True):
        np.testing.assert_allclose(recovered.targets.sum(axis=1), 1, atol=1e-5)
        assert recovered.targets.dtype == np.float32
        assert away(recovered.targets, clean) < most * returned
    # The prior that nobody has looks better than the honest one: ModelGuard's code reports the former.
    assert away(bound.targets, clean) < away(honest.targets, clean) + 0.01
    kl = [np.mean(entropy(clean, np.maximum(t, 1e-6), axis=1)) for t in (honest.targets, transfer_set.posteriors)]
    assert kl[0] < kl[1]


def test_the_prior_is_observed_unless_it_is_the_oracles() -> None:
    """Regression: the code of ModelGuard centres the attacker's prior on the clean posteriors."""
    defense = ReverseSigmoid(0.21, 0.2)
    transfer_set, clean, pool = attacked(defense, queries=40)
    without = PBayes(samples=4_000).targets(transfer_set, knowing(defense, None, pool))
    with_clean = PBayes(samples=4_000).targets(transfer_set, knowing(defense, clean, pool))
    np.testing.assert_array_equal(without.targets, with_clean.targets)
    assert (PBayes.knows, PBayesOracle.knows) == ("the defense's code", "the clean answers")
    with pytest.raises(DistillError, match="clean answers, which were not given"):
        PBayesOracle().targets(transfer_set, knowing(defense, None, pool))
    with pytest.raises(DistillError, match="does not know"):
        PBayes().targets(transfer_set, knowing(None, None, pool))
    assert yaml.safe_load((CONFIG_DIR / "recovery" / "pbayes.yaml").read_text())["_target_"].endswith(".PBayes")


def test_bayes_depends_on_the_seed_alone_and_sees_what_the_access_hides() -> None:
    defense = Temperature(2.0)
    transfer_set, clean, pool = attacked(defense, queries=40)
    known = knowing(defense, None, pool)
    one, same = (PBayes(samples=4_000).targets(transfer_set, known).targets for _ in range(2))
    np.testing.assert_array_equal(one, same)
    other = PBayes(samples=4_000).targets(transfer_set, dataclasses.replace(known, seed=4)).targets
    assert not np.array_equal(one, other)
    cut = InterfaceProfile(Reveals.TOP_K, 3)
    seen = dataclasses.replace(
        transfer_set, posteriors=cut.truncate(Answers(transfer_set.posteriors)).posteriors, profile="top_3"
    )
    recovered = PBayes(samples=20_000).targets(seen, known).targets
    assert away(recovered, clean) < 0.6 * away(seen.posteriors, clean)


def test_bayes_leaves_what_was_not_defended_nearly_as_it_is() -> None:
    transfer_set, clean, pool = attacked(NoDefense())
    assert away(PBayes(samples=60_000).targets(transfer_set, knowing(NoDefense(), None, pool)).targets, clean) < 0.1


@pytest.mark.parametrize("option", ["samples", "concentration", "tolerance", "rounds"])
def test_options_of_bayes_are_more_than_zero(option: str) -> None:
    with pytest.raises(DistillError, match=f"{option} is more than 0"):
        PBayes(**{option: 0})
