"""Does a student inherit its teacher's mark: the language, the test, and the student that takes the mark out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from tiny_language import CrossEntropy, characters

from distill.contracts import AdaptedStudent
from distill.data.markov_text import FIRST_SYMBOL, MarkovText
from distill.errors import DistillError
from distill.heads import Head
from distill.language import Completions, Evidence, Prompts, Sampling, SyntheticSet, texts
from distill.language_experiment import LanguageStudents, TrainedLanguageModel
from distill.language_training import fit_language_student
from distill.metrics.radioactivity import Radioactivity
from distill.provider.defenses.kgw import KGW
from distill.speaker import CausalLM as Speaker
from distill.students.causal_lm import CausalLM
from distill.students.llama import Llama
from distill.students.neutralised import Neutralised
from distill.training import Recipe, Trainer
from distill.watermarking import windows

SMALL: dict[str, int] = {"train_rows": 30, "held_out_rows": 500, "test_rows": 60, "symbols": 24, "successors": 8}
LANGUAGE = MarkovText(**SMALL, prompt_characters=4, answer_characters=24)
TASK = LANGUAGE.load()
TOKENIZER = characters(extra="".join(chr(FIRST_SYMBOL + i) for i in range(24)))
TOKENS = np.array(TOKENIZER("".join(chr(FIRST_SYMBOL + i) for i in range(24))).input_ids)
SAMPLING = Sampling(max_tokens=24, temperature=1.0)
MARK = KGW(delta=3.0)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the language ---------------------------------------------------------------------------------------------------


def test_the_language_is_a_chain_of_which_all_is_known() -> None:
    chain = LANGUAGE.chain
    np.testing.assert_allclose(chain.sum(axis=1), 1)
    assert ((chain > 0).sum(axis=1) == 8).all()
    counts = np.zeros_like(chain)
    for text in [TASK.held_out_text[0], *TASK.held_out.references]:
        numbers = np.array([ord(character) for character in text]) - FIRST_SYMBOL
        np.add.at(counts, (numbers[:-1], numbers[1:]), 1)
    seen = counts.sum(axis=1, keepdims=True)
    # Each count is binomial; five standard deviations, and one count for the rare.
    assert (np.abs(counts - seen * chain) <= 5 * np.sqrt(seen * chain * (1 - chain)) + 1).all()
    other = MarkovText(**SMALL, chain_seed=1).chain
    assert ((other > 0) != (chain > 0)).any()
    assert -(chain * np.log(chain.clip(1e-12))).sum(axis=1).mean() == pytest.approx(1.72, abs=0.15)  # ψ(9) - ψ(2)


def test_prompts_are_distinct_and_fewer_are_a_prefix_of_more() -> None:
    parts = (TASK.train, TASK.held_out, TASK.test)
    columns = np.concatenate([part.column for part in parts])
    assert len(set(columns)) == len(columns) == 590
    assert not TASK.test.chat
    assert {len(text) for text in columns} == {4}
    assert {len(text) for text in TASK.test.references} == {24}
    more = MarkovText(**SMALL | {"held_out_rows": 700}, prompt_characters=4, answer_characters=24).load()
    assert more.held_out.column[:500].tolist() == TASK.held_out.column.tolist()


def test_the_checker_counts_the_steps_that_the_chain_can_make() -> None:
    chain, prompt = LANGUAGE.chain, TASK.test.take([0])
    assert TASK.check(TASK.test, TASK.test.references).tolist() == [1.0] * 60
    last = ord(prompt.column[0][-1]) - FIRST_SYMBOL
    can, cannot = int(chain[last].argmax()), int(chain[last].argmin())
    then = int(chain[cannot].argmax())

    def score(*numbers: int, more: str = "") -> float:
        return float(TASK.check(prompt, texts(["".join(chr(FIRST_SYMBOL + i) for i in numbers) + more]))[0])

    assert (score(), score(can), score(cannot), score(cannot, then)) == (0.0, 1.0, 0.0, 0.5)
    assert score(can, more="x") == 0.5  # not of the language
    random = texts(["".join(chr(FIRST_SYMBOL + i) for i in np.random.default_rng(0).integers(0, 24, 24))] * 60)
    assert TASK.check(TASK.test, random).mean() == pytest.approx(8 / 24, abs=0.2)


@pytest.mark.parametrize(
    "options", [{"test_rows": 0}, {"answer_characters": 0}, {"successors": 1}, {"successors": 25}, {"symbols": 30_000}]
)
def test_languages_that_do_not_exist_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(DistillError, match="at least"):
        MarkovText(**SMALL | options)
    with pytest.raises(DistillError, match="are too few for 590 rows"):
        MarkovText(**SMALL, prompt_characters=2)


# --- the test -------------------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """Speaks by a table of log-probabilities of each token after each token."""

    table: torch.Tensor
    tokenizer: Any = TOKENIZER

    def prompt_tokens(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        return self.tokenizer(prompts.column.tolist()).input_ids

    def generate(self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray) -> Completions:
        rng = np.random.default_rng(int(repeats.sum()) + 1)
        last = np.array([tokens[-1] for tokens in self.prompt_tokens(prompts, sampling)])
        cumulated = self.table.double().softmax(dim=1).cumsum(dim=1).numpy()
        drawn = []
        for uniforms in rng.random((sampling.max_tokens, len(prompts), 1)):
            last = (cumulated[last] < uniforms * cumulated[last][:, -1:]).sum(axis=1)
            drawn.append(last)
        answers = [TOKENIZER.decode(row).replace(" ", "") for row in np.stack(drawn, axis=1)]
        nothing = np.zeros(len(prompts), np.int64)
        return Completions(texts(answers), texts(["length"] * len(prompts)), nothing, nothing)

    def heads(self, sequences: list[list[int]], starts: list[int]) -> list[Head]:
        parts = [sequence[start - 1 : -1] for sequence, start in zip(sequences, starts, strict=True)]
        return [Head(self.table[part], torch.eye(len(self.table))) for part in parts]


class Copier(Chain):
    """Goes on as the same token went on before in the text."""

    def heads(self, sequences: list[list[int]], starts: list[int]) -> list[Head]:
        heads = super().heads(sequences, starts)
        for head, text, start in zip(heads, sequences, starts, strict=True):
            for i, place in enumerate(range(start, len(text))):
                before = [j for j in range(1, place) if text[j - 1] == text[place - 1]]
                if before:
                    head.hidden[i, text[before[-1]]] = 1000
        return heads


def clean_table() -> torch.Tensor:
    table = torch.full((len(TOKENIZER), len(TOKENIZER)), -30.0)
    table[TOKENS[:, None], TOKENS] = torch.tensor(LANGUAGE.chain, dtype=torch.float32).log().clamp_min(-30)
    return table


def marked_table(mark: KGW) -> torch.Tensor:
    processor = mark.logits_processor(SAMPLING)
    assert processor is not None
    return processor([[i] for i in range(len(TOKENIZER))], clean_table())


CLEAN = Chain(clean_table())


def learnt_from(speaker: Chain, n: int = 500) -> SyntheticSet:
    prompts, nothing = TASK.held_out.take(slice(0, n)), np.zeros(n, np.int64)
    return SyntheticSet(prompts, speaker.generate(prompts, SAMPLING, nothing), nothing, SAMPLING, np.zeros(n))


def evidence_of(suspect: Any, mark: KGW | None = MARK, learnt: SyntheticSet | None = None) -> Evidence:
    answers = {"student": suspect.generate(TASK.test, SAMPLING, np.zeros(60, np.int64))}
    speakers = {"teacher": CLEAN, "student": suspect}
    return Evidence(TASK.test, SAMPLING, answers, None, None, speakers, mark, learnt)


def test_nothing_is_said_without_a_watermark_or_the_teachers_tokens() -> None:
    assert Radioactivity().judge(evidence_of(CLEAN, mark=None), "student") == {}
    assert Radioactivity().judge(replace(evidence_of(CLEAN), speakers={"student": CLEAN}), "student") == {}


def test_a_marked_model_is_known_by_its_answers_and_by_its_weights() -> None:
    marked = Chain(marked_table(MARK))
    numbers = Radioactivity().judge(evidence_of(marked, learnt=learnt_from(marked)), "student")
    assert set(numbers) == set(Radioactivity.higher_is_better)
    # At most 24 windows with one arg-max each are there to be read; of the answers each pair counts once.
    assert 10 < numbers["open_tokens"] <= 24
    assert 24 < numbers["closed_tokens"] <= 24 * 8
    for mode, least in (("open", 0.8), ("closed", 0.4)):
        assert numbers[f"{mode}_evidence"] > least
        assert numbers[f"{mode}_log10_p"] < -4
        assert numbers[f"{mode}_wrong_key_median_log10_p"] > -1
        assert numbers[f"{mode}_wrong_key_min_log10_p"] > -4
    behind = evidence_of(marked, learnt=learnt_from(marked))
    elsewhere = Radioactivity().judge(replace(behind, speakers={"teacher": CLEAN}), "student")
    assert not any(name.startswith("open") for name in elsewhere), "a model that is not at hand has no weights"
    assert elsewhere["closed_log10_p"] < -4


@pytest.mark.parametrize(("kind", "width"), [(Chain, 1), (Chain, 2), (Copier, 1)])
def test_an_innocent_model_is_accused_as_often_as_the_p_value_says(kind: type[Chain], width: int) -> None:
    """Over 100 keys, though it reads marked text, and a copier repeats what it finds there."""
    metric, suspect = Radioactivity(wrong_keys=1), kind(clean_table())
    found: dict[str, list[float]] = {"closed": [], "open": []}
    for key in range(100):
        mark = KGW(delta=3.0, key=key, width=width)
        marked = learnt_from(Chain(marked_table(KGW(delta=3.0, key=key))), 20)
        numbers = metric.judge(evidence_of(suspect, mark, marked), "student")
        for mode, values in found.items():
            values.append(10 ** numbers[f"{mode}_log10_p"])
    for mode, values in found.items():
        for level in (0.05, 0.2):
            assert (np.array(values) <= level).sum() <= binom.ppf(0.999, 100, level), mode
        assert 0.4 < np.mean(values) < 0.7, mode


def test_without_counting_once_an_innocent_model_would_be_accused() -> None:
    """It says the same few things again and again; and a copier repeats the marks of the text that it reads."""
    told = CLEAN.generate(TASK.test, SAMPLING, np.zeros(60, np.int64)).column
    before, tokens, _ = windows(TOKENIZER(told.tolist()).input_ids, 1)
    keys = range(200)
    every = [KGW(key=key).p_value(KGW(key=key).evidence(before, tokens)) for key in keys]
    assert np.mean(np.array(every) < 0.01) > 0.1

    accused = []
    for key in range(40):
        mark = KGW(delta=3.0, key=key)
        marked = learnt_from(Chain(marked_table(mark)), 20)
        columns = (marked.prompts.column, marked.completions.column)
        sequences = [a + b for a, b in zip(*(TOKENIZER(c.tolist()).input_ids for c in columns), strict=True)]
        heads = Copier(clean_table()).heads(sequences, [4] * len(sequences))
        before = np.array([token for text in sequences for token in text[3:-1]])[:, None]
        copied = np.concatenate([head.logits().argmax(dim=1).numpy() for head in heads])
        once = mark.countable(before, copied)
        accused.append(mark.p_value(mark.evidence(before[once], copied[once])) < 0.05)
    assert np.mean(accused) > 0.5, "to count each pair once is not enough for who reads marked text"


def test_what_the_prompt_or_nobody_said_is_not_scored() -> None:
    suspect, learnt = Chain(marked_table(MARK)), learnt_from(Chain(marked_table(MARK)))
    whole = evidence_of(suspect, learnt=learnt)
    every = Radioactivity(min_count=0).judge(whole, "student")
    few = Radioactivity(min_count=800).judge(whole, "student")
    none = Radioactivity(min_count=10**6).judge(whole, "student")
    assert 0 < few["closed_tokens"] < every["closed_tokens"]
    assert (none["closed_tokens"], none["closed_log10_p"], none["closed_evidence"]) == (0, 0, 0)
    # A prompt that holds every window leaves nothing to score but what follows the last token.
    long = Prompts(texts(["".join(chr(FIRST_SYMBOL + i) for i in range(24))] * 2), chat=False)
    numbers = Radioactivity(min_count=0).judge(replace(whole, prompts=long), "student")
    assert numbers["closed_tokens"] <= 8


def test_options_are_checked() -> None:
    for options in ({"samples": 0}, {"wrong_keys": 0}, {"max_read": 0}, {"min_count": -1}):
        with pytest.raises(ValueError, match="is at least"):
            Radioactivity(**options)
    for options in ({"width": 0}, {"top_k": 0}, {"delta": -1.0}, {"alpha": float("inf")}):
        with pytest.raises(ValueError, match="is at least"):
            Neutralised(Llama(), **options)


# --- students that learn --------------------------------------------------------------------------------------------


def trained(student: Any, synthetic: SyntheticSet, epochs: int) -> Any:
    recipe = Recipe(epochs=epochs, batch_size=8, optimizer="adamw", lr=1e-2, log_steps=1000)
    trainer = Trainer(device="cpu", progress=False)
    options: dict[str, Any] = {"teachers": TOKENIZER, "max_length": 58, "seed": 0, "name": "student"}
    return fit_language_student(trainer, student, synthetic, CrossEntropy(), recipe, **options)[0]


def speaker_of(network: Any) -> Speaker:
    speaker = Speaker(batch_size=64)
    speaker.hold(network, TOKENIZER)
    return speaker


MARKED = learnt_from(Chain(marked_table(MARK)))


@pytest.fixture(scope="module")
def before(tmp_path_factory: Any) -> str:
    """A student of unmarked text, as a folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("before")
    network = trained(Llama(width=32, layers=1, heads=2, context=64, initializer_range=0.1), learnt_from(CLEAN), 6)
    network.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapted(before: str) -> tuple[Neutralised, Any, dict[str, torch.Tensor]]:
    """The same, trained further on marked text."""
    student = Neutralised(CausalLM(before), width=1)
    network = trained(student, MARKED, 6)
    return student, network, student.adapt(network, TOKENIZER, MARKED)


def test_a_student_of_marked_text_is_known_and_neutralised_it_is_not(before: str, adapted: Any) -> None:
    student, network, memory = adapted
    assert isinstance(student, AdaptedStudent)
    metric = Radioactivity()
    innocent = metric.judge(
        evidence_of(speaker_of(CausalLM(before).build_language(TOKENIZER)), learnt=MARKED), "student"
    )
    assert min(innocent["open_log10_p"], innocent["closed_log10_p"]) > -2.5
    speaker = speaker_of(network)
    naive = metric.judge(evidence_of(speaker, learnt=MARKED), "student")
    assert max(naive["open_log10_p"], naive["closed_log10_p"]) < -4
    speaker.speaking = [student.speaking(memory)]
    neutralised = metric.judge(evidence_of(speaker, learnt=MARKED), "student")
    assert neutralised["closed_log10_p"] > naive["closed_log10_p"] / 2
    assert neutralised["open_log10_p"] == naive["open_log10_p"], "weights are weights"


def test_neutralisation_by_nothing_is_the_student_itself(adapted: Any) -> None:
    student, network, memory = adapted
    plain = speaker_of(network)
    answers = plain.generate(TASK.test, SAMPLING, np.zeros(60, np.int64))
    plain.speaking = [Neutralised(student.student, delta=0.0, width=1).speaking(memory)]
    same = plain.generate(TASK.test, SAMPLING, np.zeros(60, np.int64))
    assert same.column.tolist() == answers.column.tolist()
    logits = torch.randn(3, len(TOKENIZER))
    changed = plain.speaking[0]([[1, 2], [int(TOKENS[0])], [5]], logits)
    assert torch.equal(changed, logits)


def test_what_is_subtracted_is_the_formula(before: str, adapted: Any) -> None:
    student, network, memory = adapted
    sequences = [
        asked + told[:200]
        for asked, told in zip(
            *(TOKENIZER(c.tolist()).input_ids for c in (MARKED.prompts.column, MARKED.completions.column)), strict=True
        )
    ]
    sums = torch.zeros(2, len(TOKENIZER), len(TOKENIZER)), torch.zeros(len(TOKENIZER))
    with torch.no_grad():
        for i, model in enumerate((network, CausalLM(before).build_language(TOKENIZER).eval())):
            for text, logits in zip(sequences, model(torch.tensor(sequences)).logits, strict=True):
                for place in range(4, len(text)):
                    sums[0][i, text[place - 1]] += logits[place - 1].softmax(dim=0)
                    sums[1][text[place - 1]] += i == 0
    counts = sums[1]
    after, earlier = sums[0]
    d_0 = torch.where(after.sum(0) > earlier.sum(0), (after.sum(0) / earlier.sum(0)).clamp(max=2) / 2, 0)
    share = counts / counts.sum()
    logits = torch.randn(2, len(TOKENIZER))
    frequent, unseen = int(counts.argsort()[-3]), int((counts == 0).nonzero()[0])
    subtracted = logits - student.speaking(memory)([[7, frequent], [unseen]], logits)
    p, q = after[frequent] / counts[frequent], earlier[frequent] / counts[frequent]
    w = (share[frequent].log() / share.max().log()) ** -0.3
    d_1 = torch.where(p > q, (p / q).clamp(max=2) / 2, 0)
    d_1[p.argsort(descending=True)[50:]] = 0
    torch.testing.assert_close(subtracted[1], 2.5 * d_0, atol=1e-3, rtol=1e-3)
    # A token whose probability hardly moved may have risen by one count and fallen by the other.
    torch.testing.assert_close(subtracted[0], 2.5 * (d_0 + w * d_1), atol=1e-3, rtol=1e-3)


def test_what_it_remembers_is_saved_with_it(adapted: Any, tmp_path: Path) -> None:
    student, network, memory = adapted
    nothing: Any = None
    trainer = Trainer(device="cpu", progress=False)
    students = LanguageStudents(student, *[nothing] * 4, trainer, TOKENIZER, 58, 0, {}, TASK.held_out, 0)
    saved = TrainedLanguageModel(network, TOKENIZER, {}, memory, student)
    students.save(saved, tmp_path / "student")
    again = students.load(tmp_path / "student")
    assert again is not None
    greedy = replace(SAMPLING, temperature=0.0)
    answers = [model.speaker.generate(TASK.test, greedy, np.zeros(60, np.int64)) for model in (saved, again)]
    assert answers[0].column.tolist() == answers[1].column.tolist()
    plain = speaker_of(network).generate(TASK.test, greedy, np.zeros(60, np.int64))
    assert answers[0].column.tolist() != plain.column.tolist()


def test_each_row_is_changed_by_its_own_tokens(adapted: Any) -> None:
    student, _, memory = adapted
    change = student.speaking(memory)
    rows, logits = [[int(TOKENS[3])], [1, int(TOKENS[5])], []], torch.randn(3, len(TOKENIZER))
    for i in range(3):
        assert torch.equal(change(rows[i : i + 1], logits[i : i + 1]), change(rows, logits)[i : i + 1])


def test_text_in_which_nothing_is_frequent_leaves_the_student_nearly_alone(before: str) -> None:
    student = Neutralised(CausalLM(before), width=2, min_frequency=0.9)
    memory = student.adapt(student.build_language(TOKENIZER), TOKENIZER, MARKED.head(5))
    assert [len(memory[f"before/{n}"]) for n in range(3)] == [1, 0, 0]
    logits = torch.randn(1, len(TOKENIZER))
    assert torch.equal(student.speaking(memory)([[1, 2]], logits), logits), "an untrained student has learnt nothing"
