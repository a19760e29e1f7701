"""What is done to text after decoding: rewriting, and what the defenses give out."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from language_toys import a_text_provider
from scipy.stats import binomtest
from tiny_language import CHARACTERS, characters, network
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.config import CONFIG_DIR, build
from distill.contracts import LanguageDefense, PreparedLanguageDefense, Watermark
from distill.data.straight_line import StraightLine
from distill.decoding import Guided, Network
from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, Task, texts
from distill.provider.defenses._language import Unchanged
from distill.provider.defenses.answer_only import AnswerOnly
from distill.provider.defenses.label_flipping import LabelFlipping
from distill.provider.defenses.language_chain import LanguageChain
from distill.provider.defenses.length_cap import LengthCap
from distill.provider.defenses.none import NoDefense
from distill.provider.defenses.paraphrase import Paraphrase
from distill.provider.defenses.rounding import Rounding
from distill.provider.defenses.summarised_reasoning import SummarisedReasoning
from distill.provider.defenses.trace_rewriting import TraceRewriting
from distill.provider.ledger import Prices
from distill.provider.oracle import serve_text
from distill.randomness import KeyedRandom
from distill.records import EVERY_LOGPROB, InterfaceProfile, Reveals
from distill.rewriting import ByModel, ByRules, EveryStep, ReversedSteps, Rewriter
from distill.speaker import CausalLM

TOKENIZER = characters()
NOTHING = Prompts(texts([]))
TASK = Task("none", NOTHING, NOTHING, NOTHING)
OPTIONS = ("answer_only", "summarised_reasoning", "paraphrase", "trace_rewriting", "label_flipping", "language_chain")


class Tiny(CausalLM):
    """A tiny random Llama that is there at once."""

    def __init__(self, tokenizer: Any = TOKENIZER, seed: int = 0, batch_size: int = 4) -> None:
        super().__init__(batch_size)
        self.hold(network(len(tokenizer), seed=seed, layers=1), tokenizer)

    def prepare(self, task: Any, trainer: Any, cache: Path) -> None:
        pass


class Reasoning(Tiny):
    """Says the same letter so often, then a dot and a digit that the prompt decides."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.fingerprint = length, f"reasons {length}"

    def generate(self, prompts: Prompts, *others: Any, **more: Any) -> Completions:
        answers = ["a" * self.length + f".{prompts.messages(row)[-1]['content'][-1]}" for row in range(len(prompts))]
        return replace(decoded(answers), prompt_tokens=self.count_tokens(prompts, SAMPLING)).without_tokens()


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that a cut may fall into a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", clean_up_tokenization_spaces=False)


TEACHER = Tiny()
BYTES = Tiny(_bytes_tokenizer())


def option(name: str, group: str = "defense") -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return build(compose(f"{group}/{name}")[group], group)


def prepared(defense: Any, teacher: Any = TEACHER, seed: int = 0) -> Any:
    assert defense.prepare(teacher, TASK, None, Path(), seed) is teacher
    return defense


def decoded(answers: list[str], tokenizer: Any = TOKENIZER, cut: bool = False, top_k: int = 2) -> Completions:
    """Answers as a decoder gives them, with log-probabilities that depend on everything before."""
    end = [] if cut else [0]
    ids = [tokenizer(text, add_special_tokens=False).input_ids + end for text in answers]
    lengths = np.array([len(some) for some in ids], dtype=np.int64)
    flat = np.array([token for some in ids for token in some], dtype=np.int32)
    told = -np.linspace(0.1, 3.0, len(flat) * top_k, dtype=np.float32).reshape(len(flat), top_k)
    return Completions(
        texts(answers),
        texts(["length" if cut else "stop"] * len(answers)),
        np.full(len(answers), 7, np.int64),
        lengths,
        np.concatenate([[0], np.cumsum(lengths)]),
        flat,
        told[:, 0],
        np.stack([flat] * top_k, axis=1),
        told,
    )


def questions(n: int) -> Prompts:
    return Prompts.of_users([f"question {i}" for i in range(n)])


def keyed(prompts: Prompts, repeat: int = 0, seed: int = 0) -> KeyedRandom:
    return KeyedRandom(seed, prompts.keys, np.full(len(prompts), repeat))


def release(defense: LanguageDefense, answers: list[str], sampling: Sampling, repeat: int = 0) -> list[str]:
    prompts = questions(len(answers))
    return defense.release(prompts, decoded(answers), sampling, keyed(prompts, repeat)).column.tolist()


def the_same(one: Completions, other: Completions) -> bool:
    """Every byte of every column."""
    for column in fields(Completions):
        a, b = getattr(one, column.name), getattr(other, column.name)
        if (a is None) != (b is None):
            return False
        if a is not None and (a.dtype != b.dtype or a.tolist() != b.tolist()):
            return False
    return True


def traces(n: int, seed: int = 0) -> tuple[Prompts, list[str]]:
    """Programs and the steps that solve them."""
    asked = StraightLine(n, 1, 1, max_assignments=6, split_seed=seed).load().train
    assert asked.references is not None
    return asked, asked.references.tolist()


SAMPLING = Sampling(max_tokens=200, temperature=0)
REASONING = st.text(alphabet="abcdef0123456789=+-;é漢", max_size=40)


# --- the reasoning does not leak ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(REASONING, REASONING, st.integers(0, 99), st.integers(1, 60), st.booleans(), st.booleans(), st.text(max_size=2))
def test_answer_only_gives_out_the_same_bytes_whatever_the_reasoning(
    one: str, other: str, result: int, most: int, one_cut: bool, other_cut: bool, stop: str
) -> None:
    defense = prepared(AnswerOnly(), BYTES)
    prompts = questions(1)
    asked = Sampling(max_tokens=most, stop=tuple(filter(None, [stop])))
    out = [
        defense.release(
            prompts, decoded([f"{text};.{result}"], BYTES.tokenizer, cut), asked, keyed(prompts, seed=len(text))
        )
        for text, cut in ((one, one_cut), (other, other_cut))
    ]
    assert the_same(*out)
    assert out[0].offsets is None
    assert out[0].logprobs is None
    assert f".{result}".startswith(out[0].column[0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("abc123=+-", min_size=1, max_size=8), min_size=4, max_size=4), st.booleans())
def test_a_summary_tells_nothing_but_itself(steps: list[str], cut: bool) -> None:
    defense = prepared(SummarisedReasoning(EveryStep(2)))
    prompts = questions(1)
    whole = "".join(f"{step};" for step in steps) + ".7"
    other = f"zz;{steps[1]};yyyyyy;{steps[3]};.7"
    given_out = defense.release(prompts, decoded([whole], cut=cut), SAMPLING, keyed(prompts))
    assert the_same(given_out, defense.release(prompts, decoded([other]), SAMPLING, keyed(prompts)))
    assert given_out.column[0] == f"{steps[1]};{steps[3]};.7"


@pytest.mark.parametrize("name", OPTIONS)
def test_what_changes_text_exposes_text_alone(name: str) -> None:
    defense = option(name)
    assert isinstance(defense, PreparedLanguageDefense)
    assert defense.exposes == InterfaceProfile(Reveals.TEXT)
    assert not EVERY_LOGPROB.meet(defense.exposes).scores
    assert not EVERY_LOGPROB.meet(defense.exposes).logit_bias


def test_a_stop_text_is_no_question_about_what_is_hidden() -> None:
    defense = prepared(AnswerOnly())
    asked = Sampling(max_tokens=50, stop=("b=3", ".9"))
    assert defense.sampling(asked) == replace(asked, stop=())
    assert release(defense, ["b=3+5=8;.8", "b=3+6=9;.9", "b=4+4=8;.8"], asked) == [".8", "", ".8"]
    # Nor about a flipped answer: the right one does not end what is decoded.
    assert prepared(LabelFlipping(1.0)).sampling(asked).stop == ()


def test_where_there_is_no_answer_there_is_what_was_agreed() -> None:
    answers = ["b=3+5=", "", "no steps at all", "b=1+1=2;.2"]
    prompts = questions(4)
    for otherwise in ("", "no answer"):
        out = prepared(AnswerOnly(otherwise=otherwise)).release(
            prompts, decoded(answers, cut=True), SAMPLING, keyed(prompts)
        )
        assert out.column.tolist() == [otherwise] * 3 + [".2"]
        assert out.finish.tolist() == ["stop"] * 4
        assert out.completion_tokens.tolist() == [len(otherwise) + 1] * 3 + [3]


def test_what_is_billed_is_what_is_released(tmp_path: Path) -> None:
    """Through the door, with a teacher that really reasons before every answer, and other reasoning behind the same
    answers: the attacker gets and pays the same."""
    prompts = questions(5)
    received = []
    for length in (3, 30):
        defense = prepared(AnswerOnly(r"\.."), Reasoning(length))
        provider = a_text_provider(
            tmp_path / f"{length}", teacher=Reasoning(length), defense=defense, prices=Prices(0.0, 1.0, 10.0),
            sampling=Sampling(max_tokens=40, temperature=0), access=EVERY_LOGPROB.meet(defense.exposes),
        )  # fmt: skip
        with serve_text(provider) as oracle:
            received.append((oracle.ask(prompts), oracle.spent()))
        assert (provider.clean(prompts, provider.sampling, np.zeros(5, np.int64)).completion_tokens > length).all()
    (one, spent), (other, as_much) = received
    assert the_same(one.completions, other.completions)
    assert one.usd.tolist() == other.usd.tolist()
    assert (spent.tokens_in, spent.tokens_out, spent.usd) == (as_much.tokens_in, as_much.tokens_out, as_much.usd)
    assert spent.tokens_out == sum(len(text) + 1 for text in one.completions.column)
    with pytest.raises(DistillError, match="log-probabilities"), serve_text(provider) as oracle:
        oracle.score([[1, 2, 3]], [1])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>3.5 is half;.9 of 7</think>\nIt is 3.5.\n", "\nIt is 3.5.\n"),
        ("6 times 3 is 18.\n#### 18", "#### 18"),
        ("b=3+5=8;c=8-9=9;.9", ".9"),
        ("It is 3.5; 4.5 would be too much.", None),
    ],
)
def test_answers_are_found_in_three_forms(text: str, answer: str | None) -> None:
    assert release(prepared(AnswerOnly(otherwise="?")), [text], SAMPLING) == ["?" if answer is None else answer]


# --- what goes out tells one story ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=12) | st.from_regex(r"[bc]=\d\+\d=\d;é?;?\.\d", fullmatch=True), min_size=1, max_size=3),
    st.integers(1, 25),
    st.sampled_from(OPTIONS),
)
def test_a_release_is_what_a_decoder_would_have_said(answers: list[str], most: int, name: str) -> None:
    """Also for empty answers, cut ones and any Unicode: never longer than asked for, and its count is its own."""
    defense = DEFENSES[name]
    prompts = questions(len(answers))
    sampling = Sampling(max_tokens=most)
    out = defense.release(prompts, decoded(answers, BYTES.tokenizer, cut=True), sampling, keyed(prompts))
    assert (out.completion_tokens <= most).all()
    assert out.prompt_tokens.tolist() == [7] * len(answers)
    free = defense.release(
        prompts, decoded(answers, BYTES.tokenizer), replace(sampling, max_tokens=200), keyed(prompts)
    )
    for text, whole, count, finish in zip(out.column, free.column, out.completion_tokens, out.finish, strict=True):
        ids = BYTES.tokenizer(whole).input_ids
        assert finish == ("stop" if len(ids) < most else "length")
        assert count == min(len(ids) + 1, most)
        assert text == (whole if finish == "stop" else BYTES.tokenizer.decode(ids[:most], skip_special_tokens=True))
    alone = [
        defense.release(prompts.take([i]), decoded([text], BYTES.tokenizer), sampling, keyed(prompts.take([i])))
        for i, text in enumerate(answers)
    ]
    assert the_same(Completions.join(alone), out), "a row depends on itself alone"


DEFENSES = {name: prepared(option(name), BYTES) for name in OPTIONS}


def test_no_answers_are_released_as_none() -> None:
    for defense in DEFENSES.values():
        assert len(defense.release(NOTHING, Completions.none(), SAMPLING, keyed(NOTHING))) == 0


def test_without_the_teachers_tokens_there_is_nothing_to_measure_in() -> None:
    teacher = Tiny()
    teacher.tokenizer = None
    with pytest.raises(DistillError, match=r"teacher\.tokenizer"):
        AnswerOnly().prepare(teacher, TASK, None, Path(), 0)


# --- rewriting ------------------------------------------------------------------------------------------------------


def test_the_rules_for_straight_line_keep_every_step_and_the_students_characters() -> None:
    prompts, references = traces(200)
    rewriter: Rewriter = option("by_rules", "rewriter")
    once = rewriter.rewrite(texts(references), prompts, keyed(prompts))
    for old, new in zip(references, once, strict=True):
        assert set(new) <= set("abcdef0123456789=+-;.")
        assert new.rpartition(".")[2] == old[-1]
        assert new.split(";")[0] == old.split(";")[0], "the first one calculates nothing"
        for step, said in zip(old.split(";")[1:-1], new.split(";")[1:-1], strict=True):
            name, calculation, result = step.split("=")
            first, sign, second = re.fullmatch(r"(\d)([+-])(\d)", calculation).groups()  # type: ignore[union-attr]
            calculations = {calculation} | ({f"{second}+{first}"} if sign == "+" else set())
            orders = [f"{name}={{}}={result}", f"{{}}={result}={name}", f"{result}={{}}={name}"]
            assert said in {order.format(some) for order in orders for some in calculations}
    words = [word for new in once for word in new.split(";")[1:-1]]
    share = np.mean([word[0].isalpha() for word in words])
    assert binomtest(int(share * len(words)), len(words), 1 / 3).pvalue > 1e-3, "templates are equally likely"
    assert once.tolist() == rewriter.rewrite(texts(references), prompts, keyed(prompts)).tolist()
    assert once.tolist() != rewriter.rewrite(texts(references), prompts, keyed(prompts, repeat=1)).tolist()


def test_steps_are_left_out_or_reversed() -> None:
    column, nobody = texts(["a=1;b=2;c=3;d=4;", "one\ntwo\nthree", "", "x"]), questions(4)
    left = EveryStep(2).rewrite(column, nobody, keyed(nobody)).tolist()
    assert left == ["b=2;d=4;", "two\n", "", ""]
    assert EveryStep(1).rewrite(column, nobody, keyed(nobody)).tolist() == column.tolist()
    reversed_ = ReversedSteps().rewrite(column, nobody, keyed(nobody)).tolist()
    assert reversed_ == ["d=4;c=3;b=2;a=1;", "threetwo\none\n", "", "x"]
    assert release(prepared(option("trace_rewriting")), ["b=1+1=2;c=2+3=5;.5"], SAMPLING) == ["c=2+3=5;b=1+1=2;.5"]


def test_a_share_is_paraphrased() -> None:
    defense = prepared(Paraphrase(ByRules([{"find": "a", "replace": ["x"]}]), share=0.3))
    out = release(defense, ["a;.1"] * 1000, SAMPLING)
    assert binomtest(out.count("x;.1"), 1000, 0.3).pvalue > 1e-3
    assert out.count("x;.1") + out.count("a;.1") == 1000
    assert release(defense, ["a;.1"] * 1000, SAMPLING, repeat=1) != out


def test_a_model_rewrites_what_it_is_told_and_what_it_reads_is_counted() -> None:
    model = Tiny(seed=3)
    told: list[str] = []
    model.prompt_tokens = lambda prompts, sampling: (  # type: ignore[method-assign]
        told.extend(prompts.messages(row)[-1]["content"] for row in range(len(prompts)))
        or CausalLM.prompt_tokens(model, prompts, sampling)
    )
    rewriter = ByModel(model, "q {prompt} t {text}", max_tokens=9, temperature=1.0)
    assert rewriter.fingerprint == ""
    defense = prepared(TraceRewriting(rewriter))
    assert defense.fingerprint == TEACHER.fingerprint + model.fingerprint
    prompts = Prompts.of_users(["a {text}", "b", "c", "d", "e"])
    answers = ["b=1;c=2;.3", ";.4", " x y ", "", "b=1;c=2;.3"]
    out = defense.release(prompts, decoded(answers), SAMPLING, keyed(prompts))
    assert told == ["q a {text} t b=1;c=2;", "q b t ;", "q c t x y", "q e t b=1;c=2;"], "nobody is asked about nothing"
    told.clear()
    model.requests_at_once = 1  # type: ignore[misc]
    prompt_tokens = sum(len(CausalLM.prompt_tokens(model, Prompts.of_users([text]), SAMPLING)[0]) for text in [
        "q a {text} t b=1;c=2;", "q b t ;", "q c t x y", "q e t b=1;c=2;"
    ])  # fmt: skip
    assert prompt_tokens < defense.tokens_read <= prompt_tokens + 4 * 9
    before = defense.tokens_read
    assert the_same(out, defense.release(prompts, decoded(answers), SAMPLING, keyed(prompts))), "however it is batched"
    assert defense.tokens_read == 2 * before
    assert out.column[0].endswith(".3")
    assert out.column[1].endswith(".4")
    assert out.column[2].startswith(" ")
    assert out.column[2].endswith(" ")
    assert out.column[3] == ""
    assert out.column[0] != out.column[4], "the prompt is part of the draw"
    again = defense.release(prompts, decoded(answers), SAMPLING, keyed(prompts, repeat=1))
    assert again.column[0] != out.column[0]


# --- flipped answers ------------------------------------------------------------------------------------------------


def test_answers_flip_at_their_rate_into_others_that_look_right() -> None:
    prompts, references = traces(2000)
    out = prepared(LabelFlipping(0.3)).release(prompts, decoded(references), SAMPLING, keyed(prompts)).column
    flipped = out != texts(references)
    assert binomtest(int(flipped.sum()), 2000, 0.3).pvalue > 1e-3
    assert all(old[:-1] == new[:-1] for old, new in zip(references, out, strict=True)), "the reasoning stays"
    moves = (np.array([int(t[-1]) for t in out]) - np.array([int(t[-1]) for t in references]))[flipped] % 10
    counts = np.bincount(moves, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 0.5 * flipped.sum() / 9
    assert (prepared(LabelFlipping(0.0)).release(prompts, decoded(references), SAMPLING, keyed(prompts)).column
            == texts(references)).all()  # fmt: skip


def test_repeats_agree_or_do_not() -> None:
    prompts, references = traces(300)
    once, again, other = (
        prepared(LabelFlipping(0.5), seed=seed).release(prompts, decoded(references), SAMPLING, keyed(prompts, repeat))
        for seed, repeat in ((0, 0), (0, 1), (1, 0))
    )
    assert the_same(once, again)
    assert not the_same(once, other), "the provider's seed decides"
    once, again, same = (
        prepared(LabelFlipping(0.5, repeats_agree=False)).release(
            prompts, decoded(references), SAMPLING, keyed(prompts, repeat)
        )
        for repeat in (0, 1, 0)
    )
    assert the_same(once, same)
    flips = [out.column != texts(references) for out in (once, again)]
    assert 0.15 < (flips[0] & flips[1]).mean() < 0.35, "independent"


@pytest.mark.parametrize(
    ("options", "text", "allowed"),
    [
        ({}, "so 7 apples, 19.", r"so 7 apples, [1-9]\d\."),
        ({}, "so 007", r"so \d{3}"),
        ({}, "none", "none"),
        ({}, "", ""),
        ({"answer": r"\b[A-D]\b", "choices": ["A", "B", "C", "D"]}, "A or B: B", "A or B: [ACD]"),
        ({"answer": r"\b[A-E]\b", "choices": ["A", "B"]}, "E", "E"),
        ({"answer": r"\w+\Z"}, "yes", "yes"),
    ],
)
def test_flipped_answers_are_of_the_same_kind(options: Any, text: str, allowed: str) -> None:
    out = release(prepared(LabelFlipping(1.0, **options)), [text] * 60, SAMPLING)
    assert all(re.fullmatch(allowed, one) for one in out)
    changes = allowed != text
    assert (text not in out) == changes
    assert (len(set(out)) > 1) == changes


# --- a cap, and chains ----------------------------------------------------------------------------------------------


def test_a_capped_answer_is_the_beginning_of_the_uncapped_one() -> None:
    cap, prompts = LengthCap(5), questions(6)
    long = Sampling(max_tokens=12, temperature=0)
    whole = TEACHER.generate(prompts, long, np.zeros(6), top_k=3)
    some = TEACHER.generate(prompts, cap.sampling(long), np.zeros(6), top_k=3)
    assert cap.release(prompts, some, long, keyed(prompts)) is some
    for row in range(6):
        assert some.tokens(row).tolist() == whole.tokens(row)[:5].tolist()
        assert some.finish[row] == ("stop" if len(whole.tokens(row)) <= 5 and whole.finish[row] == "stop" else "length")
    assert cap.sampling(replace(long, max_tokens=3)).max_tokens == 3
    assert cap.exposes == EVERY_LOGPROB


class Shifted(Unchanged):
    """Changes logits, marks what it reads, and, as a watermark, tells of it."""

    width = 1

    def __init__(self, by: float, factor: float = 1.0, guide: Any = None) -> None:
        self.by, self.factor, self.guide = by, factor, guide
        self.fingerprint = ""

    def prepare(self, teacher: Any, task: Any, trainer: Any, cache: Path, seed: int) -> Any:
        self.fingerprint = f"{self.by}"
        return Tiny(seed=int(self.by))

    @property
    def tokens_read(self) -> int:
        return int(self.by)

    def logits_processor(self, sampling: Sampling) -> Any:
        ramp = self.by * torch.arange(len(TOKENIZER))

        def change(tokens: Any, logits: torch.Tensor, guides: Any = ()) -> torch.Tensor:
            return self.factor * logits + ramp + sum(guides)

        return change if self.guide is None else Guided([self.guide], change)

    def evidence(self, windows: Any, tokens: Any, key: Any = None) -> Any:
        return np.zeros(len(tokens))

    def countable(self, windows: Any, tokens: Any, key: Any = None) -> Any:
        return np.ones(len(tokens), bool)

    def p_value(self, evidence: Any) -> float:
        return 1.0

    def log10_p_value(self, evidence: Any) -> float:
        return 0.0


def test_a_chain_is_its_members_in_order() -> None:
    """Through sampling, decoding with plain and guided changes, and release: as done by hand."""
    guide = Network(network(len(TOKENIZER), seed=5, layers=1))
    rules = ByRules([{"find": "[a-m]", "replace": ["a", "b"]}])
    parts = [
        LengthCap(20),
        Shifted(0.01, 2.0),
        Shifted(0.02, 1.0, guide),
        prepared(Paraphrase(rules)),
        prepared(LabelFlipping(0.5)),
    ]
    chain, prompts = LanguageChain(parts), questions(8)
    asked = Sampling(max_tokens=30, stop=("zzz",), logit_bias=((7, 1.0),))
    sampling = chain.sampling(asked)
    assert sampling == replace(asked, max_tokens=20, stop=())
    processors = [made for part in parts if (made := part.logits_processor(sampling)) is not None]
    processor = chain.logits_processor(sampling)
    assert isinstance(processor, Guided)
    repeats = np.zeros(8, np.int64)
    by_hand = TEACHER.generate(prompts, sampling, repeats, 2, processors)
    at_once = TEACHER.generate(prompts, sampling, repeats, 2, [processor])
    assert the_same(at_once, by_hand)
    turned = TEACHER.generate(prompts, sampling, repeats, 2, processors[::-1])
    assert not the_same(turned, by_hand), "the order matters"
    rng = keyed(prompts)
    for i, part in enumerate(parts):
        by_hand = part.release(prompts, by_hand, replace(asked, max_tokens=20), rng.child(str(i)))
    assert the_same(chain.release(prompts, at_once, asked, rng), by_hand)


def test_chains_without_guides_or_with_one_change_or_none() -> None:
    tokens, logits = [[1, 2]], torch.randn(1, len(TOKENIZER), generator=torch.Generator().manual_seed(0))
    ramp = torch.arange(len(TOKENIZER))
    both = LanguageChain([Shifted(1.0, 2.0), Shifted(3.0, 0.5)]).logits_processor(SAMPLING)
    assert callable(both)
    assert torch.allclose(both(tokens, logits), 0.5 * (2 * logits + ramp) + 3 * ramp)
    biased = replace(SAMPLING, logit_bias=((3, 100.0),))
    again = LanguageChain([Shifted(1.0, 2.0), Shifted(3.0, 0.5)]).logits_processor(biased)
    assert callable(again)
    assert torch.equal(again(tokens, logits), both(tokens, logits)), "the decoder has added the bias"
    assert LanguageChain([LengthCap(3), AnswerOnly()]).logits_processor(SAMPLING) is None


def test_a_chain_exposes_counts_prepares_and_shows_what_its_members_do(tmp_path: Path) -> None:
    mark = Shifted(1.0)
    assert isinstance(mark, Watermark)
    inner = LanguageChain([NoDefense(), mark])
    chain = LanguageChain([LengthCap(9), inner, Shifted(2.0)])
    assert chain.watermark is mark
    assert LanguageChain([LengthCap(9)]).watermark is None
    assert chain.exposes == EVERY_LOGPROB
    assert LanguageChain([mark, AnswerOnly()]).exposes == InterfaceProfile(Reveals.TEXT)
    assert chain.tokens_read == 3
    assert isinstance(chain, PreparedLanguageDefense)
    assert chain.fingerprint == ""
    teacher = chain.prepare(TEACHER, TASK, None, tmp_path, 0)
    assert teacher.fingerprint == Tiny(seed=2).fingerprint, "the teacher that the last one made"
    assert chain.fingerprint == "1.0-2.0"
    plain = LanguageChain([LengthCap(9)])
    assert plain.prepare(TEACHER, TASK, None, tmp_path, 0) is TEACHER
    assert plain.fingerprint
    with pytest.raises(DistillError, match="Rounding defends classifiers"):
        LanguageChain([Rounding(1)])  # type: ignore[list-item]
    with pytest.raises(DistillError, match="at least one"):
        LanguageChain([])


def test_a_cap_holds_for_what_comes_after_it() -> None:
    longer = ByRules([{"find": "a", "replace": ["bcdefghijklmnop"]}])
    chain, prompts = LanguageChain([Paraphrase(longer), LengthCap(6)]), questions(2)
    out = prepared(chain).release(prompts, decoded(["a", "xyz"]), SAMPLING, keyed(prompts))
    assert out.column.tolist() == ["bcdefg", "xyz"]
    assert out.finish.tolist() == ["length", "stop"]
    assert out.completion_tokens.tolist() == [6, 4]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ByRules([{"find": "(", "replace": ["a"]}]), "rules must be a regular expression"),
        (lambda: ByRules([{"find": "a", "replace": []}]), "rules each have"),
        (lambda: ByRules([{"find": "a", "replace": "b"}]), "rules each have"),
        (lambda: EveryStep(0), "every must be at least 1"),
        (lambda: ReversedSteps("["), "boundary must be a regular expression"),
        (lambda: ByModel(TEACHER, "no place"), "instruction must say"),
        (lambda: AnswerOnly("("), "answer must be a regular expression"),
        (lambda: LabelFlipping(1.5), "rate must be"),
        (lambda: LabelFlipping(choices=["A", "A"]), "choices must be"),
        (lambda: Paraphrase(EveryStep(), share=-1), "share must be"),
        (lambda: LengthCap(0), "max_tokens must be"),
    ],
)
def test_a_wrong_option_is_told(make: Any, says: str) -> None:
    with pytest.raises(DistillError, match=re.escape(says)):
        make()


def test_characters_are_those_of_the_tiny_tokenizer() -> None:
    """The property tests above rely on one token a character."""
    assert len(TOKENIZER(CHARACTERS).input_ids) == len(CHARACTERS)
