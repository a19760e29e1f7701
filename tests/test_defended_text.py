"""The defended provider of text: what a defense does on the way, what it costs, and what it can't be asked around."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_toys import Parrot, a_text_provider, questions
from test_contracts import made, members, options
from tiny_language import characters, network

from distill import contracts
from distill.contracts import LanguageDefense, PreparedLanguageDefense
from distill.decoding import Guided, Network
from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, SyntheticSet, texts
from distill.language_experiment import LanguageStudents
from distill.provider.defenses._language import Unchanged
from distill.provider.defenses.none import NoDefense
from distill.provider.oracle import serve_text
from distill.randomness import KeyedRandom
from distill.records import EVERY_LOGPROB, Budget, InterfaceProfile, Reveals
from distill.speaker import CausalLM

TOKENIZER = characters()
SAMPLING = Sampling(max_tokens=10, temperature=1.0)
TOP = InterfaceProfile(Reveals.TOP_K, 5, logit_bias=True, prompt_logprobs=True)


class Local(CausalLM):
    """A teacher of random weights."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(batch_size=4)
        self.hold(network(len(TOKENIZER), seed), TOKENIZER)

    def prepare(self, task: Any, trainer: Any, cache: Path) -> None:
        pass


TEACHER = Local()


class Leaning(Unchanged):
    """Half of the logits are another model's."""

    def __init__(self) -> None:
        self.other = Network(network(len(TOKENIZER), 7))

    @property
    def tokens_read(self) -> int:
        return self.other.tokens_read

    def logits_processor(self, sampling: Sampling) -> Guided:
        return Guided([self.other], lambda tokens, logits, others: (logits + others[0]) / 2)


class Banning(Unchanged):
    """The token that was last is not said again."""

    def logits_processor(self, sampling: Sampling) -> Any:
        def ban(tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
            logits = logits.clone()
            logits[torch.arange(len(tokens)), [row[-1] for row in tokens]] = -torch.inf
            return logits

        return ban


def provider_of(cache: Path, defense: Any, access: InterfaceProfile = TOP, **changes: Any) -> Any:
    changes = {"teacher": TEACHER, "sampling": SAMPLING, "defense_id": type(defense).__name__} | changes
    return a_text_provider(cache, access=access, defense=defense, **changes)


@pytest.fixture
def prompts() -> Prompts:
    return Prompts.of_users([f"what is {i}?" for i in range(7)], name="toy")


def asked(provider: Any, prompts: Prompts, **more: Any) -> SyntheticSet:
    with serve_text(provider) as oracle:
        return oracle.ask(prompts, **more)


# --- decoding under a defense ---------------------------------------------------------------------------------------


def test_other_models_are_read_in_step_with_the_teacher_and_counted(tmp_path: Path, prompts: Prompts) -> None:
    defense = Leaning()
    provider = provider_of(tmp_path, defense)
    answers = asked(provider, prompts).completions
    lengths = answers.prompt_tokens + answers.completion_tokens
    # The last token of an answer is drawn, not read.
    assert provider.cost().defense_tokens == int((lengths - 1).sum()) == defense.tokens_read
    again = provider_of(tmp_path, defense)
    np.testing.assert_array_equal(asked(again, prompts).completions.column, answers.column)
    assert again.cost().defense_tokens == 0, "what was decoded is kept"
    with serve_text(provider_of(tmp_path, defense)) as oracle:
        oracle.ask(prompts)
        assert oracle.spent().defense_tokens == 0, "what it takes is not the attacker's to know"


def test_the_log_probabilities_that_are_told_are_those_after_the_defense(tmp_path: Path, prompts: Prompts) -> None:
    defense = Leaning()
    answers = asked(provider_of(tmp_path, defense), prompts).completions
    asks = TEACHER.prompt_tokens(prompts, SAMPLING)
    for row, before in enumerate(asks):
        tokens = answers.tokens(row).tolist()
        ids = torch.tensor([before + tokens])
        with torch.no_grad():
            logits = (TEACHER.network(ids).logits + network(len(TOKENIZER), 7)(ids).logits)[0] / 2
        wanted = logits[len(before) - 1 : -1].log_softmax(1)
        part = slice(*answers.offsets[row : row + 2])
        assert answers.logprobs is not None
        np.testing.assert_allclose(
            answers.logprobs[part], wanted[torch.arange(len(tokens)), tokens].numpy(), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(answers.top_logprobs[part], wanted.topk(5).values.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Leaning, Banning, NoDefense])
def test_given_text_is_scored_as_an_answer_of_the_same_text_is_told(
    kind: Any, tmp_path: Path, prompts: Prompts
) -> None:
    provider = provider_of(tmp_path, kind())
    answers = asked(provider, prompts).completions
    before = TEACHER.prompt_tokens(prompts, SAMPLING)
    whole = [asks + answers.tokens(row).tolist() for row, asks in enumerate(before)]
    with serve_text(provider_of(tmp_path, kind())) as oracle:
        scored = oracle.score(whole, [len(asks) for asks in before])
        assert oracle.spent().queries == len(prompts)
        assert oracle.spent().tokens_in == sum(map(len, whole))
    for row, sparse in enumerate(scored):
        part = slice(*answers.offsets[row : row + 2])
        np.testing.assert_allclose(sparse.logprobs.numpy(), answers.top_logprobs[part], rtol=1e-4, atol=1e-5)


def test_drawn_answers_depend_on_nothing_else_in_the_batch(tmp_path: Path, prompts: Prompts) -> None:
    together = asked(provider_of(tmp_path / "a", Leaning()), prompts).completions
    order = np.array([3, 1, 6, 0, 2, 5, 4])
    apart = asked(provider_of(tmp_path / "b", Leaning()), prompts.take(order)).completions
    np.testing.assert_array_equal(apart.column, together.column[order])


def test_whole_distributions_become_the_top_of_the_vocabulary(tmp_path: Path, prompts: Prompts) -> None:
    provider = provider_of(tmp_path, Leaning(), access=InterfaceProfile(Reveals.PROBS))
    assert provider.profile == InterfaceProfile(Reveals.TOP_K, len(TOKENIZER), prompt_logprobs=True)
    answers = asked(provider, prompts)
    sparse, lengths = provider.distributions(answers)
    assert sparse.ids.shape == (int(lengths.sum()), len(TOKENIZER))
    torch.testing.assert_close(sparse.logprobs.exp().sum(1), torch.ones(len(sparse)))
    text = provider_of(tmp_path, Leaning(), access=InterfaceProfile(Reveals.TEXT))
    assert asked(text, prompts).completions.offsets is None


def test_a_token_that_cannot_come_is_not_told(tmp_path: Path, prompts: Prompts) -> None:
    provider = provider_of(tmp_path, Banning(), access=InterfaceProfile(Reveals.PROBS))
    answers = asked(provider, prompts)
    sparse, _ = provider.distributions(answers)
    banned = (sparse.ids == -1).sum(1)
    assert (banned == 1).all()
    assert (sparse.logprobs[sparse.ids == -1] == -torch.inf).all()


def test_a_teacher_elsewhere_decodes_by_itself(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"defense: Banning .* weights are here"):
        provider_of(tmp_path, Banning(), teacher=Parrot())


def test_on_policy_is_refused_where_given_tokens_are_not_scored(tmp_path: Path) -> None:
    silent = InterfaceProfile(Reveals.TOP_K, 5)
    with (
        pytest.raises(DistillError, match="does not reveal"),
        serve_text(provider_of(tmp_path, Leaning(), access=silent)) as oracle,
    ):
        oracle.score([[6, 7, 8]], [1])


# --- after decoding -------------------------------------------------------------------------------------------------


class Shouting(Unchanged):
    """Answers with a mark that is drawn for each; text alone."""

    exposes = InterfaceProfile(Reveals.TEXT)

    def __init__(self, longer: int = 0) -> None:
        self.longer = longer

    def release(self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom) -> Completions:
        marks = (rng.uniform(1)[:, 0] * 10).astype(int)
        bare = completions.without_tokens()
        return Completions(
            texts([f"{text.upper()}{mark}" for text, mark in zip(bare.column, marks, strict=True)]),
            *(bare.finish, bare.prompt_tokens, bare.completion_tokens + self.longer),
        )


def test_what_is_done_after_decoding_is_done_to_the_answers_that_are_kept(tmp_path: Path, prompts: Prompts) -> None:
    clean = provider_of(tmp_path, NoDefense())
    plain = asked(clean, prompts).completions
    assert clean.cost().teacher_tokens > 0
    loud = provider_of(tmp_path, Shouting())
    released = asked(loud, prompts).completions
    assert loud.cost().teacher_tokens == 0, "the same answers, decoded once"
    assert [text[:-1] for text in released.column] == [text.upper() for text in plain.column]
    assert len({text[-1] for text in released.column}) > 1
    assert released.offsets is None
    other = provider_of(tmp_path, Shouting(), seed=1)
    assert list(asked(other, prompts).completions.column) != list(released.column)
    repeats = asked(provider_of(tmp_path, Shouting()), prompts, sampling=Sampling(10, 0.0), samples=3).completions
    assert len({text[-1] for text in repeats.column[:3]} | {text[-1] for text in repeats.column[3:6]}) > 1


def test_no_answer_becomes_longer_than_it_was_paid_for(tmp_path: Path, prompts: Prompts) -> None:
    with (
        pytest.raises(DistillError, match="longer than it may be"),
        serve_text(provider_of(tmp_path, Shouting(longer=10))) as oracle,
    ):
        oracle.ask(prompts)


# --- logit bias -----------------------------------------------------------------------------------------------------


def test_a_bias_is_added_to_the_logits_before_the_defense(tmp_path: Path, prompts: Prompts) -> None:
    bias = ((8, 3.0), (11, -2.0))
    biased = Sampling(max_tokens=1, temperature=0.0, logit_bias=bias)
    for defense, factor in ((NoDefense(), 1.0), (Leaning(), 0.5)):
        provider = provider_of(tmp_path, defense, access=InterfaceProfile(Reveals.TOP_K, len(TOKENIZER), True))
        plain, moved = (
            asked(provider_of(tmp_path, defense, access=provider.profile), prompts, sampling=sampling).completions
            for sampling in (Sampling(max_tokens=1, temperature=0.0), biased)
        )
        for row in range(len(prompts)):
            a, b = (dict(zip(some.top_ids[row], some.top_logprobs[row], strict=True)) for some in (plain, moved))
            shift = b[20] - a[20]
            assert b[8] - a[8] - shift == pytest.approx(3.0 * factor, abs=1e-4)
            assert b[11] - a[11] - shift == pytest.approx(-2.0 * factor, abs=1e-4)


def test_a_bias_is_refused_where_there_is_none_and_for_tokens_that_are_not_there(
    tmp_path: Path, prompts: Prompts
) -> None:
    with (
        pytest.raises(DistillError, match="takes no logit bias"),
        serve_text(provider_of(tmp_path, NoDefense(), access=InterfaceProfile(Reveals.TOP_K, 5))) as oracle,
    ):
        oracle.ask(prompts, Sampling(logit_bias=((3, 1.0),)))
    with (
        pytest.raises(DistillError, match="tokens, and one of another"),
        serve_text(provider_of(tmp_path, NoDefense())) as oracle,
    ):
        oracle.ask(prompts, Sampling(max_tokens=2, logit_bias=((5000, 1.0),)))


def test_requests_with_a_bias_to_a_free_teacher_are_not_kept(tmp_path: Path, prompts: Prompts) -> None:
    biased = Sampling(max_tokens=2, logit_bias=((8, 1.0),))
    for _ in range(2):
        provider = provider_of(tmp_path, NoDefense())
        asked(provider, prompts, sampling=biased)
        assert provider.cost().teacher_forwards == len(prompts)
    assert not list((tmp_path / "requests").rglob("*.npz"))


def test_a_bias_is_part_of_what_identifies_a_request(prompts: Prompts) -> None:
    plain, biased = Sampling(), Sampling(logit_bias=((1, 2.0),))
    zeros = np.zeros(len(prompts), dtype=np.int64)
    assert set(plain.request_keys(prompts, zeros)).isdisjoint(biased.request_keys(prompts, zeros))


# --- the profile ----------------------------------------------------------------------------------------------------


def test_profiles_meet() -> None:
    probs, top = InterfaceProfile(Reveals.PROBS), InterfaceProfile(Reveals.TOP_K, 5)
    assert probs.scores
    assert not top.scores
    assert probs.meet(EVERY_LOGPROB).scores, "whole distributions are told of any text, and still after a defense"
    assert probs.meet(EVERY_LOGPROB).reveals is Reveals.TOP_K
    assert not top.meet(EVERY_LOGPROB).scores
    assert top.meet(EVERY_LOGPROB) == top
    assert not InterfaceProfile(Reveals.TEXT, prompt_logprobs=True).scores
    assert InterfaceProfile.parse("top_k", 0) == InterfaceProfile(Reveals.TEXT)
    assert str(TOP) == "top_5+bias+prompt_logprobs"
    bias = InterfaceProfile(Reveals.TEXT, logit_bias=True)
    assert bias.meet(EVERY_LOGPROB).logit_bias
    assert not bias.meet(top).logit_bias


# --- every language defense against the contract --------------------------------------------------------------------


def unprepared() -> Iterator[str]:
    for option in options("defense", language=True):
        try:
            defense = made("defense", option)
        except DistillError:
            continue  # it has to be told of models
        if not isinstance(defense, PreparedLanguageDefense):
            yield option


def test_there_are_language_defenses_and_classifiers_have_none_of_them() -> None:
    assert {"none"}.isdisjoint(options("defense", language=True))
    assert len(list(unprepared())) > 4


@pytest.mark.parametrize("option", list(unprepared()))
@pytest.mark.parametrize("access", [TOP, InterfaceProfile(Reveals.TEXT)], ids=str)
def test_a_language_defense_treats_each_row_by_itself(
    option: str, access: InterfaceProfile, tmp_path: Path, prompts: Prompts
) -> None:
    defense = made("defense", option)
    assert isinstance(defense, LanguageDefense)
    assert members(contracts.LanguageDefense) <= set(dir(defense))
    whole = asked(provider_of(tmp_path / "a", defense, access=access), prompts).completions
    provider = provider_of(tmp_path / "b", made("defense", option), access=access)
    with serve_text(provider) as oracle:
        parts = [oracle.ask(prompts.take([row])).completions for row in range(len(prompts))]
    assert (whole.completion_tokens <= SAMPLING.max_tokens).all()
    assert provider.profile.meet(access) == provider.profile
    for row, part in enumerate(parts):
        assert part.column[0] == whole.column[row]
        assert part.finish[0] == whole.finish[row]
        assert part.completion_tokens[0] == whole.completion_tokens[row]
        if whole.offsets is not None:
            np.testing.assert_array_equal(part.tokens(0), whole.tokens(row))
            place = slice(*whole.offsets[row : row + 2])
            for name, column in part.flat().items():
                if column is not None:
                    np.testing.assert_allclose(column, whole.flat()[name][place], rtol=1e-3, atol=1e-4)


def test_budgets_hold_under_a_defense(tmp_path: Path) -> None:
    provider = provider_of(tmp_path, Leaning(), budget=Budget(tokens=60))
    with serve_text(provider) as oracle:
        oracle.ask(questions(9), partial=True)
    cost = provider.cost()
    assert 0 < cost.tokens_in + cost.tokens_out <= 60


# --- labelled examples of the attacker's own ------------------------------------------------------------------------


def students_of(pool: Prompts, own_examples: int) -> Any:
    nothing: Any = None
    return LanguageStudents(*[nothing] * 7, 64, 0, {}, pool, own_examples)


def test_own_examples_are_labelled_prompts_that_were_not_asked(tmp_path: Path) -> None:
    names = [f"question {i}" for i in range(20)]
    pool = Prompts.of_users(names, references=texts([f"answer {i}" for i in range(20)]), name="toy")
    answers = asked(provider_of(tmp_path, NoDefense()), pool.take(slice(0, 12)))
    own = students_of(pool, 8).own(answers)
    assert sorted(own.completions.column) == sorted(f"answer {i}" for i in range(12, 20))
    assert all(
        f"answer {names.index(own.prompts.messages(i)[0]['content'])}" == own.completions.column[i] for i in range(8)
    )
    assert own.usd.sum() == 0
    fewer = students_of(pool, 3).own(answers)
    assert list(fewer.completions.column) == list(own.completions.column[:3]), "fewer are a prefix of more"
    with pytest.raises(DistillError, match="own_examples: 9 are wanted, and toy has 8"):
        students_of(pool, 9).own(answers)
    with pytest.raises(DistillError, match="has 0 prompts with a reference"):
        students_of(Prompts.of_users(names, name="toy"), 1).own(answers)


def test_sets_are_joined_as_texts(tmp_path: Path) -> None:
    pool = Prompts.of_users([f"q {i}" for i in range(6)], references=texts(list("abcdef")))
    answers = asked(provider_of(tmp_path, NoDefense()), pool.take(slice(0, 4)))
    own = SyntheticSet.without_teacher(pool.take(slice(4, 6)), texts(["e", "f"]), "own")
    both = answers.followed_by(own)
    assert len(both) == 6
    assert list(both.completions.column) == [*answers.completions.column, "e", "f"]
    assert list(both.prompts.keys) == list(pool.keys)
    assert both.weights is None
    assert both.completions.offsets is None
    weighted = replace(answers, weights=np.array([0.5, 2, 1, 1], np.float32)).followed_by(own)
    np.testing.assert_array_equal(weighted.weights, [0.5, 2, 1, 1, 1, 1])
