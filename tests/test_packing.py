"""Packed rows: the same tokens as one example a row, none of which sees another example."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_language import TEMPLATE, CrossEntropy, answered, characters, network
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
)

from distill.errors import DistillError
from distill.language import Prompts, Sampling, texts
from distill.language_training import LanguageModule
from distill.packing import IGNORED, Encoded, Packed, encode, end_of_answer, first_fit_decreasing, pack, prompt_tokens

TOKENIZER = characters()


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(packed: Packed) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(column) for name, column in packed.columns().items()}


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_a_prompt_has_its_template_and_an_answer_its_end():
    encoded = encode(answered(9), TOKENIZER)
    texts_ = [TOKENIZER.decode(ids) for ids in encoded.prompts]
    asked = answered(9)
    for row in range(9):
        question = asked.prompts.messages(row)[0]["content"]
        assert texts_[row] == f"<|user|>{question}<|end|><|assistant|>"
        end = "<|end|>" if asked.completions.finish[row] == "stop" else ""
        assert TOKENIZER.decode(encoded.answers[row]) == asked.completions.column[row] + end
    assert {*asked.completions.finish} == {"stop", "length"}


def test_the_system_prompt_is_part_of_the_prompt():
    asked = replace(answered(2), sampling=Sampling(system_prompt="be brief"))
    assert TOKENIZER.decode(encode(asked, TOKENIZER).prompts[1]).startswith("<|system|>be brief<|end|><|user|>")


def test_plain_text_has_no_template():
    bare = characters(template=None)
    prompts = Prompts(texts(["a=3;", "b"]), chat=False)
    assert prompt_tokens(bare, prompts) == [bare("a=3;").input_ids, bare("b").input_ids]
    assert end_of_answer(bare, chat=False) == bare.eos_token_id
    assert end_of_answer(bare, chat=False) != end_of_answer(TOKENIZER, chat=True)


def test_the_end_is_the_end_of_text_where_the_template_has_none():
    assert end_of_answer(characters(TEMPLATE.replace("<|end|>", ";")), chat=True) == TOKENIZER.eos_token_id


def test_the_teachers_own_tokens_are_kept_where_they_mean_the_same():
    asked = answered(5, ids=TOKENIZER)
    drawn = asked.completions.token_ids.copy()
    drawn[0] = TOKENIZER.convert_tokens_to_ids("z")  # not what the text says
    asked = replace(asked, completions=replace(asked.completions, token_ids=drawn))
    assert encode(asked, TOKENIZER, characters()).answers[0][0] == drawn[0]
    retold = encode(asked, TOKENIZER).answers[0]
    assert retold == encode(asked, TOKENIZER, characters(extra="ä")).answers[0]
    assert TOKENIZER.decode(retold[:1]) == asked.completions.column[0][0]
    drawn[1] = -1  # an API that names this token by its text alone
    assert encode(asked, TOKENIZER, TOKENIZER).answers[0] == retold
    assert encode(asked, TOKENIZER, TOKENIZER).answers[1] == asked.completions.tokens(1).tolist()


def test_a_missing_chat_template_is_one_line():
    with pytest.raises(DistillError, match=r"^student: .* has no chat template; take an instruction-tuned"):
        encode(answered(2), characters(template=None))


def test_a_template_that_refuses_a_prompt_is_one_line():
    with pytest.raises(DistillError, match=r"^student: the chat template refuses a prompt: no users"):
        encode(answered(2), characters(template="{{ raise_exception('no users') }}"))


# --- rows -----------------------------------------------------------------------------------------------------------


def a_packing(max_length: int = 48, n: int = 40, **options) -> tuple[Encoded, Packed]:
    encoded = encode(answered(n, **options), TOKENIZER)
    return encoded, pack(encoded, max_length)


def test_every_example_lies_somewhere_whole_and_once():
    encoded, packed = a_packing()
    assert (packed.examples, packed.truncated, packed.dropped) == (40, 0, 0)
    found = []
    for row in range(len(packed)):
        for example in dict.fromkeys(packed.sequence[row][packed.sequence[row] >= 0].tolist()):
            found.append(example)
            prompt, answer = encoded.prompts[example], encoded.answers[example]
            here = np.flatnonzero(packed.sequence[row] == example)
            start = here[0] - len(prompt) + 1
            whole = slice(start, here[-1] + 1)
            assert packed.input_ids[row, whole].tolist() == (prompt + answer)[:-1]
            assert packed.position_ids[row, whole].tolist() == list(range(len(prompt) + len(answer) - 1))
            # Labels only on the answer, and on all of it.
            assert packed.labels[row, here].tolist() == answer
            assert packed.token[row, here].tolist() == list(range(len(answer)))
            assert (packed.labels[row, start : here[0]] == IGNORED).all()
    assert sorted(found) == list(range(40))
    report = packed.report()
    assert report["answer_tokens"] == sum(map(len, encoded.answers)) == (packed.labels != IGNORED).sum()
    assert report["tokens"] == sum(map(len, encoded.prompts + encoded.answers)) - 40
    assert report["fill"] == report["tokens"] / packed.labels.size > 0.9
    assert ((packed.token >= 0) == (packed.labels >= 0)).all()


def test_it_is_the_same_each_time():
    _, packed = a_packing()
    _, again = a_packing()
    assert packed.fingerprint == again.fingerprint
    assert a_packing(seed=1)[1].fingerprint != packed.fingerprint


def test_bins_are_first_fit_decreasing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, capacity = rng.integers(1, 33, rng.integers(1, 60)), 32
        bins = first_fit_decreasing(lengths, capacity)
        rooms: list[int] = []
        expected = np.empty_like(bins)
        for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):  # the textbook's, in quadratic time
            fitting = [b for b, room in enumerate(rooms) if room >= lengths[item]]
            if not fitting:
                rooms.append(capacity)
                fitting = [len(rooms) - 1]
            rooms[fitting[0]] -= lengths[item]
            expected[item] = fitting[0]
        np.testing.assert_array_equal(bins, expected)


def test_what_does_not_fit_is_cut_and_counted():
    encoded, packed = a_packing(max_length=14)
    prompts, answers = ([len(ids) for ids in part] for part in (encoded.prompts, encoded.answers))
    whole = [p + a - 1 for p, a in zip(prompts, answers, strict=True)]
    assert packed.labels.shape[1] <= 14
    assert packed.dropped == sum(p > 14 for p in prompts)
    assert packed.dropped == 0
    assert packed.truncated == sum(n > 14 for n in whole) > 0
    assert packed.report()["answer_tokens"] == sum(min(a, 15 - p) for p, a in zip(prompts, answers, strict=True))
    cut = pack(encoded, 10)
    assert cut.dropped == sum(p > 10 for p in prompts) > 0
    assert cut.examples == 40 - cut.dropped
    with pytest.raises(DistillError, match=r"^max_length: none of 40 examples .* within 3 tokens .* has 4\)"):
        pack(encoded, 3)


def test_examples_that_count_for_nothing_are_left_out():
    encoded = Encoded([[1], [1], [], []], [[2], [], [3], [4, 5]], np.array([1, 1, 1, 0.5], np.float32))
    packed = pack(encoded, 8)
    assert (packed.examples, packed.dropped) == (2, 2)  # no answer; nothing to predict the only token from
    assert sorted(packed.labels[packed.labels >= 0].tolist()) == [2, 5]
    assert packed.token[packed.labels == 5].tolist() == [1]
    assert packed.weights[packed.labels == 5].tolist() == [0.5]
    assert pack(replace(encoded, weights=np.array([1, 1, 1, 0], np.float32)), 8).dropped == 3


# --- boundaries -----------------------------------------------------------------------------------------------------


# Eager attention takes its softmax in float32 whatever it is given.
@pytest.mark.parametrize(("implementation", "tolerance"), [("sdpa", 1e-12), ("eager", 1e-5)])
def test_logits_are_those_of_each_example_alone(implementation, tolerance):
    encoded, packed = a_packing()
    model = network(len(TOKENIZER), attn_implementation=implementation).double()
    tensors = arguments(packed)
    together = model(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False).logits
    for example in range(40):
        ids = torch.tensor(encoded.prompts[example] + encoded.answers[example])[None]
        alone = model(input_ids=ids, use_cache=False).logits[0, len(encoded.prompts[example]) - 1 : -1]
        torch.testing.assert_close(together[packed.sequence == example], alone, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("weights", [None, np.linspace(0.25, 2, 40)])
def test_losses_and_gradients_are_those_of_each_example_alone(weights):
    encoded, packed = a_packing(weights=weights)
    module = LanguageModule(network(len(TOKENIZER)), CrossEntropy())
    loss = module(**arguments(packed))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.network.named_parameters()}
    module.zero_grad()
    total = 0.0
    for example in range(40):
        prompt, answer = encoded.prompts[example], encoded.answers[example]
        ids = torch.tensor(prompt + answer)[None]
        labels = torch.tensor([IGNORED] * len(prompt) + answer)[None]
        # transformers' own loss: the mean over the answer
        alone = module.network(input_ids=ids, labels=labels, use_cache=False).loss * len(answer)
        alone = alone * (1 if weights is None else float(weights[example]))
        alone.backward()
        total += alone.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in module.network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-5)
        assert gradients[name].abs().max() > 1e-3


def test_a_network_that_mixes_examples_is_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(DistillError, match=r"student: MambaForCausalLM can't be trained on packed rows"):
        LanguageModule(mamba, CrossEntropy())


@pytest.mark.parametrize("config", [Gemma2Config, GraniteConfig, CohereConfig, Qwen3Config])
def test_factors_and_caps_on_logits_are_known(config):
    special = {GraniteConfig: {"logits_scaling": 8.0}, CohereConfig: {"logit_scale": 0.25}}.get(config, {})
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**sizes, bos_token_id=0, eos_token_id=1, **special)).eval()
    encoded, packed = a_packing()
    loss = LanguageModule(model, CrossEntropy())(**arguments(packed))
    total = 0.0
    for prompt, answer in zip(encoded.prompts, encoded.answers, strict=True):
        labels = torch.tensor([IGNORED] * len(prompt) + answer)[None]
        total += len(answer) * model(input_ids=torch.tensor(prompt + answer)[None], labels=labels).loss.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
