"""Defenses that ask a proxy: antidistillation sampling, product of experts and the antidistillation fingerprint."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_language import answered, characters, network
from torch.func import functional_call, jvp
from transformers import GPT2Config, GPT2LMHeadModel

from distill import held_out_gradient
from distill.contracts import PreparedLanguageDefense, Watermark
from distill.decoding import Network
from distill.errors import DistillError
from distill.held_out_gradient import answer_losses, gradient, moved
from distill.language import Completions, Prompts, Sampling, SyntheticSet, Task
from distill.packing import Encoded, encode
from distill.provider.defenses import _proxy
from distill.provider.defenses._proxy import as_wide_as, own_answers
from distill.provider.defenses.antidistillation import Antidistillation
from distill.provider.defenses.antidistillation_fingerprint import AntidistillationFingerprint
from distill.provider.defenses.product_of_experts import ProductOfExperts
from distill.records import EVERY_LOGPROB, Reveals
from distill.speaker import CausalLM
from distill.students.llama import Llama
from distill.training import Recipe, Trainer
from distill.watermarking import green, marks, seeds
from distill.watermarking import windows as windows_of

TOKENIZER = characters()
VOCABULARY = len(TOKENIZER)
RECIPE = Recipe(epochs=1, batch_size=4, lr=3e-3, optimizer="adamw")
DRAWN = Sampling(max_tokens=12, temperature=0.8, seed=3)
ALL = (Antidistillation, ProductOfExperts, AntidistillationFingerprint)


def exact_network(seed: int = 0) -> Any:
    """A GPT-2, which in float64 computes all of itself in float64 (a Llama normalises in float32)."""
    torch.manual_seed(seed)
    sizes = {"n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)).double().eval()


class Given:
    """A student that comes trained: a copy of a network."""

    requires = Reveals.TEXT

    def __init__(self, made: Any, tokens: Any = TOKENIZER) -> None:
        self.made, self.tokens = made, tokens

    def tokenizer(self, teachers: Any) -> Any:
        return self.tokens

    def build_language(self, tokenizer: Any) -> Any:
        return moved(self.made, {name: torch.zeros_like(value) for name, value in self.made.named_parameters()}, 0.0)


class Here(CausalLM):
    """A teacher that is decoded here. It counts the prompts that it answers."""

    asked = 0

    def prepare(self, task: Task, trainer: Any, cache: Path) -> None:
        pass

    def generate(self, prompts: Prompts, *rest: Any, **options: Any) -> Completions:
        self.asked += len(prompts)
        return super().generate(prompts, *rest, **options)


def a_teacher(batch_size: int = 4, seed: int = 0) -> Here:
    teacher = Here(batch_size)
    teacher.hold(network(VOCABULARY, seed, max_position_embeddings=256), TOKENIZER)
    return teacher


def chats(n: int) -> Prompts:
    return Prompts.of_users([f"a={row};" + "what is b? " * (1 + row % 3) for row in range(n)])


def a_task(train: int = 40) -> Task:
    return Task("toy", chats(train), chats(2), chats(2))


def prepared(kind: Any, cache: Path, proxy: Any = None, teacher: Any = None, **options: Any) -> Any:
    """A defense whose proxy comes trained, unless `answers` says otherwise."""
    options = {"answers": 0, "max_tokens": 12, "max_length": 128} | options
    if kind is Antidistillation:
        options = {"held_out": 8} | options
    defense = kind(Given(network(VOCABULARY, seed=7)) if proxy is None else proxy, RECIPE, **options)
    assert defense.fingerprint == ""
    assert defense.tokens_read == 0
    teacher = a_teacher() if teacher is None else teacher
    assert defense.prepare(teacher, a_task(), Trainer(device="cpu", progress=False), cache, 0) is teacher
    return defense


def generated(teacher: CausalLM, defense: Any, sampling: Sampling = DRAWN, n: int = 9, top_k: int = 0) -> Completions:
    processor = None if defense is None else defense.logits_processor(sampling)
    processors = [] if processor is None else [processor]
    return teacher.generate(chats(n), sampling, np.zeros(n, np.int64), top_k, processors)


def same(a: Completions, b: Completions) -> bool:
    assert a.token_ids is not None
    assert b.token_ids is not None
    return a.finish.tolist() == b.finish.tolist() and a.token_ids.tolist() == b.token_ids.tolist()


def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """(vocabulary,) of the next token."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1]


# --- the held-out loss and its gradient -----------------------------------------------------------------------------


@pytest.fixture
def examples() -> Encoded:
    return encode(answered(20, ids=TOKENIZER), TOKENIZER, TOKENIZER)


def test_losses_and_gradient_are_those_of_each_example_alone(examples: Encoded) -> None:
    model = exact_network()
    losses, tokens = [], 0
    for prompt, answer in zip(examples.prompts, examples.answers, strict=True):
        logprobs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        losses.append(-logprobs[range(len(answer)), answer].sum())
        tokens += len(answer)
    np.testing.assert_allclose(answer_losses(model, examples), torch.stack(losses).detach(), rtol=1e-12)
    (torch.stack(losses).sum() / tokens).backward()
    found = gradient(model, examples)
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-10, atol=1e-14)


def test_the_gradient_does_not_depend_on_the_cut(examples: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code divides the sum of one process by the tokens of all, which is another direction."""
    model = exact_network().requires_grad_(False)
    whole, losses = gradient(model, examples), answer_losses(model, examples)
    monkeypatch.setattr(held_out_gradient, "LOGITS", 1)  # one example at a time
    cut = gradient(model, examples)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(answer_losses(model, examples), losses, rtol=1e-13)
    first = gradient(model, dataclasses.replace(examples, prompts=examples.prompts[:7], answers=examples.answers[:7]))
    assert any((first[name] - value).abs().max() > 0.1 * value.abs().max() for name, value in whole.items())
    assert not any(value.requires_grad or value.grad is not None for value in model.parameters())


def test_a_step_against_the_gradient_lowers_the_loss_and_leaves_the_model_alone(examples: Encoded) -> None:
    model = network(VOCABULARY).bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    direction = gradient(model, examples)
    assert {value.dtype for value in direction.values()} == {torch.float32}
    down, up = moved(model, direction, -0.05), moved(model, direction, 0.05)
    assert down.dtype == torch.float32
    losses = [answer_losses(each, examples).sum() for each in (down, model, up)]
    assert losses[0] < losses[1] < losses[2]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- antidistillation sampling --------------------------------------------------------------------------------------


def penalty(defense: Antidistillation, context: list[int]) -> torch.Tensor:
    """(vocabulary,) float64: what is added to the logits, over lambda."""
    processor = defense.logits_processor(Sampling())
    assert processor is not None
    told = [logits_of_network(net, context) for net in processor.networks]
    return processor.change([context], torch.zeros_like(told[0]), told)[0] / defense.lambda_


def logits_of_network(net: Network, context: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return net.head(net.hidden(torch.tensor([context]))[0][0, -1:]).logits()


def test_the_penalty_is_how_much_a_step_on_the_token_raises_the_held_out_loss(tmp_path: Path) -> None:
    model, teacher = exact_network(4), a_teacher()
    context = TOKENIZER("a=3;b=").input_ids
    apart = []
    for epsilon in (1e-2, 1e-3, 1e-4):
        defense = prepared(Antidistillation, tmp_path, Given(model), teacher, epsilon=epsilon)
        found = penalty(defense, context)
        held_out = encode(own_answers(teacher, chats(8), 12, tmp_path, 0), TOKENIZER, TOKENIZER)
        direction = gradient(model, held_out)
        weights = {name: value.detach() for name, value in model.named_parameters()}

        def logprobs(weights: Any) -> torch.Tensor:
            told = functional_call(model, weights, (torch.tensor([context]),), {"use_cache": False})
            return told.logits[0, -1].log_softmax(-1)

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            _, exact = jvp(logprobs, (weights,), (direction,))
        apart.append(float((found - exact).abs().max() / exact.abs().max()))
    assert apart[0] > 50 * apart[1] > 2500 * apart[2], "the error falls with the square of epsilon"
    assert apart[2] < 1e-5

    tokens = sum(map(len, held_out.answers))
    loss = answer_losses(model, held_out).sum() / tokens
    ranking = found.argsort()
    for token in (int(ranking[0]), int(ranking[VOCABULARY // 2]), int(ranking[-1])):
        wrong = []
        for rate in (1e-3, 1e-4):
            step = gradient(model, Encoded([context], [[token]]))
            student = moved(model, step, -rate)  # one step of SGD on this token
            rise = (answer_losses(student, held_out).sum() / tokens - loss) / rate
            wrong.append(abs(rise - float(found[token])) / float(found.abs().max()))
        assert wrong[1] < 0.2 * wrong[0] < 0.2, "first order in the learning rate"
        assert wrong[1] < 0.01


@pytest.mark.parametrize("form", ["paper", "code"])
def test_what_is_drawn_from_is_the_formula(form: str, tmp_path: Path) -> None:
    """At every temperature; greedy decoding is defended by the code's form alone."""
    teacher = a_teacher()
    defense = prepared(Antidistillation, tmp_path, teacher=teacher, form=form, lambda_=0.5)
    context = TOKENIZER("a=3;b=").input_ids
    logits = logits_of(teacher.network, context)
    added = 0.5 * penalty(prepared(Antidistillation, tmp_path, lambda_=1.0), context)
    told = [logits_of_network(net, context) for net in defense.networks]
    for tau in (0.5, 1.0, 2.0):
        processor = defense.logits_processor(Sampling(temperature=tau))
        drawn_from = (processor.change([context], logits[None], told)[0] / tau).softmax(-1)
        wanted = logits.log_softmax(-1) / tau + added if form == "paper" else (logits + added) / tau
        torch.testing.assert_close(drawn_from, wanted.softmax(-1))
    assert (defense.logits_processor(Sampling(temperature=0)) is None) == (form == "paper")
    assert not same(generated(teacher, defense), generated(teacher, None))


def test_the_defended_teacher_teaches_less_than_the_undefended_one(tmp_path: Path) -> None:
    """The held-out loss of the proxy after a step on answers of either: what the penalty is for."""
    teacher = a_teacher(batch_size=64)
    proxy = network(VOCABULARY, seed=7)
    defense = prepared(Antidistillation, tmp_path, Given(proxy), teacher, held_out=40, lambda_=30.0)
    held_out = encode(own_answers(teacher, chats(40), 12, tmp_path, 0), TOKENIZER, TOKENIZER)
    losses = {}
    for name, used in (("defended", defense), ("undefended", None)):
        answers = generated(teacher, used, dataclasses.replace(DRAWN, temperature=1.0), n=120)
        synthetic = SyntheticSet(chats(120), answers, np.zeros(120, np.int64), DRAWN, np.zeros(120))
        learnt = moved(proxy, gradient(proxy, encode(synthetic, TOKENIZER, TOKENIZER)), -0.3)
        losses[name] = answer_losses(learnt, held_out).sum()
    assert losses["defended"] > 1.02 * losses["undefended"]


# --- product of experts and fingerprint -----------------------------------------------------------------------------


def test_product_of_experts_is_its_formula(tmp_path: Path) -> None:
    teacher, proxy = a_teacher(), network(VOCABULARY, seed=7)
    defense = prepared(ProductOfExperts, tmp_path, Given(proxy), teacher, gamma=0.3)
    answers = generated(teacher, defense, top_k=VOCABULARY)
    prompts = teacher.prompt_tokens(chats(9), DRAWN)
    assert answers.offsets is not None
    assert answers.top_ids is not None
    for row in range(9):
        tokens = answers.tokens(row).tolist()
        for place in (0, len(tokens) - 1):
            before = prompts[row] + tokens[:place]
            mixed = 0.7 * logits_of(teacher.network, before) + 0.3 * logits_of(proxy, before)
            at = answers.offsets[row] + place
            np.testing.assert_allclose(
                answers.top_logprobs[at], mixed.log_softmax(-1)[answers.top_ids[at].astype(int)], atol=1e-4
            )
    alone = CausalLM(4)
    alone.hold(proxy, TOKENIZER)
    whole = prepared(ProductOfExperts, tmp_path, Given(proxy), teacher, gamma=1.0)
    assert same(generated(teacher, whole), generated(alone, None)), "gamma = 1 is the proxy"


def test_the_fingerprint_is_the_gradient_of_the_green_mass(tmp_path: Path) -> None:
    proxy = network(VOCABULARY, seed=7)
    defense = prepared(AntidistillationFingerprint, tmp_path, Given(proxy), lambda_=5.0, gamma=0.25, key=11)
    context = TOKENIZER("a=3;b=").input_ids
    theirs = logits_of(proxy, context).requires_grad_()
    window = torch.tensor([context[-2:]])
    listed = green(marks(seeds(window, 11, "ordered")[:, None], torch.arange(VOCABULARY), 11, "ordered"), 0.25)[0]
    assert 0 < int(listed.sum()) < VOCABULARY
    mass = theirs.softmax(-1)[listed].sum()
    (wanted,) = torch.autograd.grad(mass, theirs)
    logits = torch.randn(2, VOCABULARY)
    told = [torch.stack([theirs.detach(), theirs.detach()])]
    changed = defense.logits_processor(DRAWN).change([context, context[:1]], logits, told)
    torch.testing.assert_close(changed[0], logits[0] + 5.0 * wanted)
    assert torch.equal(changed[1], logits[1]), "one token is no window"


def test_who_holds_the_key_can_tell(tmp_path: Path) -> None:
    teacher = a_teacher(batch_size=64)
    defense = prepared(AntidistillationFingerprint, tmp_path, lambda_=64.0, key=5, teacher=teacher)
    chances: dict[str, list[float]] = {"marked": [], "unmarked": [], "wrong key": []}
    for seed in range(6):
        sampling = Sampling(max_tokens=12, temperature=1.0, seed=seed)
        for name, used in (("marked", defense), ("unmarked", None)):
            answers = generated(teacher, used, sampling, n=40)
            windows, tokens, _ = windows_of([answers.tokens(row) for row in range(40)], defense.width)
            new = defense.countable(windows, tokens)
            chances[name].append(defense.p_value(defense.evidence(windows[new], tokens[new])))
            if name == "marked":
                chances["wrong key"].append(defense.p_value(defense.evidence(windows[new], tokens[new], key=seed + 50)))
    assert max(chances["marked"]) < 1e-6
    assert min(chances["unmarked"] + chances["wrong key"]) > 1e-4, "12 p-values of nothing"
    assert defense.p_value(np.empty(0)) == 1.0


# --- what all three do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_nothing_of_it_is_the_undefended_teacher_token_for_token(kind: Any, tmp_path: Path) -> None:
    teacher = a_teacher()
    nothing = {"gamma": 0.0} if kind is ProductOfExperts else {"lambda_": 0.0}
    defense = prepared(kind, tmp_path, teacher=teacher, **nothing)
    for sampling in (DRAWN, Sampling(max_tokens=12, temperature=0)):
        assert same(generated(teacher, defense, sampling), generated(teacher, None, sampling))
    assert defense.tokens_read == 0
    assert isinstance(defense, PreparedLanguageDefense)
    assert isinstance(defense, Watermark) == (kind is AntidistillationFingerprint)
    assert defense.exposes == EVERY_LOGPROB


@pytest.mark.parametrize("kind", ALL)
def test_a_token_costs_one_pass_of_each_network(kind: Any, tmp_path: Path) -> None:
    teacher = a_teacher()
    defense = prepared(kind, tmp_path, teacher=teacher)
    teacher._network.tokens_read = 0
    answers = generated(teacher, defense, dataclasses.replace(DRAWN, temperature=1.0))
    # What was drawn last is never read.
    read = int((answers.prompt_tokens + answers.completion_tokens - 1).sum())
    assert teacher._network.tokens_read == read
    assert defense.tokens_read == read * (2 if kind is Antidistillation else 1)


@pytest.mark.parametrize("kind", ALL)
def test_drawn_answers_do_not_depend_on_their_batch(kind: Any, tmp_path: Path) -> None:
    defense = prepared(kind, tmp_path)
    whole = generated(a_teacher(16), defense, n=12)
    for batch_size in (1, 5):
        assert same(generated(a_teacher(batch_size), defense, n=12), whole)
    assert not same(generated(a_teacher(16), None, n=12), whole)


@pytest.mark.parametrize("kind", ALL)
def test_given_tokens_are_scored_as_they_would_have_been_drawn(kind: Any, tmp_path: Path) -> None:
    teacher = a_teacher()
    defense = prepared(kind, tmp_path, teacher=teacher)
    answers = generated(teacher, defense, n=3, top_k=5)
    prompts = teacher.prompt_tokens(chats(3), DRAWN)
    sequences = [prompt + answers.tokens(row).tolist() for row, prompt in enumerate(prompts)]
    processors = [defense.logits_processor(DRAWN)]
    scored = teacher.scored(sequences, [len(prompt) for prompt in prompts], DRAWN, processors, 5)
    assert scored.top_logprobs is not None
    np.testing.assert_allclose(scored.top_logprobs, answers.top_logprobs, atol=1e-4)


def test_a_vocabulary_that_is_padded_otherwise_is_met() -> None:
    logits = torch.zeros(1, 4)
    assert as_wide_as(logits, torch.tensor([[1.0, 2.0]]), -1.0).tolist() == [[1.0, 2.0, -1.0, -1.0]]
    assert as_wide_as(logits, torch.arange(6.0)[None], 0.0).tolist() == [[0.0, 1.0, 2.0, 3.0]]


# --- the proxy ------------------------------------------------------------------------------------------------------


TINY = Llama(width=16, layers=1, heads=2, context=128)


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one line for each training of a proxy."""
    tally, fit = tmp_path / "tally", _proxy.fit_language_student

    def counted(*args: Any, **options: Any) -> Any:
        with tally.open("a") as file:
            file.write("once\n")
        return fit(*args, **options)

    monkeypatch.setattr(_proxy, "fit_language_student", counted)
    return tally


def test_a_proxy_is_trained_once_and_found_again(tmp_path: Path, trainings: Path) -> None:
    first = a_teacher()
    defense = prepared(Antidistillation, tmp_path, TINY, first, answers=20)
    assert first.asked == 28
    second = a_teacher()
    again = prepared(Antidistillation, tmp_path, TINY, second, answers=20)
    assert second.asked == 0
    assert trainings.read_text() == "once\n"
    assert again.fingerprint == defense.fingerprint
    assert same(generated(second, again), generated(first, defense))

    experts = prepared(ProductOfExperts, tmp_path, TINY, second, answers=20)
    assert trainings.read_text() == "once\n", "defenses share a proxy"
    assert experts.fingerprint != defense.fingerprint
    others = [{"answers": 12}, {"proxy": Llama(width=16, layers=1, heads=1, context=128)}]
    for other in others:
        assert prepared(ProductOfExperts, tmp_path, **({"proxy": TINY, "answers": 20} | other)).fingerprint not in (
            experts.fingerprint,
            "",
        )
    assert trainings.read_text() == "once\n" * 3

    model = next((tmp_path / "proxies").glob("*/model.safetensors"))
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    for options in ({"answers": 20}, {"answers": 20}, *({"answers": 20} | other for other in others)):
        prepared(ProductOfExperts, tmp_path, **({"proxy": TINY} | options))
    assert trainings.read_text() == "once\n" * 4, "damaged weights are trained anew"


def test_a_proxy_has_learnt_what_the_teacher_said(tmp_path: Path) -> None:
    teacher = a_teacher(batch_size=64)
    losses = []
    for answers in (0, 30):
        used = dataclasses.replace(RECIPE, epochs=20, lr=1e-2)
        defense = ProductOfExperts(TINY, used, answers=answers, max_tokens=12, max_length=128)
        proxy = defense.trained(teacher, a_task(), Trainer(device="cpu", progress=False), tmp_path, 0)
        said = encode(own_answers(teacher, chats(30), 12, tmp_path, 0), TOKENIZER, TOKENIZER)
        losses.append(answer_losses(proxy.network, said).sum())
    assert losses[1] < 0.9 * losses[0]


def _in_a_process(cache: Path, told: Any) -> None:
    torch.set_num_threads(1)
    told.put(prepared(ProductOfExperts, cache, TINY, answers=12).fingerprint)


def test_two_processes_train_one_proxy(tmp_path: Path, trainings: Path) -> None:
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    both = [context.Process(target=_in_a_process, args=(tmp_path, told)) for _ in range(2)]
    for process in both:
        process.start()
    fingerprints = {told.get(timeout=60) for _ in both}
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert len(fingerprints) == 1
    assert trainings.read_text() == "once\n"


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"defense\.proxy: has other tokens than the teacher"):
        prepared(ProductOfExperts, tmp_path, Given(network(VOCABULARY + 1), characters(extra="!")))
    with pytest.raises(DistillError, match=r"defense: changes the logits .* teacher that is decoded here"):
        prepared(ProductOfExperts, tmp_path, teacher=Elsewhere())
    with pytest.raises(DistillError, match=r"defense\.answers: toy has 40 prompts .* and 41 are needed"):
        prepared(ProductOfExperts, tmp_path, answers=41)
    with pytest.raises(DistillError, match=r"defense\.held_out: toy has 40 prompts .* and 41 are needed"):
        prepared(Antidistillation, tmp_path, answers=33)
    bad: list[tuple[Any, dict[str, Any], str]] = [
        (Antidistillation, {"lambda_": -1.0}, "lambda_"),
        (Antidistillation, {"epsilon": 0.0}, "epsilon"),
        (Antidistillation, {"form": "both"}, "form"),
        (Antidistillation, {"held_out": 0}, "held_out"),
        (ProductOfExperts, {"gamma": 1.1}, "gamma"),
        (AntidistillationFingerprint, {"lambda_": float("nan")}, "lambda_"),
        (AntidistillationFingerprint, {"gamma": 1.0}, "gamma"),
        (ProductOfExperts, {"answers": -1}, "answers"),
        (ProductOfExperts, {"max_tokens": 0}, "max_tokens"),
        (ProductOfExperts, {"max_length": 0}, "max_length"),
    ]
    for kind, options, key in bad:
        with pytest.raises(DistillError, match=rf"defense\.{key}: "):
            kind(TINY, RECIPE, **options)


class Elsewhere:
    """A teacher behind an API."""

    tokenizer, fingerprint, requests_at_once = TOKENIZER, "elsewhere", 8
