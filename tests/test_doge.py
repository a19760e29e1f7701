"""DOGe: only the head learns, what it learns is the paper's loss, and conclusions are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model
from tiny_language import characters, network

from distill.contracts import LocalLanguageTeacher, PreparedLanguageDefense
from distill.decoding import padded
from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, SyntheticSet, Task, texts
from distill.provider.defenses._proxy import own_answers
from distill.provider.defenses.doge import Defensive, DOGe, divergence, untied
from distill.records import Reveals
from distill.speaker import CausalLM
from distill.students.llama import Llama
from distill.training import Recipe, Trainer

TOKENIZER = characters()
VOCABULARY = len(TOKENIZER)
RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-2, optimizer="adamw")
QUESTIONS = Prompts.of_users([f"a={i % 10};b=a+{i % 7};b?" for i in range(24)], name="toy")
NOTHING = Prompts(texts([]))
TASK = Task("toy", QUESTIONS, NOTHING, NOTHING)


def a_trainer() -> Trainer:
    return Trainer(device="cpu", progress=False)


class Teacher(CausalLM):
    def prepare(self, task: Task, trainer: Any, cache: Path) -> None:
        pass


def a_teacher(tied: bool = True) -> Any:
    teacher = Teacher(8)
    teacher.hold(network(VOCABULARY, tie_word_embeddings=tied, max_position_embeddings=128), TOKENIZER)
    return teacher


def a_defense(**changes: Any) -> DOGe:
    options: dict[str, Any] = {"strength": 0.05, "answers": 16, "max_tokens": 12, "max_length": 64, "answer": "[a-m]"}
    return DOGe([Llama(16, 1, 1, context=128)], RECIPE, RECIPE, **(options | changes))


def answers_of(column: list[str]) -> SyntheticSet:
    ones = np.ones(len(column), np.int64)
    finish = texts(["stop"] * len(column))
    completions = Completions(texts(column), finish, ones, ones)
    return SyntheticSet(QUESTIONS.take(slice(0, len(column))), completions, 0 * ones, Sampling(), np.zeros(len(column)))


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_head_is_another(tied: bool, tmp_path: Path) -> None:
    teacher, defense = a_teacher(tied), a_defense()
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    defended: Any = defense.prepare(teacher, TASK, a_trainer(), tmp_path, 0)
    assert isinstance(defense, PreparedLanguageDefense)
    assert isinstance(defended, LocalLanguageTeacher)
    for name, value in defended.network.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "lm_head.weight"), name
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), "the undefended teacher stays as it is"
    assert not any(value.requires_grad for value in defended.network.parameters())
    assert defense.fingerprint == defended.fingerprint != teacher.fingerprint
    embedded = defended.network.get_input_embeddings().weight
    assert embedded is teacher.network.get_input_embeddings().weight, "weights that stay are held once"
    again = a_defense()
    assert again.prepare(a_teacher(tied), TASK, a_trainer(), tmp_path, 0).fingerprint == defended.fingerprint
    assert len(list((tmp_path / "heads").glob("*/head.json"))) == 1, "kept, not trained twice"
    damaged = next((tmp_path / "heads").glob("*/model.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    assert a_defense().prepare(a_teacher(tied), TASK, a_trainer(), tmp_path, 0).fingerprint == defended.fingerprint
    said = defended.generate(QUESTIONS, Sampling(max_tokens=12, temperature=0), np.zeros(24, np.int64))
    assert len(said) == 24


def test_the_divergence_is_its_definition() -> None:
    torch.manual_seed(0)
    teacher, proxy = torch.randn(5, 7), torch.randn(5, 7)
    p, q = teacher.double().softmax(1), proxy.double().softmax(1)
    assert divergence(teacher, proxy, False).item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert divergence(teacher, proxy, True).item() == pytest.approx((q * (q / p).log()).sum().item(), rel=1e-5)
    proxy[:, 6] = -torch.inf  # which the proxy's vocabulary lacks
    p, q = teacher[:, :6].double().softmax(1), proxy[:, :6].double().softmax(1)
    assert divergence(teacher, proxy, False).item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    teacher.requires_grad_()
    divergence(teacher, proxy, False).backward()
    assert teacher.grad is not None
    assert torch.isfinite(teacher.grad).all()


@pytest.mark.parametrize("toward_proxy", [True, False])
def test_the_loss_is_the_formula(toward_proxy: bool) -> None:
    """Against a plain computation with the whole models' logits, answer by answer; two proxies."""
    column = ["12;34;.5", "6;.78", "999"]
    defense = a_defense(answer=r"(?<=;)\.")
    features, positions = defense.lessons(answers_of(column), TOKENIZER)
    assert positions.tolist() == [9, 6, 4], "with the token that ends an answer"
    first, conclusion = features.tensors["first"], features.tensors["conclusion"]
    assert (conclusion - first).tolist() == [6, 2, 0], "without a conclusion nothing is told apart"
    teacher = untied(network(VOCABULARY, tie_word_embeddings=True).requires_grad_(False))
    proxies = [network(VOCABULARY, seed=seed, layers=1) for seed in (1, 2)]
    module = Defensive(teacher, proxies, 0.3, 2.0, toward_proxy)
    loss = module(**features.tensors)
    loss.backward()

    expected = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(features.tensors["length"].tolist()):
        tokens = features.tensors["tokens"][row, :length]
        part = slice(int(first[row]) - 1, length - 1)
        logits, *theirs = (each(tokens[None]).logits[0, part].double() for each in (teacher, *proxies))
        labels = tokens[int(first[row]) :]
        expected = expected - logits.log_softmax(1)[torch.arange(len(labels)), labels].sum()
        reasons = int(conclusion[row] - first[row])
        for other in theirs:
            p, q = (some[:reasons].div(2.0).softmax(1) for some in (logits, other))
            p, q = (q, p) if toward_proxy else (p, q)
            expected = expected - 0.3 * (p * (p / q).log()).sum() / len(proxies)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(expected, [teacher.lm_head.weight])
    torch.testing.assert_close(teacher.lm_head.weight.grad, gradient.float(), rtol=1e-4, atol=1e-5)
    assert all(value.grad is None for each in proxies for value in each.parameters())


def test_conclusions_are_left_alone() -> None:
    """Where all is conclusion, no strength changes the loss; where some is, the gradient of a step is another."""
    tokens = padded([[5, 6, 7, 8, 9, 10], [7, 8, 9, 10]])
    first, length = torch.tensor([2, 1]), torch.tensor([6, 4])
    teacher, proxy = untied(network(VOCABULARY).requires_grad_(False)), network(VOCABULARY, seed=1)
    losses = {
        (weight, reasons): Defensive(teacher, [proxy], weight, 2.0, False)(
            tokens, first, first + reasons, length
        ).item()
        for weight in (0.0, 5.0)
        for reasons in (0, 1)
    }
    assert losses[0.0, 0] == losses[5.0, 0] == losses[0.0, 1]
    assert losses[5.0, 1] < losses[0.0, 1]


def test_strength_moves_the_teacher_away_from_its_proxy_and_zero_does_not(tmp_path: Path) -> None:
    teacher, apart, likely = a_teacher(), {}, {}
    for strength in (None, 0.0, 2.0):
        defense = a_defense(strength=strength or 0.0, answer="$")  # all but the end reasons
        defense.recipe = Recipe(epochs=8, batch_size=8, lr=1e-2, optimizer="adamw")
        defended = teacher if strength is None else defense.prepare(teacher, TASK, a_trainer(), tmp_path, 0)
        own = own_answers(teacher, QUESTIONS.take(slice(0, 16)), 12, tmp_path, 0)
        features, positions = defense.lessons(own, TOKENIZER)
        alone, both = (
            Defensive(defended.network, [a_proxy(defense, tmp_path)] if weight else [], weight, 2.0, False)(
                **features.tensors
            ).item()
            for weight in (0.0, 1.0 if strength is not None else 0.0)
        )
        likely[strength], apart[strength] = alone / int(positions.sum()), alone - both
    assert likely[0.0] < likely[None], "its own answers alone are learnt"
    assert likely[0.0] < likely[2.0]
    assert apart[2.0] > 1.5 * apart[0.0] > 0


def a_proxy(defense: DOGe, cache: Path) -> Any:
    """The proxy, from the cache."""
    found = defense.proxies[0].build_language(TOKENIZER)
    load_model(found, next((cache / "proxies").glob("*/model.safetensors")))
    return found.eval()


def test_what_it_refuses(tmp_path: Path) -> None:
    for wrong in ({"strength": -1}, {"alpha": 0}, {"answers": 0}, {"answer": "("}, {"max_length": 0}):
        with pytest.raises(DistillError):
            a_defense(**wrong)
    with pytest.raises(DistillError, match="proxies"):
        DOGe([], RECIPE, RECIPE)
    with pytest.raises(DistillError, match="weights are here"):
        a_defense().prepare(object(), TASK, a_trainer(), tmp_path, 0)  # type: ignore[arg-type]
    with pytest.raises(DistillError, match=r"defense\.answers"):
        a_defense(answers=99).prepare(a_teacher(), TASK, a_trainer(), tmp_path, 0)
    assert a_defense().exposes.reveals is Reveals.LOGITS, "whose weights they are is not told"
