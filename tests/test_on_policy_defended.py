"""Students that learn on text of their own from a defended API: what they are told of it, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_language import answered, characters, network

from distill.decoding import Guided, Network, Processor
from distill.errors import BudgetExceeded, DistillError
from distill.heads import Head, Sparse
from distill.language import Completions, Prompts, Sampling
from distill.on_policy import fit_on_policy
from distill.provider.defenses._language import Unchanged
from distill.provider.defenses.logprob_noise import LogprobNoise
from distill.provider.defenses.logprob_rounding import LogprobRounding
from distill.provider.defenses.logprob_temperature import LogprobTemperature
from distill.provider.defenses.logprob_truncation import LogprobTruncation
from distill.provider.language_provider import LanguageProvider
from distill.provider.ledger import Prices
from distill.provider.oracle import serve_text
from distill.randomness import KeyedRandom
from distill.records import EVERY_LOGPROB, Budget, InterfaceProfile, Reveals
from distill.rollouts.gkd import GKD
from distill.rollouts.minillm import MiniLLM
from distill.speaker import CausalLM
from distill.students.llama import Llama
from distill.training import Recipe, Trainer

TOKENIZER = characters()
VOCABULARY = len(TOKENIZER)
DRAWN = Sampling(max_tokens=8)
WHOLE = InterfaceProfile(Reveals.PROBS)
JUDGE = InterfaceProfile(Reveals.TOP_K, 5, prompt_logprobs=True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Teacher(CausalLM):
    """A language model of random weights."""

    def __init__(self) -> None:
        super().__init__(batch_size=64)
        self.network = network(VOCABULARY, seed=1)
        self.hold(self.network, TOKENIZER)

    def prepare(self, task: Any, trainer: Any, cache: Path) -> None:
        pass


TEACHER = Teacher()


def green(last: int) -> np.ndarray:
    """(vocabulary,) the half of the tokens that is favoured after a token."""
    return np.random.default_rng(last).random(VOCABULARY) < 0.5


class Greens(Unchanged):
    """A green-list watermark: the logits of half of the tokens are raised, by the last token."""

    def __init__(self, delta: float = 4.0) -> None:
        self.delta = delta

    def logits_processor(self, sampling: Sampling) -> Processor:
        def raised(tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
            return logits + self.delta * torch.from_numpy(np.stack([green(row[-1]) for row in tokens]))

        return raised


class Beside(Unchanged):
    """The mean with another model, which runs beside the teacher."""

    def __init__(self) -> None:
        self.other = network(VOCABULARY, seed=5)
        self._reads = Network(self.other)

    @property
    def tokens_read(self) -> int:
        return self._reads.tokens_read

    def logits_processor(self, sampling: Sampling) -> Guided:
        return Guided([self._reads], lambda tokens, logits, others: (logits + others[0]) / 2)


def a_provider(
    cache: Path, defense: Any = None, access: InterfaceProfile = JUDGE, queries: int = 100_000
) -> LanguageProvider:
    return LanguageProvider(
        TEACHER,
        access=access,
        prices=Prices(0.5, 1.0, 2.0),
        budget=Budget(queries),
        sampling=DRAWN,
        cache=cache,
        defense=defense,
        defense_id="" if defense is None else type(defense).__name__,
        seed=3,
    )


@torch.no_grad()
def log_probabilities(model: Any, sequence: list[int], start: int) -> torch.Tensor:
    """(tokens from start on, vocabulary), by the model itself in one pass."""
    return model(torch.tensor([sequence])).logits[0, start - 1 : -1].float()


def defended(sequence: list[int], start: int, delta: float = 4.0) -> torch.Tensor:
    """What `Greens` makes of the teacher's distributions, from the definition."""
    raised = torch.from_numpy(np.stack([green(token) for token in sequence[start - 1 : -1]]))
    return (log_probabilities(TEACHER.network, sequence, start) + delta * raised).log_softmax(dim=1)


class Watching:
    """Forward KL on what is told, which keeps what it was told and of which tokens."""

    requires = Reveals.TOP_K

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, Any]] = []

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        self.seen.append((labels, signal))
        log_q = student.logits().log_softmax(1)
        if isinstance(signal, Sparse):
            return -(signal.logprobs.exp() * log_q.gather(1, signal.ids.clamp_min(0))).sum()
        assert isinstance(signal, Head)
        return -(signal.logits().softmax(1) * log_q).sum()


class Kept(GKD):
    """Everything that was written."""

    written: list[tuple[list[int], list[int]]]

    def examples(self, prompts: Any, write: Any, chance: float, progress: float) -> Any:
        given = super().examples(prompts, write, chance, progress)
        self.written = [*vars(self).get("written", []), *given]
        return given


def fit(
    provider: LanguageProvider, epochs: int = 1, rollout: Any = None, lr: float = 3e-3
) -> tuple[Any, Watching, Any]:
    objective, rollout = Watching(), rollout or Kept(lambda_=1.0, max_tokens=6)
    with serve_text(provider) as oracle:
        trained, _ = fit_on_policy(
            Trainer(device="cpu", progress=False),
            Llama(width=16, layers=1, heads=2, initializer_range=0.3),
            answered(24, ids=TOKENIZER),
            objective,
            Recipe(epochs=epochs, batch_size=3, lr=lr, validation_share=0.0),
            rollout,
            oracle,
            max_length=40,
            seed=0,
            name="student",
        )
    return trained, objective, rollout


# --- what is scored -------------------------------------------------------------------------------------------------


def test_scored_text_is_told_as_the_defense_would_have_drawn_it(tmp_path: Path) -> None:
    provider = a_provider(tmp_path, Greens())
    with serve_text(provider) as oracle:
        assert str(oracle.profile) == "top_5+prompt_logprobs"
        given = oracle.ask(Prompts.of_users(["1+2", "ab"]))
        sequences = [
            before + given.completions.tokens(row).tolist()
            for row, before in enumerate(TEACHER.prompt_tokens(given.prompts, DRAWN))
        ]
        starts = [len(some) - n for some, n in zip(sequences, given.completions.completion_tokens, strict=True)]
        scored = oracle.score([*sequences, [7, 8, 9, 7]], [*starts, 1])
        cost = oracle.spent()
    for sequence, start, told in zip([*sequences, [7, 8, 9, 7]], [*starts, 1], scored, strict=True):
        expected = defended(sequence, start).topk(5, dim=1)
        torch.testing.assert_close(told.logprobs, expected.values, atol=2e-5, rtol=0)
        assert (told.ids == expected.indices).float().mean() > 0.99
    # The teacher's own answers came with the same numbers that they are scored with.
    for row, told in enumerate(scored[:2]):
        own = slice(*given.completions.offsets[row : row + 2])
        np.testing.assert_allclose(told.logprobs, given.completions.top_logprobs[own], atol=1e-4)
    assert cost.queries == 5
    assert cost.tokens_in == int(given.completions.prompt_tokens.sum()) + sum(map(len, [*sequences, [7, 8, 9, 7]]))


def test_a_model_beside_the_teacher_reads_scored_text_and_is_paid_for(tmp_path: Path) -> None:
    defense = Beside()
    provider = a_provider(tmp_path, defense)
    sequences, starts = [[7, 8, 9, 10, 11], [12, 13, 14]], [2, 1]
    with serve_text(provider) as oracle:
        scored = oracle.score(sequences, starts)
    for sequence, start, told in zip(sequences, starts, scored, strict=True):
        both = [log_probabilities(model, sequence, start) for model in (TEACHER.network, defense.other)]
        expected = (sum(both) / 2).log_softmax(dim=1).topk(5, dim=1)
        torch.testing.assert_close(told.logprobs, expected.values, atol=2e-5, rtol=0)
    assert provider.cost().defense_tokens == 8


@pytest.mark.parametrize("access", [JUDGE, WHOLE], ids=str)
@pytest.mark.parametrize(
    "policy",
    [LogprobTruncation(2), LogprobRounding(1), LogprobNoise(1.0), LogprobTemperature(3.0)],
    ids=lambda p: type(p).__name__,
)
def test_interface_policies_hold_for_scored_text(tmp_path: Path, policy: Any, access: InterfaceProfile) -> None:
    sequence, start = [7, 8, 9, 10, 11, 12], 2
    clean = log_probabilities(TEACHER.network, sequence, start).log_softmax(dim=1)
    k = min(VOCABULARY if access is WHOLE else 5, 2 if isinstance(policy, LogprobTruncation) else VOCABULARY)
    told, again = (a_provider(tmp_path, policy, access).score([sequence], [start])[0] for _ in range(2))
    assert isinstance(told, Sparse)
    assert isinstance(again, Sparse)
    assert told.ids.shape == (4, k)
    torch.testing.assert_close(told.logprobs, again.logprobs, atol=0, rtol=0)
    expected = clean.gather(1, told.ids)
    match policy:
        case LogprobTruncation():
            torch.testing.assert_close(told.logprobs, expected, atol=2e-5, rtol=0)
        case LogprobRounding():
            assert (told.logprobs - expected).abs().max() <= 0.1 + 1e-4
            torch.testing.assert_close(10 * told.logprobs, (10 * told.logprobs).round(), atol=1e-4, rtol=0)
        case LogprobNoise():
            assert 0.3 < (told.logprobs - expected).std() < 2
            assert (told.logprobs.exp().sum(1) <= 1 + 1e-5).all()
        case LogprobTemperature():
            tempered = (clean / 3).log_softmax(dim=1).gather(1, told.ids)
            torch.testing.assert_close(told.logprobs, tempered, atol=2e-5, rtol=0)


def test_scoring_is_refused_where_the_interface_does_not_offer_it(tmp_path: Path) -> None:
    silent = InterfaceProfile(Reveals.TOP_K, 5)
    closed = Greens()
    closed.exposes = InterfaceProfile(Reveals.TOP_K, 5, logit_bias=True)
    for provider in (
        a_provider(tmp_path, Greens(), silent),
        a_provider(tmp_path, closed),
        a_provider(tmp_path, closed, WHOLE),
    ):
        assert not provider.profile.scores
        with pytest.raises(DistillError, match="does not reveal"):
            provider.score([[7, 8, 9]], [1])
        with pytest.raises(DistillError, match=r"access\.prompt_logprobs"):
            fit(provider)
        assert provider.cost().queries == 0


# --- what is learnt from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", [JUDGE, WHOLE], ids=str)
def test_a_student_on_its_own_text_learns_from_the_defended_distributions(
    tmp_path: Path, access: InterfaceProfile
) -> None:
    provider = a_provider(tmp_path, Greens(), access)
    _, objective, rollout = fit(provider)
    k = VOCABULARY if access is WHOLE else 5
    assert provider.cost().queries == len(rollout.written) > 0, "each text is one query"
    expected = torch.cat([defended(prompt + answer, len(prompt)) for prompt, answer in rollout.written])
    labels = torch.cat([labels for labels, _ in objective.seen])
    told = Sparse(*(torch.cat([getattr(signal, name) for _, signal in objective.seen]) for name in ("ids", "logprobs")))
    assert told.ids.shape == (len(labels), k)
    assert len(labels) == len(expected)
    # Rows of a step are packed, so the order within it is another; each told row is one of the expected ones.
    top = expected.topk(k, dim=1).values
    far = torch.cdist(told.logprobs.double(), top.double(), p=float("inf"))
    assert far.min(dim=1).values.max() < 1e-3
    assert far.min(dim=0).values.max() < 1e-3
    clean = torch.cat([log_probabilities(TEACHER.network, p + a, len(p)) for p, a in rollout.written])
    clean_top = clean.log_softmax(dim=1).topk(k, dim=1).values
    assert torch.cdist(told.logprobs.double(), clean_top.double(), p=float("inf")).min(dim=1).values.median() > 0.1


def test_the_student_takes_on_what_the_defense_did(tmp_path: Path) -> None:
    """Mass on the tokens that a defense favours everywhere: distilled from the defended API and from the plain one."""
    favoured = torch.arange(VOCABULARY) < VOCABULARY // 2

    class Favouring(Unchanged):
        def logits_processor(self, sampling: Sampling) -> Processor:
            return lambda tokens, logits: logits + 6.0 * favoured

    def mass(trained: Any) -> float:
        q = log_probabilities(trained, list(range(6, 46)), 1).softmax(dim=1)
        return float(q[:, favoured].sum(dim=1).mean())

    defended, plain = (
        fit(a_provider(tmp_path, defense, JUDGE), epochs=10, lr=2e-2)[0] for defense in (Favouring(), None)
    )
    assert mass(defended) > mass(plain) + 0.2


def test_what_was_scored_is_bounded_by_its_budget(tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded):
        fit(a_provider(tmp_path, Greens(), queries=10))


def test_a_rollout_that_draws_from_the_teacher_needs_whole_distributions(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="likeliest tokens only"):
        fit(a_provider(tmp_path, Greens()), rollout=MiniLLM(teacher_share=0.9, max_tokens=6))


def test_release_sees_scored_text_as_an_answer_to_what_is_before_it(tmp_path: Path) -> None:
    seen: list[tuple[Prompts, Completions, Sampling]] = []

    class Seeing(Unchanged):
        exposes = EVERY_LOGPROB

        def release(
            self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom
        ) -> Completions:
            seen.append((prompts, completions, sampling))
            assert len(rng) == len(prompts) == len(completions)
            return completions

    words = TOKENIZER("ab=1").input_ids
    a_provider(tmp_path, Seeing()).score([words, words[:2]], [3, 1])
    [(prompts, completions, sampling)] = seen
    assert prompts.column.tolist() == ["ab=", "a"]
    assert not prompts.chat
    assert completions.column.tolist() == ["1", "b"]
    assert completions.token_ids.tolist() == [words[3], words[1]]
    assert sampling == DRAWN
