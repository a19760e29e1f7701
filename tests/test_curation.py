"""Curations: which answers are left, what is counted, and that nothing of an answer gets lost on the way."""

from __future__ import annotations

import functools
import importlib.util
import time
from typing import Any

import numpy as np
import pytest
import yaml
from assets import need
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toys import answered

from distill import contracts
from distill.config import CONFIG_DIR, build
from distill.data.straight_line import StraightLine, answer_right
from distill.errors import DistillError, MissingAsset
from distill.language import Prompts, SyntheticSet, texts
from distill.recovery.curation_chain import CurationChain
from distill.recovery.exact_dedup import ExactDedup
from distill.recovery.language_filter import LanguageFilter
from distill.recovery.length_filter import LengthFilter
from distill.recovery.majority_vote import MajorityVote
from distill.recovery.near_dedup import NearDedup
from distill.recovery.verified import Verified

CURATIONS = (
    "all_answers", "exact_dedup", "near_dedup", "length_filter", "language_filter", "verified", "majority_vote",
    "curation_chain",
)  # fmt: skip


@functools.cache
def made(option: str) -> Any:
    """As its yaml makes it; once, since the language model takes a second to load."""
    return build(yaml.safe_load((CONFIG_DIR / "recovery" / f"{option}.yaml").read_text()), "recovery")


def asked(questions: list[str], answers: list[str], **columns: Any) -> SyntheticSet:
    return answered(Prompts.of_users(questions, **columns), answers)


def left(synthetic: SyntheticSet) -> list[str]:
    """The answers, after a check that every column was cut in the same way."""
    column = synthetic.completions.column.tolist()
    tokens = ["".join(map(chr, synthetic.completions.tokens(row))) for row in range(len(column))]
    assert tokens == [f"{answer}\0" for answer in column]
    assert len(synthetic.prompts) == len(synthetic.repeats) == len(synthetic.usd) == len(column)
    return column


@pytest.mark.parametrize("option", CURATIONS)
@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from(["", "yes", "no", "no no no no"])), max_size=12))
@settings(max_examples=20, deadline=None)
def test_what_is_dropped_and_what_is_left_are_all_that_there_was(option: str, pairs: list[tuple[str, str]]) -> None:
    need(importlib.util.find_spec("datasketch") and importlib.util.find_spec("py3langid"), "pip install the extras")
    curation = made(option)
    assert isinstance(curation, contracts.Curation)
    assert contracts.of_language("recovery", type(curation))
    questions, answers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    given_set = asked(questions, answers, entries=texts(["yes"] * len(pairs)))
    knowledge = {"check": lambda prompts, column: (column == prompts.entries).astype(float)}
    curated = curation.curate(given_set, knowledge if curation.knows == "the task's checker" else {})
    assert len(curated) + sum(curated.dropped.values()) == len(pairs)
    assert given_set.dropped == {}, "what was paid for stays as it is"
    remaining = iter(pairs)
    kept = [(curated.prompts.messages(row)[0]["content"], answer) for row, answer in enumerate(left(curated))]
    assert all(pair in remaining for pair in kept), "the order of asking stays"


def test_equal_examples() -> None:
    given_set = asked(["a", "b", "a", "a", "b"], ["x", "x", "x", "y", "z"])
    for of, expected in (("pair", ["x", "x", "y", "z"]), ("prompt", ["x", "x"]), ("answer", ["x", "y", "z"])):
        curated = ExactDedup(of).curate(given_set, {})
        assert left(curated) == expected
        assert curated.dropped == {"exact_dedup": 5 - len(expected)}
    with pytest.raises(DistillError, match=r"of has no 'pairs'. Did you mean 'pair'\?"):
        ExactDedup("pairs")


def variants(n: int, words: int, changed: int, seed: int = 0) -> list[str]:
    """n texts and, after each, the same with so many words changed at its end."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        text = [f"w{word}" for word in rng.integers(10**6, size=words)]
        pairs += [" ".join(text), " ".join([*text[: words - changed], *(f"x{i}y{j}" for j in range(changed))])]
    return pairs


def test_nearly_equal_answers_are_found_and_no_others() -> None:
    need(importlib.util.find_spec("datasketch"), "pip install datasketch")
    # 100 words have 96 shingles of five; the last three changed leaves 93 of 99 in common: a Jaccard of 0.94.
    near = variants(60, 100, 3)
    # The last 15 changed leave 81 of 111: 0.73, below the threshold of 0.8.
    far = variants(60, 100, 15, seed=1)
    curated = NearDedup().curate(asked([str(i) for i in range(120)], near), {})
    assert left(curated) == near[::2]
    assert curated.dropped == {"near_dedup": 60}
    assert left(NearDedup().curate(asked([str(i) for i in range(120)], far), {})) == far
    assert left(NearDedup(threshold=0.6).curate(asked([str(i) for i in range(120)], far), {})) == far[::2]


def test_prompts_count_unless_answers_alone_are_compared() -> None:
    need(importlib.util.find_spec("datasketch"), "pip install datasketch")
    given_set = asked(["What are one and two and then three?", "Who was the king of all Denmark?"], ["I see."] * 2)
    assert len(NearDedup().curate(given_set, {})) == 2
    assert len(NearDedup(answers_only=True).curate(given_set, {})) == 1


def test_a_thousand_answers_are_compared_in_seconds() -> None:
    need(importlib.util.find_spec("datasketch"), "pip install datasketch")
    given_set = asked([str(i) for i in range(1_000)], variants(500, 60, 1))
    started = time.process_time()
    assert len(NearDedup().curate(given_set, {})) == 500
    assert time.process_time() - started < 10


def test_lengths_and_cut_answers() -> None:
    given_set = asked(list("abcdef"), ["", "  ", "one", "three", "seven77", "cut off"])
    given_set.completions.finish[5] = "length"
    curated = LengthFilter(max_characters=5).curate(given_set, {})
    assert left(curated) == ["one", "three"]
    assert curated.dropped == {"cut": 1, "too_short": 2, "too_long": 1}
    assert left(LengthFilter(min_characters=4, keep_cut=True).curate(given_set, {})) == ["three", "seven77", "cut off"]
    with pytest.raises(DistillError, match="max_characters must be at least 5"):
        LengthFilter(5, 4)


def test_languages() -> None:
    need(importlib.util.find_spec("py3langid"), "pip install py3langid")
    said = {
        "en": "The capital of the country is a large city by the river.",
        "de": "Die Hauptstadt des Landes ist eine große Stadt am Fluss.",
        "fr": "La capitale du pays est une grande ville au bord du fleuve.",
    }
    given_set = asked(list("abcd"), [*said.values(), "Ja."])
    for languages in (["en"], ["de"], ["en", "fr"]):
        curated = LanguageFilter(languages).curate(given_set, {})
        assert left(curated) == [*(said[language] for language in said if language in languages), "Ja."]
        assert curated.dropped == {"language_filter": 3 - len(languages)}
    with pytest.raises(DistillError, match=r"recovery.languages: no language 'xx'"):
        LanguageFilter(["xx"]).curate(given_set, {})
    with pytest.raises(DistillError, match="languages needs at least one"):
        LanguageFilter([])


@pytest.mark.parametrize("curation", [NearDedup(), LanguageFilter()])
def test_a_package_that_is_not_there_is_said(curation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingAsset, match=r"recovery: .* pip install"):
        curation.curate(asked(["a"], ["b"]), {})


# --- the task's checker ---------------------------------------------------------------------------------------------


def test_verified_answers_of_a_real_task() -> None:
    prompts = StraightLine(1, 20, 1).load().held_out.take(np.repeat(np.arange(20), 3))
    answers = prompts.references.tolist()
    wrong = [i for i in range(60) if i % 3 == 1 or i < 3]
    for i in wrong:
        answers[i] = f"{answers[i][:-1]}{(int(answers[i][-1]) + 1) % 10}"
    given_set = answered(prompts, answers)
    curated = Verified().curate(given_set, {"check": answer_right})
    assert curated.dropped == {"wrong": len(wrong)}
    assert left(curated) == [answers[i] for i in range(60) if i not in wrong]
    best = Verified(best_of_n=True).curate(given_set, {"check": answer_right})
    assert best.dropped == {"wrong": len(wrong), "not_best": 19}
    assert len(set(best.prompts.column)) == len(best) == 19


def test_the_best_of_n_is_the_best_scored_and_the_first_among_equals() -> None:
    scores = {"poor": 0.1, "good": 0.8, "also good": 0.8, "fair": 0.5}
    given_set = asked(["a", "a", "a", "b", "a", "b"], ["poor", "good", "also good", "poor", "fair", "fair"],
                      entries=texts([""] * 6))  # fmt: skip

    def check(prompts: Prompts, answers: np.ndarray) -> np.ndarray:
        return np.array([scores[answer] for answer in answers])

    curated = Verified(0.0, best_of_n=True).curate(given_set, {"check": check})
    assert left(curated) == ["good", "fair"]
    assert left(Verified(0.6, best_of_n=True).curate(given_set, {"check": check})) == ["good"]
    assert left(Verified(0.8).curate(given_set, {"check": check})) == ["good", "also good"]


def test_what_can_not_be_verified_is_said() -> None:
    with pytest.raises(DistillError, match="recovery: verified needs a task with a checker"):
        Verified().curate(asked(["a"], ["b"]), {"check": None})
    with pytest.raises(DistillError, match="recovery: verified needs prompts that the task's checker knows"):
        Verified().curate(asked(["a"], ["b"]), {"check": answer_right})


# --- votes ----------------------------------------------------------------------------------------------------------


def test_the_majority_of_a_prompts_answers() -> None:
    questions = [*"aaaa", *"bbbb", *"cc"]
    answers = ["x.1", "y. 2", "z.1 ", "no", "u.3", "u.4", "u.5", "u.3", "none", "no"]
    given_set = asked(questions, answers)
    curated = MajorityVote(".").curate(given_set, {})
    assert left(curated) == ["x.1", "z.1 ", "u.3", "u.3"]
    assert curated.dropped == {"no_conclusion": 3, "minority": 3, "no_majority": 0}
    assert left(MajorityVote(".", min_share=0.51).curate(given_set, {})) == []
    assert left(MajorityVote(".", min_share=0.5).curate(given_set, {})) == ["x.1", "z.1 ", "u.3", "u.3"]
    assert left(MajorityVote().curate(asked(["a", "a", "b"], ["q", "p", "r"]), {})) == ["q", "r"], "ties: the first"
    with pytest.raises(DistillError, match="separator must not be empty"):
        MajorityVote("")


@given(st.lists(st.sampled_from("123"), min_size=1, max_size=9))
def test_a_vote_keeps_a_commonest_conclusion(conclusions: list[str]) -> None:
    curated = MajorityVote().curate(asked(["same"] * len(conclusions), conclusions), {})
    kept = left(curated)
    assert len(set(kept)) == 1
    assert len(kept) == max(conclusions.count(conclusion) for conclusion in "123")


# --- chains ---------------------------------------------------------------------------------------------------------


def test_a_chain_is_its_members_in_turn_and_counts_each() -> None:
    given_set = asked([*"aabbb"], ["x", "x", "", "y", "zzzzzzzz"], entries=texts(["x"] * 5))
    chain = CurationChain([ExactDedup(), LengthFilter(), LengthFilter(max_characters=4), Verified()])
    assert chain.knows == "the task's checker"
    curated = chain.curate(given_set, {"check": lambda prompts, answers: (answers == prompts.entries).astype(float)})
    assert left(curated) == ["x"]
    assert curated.dropped == {
        "1.exact_dedup": 1, "2.cut": 0, "2.too_short": 1, "3.cut": 0, "3.too_short": 0, "3.too_long": 1, "4.wrong": 1
    }  # fmt: skip
    assert CurationChain([ExactDedup()]).knows == "nothing"
    nested = CurationChain([CurationChain([ExactDedup()])]).curate(given_set, {})
    assert nested.dropped == {"1.1.exact_dedup": 1}


def test_a_chain_hands_out_no_more_knowledge_than_a_member_asks_for() -> None:
    class Curious:
        knows = "nothing"

        def curate(self, synthetic: SyntheticSet, knowledge: Any) -> SyntheticSet:
            assert knowledge == {}
            return synthetic

    class Other(Curious):
        knows = "the defense's name"

    given_set = asked(["a"], ["x"], entries=texts(["x"]))
    check = lambda prompts, answers: np.ones(len(answers))  # noqa: E731
    assert len(CurationChain([Curious(), Verified()]).curate(given_set, {"check": check})) == 1
    with pytest.raises(DistillError, match=r"recovery.members: know different things"):
        CurationChain([Other(), Verified()])
    with pytest.raises(DistillError, match=r"recovery.members: needs at least one"):
        CurationChain([])
