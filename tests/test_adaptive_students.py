"""Students that adapt: reweighted, filtered and paraphrased answers, and reasoning that is asked for again."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from language_toys import Parrot, a_text_provider
from prompt_toys import FakeOracle
from prompt_toys import answered as made_answers
from tiny_language import answered, characters, network

from distill.attacks.re_elicited import ReElicited
from distill.config import CONFIG_DIR, build
from distill.contracts import Curation, PromptAttack, of_language
from distill.data.straight_line import StraightLine
from distill.errors import DistillError
from distill.held_out_gradient import answer_losses, gradient
from distill.language import Prompts, Sampling, SyntheticSet, texts
from distill.packing import encode
from distill.provider.ledger import Prices
from distill.provider.oracle import serve_text
from distill.records import Budget
from distill.recovery.filtered import Filtered
from distill.recovery.paraphrased import Paraphrased
from distill.recovery.reweighted import Reweighted
from distill.rewriting import ByRules

TOKENIZER = characters()


class Apprentice:
    """Hands out one student, whatever it is to learn."""

    seed = 0

    def __init__(self) -> None:
        self.module, self.learnt = network(len(TOKENIZER)).double(), []

    def fit(self, synthetic: SyntheticSet) -> Any:
        self.learnt.append(synthetic)
        return SimpleNamespace(module=self.module, tokenizer=TOKENIZER)


# --- reweighted -----------------------------------------------------------------------------------------------------


def test_what_helps_on_own_examples_counts_more() -> None:
    """The sign: of a plain gradient step on each answer alone, what it takes off the loss on the own examples."""
    apprentice, answers, own = Apprentice(), answered(12), answered(6, seed=1)
    knowledge = {"own": own, "student": apprentice}
    curated = Reweighted(beta=2.0, levels=1000).curate(answers, knowledge)
    assert apprentice.learnt == [answers], "theta has learnt from all answers"
    encoded, rate = encode(own, TOKENIZER), 1e-5
    before = answer_losses(apprentice.module, encoded).sum()
    taken_off = []
    for row in range(len(answers)):
        step = gradient(apprentice.module, encode(answers.take([row]), TOKENIZER))
        student = network(len(TOKENIZER)).double()
        with torch.no_grad():
            for name, value in student.named_parameters():
                value -= rate * step[name]
        taken_off.append((before - answer_losses(student, encoded).sum()) / rate)
    assert min(taken_off) < np.median(taken_off) < max(taken_off)
    assert curated.weights is not None
    assert (np.argsort(curated.weights) == np.argsort(taken_off)).all()
    # And the number itself: the same per token of the own examples.
    tokens = sum(map(len, encoded.answers))
    found = Reweighted(epsilon=1e-4).advantages(apprentice.fit(answers), answers, own)
    np.testing.assert_allclose(found, np.array(taken_off) / tokens, rtol=2e-2, atol=2e-2)


def test_weights_are_exponential_clipped_of_mean_one_and_few() -> None:
    answers, knowledge = answered(40), {"own": answered(6, seed=1), "student": Apprentice()}
    helps = Reweighted().advantages(knowledge["student"].fit(answers), answers, knowledge["own"])
    exact = Reweighted(beta=3.0, clip=0.02, levels=10**6).curate(answers, knowledge).weights
    expected = np.exp(3.0 * helps.clip(-0.02, 0.02))
    assert exact is not None
    np.testing.assert_allclose(exact, expected / expected.mean(), rtol=1e-5)
    few = Reweighted(beta=3.0, levels=4).curate(answers, knowledge).weights
    assert few is not None
    assert len(np.unique(few)) <= 4
    assert few.mean() == pytest.approx(1, abs=1e-6)
    assert (np.diff(few[np.argsort(helps)]) >= 0).all()
    alike = Reweighted(beta=0.0).curate(answers, knowledge).weights
    assert alike is not None
    assert (alike == 1).all()


def test_reweighted_refuses() -> None:
    with pytest.raises(DistillError, match="own_examples"):
        Reweighted().curate(answered(3), {"own": answered(3).take([]), "student": Apprentice()})
    for wrong in ({"beta": -1}, {"epsilon": 0}, {"clip": 0}, {"levels": 0}):
        with pytest.raises(DistillError, match=f"recovery.{next(iter(wrong))}"):
            Reweighted(**wrong)


# --- filtered -------------------------------------------------------------------------------------------------------


def asked(answers: list[str], told: bool = False) -> SyntheticSet:
    found = made_answers(Prompts.of_users(["what?"] * len(answers)), answers)
    return found if told else replace(found, completions=found.completions.without_tokens())


@pytest.mark.parametrize("told", [False, True])
def test_degenerate_answers_are_dropped_and_counted(told: bool) -> None:
    kept = ["a=3;b=3+5=8;.8", "aaaaaaa", "", "The answer of ℝ and µ is 𝑥 = ½.", "no no no no no no no"]
    bad = ["so aaaaaaaa it is", "b=3+5=8;" * 40, "答 is 8", "ответ 8"]
    curated = Filtered().curate(asked([*kept, *bad], told), {})
    assert curated.completions.column.tolist() == kept
    assert curated.dropped == {"repeated_token": 1, "repetitive": 1, "unexpected_script": 2}
    words = "go go go go go go go go there"
    assert Filtered().curate(asked([words]), {}).dropped["repeated_token"] == 1, "words where tokens are not told"
    assert len(Filtered(scripts=None).curate(asked(bad), {})) == 2
    assert len(Filtered(scripts=["cyrillic", "latin"]).curate(asked(bad), {})) == 1


def test_scripts_of_the_question_are_expected() -> None:
    found = made_answers(Prompts.of_users(["что?", "what?"]), ["да", "да"])
    assert Filtered().curate(found, {}).prompts.messages(0)[0]["content"] == "что?"
    assert Filtered().curate(found, {}).dropped["unexpected_script"] == 1


def test_what_is_unlike_the_others_is_an_outlier() -> None:
    apprentice, own, answers = Apprentice(), answered(5, seed=1), answered(30)
    curation = Filtered(run=99, max_compression=99, max_deviation=1.5)
    assert curation.knows == "own labelled examples"
    assert Filtered().knows == "nothing"
    curated = curation.curate(answers, {"own": own, "student": apprentice})
    assert apprentice.learnt == [own], "of the own examples alone"
    encoded = encode(answers, TOKENIZER)
    losses = answer_losses(apprentice.module, encoded) / [len(answer) for answer in encoded.answers]
    median = np.median(losses)
    out = losses > median + 1.5 * 1.4826 * np.median(np.abs(losses - median))
    assert 0 < out.sum() < 15
    assert curated.dropped["outlier"] == out.sum()
    assert curated.rows is not None
    assert curated.rows.tolist() == np.flatnonzero(~out).tolist()
    with pytest.raises(DistillError, match=r"recovery\.run"):
        Filtered(run=1)
    with pytest.raises(DistillError, match="max_compression"):
        Filtered(max_compression=1)
    with pytest.raises(DistillError, match="max_deviation"):
        Filtered(max_deviation=0)


# --- paraphrased ----------------------------------------------------------------------------------------------------


def test_answers_are_said_in_other_words_and_cost_what_they_cost() -> None:
    rules = [{"find": r"(\d)\+(\d)", "replace": [r"\1+\2", r"\2+\1"]}]
    answers = made_answers(Prompts.of_users([f"q{i}" for i in range(40)]), ["b=3+5=8;.8"] * 40)
    curated = Paraphrased(ByRules(rules)).curate(answers, {})
    assert set(curated.completions.column) == {"b=3+5=8;.8", "b=5+3=8;.8"}, "each draws by itself"
    assert curated.completions.token_ids is None, "they are tokens of other words"
    assert (curated.completions.completion_tokens == answers.completions.completion_tokens).all()
    assert (curated.usd == answers.usd).all()
    again = Paraphrased(ByRules(rules)).curate(answers.take(slice(5, 9)), {})
    assert again.completions.column.tolist() == curated.completions.column[5:9].tolist(), "whatever else there is"
    other = Paraphrased(ByRules(rules), seed=1).curate(answers, {})
    assert other.completions.column.tolist() != curated.completions.column.tolist()


@pytest.mark.parametrize("option", ["reweighted", "filtered", "paraphrased"])
def test_they_are_curations(option: str) -> None:
    node = yaml.safe_load((CONFIG_DIR / "recovery" / f"{option}.yaml").read_text())
    if node.pop("defaults", None):
        node["rewriter"] = yaml.safe_load((CONFIG_DIR / "rewriter" / "by_rules.yaml").read_text())
    curation = build(node, "recovery")
    assert isinstance(curation, Curation)
    assert of_language("recovery", type(curation))


# --- re-elicited ----------------------------------------------------------------------------------------------------

BY_PIECES: dict[str, Any] = {
    "piece": "(?P<begin>a=(?P<first>[0-9]);)?(?P<name>[a-z])=[a-z](?P<rest>[^;]*);",
    "sub_question": "{before}{name}?",
    "step": "{begin}{name}={first}{previous}{rest}={answer};",
    "conclusion": ".{answer}",
    "result": "[0-9]",
}
TASK = StraightLine(train_rows=1, held_out_rows=30, test_rows=1, max_assignments=6).load()


def calculated(question: str, repeat: int) -> str:
    """A teacher of straight-line programs whose reasoning is held back."""
    values: dict[str, int] = {}
    for name, program in re.findall(r"([a-z])=([^;]*);", question):
        values[name] = eval(program, {}, values) % 10
    return f".{values[question[-2]]}"


def test_sub_questions_bring_the_reasoning_back() -> None:
    oracle = FakeOracle(calculated)
    attack = ReElicited(**BY_PIECES, questions_at_once=7)
    assert isinstance(attack, PromptAttack)
    found = attack.synthesise(oracle, TASK.held_out, 1, 0)
    references = found.prompts.references
    assert references is not None
    assert len(found) == len(TASK.held_out)
    for row, reference in enumerate(references):
        assert found.completions.column[row] == reference, "the task's own reasoning"
        assert found.completions.token_ids is None
    asked = [Prompts(texts([chat])).messages(0)[0]["content"] for chat, _ in oracle.asked]
    assert len(asked) == sum(reference.count(";") - 1 for reference in references)
    assert min(question.count(";") for question in asked) == 2
    assert TASK.check is not None
    assert TASK.check(found.prompts, found.completions.column).all()


def test_a_second_turn_brings_the_reasoning_back() -> None:
    oracle = FakeOracle(lambda said, repeat: "because." if said.startswith("Why") else f"{said}!")
    pool = Prompts.of_users([f"q{i}" for i in range(5)])
    found = ReElicited(follow_up="Why?", step="{answer} ").synthesise(oracle, pool, 2, 0)
    questions = [found.prompts.messages(row)[0]["content"] for row in range(10)]
    assert sorted(questions) == sorted([f"q{i}" for i in range(5)] * 2)
    assert found.completions.column.tolist() == [f"because. {question}!" for question in questions]
    turns = [Prompts(texts([chat])).messages(0) for chat, _ in oracle.asked]
    assert [[message["role"] for message in turn] for turn in turns] == [["user"]] * 10 + [
        ["user", "assistant", "user"]
    ] * 10
    assert turns[10][1]["content"] == turns[0][0]["content"] + "!"


@pytest.mark.parametrize("options", [{}, BY_PIECES], ids=["turn", "pieces"])
@pytest.mark.parametrize("budget", [1, 2, 6, 63, 64, 65, 10_000])
def test_a_budget_is_spent_and_never_passed(options: dict[str, Any], budget: int, tmp_path: Path) -> None:
    """Through a real provider that bills queries and tokens: the sums over rows are what was spent."""
    prices = Prices(0.25, 1.0, 3.0)
    provider = a_text_provider(tmp_path, Parrot(), budget=Budget(queries=budget), prices=prices)
    with serve_text(provider) as oracle:
        found = ReElicited(**options, questions_at_once=4).synthesise(oracle, TASK.held_out, 1, 0)
        spent = oracle.spent()
    assert TASK.held_out.references is not None
    pieces = [text.count(";") - 1 for text in TASK.held_out.references]
    whole = 2 * len(pieces) if not options else sum(pieces)
    assert spent.queries == min(budget, whole)
    assert found.usd.sum() == pytest.approx(spent.usd)
    assert found.completions.prompt_tokens.sum() == spent.tokens_in
    assert found.completions.completion_tokens.sum() == spent.tokens_out
    if budget > whole:
        assert len(found) == len(pieces), "the pool ended"


@pytest.mark.parametrize("options", [{}, BY_PIECES], ids=["turn", "pieces"])
def test_a_budget_of_tokens_too(options: dict[str, Any], tmp_path: Path) -> None:
    provider = a_text_provider(tmp_path, Parrot(), budget=Budget(tokens=700), sampling=Sampling(max_tokens=9))
    with serve_text(provider) as oracle:
        found = ReElicited(**options, questions_at_once=4).synthesise(oracle, TASK.held_out, 1, 0)
        spent = oracle.spent()
    assert 500 < spent.tokens_in + spent.tokens_out <= 700
    assert found.completions.prompt_tokens.sum() == spent.tokens_in


def test_what_it_refuses() -> None:
    for wrong, key in (
        ({"follow_up": " "}, "follow_up"),
        ({"questions_at_once": 0}, "questions_at_once"),
        ({"piece": "("}, "piece"),
        ({"result": "["}, "result"),
        ({"step": "{previous}"}, "step"),
        ({"piece": "a", "sub_question": "{name}"}, "sub_question"),
        ({"conclusion": "{"}, "conclusion"),
    ):
        with pytest.raises(DistillError, match=f"attack.{key}"):
            ReElicited(**wrong)
    oracle = FakeOracle(calculated)
    with pytest.raises(DistillError, match=r"attack\.piece"):
        ReElicited(piece="#").synthesise(oracle, TASK.held_out, 1, 0)
    with pytest.raises(DistillError, match="plain text"):
        ReElicited().synthesise(oracle, Prompts(texts(["Once"]), chat=False), 1, 0)
    assert oracle.asked == []
