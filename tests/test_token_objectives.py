"""The objectives on next-token distributions: options, limits, signals (the kernel itself: test_kd_kernel.py)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from distill.config import CONFIG_DIR, build
from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.objectives.rs_kd import RSKD
from distill.objectives.sequence_kd import SequenceKD
from distill.objectives.token_adaptive_kl import TokenAdaptiveKL
from distill.objectives.token_forward_kl import TokenForwardKL
from distill.objectives.token_jsd import TokenJSD
from distill.objectives.token_reverse_kl import TokenReverseKL
from distill.objectives.token_skew_forward_kl import TokenSkewForwardKL
from distill.objectives.token_skew_reverse_kl import TokenSkewReverseKL
from distill.objectives.token_symmetric_kl import TokenSymmetricKL
from distill.objectives.token_total_variation import TokenTotalVariation
from distill.objectives.uld import ULD
from distill.records import Reveals

DENSE: list[type] = [
    TokenForwardKL,
    TokenReverseKL,
    TokenJSD,
    TokenSkewForwardKL,
    TokenSkewReverseKL,
    TokenTotalVariation,
    TokenAdaptiveKL,
    TokenSymmetricKL,
]
ALL: list[type] = [*DENSE, SequenceKD, RSKD, ULD]
STEMS = {cls: cls.__module__.rpartition(".")[2] for cls in ALL}
N, VOCABULARY = 6, 40


def case(seed: int = 0, teacher_vocabulary: int = VOCABULARY) -> tuple[Head, torch.Tensor, Head]:
    """Student, labels and teacher in float64."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=rng, dtype=torch.float64)  # noqa: E731
    student = Head(draw(N, 8).requires_grad_(), draw(VOCABULARY, 8).requires_grad_(), draw(VOCABULARY).requires_grad_())
    teacher = Head(draw(N, 5), draw(teacher_vocabulary, 5))
    return student, torch.randint(VOCABULARY, (N,), generator=rng), teacher


def gradients(loss: torch.Tensor, student: Head) -> list[torch.Tensor]:
    leaves = [student.hidden, student.weight, student.bias]
    return list(torch.autograd.grad(loss, leaves, retain_graph=True))  # type: ignore[arg-type]


def assert_same(student: Head, a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
    for x, y in zip(gradients(a, student), gradients(b, student), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


def sampled(teacher: Head, draws: int, rng: torch.Generator) -> Sparse:
    """Tokens drawn from the teacher; equal ones are counted together."""
    log_p = teacher.logits().log_softmax(1)
    drawn = torch.multinomial(log_p.exp(), draws, replacement=True, generator=rng)
    counts = torch.zeros_like(log_p).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=log_p.dtype))
    counts, ids = counts.topk(draws, dim=1)
    ids = ids.masked_fill(counts == 0, -1)
    logprobs = log_p.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    return Sparse(ids, logprobs, counts / draws)


def signal_for(cls: type, teacher: Head) -> Head | Sparse | None:
    if cls is RSKD:
        return sampled(teacher, 5, torch.Generator().manual_seed(0))
    return None if cls is SequenceKD else teacher


@pytest.mark.parametrize("cls", ALL)
def test_its_yaml_is_its_constructor(cls: Any) -> None:
    node = yaml.safe_load((CONFIG_DIR / "objective" / f"{STEMS[cls]}.yaml").read_text())
    assert type(build(node, "objective")) is cls
    defaults = {k: p.default for k, p in inspect.signature(cls).parameters.items()}
    assert {k: v for k, v in node.items() if k != "_target_"} == defaults


@pytest.mark.parametrize("cls", ALL)
def test_is_a_sum_over_positions(cls: Any) -> None:
    student, labels, teacher = case()
    objective, signal = cls(), signal_for(cls, teacher)

    def part(rows: slice) -> torch.Tensor:
        def cut(x: Any) -> Any:
            if isinstance(x, Head):
                return Head(x.hidden[rows], x.weight, x.bias)
            return x and Sparse(x.ids[rows], x.logprobs[rows], x.weights[rows])

        return objective.loss(cut(student), labels[rows], cut(signal))

    assert_same(student, part(slice(0, 2)) + part(slice(2, N)), part(slice(0, N)))


@pytest.mark.parametrize("cls", DENSE)
def test_is_zero_with_no_gradient_for_a_perfect_student(cls: Any) -> None:
    student, labels, _ = case()
    twin = Head(student.hidden.detach(), student.weight.detach(), student.bias.detach())  # type: ignore[union-attr]
    loss = cls().loss(student, labels, twin)
    assert abs(loss.item()) < 1e-12
    assert max(g.abs().max().item() for g in gradients(loss, student)) < 1e-10


@pytest.mark.parametrize("cls", DENSE)
def test_gives_no_gradient_to_the_teacher(cls: Any) -> None:
    student, labels, teacher = case()
    teacher = Head(teacher.hidden.requires_grad_(), teacher.weight.requires_grad_())
    cls().loss(student, labels, teacher).backward()
    assert teacher.hidden.grad is None
    assert teacher.weight.grad is None


@pytest.mark.parametrize("cls", DENSE)
def test_temperature_and_its_square(cls: Any) -> None:
    """Both sides are tempered, and T² multiplies the divergence alone."""
    student, labels, teacher = case()
    plain = cls(temperature=1.0)
    halved = [Head(h.hidden / 2.0, h.weight, None if h.bias is None else h.bias / 2.0) for h in (student, teacher)]
    tempered = cls(temperature=2.0).loss(student, labels, teacher)
    assert_same(student, tempered, plain.loss(halved[0], labels, halved[1]))
    squared = cls(temperature=2.0, t_squared=True, label_weight=0.25).loss(student, labels, teacher)
    cross = F.cross_entropy(student.logits(), labels, reduction="sum")
    assert_same(student, squared, 0.75 * 4 * tempered + 0.25 * cross)


@pytest.mark.parametrize("cls", DENSE)
def test_a_label_weight_of_one_is_sequence_kd(cls: Any) -> None:
    student, labels, teacher = case()
    ours = cls(label_weight=1.0).loss(student, labels, teacher)
    assert_same(student, ours, SequenceKD().loss(student, labels, None))


def test_sequence_kd_is_cross_entropy() -> None:
    student, labels, teacher = case()
    plain = F.cross_entropy(student.logits(), labels, reduction="sum")
    assert_same(student, SequenceKD().loss(student, labels, teacher), plain)


@pytest.mark.parametrize(("beta", "limit"), [(1e-5, TokenForwardKL()), (1 - 1e-5, TokenReverseKL())])
def test_normalised_jsd_tends_to_both_kls(beta: float, limit: Any) -> None:
    student, labels, teacher = case()
    # Nearby ones, for which β is small enough: ln(p/q) must be small against ln(1/β).
    student, teacher = (Head(0.3 * head.hidden, head.weight) for head in (student, teacher))
    student = Head(student.hidden, student.weight, torch.zeros(VOCABULARY, dtype=torch.float64, requires_grad=True))
    near = TokenJSD(beta, normalised=True).loss(student, labels, teacher)
    assert_same(student, near, limit.loss(student, labels, teacher), 1e-3)
    assert TokenJSD(beta).loss(student, labels, teacher) < 1e-3  # without, it vanishes
    for normalised in (False, True):
        at = TokenJSD(round(beta), normalised=normalised).loss(student, labels, teacher)
        assert_same(student, at, limit.loss(student, labels, teacher))


def test_bounds() -> None:
    student, labels, teacher = case()
    far = Head(40 * teacher.hidden, teacher.weight)
    assert 0 < TokenJSD().loss(student, labels, far) < N * torch.log(torch.tensor(2.0))
    assert 0 < TokenTotalVariation().loss(student, labels, far) < N
    most = -torch.log(torch.tensor(0.1)) * N
    assert TokenSkewForwardKL(0.1).loss(student, labels, far) < most < TokenForwardKL().loss(student, labels, far)
    assert TokenSkewReverseKL(0.1).loss(student, labels, far) < most < TokenReverseKL().loss(student, labels, far)


def test_skew_of_zero_is_forward_kl() -> None:
    student, labels, teacher = case()
    skewed = TokenSkewForwardKL(0.0).loss(student, labels, teacher)
    assert_same(student, skewed, TokenForwardKL().loss(student, labels, teacher))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_symmetric_kl_is_a_mixture(share: float) -> None:
    student, labels, teacher = case()
    ours = TokenSymmetricKL(share).loss(student, labels, teacher)
    forward, reverse = (cls().loss(student, labels, teacher) for cls in (TokenForwardKL, TokenReverseKL))
    assert_same(student, ours, (1 - share) * forward + share * reverse)


def test_adaptive_kl_weighs_by_where_the_gap_is() -> None:
    """By hand: p = (.6, .3, .1) has the head {0}; q = (.2, .3, .5) is .4 away on it and .4 elsewhere: ½ and ½."""
    p, q = torch.tensor([[0.6, 0.3, 0.1]]).double(), torch.tensor([[0.2, 0.3, 0.5]]).double()
    student, teacher = (Head(x.log(), torch.eye(3).double()) for x in (q, p))
    forward, reverse = ((a * (a / b).log()).sum() for a, b in ((p, q), (q, p)))
    loss = TokenAdaptiveKL().loss(student, torch.zeros(1, dtype=torch.long), teacher)
    assert loss.item() == pytest.approx((forward + reverse).item() / 2)
    wide = TokenAdaptiveKL(head_mass=0.8).loss(student, torch.zeros(1, dtype=torch.long), teacher)
    assert wide.item() == pytest.approx((forward + reverse).item() / 2)  # {0, 1}: the second has no gap
    whole = TokenAdaptiveKL(head_mass=0.95).loss(student, torch.zeros(1, dtype=torch.long), teacher)
    assert whole.item() == pytest.approx(forward.item())


def test_adaptive_kl_finds_a_head_of_many_tokens() -> None:
    """A nearly flat teacher: half of its mass lies on more tokens than are looked at first."""
    rng = torch.Generator().manual_seed(0)
    t, z = (0.01 * torch.randn(2, 400, generator=rng, dtype=torch.float64) for _ in range(2))
    p, q = t.softmax(1), z.softmax(1)
    ordered, ids = p.sort(dim=1, descending=True)
    head = ordered.cumsum(1) - ordered < 0.5
    assert head.sum(1).min() > 64
    gaps = (p - q).abs()
    w = (gaps.gather(1, ids) * head).sum(1) / gaps.sum(1)
    expected = (w * (p * (p / q).log()).sum(1) + (1 - w) * (q * (q / p).log()).sum(1)).sum()
    eye = torch.eye(400, dtype=torch.float64)
    loss = TokenAdaptiveKL().loss(Head(z, eye), torch.zeros(2, dtype=torch.long), Head(t, eye))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


# --- truncated teachers ---------------------------------------------------------------------------------------------


def top_k(teacher: Head, k: int) -> Sparse:
    logprobs, ids = teacher.logits().log_softmax(1).topk(k, dim=1)
    return Sparse(ids, logprobs)


@pytest.mark.parametrize("cls", DENSE)
def test_a_full_list_is_the_whole_distribution(cls: Any) -> None:
    student, labels, teacher = case()
    listed = cls(temperature=2.0).loss(student, labels, top_k(teacher, VOCABULARY))
    assert_same(student, listed, cls(temperature=2.0).loss(student, labels, teacher))


@pytest.mark.parametrize("cls", [TokenForwardKL, TokenReverseKL, TokenJSD, TokenTotalVariation])
def test_a_longer_list_says_more(cls: Any) -> None:
    """Merging outcomes never adds to a divergence, so the tail bucket bounds the whole one from below."""
    student, labels, teacher = case()
    losses = [cls().loss(student, labels, top_k(teacher, k)).item() for k in (1, 3, 10, VOCABULARY)]
    assert losses == sorted(losses)
    assert 0 < losses[0] < losses[-1]


def test_the_zero_policy_makes_the_student_too_sure_and_the_tail_does_not() -> None:
    """Followed to their minima, the one puts all mass on the list and the other the teacher's."""
    _, labels, teacher = case()
    signal = top_k(teacher, 3)
    listed = signal.logprobs.exp().sum(1)
    for missing, expected in (("zero", torch.ones(N, dtype=torch.float64)), ("tail", listed)):
        z = torch.zeros(N, VOCABULARY, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([z], lr=0.3)
        for _ in range(300):
            optimizer.zero_grad()
            TokenForwardKL(missing=missing).loss(Head(z, torch.eye(VOCABULARY).double()), labels, signal).backward()
            optimizer.step()
        torch.testing.assert_close(z.softmax(1).gather(1, signal.ids).sum(1).detach(), expected, rtol=0, atol=0.01)


def test_rs_kd_is_unbiased_and_top_k_is_not() -> None:
    """The mean over 4,000 draws of 5 tokens is within 5 standard errors of forward KL: the loss and each gradient."""
    student, labels, teacher = case()
    exact = TokenForwardKL().loss(student, labels, teacher)
    truth = torch.cat([exact.detach().view(1), gradients(exact, student)[0].flatten()])
    rng, draws = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        loss = RSKD().loss(student, labels, sampled(teacher, 5, rng))
        draws.append(torch.cat([loss.detach().view(1), torch.autograd.grad(loss, student.hidden)[0].flatten()]))
    values = torch.stack(draws)
    errors = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - truth).abs() < 5 * errors).all()
    biased = TokenForwardKL(missing="zero").loss(student, labels, top_k(teacher, 5))
    assert (biased - exact).abs() > 20 * errors[0]


def test_rs_kd_with_every_token_is_forward_kl() -> None:
    student, labels, teacher = case()
    log_p = teacher.logits().log_softmax(1)
    signal = Sparse(torch.arange(VOCABULARY).expand(N, -1), log_p, log_p.exp())
    ours = RSKD(label_weight=0.3).loss(student, labels, signal)
    assert_same(student, ours, TokenForwardKL(label_weight=0.3).loss(student, labels, teacher))


# --- other vocabularies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher_vocabulary", [30, 40, 50])
def test_uld(teacher_vocabulary: int) -> None:
    student, labels, teacher = case(teacher_vocabulary=teacher_vocabulary)
    p, q = ((x.logits() / 2).softmax(1).sort(dim=1, descending=True).values for x in (teacher, student))
    p, q = (F.pad(x, (0, 50 - x.shape[1])) for x in (p, q))
    plain = F.cross_entropy(student.logits(), labels, reduction="sum") + 1.5 * (p - q).abs().sum()
    assert_same(student, ULD(temperature=2.0).loss(student, labels, teacher), plain)


def test_uld_does_not_know_which_token_is_which() -> None:
    student, labels, teacher = case()
    shuffled = Head(teacher.hidden, teacher.weight[torch.randperm(VOCABULARY)])
    assert_same(student, ULD().loss(student, labels, shuffled), ULD().loss(student, labels, teacher))


@pytest.mark.parametrize("cls", DENSE)
def test_padded_vocabularies_are_mapped(cls: Any) -> None:
    """Three more tokens in the teacher's head: it is renormalised over those that the student has."""
    student, labels, teacher = case(teacher_vocabulary=VOCABULARY + 3)
    shared = Head(teacher.hidden, teacher.weight[:VOCABULARY])
    assert_same(student, cls().loss(student, labels, teacher), cls().loss(student, labels, shared))


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_what_each_requires() -> None:
    assert {cls.requires for cls in DENSE} == {Reveals.TOP_K}
    assert [cls.requires for cls in (SequenceKD, RSKD, ULD)] == [Reveals.LABEL, Reveals.PROBS, Reveals.PROBS]


@pytest.mark.parametrize("cls", DENSE)
def test_text_alone_is_not_enough(cls: Any) -> None:
    student, labels, _ = case()
    with pytest.raises(DistillError, match=r"objective: .* with text alone use objective=sequence_kd"):
        cls().loss(student, labels, None)


def test_signals_of_the_wrong_kind() -> None:
    student, labels, teacher = case()
    drawn = sampled(teacher, 5, torch.Generator().manual_seed(0))
    with pytest.raises(DistillError, match="lists sampled tokens, not the top k; use objective=rs_kd"):
        TokenJSD().loss(student, labels, drawn)
    for signal in (None, teacher, top_k(teacher, 5)):
        with pytest.raises(DistillError, match="needs a signal of sampled tokens"):
            RSKD().loss(student, labels, signal)
    for signal in (None, top_k(teacher, 5), drawn):
        with pytest.raises(DistillError, match="whole next-token distributions"):
            ULD().loss(student, labels, signal)


def test_a_label_that_the_student_lacks() -> None:
    student, labels, _ = case()
    labels[3] = VOCABULARY
    with pytest.raises(DistillError, match=r"position 3 has no token of the student's 40, only \[40\]"):
        SequenceKD().loss(student, labels, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenForwardKL(temperature=0.0), "temperature is more than 0, not 0.0"),
        (lambda: TokenForwardKL(temperature=float("inf")), "temperature is more than 0"),
        (lambda: TokenForwardKL(label_weight=1.5), "label_weight lies between 0 and 1"),
        (lambda: TokenForwardKL(missing="drop"), "missing is tail or zero, not 'drop'"),
        (lambda: TokenJSD(beta=1.1), "beta lies between 0 and 1"),
        (lambda: TokenJSD(beta=1.0, missing="zero"), "missing is tail where beta is 1"),
        (lambda: TokenSkewForwardKL(alpha=1.0), "alpha is at least 0 and less than 1"),
        (lambda: TokenSkewReverseKL(alpha=0.0), "alpha lies between 0 and 1"),
        (lambda: TokenAdaptiveKL(head_mass=1.0), "head_mass lies between 0 and 1"),
        (lambda: TokenSymmetricKL(reverse_share=-0.1), "reverse_share lies between 0 and 1"),
        (lambda: RSKD(label_weight=-1.0), "label_weight lies between 0 and 1"),
        (lambda: ULD(uld_weight=-1.0), "uld_weight is at least 0"),
        (lambda: ULD(temperature=-1.0), "temperature is more than 0"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
