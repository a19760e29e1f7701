"""Matching of hidden states: the gradient is the papers', the projections are learnt, resumed and left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import distill, refused
from test_language_students import Run, assert_same, with_top
from test_lm_train import QUICK
from test_train import result_of
from tiny_language import Local, answered, characters, network
from transformers import AutoModelForCausalLM

from distill.errors import DistillError
from distill.language_training import AnsweredSignal, LanguageModule, TeacherSignal, build_language
from distill.objectives.hidden_states import HiddenStates
from distill.objectives.kl import KL
from distill.objectives.rs_kd import RSKD
from distill.objectives.sequence_kd import SequenceKD
from distill.objectives.token_forward_kl import TokenForwardKL
from distill.objectives.token_jsd import TokenJSD
from distill.packing import encode, pack
from distill.speaker import CausalLM
from distill.students.llama import Llama

TOKENIZER = characters()
TEACHER = network(len(TOKENIZER), seed=3, layers=4)  # of width 32
STUDENT = Llama(width=16, layers=2, heads=2, kv_heads=1, initializer_range=0.1)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def live(synthetic: Any, teacher: Any = TEACHER) -> TeacherSignal:
    return TeacherSignal(Local(teacher, TOKENIZER), synthetic)


def trained(directory: Path | None = None, objective: Any = None, **options: Any) -> Run:
    options.setdefault("synthetic", answered(40, ids=TOKENIZER))
    options.setdefault("signal", live(options["synthetic"]))
    return Run(directory, objective=objective or HiddenStates(TokenForwardKL()), student=STUDENT, **options)


def tensors(synthetic: Any) -> dict[str, torch.Tensor]:
    """All packed rows."""
    packed = pack(encode(synthetic, TOKENIZER, TOKENIZER), 48)
    return {name: torch.from_numpy(column) for name, column in packed.columns().items()}


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("weights", [None, np.tile([0.5, 2.0], 6)])
def test_loss_and_gradients_are_the_formulas(distance: str, weights: Any) -> None:
    """In float64, against each example by itself, without packing and without the fused kernel."""
    synthetic = answered(12, ids=TOKENIZER, weights=weights)
    teacher = network(len(TOKENIZER), seed=3, layers=4).double()
    student = build_language(STUDENT, TOKENIZER, 0).double()
    objective = HiddenStates(TokenForwardKL(), [[0, 1], [2, 4], [1, 2]], 0.7, distance).between(student, teacher)
    signal = live(synthetic, teacher).of_layers([1, 4, 2])
    module = LanguageModule(student, objective, signal)
    loss = module(**tensors(synthetic))
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()

    encoded, total = encode(synthetic, TOKENIZER, TOKENIZER), torch.zeros((), dtype=torch.float64)
    for row, (prompt, answer) in enumerate(zip(encoded.prompts, encoded.answers, strict=True)):
        part = slice(len(prompt) - 1, -1)
        ours, theirs = (
            model(torch.tensor([prompt + answer]), output_hidden_states=True) for model in (student, teacher)
        )
        log_q, log_p = (out.logits[0, part].log_softmax(1) for out in (ours, theirs))
        lost = (log_p.exp() * (log_p - log_q)).sum()
        for (s, t), matrix in zip([(0, 1), (2, 4), (1, 2)], objective.projections, strict=True):
            mapped, wanted = ours.hidden_states[s][0, part] @ matrix.T, theirs.hidden_states[t][0, part].detach()
            if distance == "mse":
                lost = lost + 0.7 * ((mapped - wanted) ** 2).sum() / 32
            else:
                cosine = (mapped * wanted).sum(1) / (mapped.norm(dim=1) * wanted.norm(dim=1))
                lost = lost + 0.7 * (1 - cosine).sum()
        total = total + lost * (1 if weights is None else synthetic.weights[row].item())
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-9)
    assert set(found) == {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-9, msg=name)


def test_layers_are_paired_evenly() -> None:
    def pairs(ours: int, theirs: int) -> list[tuple[int, int]]:
        student, teacher = (network(len(TOKENIZER), layers=layers) for layers in (ours, theirs))
        return list(HiddenStates(SequenceKD()).between(student, teacher).pairs)

    assert pairs(2, 4) == [(1, 2), (2, 4)]
    assert pairs(2, 3) == [(1, 2), (2, 3)]
    assert pairs(4, 2) == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_teacher_gives_the_hidden_states_of_its_layers() -> None:
    teacher = CausalLM(batch_size=4)
    teacher.hold(network(len(TOKENIZER), seed=3, layers=4), TOKENIZER)
    sequences, starts = [[7, 8, 9, 10, 11], [9, 30], [5, 6, 7]], [2, 1, 1]
    heads = teacher.heads(sequences, starts, [4, 0, 2])
    for ids, start, head, plain in zip(sequences, starts, heads, teacher.heads(sequences, starts), strict=True):
        states = teacher.network(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer, found in zip([4, 0, 2], head.layers, strict=True):
            torch.testing.assert_close(found, states[layer][0, start - 1 : -1], atol=1e-5, rtol=1e-5)
        assert torch.equal(head.hidden, plain.hidden)
        assert plain.layers == ()


# --- training -------------------------------------------------------------------------------------------------------


def test_projections_are_learnt_with_the_student_and_left_behind(tmp_path: Path, monkeypatch: Any) -> None:
    made = []
    between = HiddenStates.between

    def seen(*words: Any) -> HiddenStates:
        objective = between(*words)
        made.extend([objective, copy.deepcopy(objective)])
        return objective

    monkeypatch.setattr(HiddenStates, "between", seen)
    run = trained(recipe={"epochs": 6})
    objective, fresh = made
    assert [tuple(matrix.shape) for matrix in fresh.projections] == [(32, 16), (32, 16)]
    for matrix, before in zip(objective.projections, fresh.projections, strict=True):
        assert (matrix - before).abs().mean() > 1e-3
    assert run.history["layers"] == [[1, 2], [2, 4]]
    untrained = build_language(STUDENT, TOKENIZER, 0)
    assert run.history["parameters"]["all"] == untrained.num_parameters()

    def distance(model: Any, matching: HiddenStates) -> float:
        """What the second term is at the answers of the training."""
        synthetic = answered(40, ids=TOKENIZER)
        signal = live(synthetic).of_layers([2, 4])
        with torch.no_grad():
            both, first = (
                LanguageModule(model, each, signal)(**tensors(synthetic)) for each in (matching, TokenForwardKL())
            )
        return float(both - first)

    assert distance(run.network, objective) < 0.9 * distance(untrained, fresh)
    run.network.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == set(untrained.state_dict())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, run.weights[name]), name


def test_accumulation_changes_nothing() -> None:
    recipe = {"optimizer": "sgd", "lr": 0.05, "gradient_clip": 1.0}
    synthetic = answered(40, ids=TOKENIZER, weights=np.tile([0.5, 1, 2, 1], 10))
    whole = trained(recipe=recipe, synthetic=synthetic)
    pieces = trained(recipe={**recipe, "micro_batch_size": 1}, synthetic=synthetic)
    assert_same(whole, pieces, exactly=False)
    for a, b in zip(whole.rows, pieces.rows, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = trained()
    with pytest.raises(InterruptedError):
        trained(tmp_path, stop_at=4, recipe={"checkpoint_steps": 2})
    (saved,) = tmp_path.rglob("*.pt")
    state = torch.load(saved, weights_only=True)["module"]
    assert sum("projections" in name for name in state) == 2
    torch.manual_seed(12345)
    resumed = trained(tmp_path, recipe={"checkpoint_steps": 2})
    assert resumed.rows[0]["step"] == 3
    whole.rows = [row for row in whole.rows if row["step"] > 2]
    assert_same(whole, resumed)


@pytest.mark.parametrize(
    "other",
    [
        HiddenStates(TokenJSD(beta=0.2), weight=2.0),
        HiddenStates(TokenJSD(beta=0.1)),
        HiddenStates(TokenJSD(beta=0.1), weight=2.0, distance="cosine"),
        HiddenStates(TokenJSD(beta=0.1), [[2, 4], [1, 2]], weight=2.0),
    ],
)
def test_a_checkpoint_of_other_options_is_ignored(tmp_path: Path, other: HiddenStates) -> None:
    recipe = {"checkpoint_steps": 1}
    with pytest.raises(InterruptedError):
        trained(tmp_path, HiddenStates(TokenJSD(beta=0.1), weight=2.0), stop_at=3, recipe=recipe)
    with pytest.raises(InterruptedError):  # at a step that a continued run is past
        trained(tmp_path, other, stop_at=1, recipe=recipe)


def test_in_bfloat16_the_gradient_of_the_output_matrix_is_summed_in_float32() -> None:
    synthetic = answered(60, ids=TOKENIZER)  # more positions than the kernel multiplies at once
    module = LanguageModule(network(len(TOKENIZER)), TokenForwardKL(), live(synthetic))
    with torch.autocast("cpu", torch.bfloat16):
        module(**tensors(synthetic)).backward()
    gradient = module.network.lm_head.weight.grad
    assert (gradient != gradient.bfloat16().float()).float().mean() > 0.5


# --- what it takes --------------------------------------------------------------------------------------------------

WORDS = [*QUICK, "curve=[]", "training.epochs=1", "access=white_box", "signal=text", "objective=hidden_states"]


def test_through_the_command_line(tmp_path: Path) -> None:
    distill("train", *WORDS, "objective@objective.tokens=token_jsd", "objective.distance=cosine", cwd=tmp_path)
    result = result_of(tmp_path)
    assert result["training"]["layers"] == [[1, 1], [2, 2]]
    assert result["config"]["objective"]["tokens"]["beta"] == 0.5
    assert "signal" not in result["training"]
    assert any("white-box" in flag for flag in result["flags"])
    (student,) = (path.parent for path in tmp_path.rglob("student/model.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(student).num_parameters() == result["sizes"]["student"]["parameters"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["access=logits"], "objective: hidden_states requires weights"),
        (["signal=hidden_states"], "signal: objective=hidden_states looks inside the teacher"),
        (["rollout=gkd", "budget.scored=10"], "rollout: objective=hidden_states looks inside the teacher"),
        (["objective@objective.tokens=rs_kd"], "objective.tokens: is sequence_kd, token_forward_kl or the like"),
    ],
)
def test_bad_input_is_one_line(words: list[str], says: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert says in refused([*WORDS, *words], tmp_path, monkeypatch, capsys)


def test_other_refusals_are_one_line() -> None:
    for tokens in (RSKD(), HiddenStates(SequenceKD()), KL(), "token_jsd"):
        with pytest.raises(ValueError, match="tokens is sequence_kd, token_forward_kl or the like, not"):
            HiddenStates(tokens)
    for options, says in (
        ({"pairs": []}, "pairs are of a student's and a teacher's layer"),
        ({"pairs": [1, 2]}, "pairs are of a student's and a teacher's layer"),
        ({"pairs": [[1, 2.5]]}, "pairs are of a student's and a teacher's layer"),
        ({"weight": 0.0}, "weight is more than 0, not 0.0"),
        ({"distance": "l1"}, "distance is mse or cosine, not 'l1'"),
    ):
        with pytest.raises(ValueError, match=says):
            HiddenStates(SequenceKD(), **options)
    with pytest.raises(DistillError, match=r"^objective.pairs: \[1,5\] is not there: the student has layers 1 to 2"):
        trained(objective=HiddenStates(SequenceKD(), [[1, 5]]))
    synthetic = with_top(answered(20, ids=TOKENIZER), TEACHER, 5)
    with pytest.raises(DistillError, match=r"^signal: HiddenStates looks inside the teacher at each step, which no"):
        trained(synthetic=synthetic, signal=AnsweredSignal(synthetic.completions))
    module = LanguageModule(network(len(TOKENIZER)), HiddenStates(SequenceKD()), live(synthetic))
    with pytest.raises(DistillError, match=r"^objective: hidden_states looks inside the teacher at each step"):
        module(**tensors(synthetic))
