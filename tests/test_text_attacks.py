"""Texts that an attacker makes: nonsense, and sentences whose words were changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack_toys import NAMES, TEXT, ToyTeacherOf, a_labelled_pool, extracted
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contracts import an_experiment
from toys import SPEC, a_pool

from distill.attacks.perturbed_sentences import PerturbedSentences
from distill.data.pools.random_words import RandomWords
from distill.errors import DistillError
from distill.records import Dataset, Examples, softmax

POOL = a_labelled_pool("text", 12)


def texts(*lines: str) -> Examples:
    column = np.empty(len(lines), dtype=object)
    column[:] = lines
    return Examples(column, TEXT, name="lines")


def a_dataset(corpus: Examples) -> Dataset:
    """Whose held-out texts are these."""
    return Dataset("toy", TEXT, NAMES, POOL, POOL, corpus)


class Corpus:
    """Other data, as `pool.source`."""

    def __init__(self, train: Examples) -> None:
        self.train = train

    def load(self) -> Dataset:
        return replace(a_dataset(POOL), name="corpus", train=self.train)


# --- perturbed sentences --------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(queries=st.sampled_from([1, 4, 11, 12, 13, 24, 25, 60]), seed=st.integers(0, 3))
def test_budgets_are_exact_and_seeds_reproduce(
    queries: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("p")
    asked, provider, _ = extracted(PerturbedSentences(), folder / "1", "text", queries, POOL, seed)
    assert len(asked) == provider.cost().queries == queries
    again, *_ = extracted(PerturbedSentences(), folder / "2", "text", queries, POOL, seed)
    fewer, *_ = extracted(PerturbedSentences(), folder / "3", "text", (queries + 1) // 2, POOL, seed)
    assert asked.made is not None
    np.testing.assert_array_equal(asked.made, again.made)
    np.testing.assert_array_equal(asked.made[: len(fewer)], fewer.made)
    np.testing.assert_allclose(asked.posteriors, softmax(ToyTeacherOf("text").predict(asked.made)), atol=1e-6)
    other, *_ = extracted(PerturbedSentences(), folder / "4", "text", queries, POOL, seed + 1)
    assert queries < 4 or (asked.made != other.made).any()


SHARES = st.sampled_from([0.0, 0.1, 0.25, 1 / 3])


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 40), replaced=SHARES, dropped=SHARES, swapped=SHARES, seed=st.integers(0, 99))
def test_the_stated_share_of_words_is_changed(
    n: int, replaced: float, dropped: float, swapped: float, seed: int
) -> None:
    if replaced + dropped + swapped == 0:
        return
    before, new = [f"w{i}" for i in range(n)], np.array([f"x{i}" for i in range(5)], dtype=object)
    after = PerturbedSentences(replaced, dropped, swapped)._edited(before, new, np.random.default_rng(seed))
    stated = [max(1, round(share * n)) if share else 0 for share in (replaced, dropped, swapped)]
    of_new = sum(word in new for word in after)
    assert of_new == min(stated[0], n)
    gone = min(stated[1], n - of_new, max(n - 1, 0))
    assert len(after) == n - gone
    old = [word for word in after if word not in new]
    assert len(set(old)) == len(old) == n - gone - of_new, "no word comes twice, and none but the dropped is lost"
    if not gone:
        moved = sum(word != own for word, own in zip(after, before, strict=True)) - of_new
        room = n - of_new
        assert moved == (min(max(2, stated[2]), room) if stated[2] and room > 1 else 0)


def test_new_words_are_drawn_as_often_as_they_come_in_the_pool(tmp_path: Path) -> None:
    pool = texts("a " * 30 + "b " * 10, "c " * 60)
    made = extracted(PerturbedSentences(replaced=1.0, dropped=0.0, swapped=0.0), tmp_path, "text", 100, pool)[0].made
    assert made is not None
    counts = Counter(" ".join(text for text in made if len(text.split()) == 60).split())
    assert set(counts) == {"a", "b"}, "a word is never replaced by itself"
    assert abs(counts["a"] / counts["b"] - 3) < 0.3


def test_a_pool_of_one_word_has_none_to_replace_it_by(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"^pool: its texts have only one word"):
        extracted(PerturbedSentences(), tmp_path, "text", 3, texts("no no", "no"))
    assert not (tmp_path / "provider_log").exists()


@pytest.mark.parametrize(
    ("option", "shares"),
    [
        ("replaced", (-0.1, 0.0, 0.0)),
        ("dropped", (0.0, 1.1, 0.0)),
        ("replaced", (0.5, 0.5, 0.5)),
        ("replaced", (0,) * 3),
    ],
)
def test_shares_out_of_range(option: str, shares: tuple[float, float, float]) -> None:
    with pytest.raises(DistillError, match=f"^{option}"):
        PerturbedSentences(*shares)


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    """Of texts by an attack on tables, and the other way round."""
    with pytest.raises(
        DistillError, match=r"perturbed_sentences asks about texts, and digits holds images; compatible"
    ):
        an_experiment(tmp_path, "attack=perturbed_sentences")
    with pytest.raises(DistillError, match=r"marginals asks about tables, and reuters_r8 holds texts; compatible: .*"
                       r"knockoff_random.*perturbed_sentences"):  # fmt: skip
        an_experiment(tmp_path, "data=reuters_r8", "attack=marginals")


# --- nonsense -------------------------------------------------------------------------------------------------------


def shares_of(pool: RandomWords, corpus: Examples) -> dict[str, float]:
    counts = Counter(" ".join(pool.load(a_dataset(corpus)).inputs[:]).split())
    return {word: count / sum(counts.values()) for word, count in counts.items()}


def test_words_come_uniformly_or_as_often_as_in_the_corpus() -> None:
    corpus = texts("often " * 6 + "some some", "often often rare")
    even, like_corpus = (shares_of(RandomWords(size=2000, by_frequency=by), corpus) for by in (False, True))
    for word, share in {"often": 8 / 11, "some": 2 / 11, "rare": 1 / 11}.items():
        assert abs(even[word] - 1 / 3) < 0.01
        assert abs(like_corpus[word] - share) < 0.01


def test_words_of_another_data_set() -> None:
    held_out = texts("here and there")
    source: Any = Corpus(texts("far away", "far"))
    far = shares_of(RandomWords(size=500, source=source, by_frequency=True), held_out)
    assert set(far) == {"far", "away"}
    assert abs(far["far"] - 2 / 3) < 0.02
    tables: Any = Corpus(a_pool(3))
    assert tables.train.spec == SPEC
    with pytest.raises(DistillError, match=r"^pool\.source: .* holds tables, which have no words"):
        RandomWords(source=tables).load(a_dataset(held_out))
    with pytest.raises(DistillError, match=r"^path is one place"):
        RandomWords(path="words.txt", source=source)
    with pytest.raises(DistillError, match=r"^source is an option of the group data"):
        RandomWords(source="newsgroups")  # type: ignore[arg-type]
