"""Pools of prompts, and the attacks that ask them or make their own: what is asked, what is paid, what is kept."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from assets import need
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toys import FakeOracle, chats

from distill import contracts
from distill.attacks.evol_instruct import DEEPER, EvolInstruct
from distill.attacks.ground_truth_answers import GroundTruthAnswers
from distill.attacks.magpie import Magpie, user_turn
from distill.attacks.no_teacher_text import NoTeacherText
from distill.attacks.novelty import Novelty, rouge_l
from distill.attacks.prompt_pool import PromptPool
from distill.attacks.self_instruct import SelfInstruct, numbered
from distill.config import CONFIG_DIR, build
from distill.data.pools.continuation import Continuation
from distill.data.pools.prompts_held_out import PromptsHeldOut
from distill.data.pools.prompts_local import PromptsLocal
from distill.data.pools.random_word_prompts import RandomWordPrompts
from distill.data.straight_line import StraightLine
from distill.errors import BudgetExceeded, DistillError
from distill.language import Prompts, SyntheticSet, Task, texts

ATTACKS = ("prompt_pool", "self_instruct", "evol_instruct", "magpie", "ground_truth_answers", "no_teacher_text")


class Template:
    """A tokenizer's chat template, and no tokens."""

    chat_template = "ChatML"
    bos_token_id = None

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def teacher(said: str, repeat: int) -> str:
    """Obliging: it lists tasks, rewrites prompts, continues a template, and answers all else by its length."""
    number = sum(map(ord, said)) * 31 + repeat
    words = "".join(chr(97 + (number >> 3 * i) % 26) for i in range(9))
    if said.startswith("Here are"):
        return "Sure:\n" + "\n".join(f"{9 + i}. Do {words}{i} with {words[::-1]}{i * i} now" for i in range(8))
    if said.startswith(("Rewrite", "Read the prompt")):
        return f"{said.rsplit(chr(10), 1)[1]} and {words}"
    if said.endswith("user\n"):
        return f" Tell me about {words} {repeat}\n"
    return f"It has {len(said)} letters ({repeat})."


def held_out(prompts: Prompts) -> Task:
    return Task("toy", prompts.take(slice(0, 0)), prompts, prompts.take(slice(0, 1)))


def run(
    option: str, oracle: FakeOracle, pool: Prompts, samples: int = 1, seed: int = 0, **options: Any
) -> SyntheticSet:
    node = yaml.safe_load((CONFIG_DIR / "attack" / f"{option}.yaml").read_text())
    return build(node | options, "attack").synthesise(oracle, pool, samples, seed)


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ATTACKS)
@given(budget=st.sampled_from([0, 1, 2, 29, 30, 31, 59, 60, 61]) | st.integers(0, 150), samples=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_no_attack_asks_for_more_than_its_budget_or_leaves_much(option: str, budget: int, samples: int) -> None:
    pool = chats(30)
    oracle = FakeOracle(teacher, queries=budget, tokenizer=Template())
    synthetic = run(option, oracle, pool, samples)
    attack = build(yaml.safe_load((CONFIG_DIR / "attack" / f"{option}.yaml").read_text()), "attack")
    spent = oracle.spent().queries
    if not attack.uses_teacher:
        assert spent == 0
        assert len(synthetic) == min(budget, 30 * samples)
        return
    assert spent <= budget
    whole_pool = 30 * samples
    if option == "prompt_pool":
        assert spent == len(synthetic) == min(budget, whole_pool)
    elif option == "evol_instruct":
        assert spent == min(budget, whole_pool + 4 * 30 * (1 + samples))
    else:  # a last single answer is not worth a prompt of one's own
        assert budget - spent <= 1
    asked = [json.loads(prompt)[-1]["content"] for prompt, sampling in oracle.asked if sampling is None]
    assert [synthetic.prompts.messages(row)[-1]["content"] for row in range(len(synthetic))] == asked
    assert len(synthetic) == len(synthetic.usd) == len(synthetic.repeats) == len(synthetic.prompts)
    assert all(answer == teacher(question, int(repeat)) for answer, question, repeat in
               zip(synthetic.completions.column, asked, synthetic.repeats, strict=True))  # fmt: skip


@pytest.mark.parametrize("option", ["prompt_pool", "self_instruct", "evol_instruct", "magpie"])
@given(tokens=st.integers(0, 3_000), samples=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_a_budget_of_tokens_ends_an_attack_in_the_middle_of_a_batch(option: str, tokens: int, samples: int) -> None:
    oracle = FakeOracle(teacher, tokens=tokens, tokenizer=Template())
    synthetic = run(option, oracle, chats(30), samples)
    assert oracle.used_tokens <= tokens
    answers = [prompt for prompt, sampling in oracle.asked if sampling is None]
    assert synthetic.prompts.column.tolist() == answers, "all that was paid for is kept"
    assert synthetic.completions.tokens(0).size if len(synthetic) else True


@pytest.mark.parametrize("option", ATTACKS)
def test_an_attack_asks_the_same_again_and_other_seeds_ask_otherwise(option: str) -> None:
    def asked(seed: int, budget: int = 100) -> tuple[list, SyntheticSet]:
        oracle = FakeOracle(teacher, queries=budget, tokenizer=Template())
        return oracle.asked, run(option, oracle, chats(30), 2, seed)

    one, same, other = asked(0), asked(0), asked(1)
    assert one[0] == same[0]
    assert one[1].prompts.fingerprint == same[1].prompts.fingerprint
    assert one[1].completions.column.tolist() == same[1].completions.column.tolist()
    assert one[0] != other[0] or one[1].prompts.fingerprint != other[1].prompts.fingerprint
    smaller = asked(0, 25)[1]
    assert smaller.prompts.column.tolist()[:10] == one[1].prompts.column.tolist()[:10] or option == "evol_instruct"


@pytest.mark.parametrize("option", ATTACKS)
def test_attacks_have_what_their_contract_asks_for(option: str) -> None:
    attack = build(yaml.safe_load((CONFIG_DIR / "attack" / f"{option}.yaml").read_text()), "attack")
    assert isinstance(attack, contracts.PromptAttack)
    assert contracts.of_language("attack", type(attack))


def test_an_oracle_that_is_not_asked_partially_charges_nothing() -> None:
    """The stand-in keeps the contract that the attacks are held against."""
    oracle = FakeOracle(teacher, queries=3)
    with pytest.raises(BudgetExceeded, match="affords only 3"):
        oracle.ask(chats(4))
    assert oracle.spent().queries == 0
    assert len(oracle.ask(chats(2), samples=2, partial=True)) == 3


# --- prompts of the pool, and controls ------------------------------------------------------------------------------


def test_smaller_budgets_nest_and_samples_stand_beside_each_other() -> None:
    pool = chats(20)
    whole = PromptPool().synthesise(FakeOracle(teacher), pool, 3, seed=5)
    assert len(whole) == 60
    assert whole.repeats.tolist() == [0, 1, 2] * 20
    assert set(whole.prompts.column) == set(pool.column)
    for budget in (1, 4, 59):
        part = PromptPool().synthesise(FakeOracle(teacher, queries=budget), pool, 3, seed=5)
        assert part.prompts.column.tolist() == whole.prompts.column.tolist()[:budget]


@pytest.mark.parametrize("budget", [1, 7, 40, 61])
def test_controls_take_the_very_prompts_that_the_pool_attack_asks(budget: int) -> None:
    pool = chats(20)
    asked = PromptPool().synthesise(FakeOracle(teacher, queries=budget), pool, 3, seed=5)
    for control in (GroundTruthAnswers(), NoTeacherText()):
        oracle = FakeOracle(teacher, queries=budget)
        synthetic = control.synthesise(oracle, pool, 3, seed=5)
        assert synthetic.prompts.column.tolist() == asked.prompts.column.tolist()
        assert oracle.asked == []
        assert synthetic.usd.sum() == synthetic.completions.completion_tokens.sum() == 0
        right = synthetic.completions.column == synthetic.prompts.references
        assert right.all() if isinstance(control, GroundTruthAnswers) else not right.any()


def test_controls_need_references() -> None:
    for control in (GroundTruthAnswers(), NoTeacherText()):
        with pytest.raises(DistillError, match="attack: this control needs a pool"):
            control.synthesise(FakeOracle(teacher, queries=3), chats(5, references=False), 1, 0)


# --- self-instruct --------------------------------------------------------------------------------------------------


def test_self_instruct_shows_old_prompts_and_keeps_new_ones() -> None:
    oracle = FakeOracle(teacher, queries=400)
    attack = SelfInstruct(seeds=12, requests_at_once=2)
    synthetic = attack.synthesise(oracle, chats(30), 1, 0)
    requests = [json.loads(p)[0]["content"] for p, sampling in oracle.asked if sampling is not None]
    seeds = {synthetic.prompts.messages(row)[0]["content"] for row in range(12)}
    own = [synthetic.prompts.messages(row)[0]["content"] for row in range(12, len(synthetic))]
    for i, request in enumerate(requests):
        shown = numbered(request.partition("\n\nThink")[0], cut=False)
        assert len(shown) == 8
        assert len(seeds & set(shown)) == (8 if i < 2 else 6)
    assert len(own) == len(set(own)) > 100
    for i, prompt in enumerate(own[:60]):
        assert all(rouge_l(prompt, other) < 0.7 for other in [*seeds, *own[:i]])
    assert synthetic.prompts.entries is None, "no checker knows the attack's own prompts"
    sampled = {sampling for _, sampling in oracle.asked if sampling is not None}
    assert {(s.temperature, s.top_p, s.max_tokens) for s in sampled} == {(0.7, 0.5, 1024)}


def test_self_instruct_ends_where_nothing_new_comes_and_at_its_own_bound(caplog: pytest.LogCaptureFixture) -> None:
    def dull(said: str, repeat: int) -> str:
        return "1. Always the same task, whatever is shown" if said.startswith("Here") else "Yes."

    synthetic = SelfInstruct(seeds=5, patience=3, requests_at_once=1).synthesise(FakeOracle(dull), chats(9), 1, 0)
    assert len(synthetic) == 6
    assert "3 rounds in a row brought no new prompt" in caplog.text
    bounded = SelfInstruct(seeds=5, max_prompts=11).synthesise(FakeOracle(teacher), chats(9), 2, 0)
    assert len(bounded) == 2 * (5 + 11)


def test_lists_are_read_as_models_write_them() -> None:
    assert numbered("Sure!\n9. Write a poem\nof two lines.\n10) Name 3 rivers.\n 11: Stop.", cut=False) == [
        "Write a poem\nof two lines.", "Name 3 rivers.", "Stop."]  # fmt: skip
    assert numbered("1. One\n2. Tw", cut=True) == ["One"]
    assert numbered("1. One\n\n2. Two\n\nThese are all.", cut=False) == ["One", "Two"]
    assert numbered("I can't do that.", cut=False) == numbered("", cut=False) == numbered("3.", cut=False) == []


def test_prompts_that_text_can_not_serve_are_dropped() -> None:
    def listing(said: str, repeat: int) -> str:
        if not said.startswith("Here"):
            return "Yes."
        return "1. Describe this image.\n2. " + "very " * 151 + "long\n3. Name a river.\n4. ...\n5. Name a river!"

    synthetic = SelfInstruct(seeds=2, max_prompts=1).synthesise(FakeOracle(listing), chats(4), 1, 0)
    assert synthetic.prompts.messages(2)[0]["content"] == "Name a river."
    assert len(synthetic) == 3


WORDS = st.lists(st.sampled_from(list("abcdef")), max_size=12)


@given(WORDS, WORDS)
def test_rouge_l_is_the_table_of_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    expected = 2 * table[-1, -1] / (len(one) + len(other)) if one and other else 0.0
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected)
    novelty = Novelty(0.7)
    assert novelty.admit(" ".join(one)) == bool(one)
    assert novelty.admit(" ".join(other)) == (bool(other) and expected < 0.7)


def test_rouge_l_is_what_the_package_says() -> None:
    need(importlib.util.find_spec("rouge_score"), "pip install rouge-score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    rng = np.random.default_rng(0)
    vocabulary = ["The", "cat,", "sat", "2", "mats;", "the", "DOG'S", "mat", "ran!"]
    for _ in range(100):
        one, other = (" ".join(rng.choice(vocabulary, size=rng.integers(1, 30))) for _ in range(2))
        assert rouge_l(one, other) == pytest.approx(scorer.score(one, other)["rougeL"].fmeasure)


# --- evol-instruct --------------------------------------------------------------------------------------------------


def test_evol_instruct_rewrites_what_it_wrote_and_uses_all_its_requests() -> None:
    oracle = FakeOracle(teacher)
    synthetic = EvolInstruct(rounds=3, prompts_at_once=8).synthesise(oracle, chats(20), 2, 0)
    assert len(synthetic) == 20 * 4 * 2
    requests = [json.loads(p)[0]["content"] for p, sampling in oracle.asked if sampling is not None]
    assert len(requests) == 60
    used = [next((i for i, how in enumerate(DEEPER) if how in request), len(DEEPER)) for request in requests]
    assert set(used) == set(range(6))
    last = max((synthetic.prompts.messages(row)[0]["content"] for row in range(len(synthetic))), key=len)
    assert last.count(" and ") == 3, "the third rewriting is of the second"


@pytest.mark.parametrize(
    ("rewriting", "reply", "asked", "rounds_that_start_anew"),
    [
        ("", "Fine words.", 1, 4),
        ("  {prompt} ", "Fine words.", 1, 4),
        ("Here is the rewritten prompt: {prompt} now", "Fine words.", 1, 4),
        ("{prompt} harder", "I am sorry, I can't.", 5, 4),
        ("{prompt} harder", "and is the .", 5, 4),
        ("{prompt} harder", "Fine words.", 5, 1),
    ],
)
def test_failed_rewritings_go_back_to_what_they_came_from(
    rewriting: str, reply: str, asked: int, rounds_that_start_anew: int
) -> None:
    original = "How far is the moon?"

    def answer(said: str, repeat: int) -> str:
        prompt = said.rsplit("\n", 1)[-1]
        return rewriting.format(prompt=prompt) if said.startswith(("Rewrite", "Read the")) else reply

    oracle = FakeOracle(answer)
    synthetic = EvolInstruct().synthesise(oracle, Prompts.of_users([original], name="one"), 1, 0)
    assert len(synthetic) == asked
    requests = [json.loads(p)[0]["content"] for p, sampling in oracle.asked if sampling is not None]
    assert sum(request.endswith(f"\n{original}") for request in requests) == rounds_that_start_anew


def test_only_the_last_message_of_a_chat_is_rewritten() -> None:
    from distill.language import encode_messages

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How far is the moon?"}]
    pool = Prompts(texts([encode_messages(chat)]))
    synthetic = EvolInstruct(rounds=1).synthesise(FakeOracle(teacher), pool, 1, 0)
    assert synthetic.prompts.messages(1)[0] == chat[0]
    assert synthetic.prompts.messages(1)[1]["content"].startswith("How far is the moon? and ")


def test_plain_text_and_empty_pools_are_refused_before_a_query() -> None:
    plain = Prompts(texts(["In the beginning"]), chat=False, name="text")
    for attack in (SelfInstruct(), EvolInstruct()):
        for pool, message in ((plain, "plain text"), (chats(0), "is empty")):
            oracle = FakeOracle(teacher)
            with pytest.raises(DistillError, match=f"pool: .*{message}"):
                attack.synthesise(oracle, pool, 1, 0)
            assert oracle.asked == []


# --- magpie ---------------------------------------------------------------------------------------------------------


def test_magpie_opens_the_users_turn_and_asks_what_came() -> None:
    oracle = FakeOracle(teacher, queries=60, tokenizer=Template())
    synthetic = Magpie(system_prompt="Mathematics.").synthesise(oracle, chats(0), 2, 0)
    openings = [(prompt, sampling) for prompt, sampling in oracle.asked if sampling is not None]
    assert len(openings) == 20
    assert {prompt for prompt, _ in openings} == {"<|im_start|>system\nMathematics.<|im_end|>\n<|im_start|>user\n"}
    assert openings[0][1].stop == ("<|im_end|>",)
    assert len(synthetic) == 40
    assert synthetic.prompts.chat
    questions = {synthetic.prompts.messages(row)[0]["content"] for row in range(40)}
    assert len(questions) == 20
    assert all(question == question.strip() and question.startswith("Tell me about") for question in questions)


def test_magpie_drops_what_did_not_end_and_what_came_before(caplog: pytest.LogCaptureFixture) -> None:
    def repeating(said: str, repeat: int) -> str:
        return ["Same question?", " same question! ", ""][repeat % 3] if said.endswith("user\n") else "Yes."

    synthetic = Magpie(patience=2, prompts_at_once=6).synthesise(
        FakeOracle(repeating, tokenizer=Template()), chats(0), 1, 0
    )
    assert len(synthetic) == 1
    assert "2 rounds in a row" in caplog.text

    class Cut(FakeOracle):
        def ask(self, *arguments: Any, **options: Any) -> SyntheticSet:
            answers = super().ask(*arguments, **options)
            answers.completions.finish[:] = "length"
            return answers

    assert len(Magpie(patience=2).synthesise(Cut(teacher, tokenizer=Template()), chats(0), 1, 0)) == 0


def test_magpie_says_what_it_needs_before_a_query() -> None:
    class Bare(Template):
        chat_template = None

    for tokenizer, message in ((None, "does not show its tokenizer"), (Bare(), "has no chat template")):
        oracle = FakeOracle(teacher, queries=5, tokenizer=tokenizer)
        with pytest.raises(DistillError, match=f"attack: magpie needs a teacher whose chat template .* {message}"):
            Magpie().synthesise(oracle, chats(0), 1, 0)
        assert oracle.asked == []
    with pytest.raises(DistillError, match="temperature must be above 0"):
        Magpie(temperature=0)


def test_magpie_reads_a_real_template() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert user_turn(tokenizer, None) == ("<|user|>", "<|end|>")
    assert user_turn(tokenizer, "Hi") == ("<|system|>Hi<|end|><|user|>", "<|end|>")


def test_a_beginning_that_the_tokenizer_adds_itself_is_not_doubled() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    for adds in (True, False):
        words = Tokenizer(models.WordLevel({"<s>": 0, "user": 1, ":": 2}, "user"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        if adds:
            words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
        tokenizer.chat_template = "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        before, _ = user_turn(tokenizer, None)
        assert before == ("user: " if adds else "<s>user: ")
        assert tokenizer(before).input_ids == [0, 1, 2]


@pytest.mark.parametrize("attack", [SelfInstruct, EvolInstruct, Magpie])
def test_a_bad_option_names_itself(attack: type) -> None:
    for options in ({"max_tokens": 0}, {"top_p": 0}, {"temperature": -1}):
        with pytest.raises(DistillError, match=f"^{next(iter(options))} must be"):
            attack(**options)
    with pytest.raises(DistillError, match=r"^attack.max_tokens: must be at least 1"):
        build({"_target_": f"{attack.__module__}.{attack.__name__}", "max_tokens": 0}, "attack")


# --- pools ----------------------------------------------------------------------------------------------------------


def test_the_held_out_prompts_and_nothing_else() -> None:
    task = StraightLine(20, 10, 5).load()
    assert PromptsHeldOut().load_prompts(task) is task.held_out
    with pytest.raises(DistillError, match="toy holds no prompts out"):
        PromptsHeldOut().load_prompts(held_out(chats(0)))


def test_your_own_prompts_as_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one", "r": "1"}\n{"prompt": "two", "r": "2"}\n')
    pool = PromptsLocal(str(path), reference_column="r").load_prompts(held_out(chats(1)))
    assert [pool.messages(row)[0]["content"] for row in range(2)] == ["one", "two"]
    assert pool.references.tolist() == ["1", "2"]
    assert pool.entries is None, "the task's checker knows nothing of them"
    with pytest.raises(DistillError, match=r"pool.prompt_column: no column 'x'"):
        PromptsLocal(str(path), prompt_column="x").load_prompts(held_out(chats(1)))
    with pytest.raises(DistillError, match=r"pool.path: state your prompts: pool.path=… or pool.hub_id"):
        PromptsLocal().load_prompts(held_out(chats(1)))


def test_beginnings_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(50)))
    pool = Continuation(str(path), prompt_words=2, answer_words=8).load_prompts(held_out(chats(1)))
    assert not pool.chat
    assert pool.column.tolist() == [f"w{i} w{i + 1}" for i in range(0, 50, 10)]
    assert pool.references[0] == " " + " ".join(f"w{i}" for i in range(2, 10))
    path.write_bytes(b"\xff\xfe\xfa" * 20)
    with pytest.raises(DistillError, match=r"pool.path: .* can't be read as UTF-8"):
        Continuation(str(path)).load_prompts(held_out(chats(1)))


def test_what_the_evaluation_reads_is_no_prompt(tmp_path: Path) -> None:
    from distill.data.plain_text import PlainText

    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(4_000)))
    task = PlainText(str(path), prompt_words=10, answer_words=30).load()
    same = Continuation(str(path), prompt_words=10, answer_words=30).load_prompts(task)
    assert set(same.column) == set(task.held_out.column)
    tested = [set(passage.split()) for passage in task.held_out_text]
    other = Continuation(str(path), prompt_words=6, answer_words=9).load_prompts(task)
    assert 100 < len(other) < 4_000 // 15
    for start, rest in zip(other.column, other.references, strict=True):
        assert all(len(words.intersection((start + rest).split())) < 13 for words in tested)
    alien = Task("text", task.train, task.held_out, task.test, held_out_text=texts([path.read_text()]))
    with pytest.raises(DistillError, match=r"pool.path: all of this text"):
        Continuation(str(path)).load_prompts(alien)


def test_random_words_come_as_often_as_in_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("common " * 900 + "rare " * 100)
    pool = RandomWordPrompts(str(path), size=400, min_words=3, max_words=9).load_prompts(held_out(chats(1)))
    words = [pool.messages(row)[0]["content"].split() for row in range(400)]
    assert {len(prompt) for prompt in words} == set(range(3, 10))
    drawn = [word for prompt in words for word in prompt]
    # About 2,400 draws at 10 %: 0.6 % standard deviation, so five of them.
    assert abs(drawn.count("rare") / len(drawn) - 0.1) < 0.031
    same = RandomWordPrompts(str(path), size=400, min_words=3, max_words=9).load_prompts(held_out(chats(1)))
    assert same.fingerprint == pool.fingerprint
    of_task = RandomWordPrompts(size=5).load_prompts(held_out(chats(8)))
    known = " ".join(chats(8).messages(row)[0]["content"] for row in range(8)).split()
    assert set(" ".join(of_task.messages(row)[0]["content"] for row in range(5)).split()) <= set(known)
    path.write_text("one one one")
    with pytest.raises(DistillError, match=r"pool.path: 1 words make no texts"):
        RandomWordPrompts(str(path)).load_prompts(held_out(chats(1)))
