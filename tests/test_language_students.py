"""Students of the generation domain, and how they are trained: exact, resumable, in one process or two."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import distributed_language
import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tiny_language import CrossEntropy, ForwardKL, Local, answered, characters, network

from distill.config import CONFIG_DIR, build
from distill.contracts import LanguageStudent
from distill.errors import DistillError, MissingAsset
from distill.heads import Sparse
from distill.language_training import (
    AnsweredSignal,
    LanguageModule,
    TeacherSignal,
    build_language,
    fit_language_student,
)
from distill.objectives.sequence_kd import SequenceKD
from distill.packing import encode, pack
from distill.students.causal_lm import CausalLM
from distill.students.llama import Llama
from distill.students.lora import LoRA
from distill.students.teacher_layers import TeacherLayers
from distill.training import Recipe, Trainer

TOKENIZER = characters()
TINY = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "initializer_range": 0.1}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny pretrained model with its tokenizer, as a hub folder."""
    path = tmp_path_factory.mktemp("hub")
    network(len(TOKENIZER), seed=7).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


class Run:
    """One training of a tiny Llama, with everything that came of it."""

    def __init__(self, directory: Path | None = None, stop_at: int | None = None, **options):
        self.rows, self.stop_at = [], stop_at
        recipe = {
            "epochs": 2,
            "batch_size": 4,
            "optimizer": "adam",
            "lr": 3e-3,
            "log_steps": 1,
            "validation_share": 0.2,
        }
        self.network, self.history = fit_language_student(
            Trainer(device="cpu", log=self.log, progress=False, precision=options.pop("precision", "no")),
            options.pop("student", Llama(**TINY)),
            options.pop("synthetic", answered(60, ids=TOKENIZER)),
            options.pop("objective", SequenceKD()),
            Recipe(**recipe | options.pop("recipe", {})),
            signal=options.pop("signal", None),
            teachers=options.pop("teachers", TOKENIZER),
            max_length=options.pop("max_length", 48),
            seed=0,
            name="student",
            directory=directory,
        )
        assert not options
        self.history.pop("seconds")
        self.weights = {key: value.clone() for key, value in self.network.state_dict().items()}

    def log(self, row: dict) -> None:
        self.rows.append(row)
        if row["step"] == self.stop_at:
            raise InterruptedError


def assert_same(a: Run, b: Run, exactly: bool = True) -> None:
    for key in a.weights:
        if exactly:
            assert torch.equal(a.weights[key], b.weights[key]), key
        else:
            torch.testing.assert_close(a.weights[key], b.weights[key], atol=1e-5, rtol=1e-5)
    if exactly:
        assert a.history == b.history
        assert a.rows == b.rows


# --- students -------------------------------------------------------------------------------------------------------


def made(option: str, **changes) -> LanguageStudent:
    node = yaml.safe_load((CONFIG_DIR / "student" / f"{option}.yaml").read_text())
    return build(node | changes, "student")


@pytest.mark.parametrize("option", ["llama", "causal_lm", "lora", "teacher_layers"])
def test_each_student_fits_the_contract(option, folder):
    student = made(option, **({"model": folder} if option in ("causal_lm", "lora") else {}))
    assert isinstance(student, LanguageStudent)
    if option == "teacher_layers":
        student = student.of_teacher(network(len(TOKENIZER)))
    tokenizer = student.tokenizer(TOKENIZER)
    one, other = (build_language(student, tokenizer, 0) for _ in range(2))
    LanguageModule(one, CrossEntropy())  # which tries out that it can be trained on packed rows
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    ids = tokenizer("1+2=?", return_tensors="pt").input_ids
    assert one.eval().generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 8)


def test_a_llama_has_the_size_that_was_asked_for():
    def parameters(**options) -> int:
        return sum(p.numel() for p in Llama(**options).build_language(TOKENIZER).parameters())

    def expected(width, layers, kv_width, mlp, tied) -> int:
        layer = 2 * width * width + 2 * width * kv_width + 3 * width * mlp + 2 * width
        return (1 if tied else 2) * len(TOKENIZER) * width + layers * layer + width

    assert parameters() == expected(256, 4, 256, 680, True)
    assert parameters(**TINY) == expected(16, 2, 8, 40, True)
    assert parameters(width=128, layers=1, heads=8, kv_heads=2, tied=False) == expected(128, 1, 32, 344, False)
    assert parameters(width=64, layers=3, mlp_ratio=4.0) == expected(64, 3, 64, 256, True)
    assert Llama(width=576, heads=9).mlp_width == 1536  # SmolLM2's
    config = Llama(**TINY, context=77).build_language(TOKENIZER).config
    assert (config.max_position_embeddings, config.eos_token_id) == (77, TOKENIZER.eos_token_id)


@pytest.mark.parametrize(
    ("option", "changes", "says"),
    [
        ("llama", {"width": 20, "heads": 4}, "width:? is an even multiple of heads, not 20 for 4"),
        ("llama", {"kv_heads": 3}, "kv_heads:? is a divisor of heads"),
        ("llama", {"layers": 0}, "layers:? is at least 1"),
        ("llama", {"mlp_ratio": 0.0}, "mlp_ratio:? is more than 0"),
        ("causal_lm", {"model": "x", "dtype": "half"}, "dtype:? is one of float32, bfloat16, float16"),
        ("lora", {"model": "x", "rank": 0}, "rank:? is at least 1"),
        ("lora", {"model": "x", "dropout": 1.0}, "dropout:? is at least 0 and less than 1"),
        ("lora", {"model": "x", "modules": ["q_proj", "lm_head"]}, "the output matrix"),
        ("teacher_layers", {"every": 0}, "every:? is at least 1"),
    ],
)
def test_a_student_that_makes_no_sense_is_one_line(option, changes, says):
    with pytest.raises(DistillError, match=says) as caught:
        made(option, **changes)
    assert str(caught.value).startswith("student")
    assert "\n" not in str(caught.value)


def test_a_teacher_without_a_public_tokenizer():
    for student in (Llama(), TeacherLayers()):
        with pytest.raises(DistillError, match=r"student: .*choose causal_lm"):
            student.tokenizer(None)


def test_a_pretrained_model_comes_as_it_was_saved(folder):
    student = CausalLM(folder, dtype="bfloat16")
    loaded = student.build_language(student.tokenizer(None))
    assert loaded.dtype == torch.bfloat16
    original = network(len(TOKENIZER), seed=7)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, original.state_dict()[key].bfloat16())
    assert student.tokenizer(None).get_vocab() == TOKENIZER.get_vocab()
    fresh = build_language(CausalLM(folder, pretrained=False), TOKENIZER, 0)
    assert fresh.config.hidden_size == loaded.config.hidden_size
    assert not torch.equal(fresh.lm_head.weight.bfloat16(), loaded.lm_head.weight)
    with pytest.raises(DistillError, match=r"student.model: .* fewer embeddings than its tokenizer has tokens"):
        student.build_language(characters(extra="äöü"))
    with pytest.raises(DistillError, match=r"student.model: .*(can't be loaded|no tokenizer)"):
        CausalLM(str(Path(__file__).parent)).tokenizer(None)


def test_gradient_checkpointing_changes_nothing(folder):
    def gradients(**options):
        model = CausalLM(folder, **options).build_language(TOKENIZER).train()
        module = LanguageModule(model, SequenceKD())
        assert model.training
        on = options.get("gradient_checkpointing", False)
        assert all(layer.gradient_checkpointing == on for layer in model.model.layers)
        packed = pack(encode(answered(20), TOKENIZER), 48)
        module(**{name: torch.from_numpy(column) for name, column in packed.columns().items()}).backward()
        return [p.grad for p in model.parameters()]

    for plain, checkpointed in zip(gradients(), gradients(gradient_checkpointing=True), strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear"])
def test_lora_trains_its_adapters_alone(folder, modules):
    student = LoRA(folder, modules=modules)
    before = build_language(student, TOKENIZER, 0)
    ids = TOKENIZER("1+2=?", return_tensors="pt").input_ids
    plain = network(len(TOKENIZER), seed=7)
    assert torch.equal(before.eval()(ids).logits, plain(ids).logits)  # it starts from the model itself
    run = Run(student=student)
    original = dict(plain.named_parameters())
    adapted = 0
    for name, parameter in run.network.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_" in name:
            adapted += parameter.numel()
            assert not torch.equal(parameter, before.get_parameter(name)), name
        else:
            assert torch.equal(parameter, original[name.replace(".base_layer", "")]), name
    layer = 4 * (32 + 32) + 4 * (32 + 16)  # queries are 32 wide, values 16
    if modules == "all-linear":
        layer += 4 * (32 + 16) + 4 * (32 + 32) + 3 * 4 * (32 + 48)
    assert run.history["parameters"] == {
        "all": sum(p.numel() for p in plain.parameters()) + adapted,
        "trained": adapted,
    }
    assert adapted == 2 * layer
    assert type(run.network) is type(plain)
    adapter = get_peft_model_state_dict(run.network)
    assert sum(value.numel() for value in adapter.values()) == adapted
    set_peft_model_state_dict(before, adapter)
    assert torch.equal(before(ids).logits, run.network(ids).logits)
    assert not torch.equal(run.network(ids).logits, plain(ids).logits)


def test_lora_names_layers_that_are_not_there(folder):
    with pytest.raises(DistillError, match=r"student.modules: .* no layers called \['W_query'\]; all-linear"):
        LoRA(folder, modules=["W_query"]).build_language(TOKENIZER)


def test_every_nth_layer_of_the_teacher_is_copied():
    teacher = network(len(TOKENIZER), layers=5).bfloat16()
    weights = teacher.state_dict()
    student = TeacherLayers(every=2).of_teacher(teacher).build_language(TOKENIZER)
    assert (student.config.num_hidden_layers, teacher.config.num_hidden_layers) == (3, 5)
    assert student.dtype == torch.bfloat16
    for mine, theirs in enumerate([0, 2, 4]):
        for name, value in student.model.layers[mine].state_dict().items():
            assert torch.equal(value, weights[f"model.layers.{theirs}.{name}"])
        assert student.model.layers[mine].self_attn.layer_idx == mine
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(student.get_parameter(name), weights[name])
    ids = TOKENIZER("1+2=?", return_tensors="pt").input_ids
    whole = TeacherLayers(every=1).of_teacher(teacher).build_language(TOKENIZER).eval()
    assert torch.equal(whole(ids).logits, teacher(ids).logits)
    with torch.no_grad():
        whole.lm_head.weight.zero_()  # the copy is the student's own
    assert teacher.lm_head.weight.abs().max() > 0
    with pytest.raises(DistillError, match=r"student: teacher_layers copies .* white-box access"):
        TeacherLayers().build_language(TOKENIZER)


def test_lora_without_peft_is_one_line(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingAsset, match=r"^student: .* needs the package peft; run `pip install peft`"):
        LoRA(folder).build_language(TOKENIZER)


# --- training -------------------------------------------------------------------------------------------------------


def test_it_learns_to_answer():
    digits = [f"{a}+{b}=?" for a in range(4) for b in range(4)]
    asked = answered(16)
    prompts = type(asked.prompts).of_users(digits)
    column = np.array([str(a + b) for a in range(4) for b in range(4)], dtype=object)
    finish = np.array(["stop"] * 16, dtype=object)
    asked = replace(asked, prompts=prompts, completions=replace(asked.completions, column=column, finish=finish))
    recipe = {"epochs": 150, "batch_size": 16, "lr": 1e-2, "validation_share": 0.0, "log_steps": 50}
    run = Run(synthetic=asked, recipe=recipe, student=Llama(**TINY | {"width": 32}))
    assert run.history["curve"][-1]["loss"] < 0.05
    encoded = encode(asked, TOKENIZER)
    for prompt, answer in zip(encoded.prompts, encoded.answers, strict=True):
        ids = torch.tensor([prompt])
        drawn = run.network.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert drawn[0, len(prompt) :].tolist() == answer  # and it stops by itself


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_accumulation_changes_nothing(micro_batch_size):
    recipe = {"optimizer": "sgd", "lr": 0.05, "gradient_clip": 1.0}
    synthetic = answered(60, weights=np.tile([0.5, 1, 2], 20))
    whole = Run(recipe=recipe, synthetic=synthetic)
    pieces = Run(recipe={**recipe, "micro_batch_size": micro_batch_size}, synthetic=synthetic)
    assert_same(whole, pieces, exactly=False)
    for a, b in zip(whole.rows, pieces.rows, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_the_loss_is_the_mean_over_the_tokens_of_the_answers():
    synthetic = answered(60, weights=np.tile([0.5, 1, 2], 20))
    run = Run(recipe={"batch_size": 1000, "validation_share": 0.0, "epochs": 1}, synthetic=synthetic)
    student = build_language(Llama(**TINY), TOKENIZER, 0)
    encoded, total = encode(synthetic, TOKENIZER), 0.0
    for prompt, answer, weight in zip(encoded.prompts, encoded.answers, synthetic.weights, strict=True):
        logits = student(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += weight * torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
    assert run.rows[0]["loss"] == pytest.approx(total / sum(map(len, encoded.answers)), rel=1e-5)


@pytest.mark.parametrize("stop_at", [4, 9])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, stop_at, folder):
    # LoRA has dropout, so each step's random numbers must come back too.
    options = {"recipe": {"checkpoint_steps": 3, "epochs": 3}, "student": LoRA(folder)}
    whole = Run(**options)
    with pytest.raises(InterruptedError):
        Run(tmp_path, stop_at=stop_at, **options)
    torch.manual_seed(12345)
    resumed = Run(tmp_path, **options)
    done = stop_at // 3 * 3 if stop_at % 3 else stop_at - 3
    assert resumed.rows[0]["step"] == done + 1
    whole.rows = [row for row in whole.rows if row["step"] > done]
    assert_same(whole, resumed)


def test_a_checkpoint_of_another_objective_or_other_answers_is_ignored(tmp_path):
    with pytest.raises(InterruptedError):
        Run(tmp_path, stop_at=5, recipe={"checkpoint_steps": 2})
    assert_same(
        Run(objective=CrossEntropy(), recipe={"checkpoint_steps": 2}),
        Run(tmp_path, objective=CrossEntropy(), recipe={"checkpoint_steps": 2}),
    )
    with pytest.raises(InterruptedError):
        Run(tmp_path, stop_at=5, recipe={"checkpoint_steps": 2})
    other = answered(60, ids=TOKENIZER, seed=1)
    assert Run(tmp_path, synthetic=other, recipe={"checkpoint_steps": 2}).rows[0]["step"] == 1


def test_bfloat16_is_close():
    exact, rough = Run(), Run(precision="bf16")
    assert {value.dtype for value in rough.weights.values()} == {torch.float32}
    for a, b in zip(exact.rows, rough.rows, strict=True):
        for key in ("loss", "validation_loss"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=0.02)
    assert exact.rows != rough.rows


def test_two_processes_are_one(tmp_path):
    script = Path(__file__).with_name("distributed_language.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path / "two.pt")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    distributed_language.main(tmp_path / "one.pt")
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["packing"] == two["packing"]
    assert len(one["rows"]) == len(two["rows"]) > 10
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for a, b in zip(one["weights"], two["weights"], strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-5)
    assert one["sharded"][0] == pytest.approx(two["sharded"][0], rel=1e-6)
    for key, gradient in one["sharded"][1].items():
        torch.testing.assert_close(gradient, two["sharded"][1][key], atol=1e-4, rtol=1e-5)


# --- signals --------------------------------------------------------------------------------------------------------


def module_loss(model, objective, signal, synthetic, max_length=48) -> torch.Tensor:
    packed = pack(encode(synthetic, TOKENIZER, TOKENIZER), max_length)
    tensors = {name: torch.from_numpy(column) for name, column in packed.columns().items()}
    return LanguageModule(model, objective, signal)(**tensors)


@pytest.mark.parametrize("max_length", [48, 13])  # the second cuts answers
@pytest.mark.parametrize("weights", [None, np.tile([0.5, 2], 15)])
def test_a_student_that_is_the_teacher_has_no_loss(weights, max_length):
    teacher = network(len(TOKENIZER), seed=3)
    for synthetic in (answered(30, ids=TOKENIZER, weights=weights), answered(30, weights=weights)):
        signal = TeacherSignal(Local(teacher, TOKENIZER), synthetic)
        assert module_loss(teacher, ForwardKL(), signal, synthetic, max_length).item() == pytest.approx(0, abs=1e-3)
        other = network(len(TOKENIZER), seed=4)
        assert module_loss(other, ForwardKL(), signal, synthetic, max_length).item() > 1


def with_top(synthetic, teacher, k):
    """The answers with the teacher's k most probable tokens at each position."""
    encoded = encode(synthetic, TOKENIZER, TOKENIZER)
    tops = []
    for prompt, answer in zip(encoded.prompts, encoded.answers, strict=True):
        logits = teacher(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].detach()
        tops.append(logits.log_softmax(1).topk(k))
    ids = torch.cat([top.indices for top in tops]).numpy().astype(np.int32)
    logprobs = torch.cat([top.values for top in tops]).numpy()
    return replace(synthetic, completions=replace(synthetic.completions, top_ids=ids, top_logprobs=logprobs))


def test_log_probabilities_of_the_answers_line_up():
    teacher, n = network(len(TOKENIZER), seed=3), len(TOKENIZER)
    synthetic = with_top(answered(30, ids=TOKENIZER), teacher, n)
    whole = module_loss(teacher, ForwardKL(), AnsweredSignal(synthetic.completions), synthetic)
    encoded, entropy = encode(synthetic, TOKENIZER), 0.0
    for prompt, answer in zip(encoded.prompts, encoded.answers, strict=True):
        log_p = teacher(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        entropy -= (log_p.exp() * log_p).sum().item()
    assert whole.item() == pytest.approx(entropy, rel=1e-5)  # a cross-entropy is least, an entropy, where they line up
    completions = synthetic.completions
    completions.top_ids[5, 1:] = -1  # a row with one token
    some = AnsweredSignal(completions).for_positions(np.array([0, 3], np.int32), np.array([0, 1], np.int32))
    assert isinstance(some, Sparse)
    assert some.ids.dtype == torch.int64
    assert some.ids[1].tolist() == completions.top_ids[completions.offsets[3] + 1].tolist()
    padded = AnsweredSignal(completions).for_positions(np.zeros(1, np.int32), np.array([5], np.int32))
    assert padded.logprobs[0, 1:].eq(-torch.inf).all()


def test_a_run_on_each_signal_is_nearer_to_the_teacher():
    teacher = network(len(TOKENIZER), seed=3)
    synthetic = with_top(answered(60, ids=TOKENIZER), teacher, 5)
    local = Local(teacher, TOKENIZER)
    for signal in (TeacherSignal(local, synthetic), AnsweredSignal(synthetic.completions)):
        run = Run(synthetic=synthetic, objective=ForwardKL(), signal=signal, recipe={"epochs": 4})
        losses = [row["validation_loss"] for row in run.history["curve"]]
        assert losses[-1] < losses[0]


def test_a_signal_over_other_tokens_is_one_line(folder):
    synthetic = with_top(answered(10, ids=TOKENIZER), network(len(TOKENIZER)), 5)
    signal = AnsweredSignal(synthetic.completions)
    for teachers in (None, characters(extra="ä")):
        options = {"student": CausalLM(folder), "synthetic": synthetic, "objective": ForwardKL(), "teachers": teachers}
        with pytest.raises(DistillError, match=r"^student: .* this student's tokenizer has others; choose"):
            Run(**options, signal=signal)
        Run(**options | {"objective": SequenceKD()})  # text alone will do for any


def test_rows_longer_than_the_context_are_one_line():
    with pytest.raises(DistillError, match=r"^max_length: rows have 48 tokens and the student reads at most 40"):
        Run(student=Llama(**TINY, context=40))


def test_a_signal_that_is_not_there_is_one_line():
    with pytest.raises(DistillError, match=r"^objective: ForwardKL needs the teacher's distributions"):
        Run(objective=ForwardKL())
    with pytest.raises(DistillError, match=r"^objective: the answers come without token ids or log-probabilities"):
        AnsweredSignal(answered(3, ids=TOKENIZER).completions)


# --- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_accelerate_takes_the_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(CONFIG_DIR / "accelerate" / f"{name}.yaml")
    config = load_config_from_file(path)
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"
    assert "not been run" in Path(path).read_text()
    arguments = launch_command_parser().parse_args(["--config_file", path, "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    if name == "fsdp2":
        assert arguments.use_fsdp
        assert arguments.fsdp_version == 2
    else:
        assert arguments.use_deepspeed
        assert arguments.zero_stage == int(name[-1])
