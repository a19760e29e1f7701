"""The fused kernel against float64 autograd of the plain formulas, written out here."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.objectives import _divergences as divergences
from distill.objectives import _fused
from distill.objectives._fused import Term, fused, on_labels

Plain = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # log p, log q (n, vocabulary) -> (n,)


def mixture(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """ln((1 − share) e^a + share e^b)."""
    return torch.logaddexp(a + math.log(1 - share), b + math.log(share))


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.exp() * (a - b)).sum(1)


def plain_jsd(beta: float) -> Plain:
    def value(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        m = mixture(log_q, log_p, beta)
        return beta * kl(log_p, m) + (1 - beta) * kl(log_q, m)

    return value


def plain_adaptive(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    shares = []
    for p, q in zip(log_p.exp().tolist(), log_q.exp().tolist(), strict=True):
        head, mass = 0.0, 0.0
        for v in sorted(range(len(p)), key=lambda v: -p[v]):
            if mass < 0.5:
                head += abs(p[v] - q[v])
            mass += p[v]
        total = sum(abs(a - b) for a, b in zip(p, q, strict=True))
        shares.append(head / total if total else 0.5)
    share = torch.tensor(shares, dtype=log_p.dtype)
    return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)


def plain_sorted_l1(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    size = max(log_p.shape[1], log_q.shape[1])
    p, q = (F.pad(x.exp().sort(dim=1, descending=True).values, (0, size - x.shape[1])) for x in (log_p, log_q))
    return (p - q).abs().sum(1)


PAIRS: dict[str, tuple[divergences.Divergence, Plain]] = {
    "forward_kl": (divergences.forward_kl, kl),
    "reverse_kl": (divergences.reverse_kl, lambda p, q: kl(q, p)),
    "jsd_0.5": (divergences.generalised_jsd(0.5), plain_jsd(0.5)),
    "jsd_0.1": (divergences.generalised_jsd(0.1), plain_jsd(0.1)),
    "jsd_0.3_normalised": (divergences.generalised_jsd(0.3, True), lambda p, q: plain_jsd(0.3)(p, q) / 0.21),
    "skew_forward_kl": (divergences.skew_forward_kl(0.1), lambda p, q: kl(p, mixture(q, p, 0.1))),
    "skew_reverse_kl": (divergences.skew_reverse_kl(0.1), lambda p, q: kl(q, mixture(p, q, 0.1))),
    "total_variation": (divergences.total_variation, lambda p, q: (p.exp() - q.exp()).abs().sum(1) / 2),
    "symmetric_kl": (divergences.symmetric_kl(0.9), lambda p, q: 0.1 * kl(p, q) + 0.9 * kl(q, p)),
    "adaptive_kl": (divergences.adaptive_kl(0.5), plain_adaptive),
    "sorted_l1": (divergences.sorted_l1, plain_sorted_l1),
}


def inputs(
    kind: str = "random", n: int = 5, vocabulary: int = 83, teacher_vocabulary: int = 83, **more: float
) -> tuple[Head, Head]:
    """A student whose tensors need gradients and a teacher of another width, in float64."""
    rng = torch.Generator().manual_seed(0)

    def head(width: int, size: int, **options: float) -> Head:
        hidden, weight = (torch.randn(k, width, generator=rng, dtype=torch.float64) for k in (n, size))
        bias = torch.randn(size, generator=rng, dtype=torch.float64)
        size_of = {"random": 0.7, "peaked": 15.0, "underflow": 400.0, "ties": 1.0}[kind]
        hidden = hidden * size_of
        if kind == "ties":
            hidden, weight, bias = hidden.round(), weight.round(), bias.round()
        return Head(hidden, weight, bias, **options)  # type: ignore[arg-type]

    student, teacher = head(6, vocabulary, **more), head(4, teacher_vocabulary)
    for tensor in (student.hidden, student.weight, student.bias):
        assert tensor is not None
        tensor.requires_grad_()
    return student, teacher


def logits(head: Head) -> torch.Tensor:
    assert head.bias is not None
    z = (head.hidden @ head.weight.T + head.bias) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def leaves(head: Head) -> list[torch.Tensor]:
    return [tensor for tensor in (head.hidden, head.weight, head.bias) if tensor is not None]


def assert_same(student: Head, ours: torch.Tensor, plain: torch.Tensor, rtol: float = 1e-9) -> None:
    """The loss and each gradient, against the largest entry of the latter."""
    torch.testing.assert_close(ours, plain, rtol=rtol, atol=rtol * 1e-3)
    gradients = (torch.autograd.grad(loss, leaves(student)) for loss in (ours, plain))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * max(1e-3, expected.abs().max().item()))


# Which of two equal tokens comes first is anyone's choice, and these two depend on it.
CASES = [
    (name, kind)
    for name in PAIRS
    for kind in ("random", "peaked", "underflow", "ties")
    if not (kind == "ties" and name in ("adaptive_kl", "sorted_l1"))
]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_divergence_and_gradients(name: str, kind: str, temperature: float) -> None:
    divergence, plain = PAIRS[name]
    student, teacher = inputs(kind)
    ours = fused(student, Term(teacher, divergence, 0.7, temperature))
    log_p, log_q = (F.log_softmax(logits(head) / temperature, dim=1) for head in (teacher, student))
    assert_same(student, ours, 0.7 * plain(log_p, log_q).sum())


@pytest.mark.parametrize("name", PAIRS)
def test_scale_and_softcap(name: str) -> None:
    divergence, plain = PAIRS[name]
    student, teacher = inputs(scale=0.3, softcap=2.0)
    ours = fused(student, Term(teacher, divergence, temperature=1.5), on_labels(torch.arange(5), 0.4))
    log_p, log_q = (F.log_softmax(logits(head) / 1.5, dim=1) for head in (teacher, student))
    cross = F.cross_entropy(logits(student), torch.arange(5), reduction="sum")
    assert_same(student, ours, plain(log_p, log_q).sum() + 0.4 * cross)


@pytest.mark.parametrize(("ours", "theirs"), [(83, 80), (80, 83)])
@pytest.mark.parametrize("name", PAIRS)
def test_padded_vocabularies_meet_on_the_shared_tokens(name: str, ours: int, theirs: int) -> None:
    divergence, plain = PAIRS[name]
    student, teacher = inputs(vocabulary=ours, teacher_vocabulary=theirs)
    paired = name != "sorted_l1"
    log_p, log_q = (F.log_softmax(logits(head)[:, : 80 if paired else None], dim=1) for head in (teacher, student))
    assert_same(student, fused(student, Term(teacher, divergence, paired=paired)), plain(log_p, log_q).sum())


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "adaptive_kl"])  # its weights are constants
def test_gradcheck(name: str) -> None:
    student, teacher = inputs(n=3, vocabulary=7, teacher_vocabulary=7)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fused(Head(hidden, weight, bias, 0.5, 3.0), Term(teacher, PAIRS[name][0], temperature=2.0))

    assert torch.autograd.gradcheck(loss, tuple(leaves(student)))


def test_closed_forms() -> None:
    """With the identity for a head, the gradient by the hidden states is that by the logits."""
    rng = np.random.default_rng(0)
    z, t = (rng.normal(size=(4, 9)) * 2 for _ in range(2))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (t, z))
    r = np.log(q / p)
    m = 0.5 * (p + q)
    mean = lambda x: (q * x).sum(1, keepdims=True)  # noqa: E731
    expected = {
        "forward_kl": q - p,
        "reverse_kl": q * (r - mean(r)),
        "jsd_0.5": 0.5 * q * (np.log(q / m) - mean(np.log(q / m))),
        "total_variation": 0.5 * q * (np.sign(q - p) - mean(np.sign(q - p))),
    }
    eye = torch.eye(9, dtype=torch.float64)
    for name, gradient in expected.items():
        hidden = torch.tensor(z, requires_grad=True)
        fused(Head(hidden, eye), Term(Head(torch.tensor(t), eye), PAIRS[name][0])).backward()
        np.testing.assert_allclose(hidden.grad, gradient, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("chunk", [(1, 1, 1), (4, 2, 2), (6, 4, 2), (4, 8, 2), (8, 8, 8)])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, chunk: tuple[int, int, int]) -> None:
    student, teacher = inputs(n=13)
    terms = Term(teacher, divergences.reverse_kl), Term(top_k(teacher, 5), divergences.forward_kl)
    whole = fused(student, *terms)
    monkeypatch.setattr(_fused._Plan, "fitting", lambda *_: _fused._Plan(*chunk))
    assert_same(student, fused(student, *terms), whole, 1e-12)


def test_a_plan_for_every_vocabulary() -> None:
    for vocabulary in (1, 2, 1000, 32_000, 151_936, 10_000_000):
        plan = _fused._Plan.fitting(vocabulary, torch.float32, torch.device("cpu"))
        assert plan.chunk % plan.group == plan.teacher % plan.group == 0
        assert plan.group >= 1


def test_a_sum_over_positions() -> None:
    student, teacher = inputs(n=9)
    term = divergences.generalised_jsd(0.5)

    def part(rows: slice) -> torch.Tensor:
        mine, theirs = (Head(head.hidden[rows], head.weight, head.bias) for head in (student, teacher))
        return fused(mine, Term(theirs, term), on_labels(torch.arange(9)[rows]))

    assert_same(student, part(slice(0, 4)) + part(slice(4, 9)), part(slice(0, 9)), 1e-12)


def test_no_positions() -> None:
    student, teacher = inputs(n=0)
    loss = fused(student, Term(teacher, divergences.forward_kl), on_labels(torch.empty(0, dtype=torch.long)))
    loss.backward()
    assert loss.item() == 0
    assert all(not leaf.grad.any() for leaf in leaves(student))


def test_only_asked_gradients_are_there_and_any_factor_multiplies_them() -> None:
    student, teacher = inputs()
    term = Term(teacher, divergences.generalised_jsd(0.5))
    full = torch.autograd.grad(fused(student, term), leaves(student))
    for asked in range(3):
        frozen = [leaf.detach().requires_grad_(i == asked) for i, leaf in enumerate(leaves(student))]
        loss = fused(Head(*frozen), term)
        (3 * loss).backward(retain_graph=True)
        once = frozen[asked].grad.clone()
        torch.testing.assert_close(once, 3 * full[asked])
        (3 * loss).backward()  # the first time has changed nothing that the second needs
        torch.testing.assert_close(frozen[asked].grad, 2 * once, rtol=0, atol=0)
        assert all(leaf.grad is None for i, leaf in enumerate(frozen) if i != asked)


def test_without_gradients_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = inputs()
    term = Term(teacher, divergences.forward_kl)
    with_grad = fused(student, term)
    calls = []
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **k: calls.append(a))
    with torch.no_grad():
        loss = fused(student, term)
    assert not loss.requires_grad
    assert not calls
    torch.testing.assert_close(loss, with_grad.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    student, teacher = inputs()

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fused(Head(hidden.tanh(), weight, bias), Term(teacher, divergences.reverse_kl))

    checkpointed = checkpoint(loss, *leaves(student), use_reentrant=reentrant)
    checkpointed.backward()
    got = [leaf.grad for leaf in leaves(student)]
    for a, b in zip(got, torch.autograd.grad(loss(*leaves(student)), leaves(student)), strict=True):
        torch.testing.assert_close(a, b)


def test_in_distributed_data_parallel(tmp_path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 83)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fused(Head(self.body(x), self.head.weight, self.head.bias), Term(teacher, divergences.forward_kl))

    teacher = inputs()[1]
    teacher = Head(teacher.hidden.float(), teacher.weight.float())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = Model(), torch.randn(5, 4)
        expected = torch.autograd.grad(model(x), list(model.parameters()))
        torch.nn.parallel.DistributedDataParallel(model)(x).backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", PAIRS)
def test_bfloat16_is_near_float32(name: str) -> None:
    """Relative error under 2 % (measured: 1 %): logits are rounded to 8 bits, sums over 300 positions are not.

    15 % (9 %) where the gradient is made of signs, which turn where p and q are as near as the rounding.
    """
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, 32, generator=rng).mul(0.5).bfloat16() for k in (300, 500))
    theirs, head = (torch.randn(k, 16, generator=rng).bfloat16() for k in (300, 500))
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        loss = fused(Head(leaf, w), Term(Head(theirs.to(dtype), head.to(dtype)), PAIRS[name][0]))
        assert loss.dtype == torch.float32
        loss.backward()
        assert (leaf.grad.dtype, w.grad.dtype) == (dtype, dtype)
        grads.append((loss, leaf.grad.float(), w.grad.float()))
    for low, high in zip(*grads, strict=True):
        assert (low - high).norm() < (0.15 if name in ("total_variation", "sorted_l1") else 0.02) * high.norm()


def test_bfloat16_states_with_float32_heads() -> None:
    """What autocast hands over: the states are low, the head is not, and each gradient has its own type."""
    student, teacher = inputs()
    hidden, weight, bias = (leaf.detach().float().requires_grad_() for leaf in leaves(student))
    loss = fused(Head(hidden.bfloat16(), weight, bias), Term(teacher, divergences.forward_kl))
    loss.backward()
    assert [x.grad.dtype for x in (hidden, weight, bias)] == [torch.float32] * 3
    exact = fused(student, Term(teacher, divergences.forward_kl)).item()
    assert loss.item() == pytest.approx(exact, rel=0.02)


def test_autocast_does_not_touch_it() -> None:
    student, teacher = inputs()
    heads = [Head(h.hidden.detach().float().requires_grad_(), h.weight.detach().float()) for h in (student, teacher)]
    term = Term(heads[1], divergences.generalised_jsd(0.5))
    plain = fused(heads[0], term, on_labels(torch.arange(5)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fused(heads[0], term, on_labels(torch.arange(5)))
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    a, b = (torch.autograd.grad(loss, heads[0].hidden)[0] for loss in (cast, plain))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_float32_survives_extreme_logits() -> None:
    """A logit of 1000 is itself only known to 6e-5 in float32."""
    eye = torch.eye(4)
    z = torch.tensor([[0.0, 300.0, -300.0, 0.0], [1000.0, -1000.0, 0.0, 999.0], [0.0, 1.0, 2.0, -1.0]])
    for name, (divergence, plain) in PAIRS.items():
        hidden = z.clone().requires_grad_()
        loss = fused(Head(hidden, eye), Term(Head(z.flip(0), eye), divergence))
        loss.backward()
        assert torch.isfinite(hidden.grad).all(), name
        log_p, log_q = (F.log_softmax(x.double(), 1) for x in (z.flip(0), z))
        assert loss.item() == pytest.approx(plain(log_p, log_q).sum().item(), rel=1e-4), name


# --- signals that list some tokens ----------------------------------------------------------------------------------


def top_k(teacher: Head, k: int) -> Sparse:
    log_p, ids = logits(teacher).log_softmax(1).topk(k, dim=1)
    return Sparse(ids, log_p)


def coarse(log_x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the listed tokens, and of all others together."""
    others = log_x.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_x.gather(1, ids), others], dim=1)


LISTED = [name for name in PAIRS if name != "sorted_l1"]


@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("name", LISTED)
def test_the_tail_is_one_outcome(name: str, kind: str) -> None:
    divergence, plain = PAIRS[name]
    student, teacher = inputs(kind)
    teacher = Head(teacher.hidden * (0.05 if kind == "peaked" else 1), teacher.weight, teacher.bias)
    signal = top_k(teacher, 6)
    log_p, log_q = (coarse(logits(head).log_softmax(1), signal.ids) for head in (teacher, student))
    assert_same(student, fused(student, Term(signal, divergence)), plain(log_p, log_q).sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", LISTED)
def test_with_every_token_listed_it_is_the_whole_distribution(name: str, temperature: float) -> None:
    divergence, _ = PAIRS[name]
    student, teacher = inputs()
    whole = fused(student, Term(teacher, divergence, temperature=temperature))
    assert_same(student, fused(student, Term(top_k(teacher, 83), divergence, temperature=temperature)), whole)


def test_a_flat_tail_is_tempered_exactly() -> None:
    student, _ = inputs(n=1)
    teacher_logits = torch.zeros(1, 83, dtype=torch.float64)
    teacher_logits[0, :3] = torch.tensor([4.0, 3.0, 2.0])
    teacher = Head(teacher_logits, torch.eye(83, dtype=torch.float64), torch.zeros(83, dtype=torch.float64))
    signal = top_k(teacher, 3)
    log_p, log_q = (coarse((logits(head) / 2.5).log_softmax(1), signal.ids) for head in (teacher, student))
    ours = fused(student, Term(signal, divergences.reverse_kl, temperature=2.5))
    assert_same(student, ours, kl(log_q, log_p).sum())


@pytest.mark.parametrize("name", ["forward_kl", "jsd_0.5", "skew_forward_kl", "skew_reverse_kl", "total_variation"])
def test_without_a_tail_the_list_is_the_whole_teacher(name: str) -> None:
    divergence, plain = PAIRS[name]
    student, teacher = inputs()
    signal = top_k(teacher, 6)
    ours = fused(student, Term(signal, divergence, temperature=2.0, tail=False))
    listed = torch.full((5, 83), -1e5, dtype=torch.float64).scatter(1, signal.ids, signal.logprobs / 2)
    assert_same(student, ours, plain(listed.log_softmax(1), (logits(student) / 2).log_softmax(1)).sum())


def test_padding_of_a_list_and_tokens_that_the_student_lacks() -> None:
    """-1 says nothing; the mass of a token beyond the student's vocabulary is shared out among all others."""
    student, teacher = inputs(teacher_vocabulary=90)
    log_p, ids = logits(teacher).log_softmax(1).topk(60, dim=1)
    ids, log_p = F.pad(ids, (0, 3), value=-1), F.pad(log_p, (0, 3), value=-torch.inf)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    ours = fused(student, Term(Sparse(ids[:, order], log_p[:, order]), divergences.reverse_kl))
    assert (ids >= 83).any()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(5):
        listed = ids[row][(ids[row] >= 0) & (ids[row] < 83)].unsqueeze(0)
        beyond = ids[row][ids[row] >= 83]
        full = logits(teacher)[row].log_softmax(0)
        known = full[listed] - torch.log1p(-full[beyond].exp().sum())
        p = torch.cat([known, torch.log1p(-known.exp().sum(1, keepdim=True))], dim=1)
        total = total + kl(coarse(logits(student)[row : row + 1].log_softmax(1), listed), p).sum()
    assert_same(student, ours, total)


def test_a_position_without_a_list_is_all_tail() -> None:
    student, _ = inputs(n=2)
    signal = Sparse(torch.full((2, 3), -1), torch.full((2, 3), -torch.inf))
    ours = fused(student, Term(signal, divergences.forward_kl))
    ours.backward()
    assert ours.item() == pytest.approx(0, abs=1e-12)
    assert student.hidden.grad.abs().max() < 1e-12


def test_cross_entropy_with_labels() -> None:
    for kind in ("random", "underflow"):
        student, _ = inputs(kind, softcap=30.0 if kind == "random" else None)
        labels = torch.tensor([0, 82, 4, 4, 11])
        plain = F.cross_entropy(logits(student), labels, reduction="sum")
        assert_same(student, fused(student, on_labels(labels)), plain)


def test_sampled_tokens() -> None:
    student, teacher = inputs()
    log_p = logits(teacher).log_softmax(1)
    ids = torch.tensor([[3, 1, 80], [0, 1, 2], [5, 6, -1], [7, 8, 9], [82, 81, 80]])
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.75, 0.25, 0], [1, 0, 0], [0.1, 0.1, 0.8]])
    known = log_p.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    ours = fused(student, Term(Sparse(ids, known, weights), divergences.forward_kl))
    log_q = logits(student).log_softmax(1).gather(1, ids.clamp_min(0))
    plain = (weights.double() * (known.masked_fill(ids < 0, 0) - log_q)).sum()
    assert_same(student, ours, plain, rtol=1e-6)  # the weights are float32


def test_what_does_not_fit() -> None:
    student, teacher = inputs()
    short = Head(teacher.hidden[:4], teacher.weight)
    with pytest.raises(DistillError, match="the signal has 4 positions, the student 5"):
        fused(student, Term(short, divergences.forward_kl))
    for label in (-1, 83):
        with pytest.raises(DistillError, match=rf"position 2 has no token of the student's 83, only \[{label}\]"):
            fused(student, on_labels(torch.tensor([0, 82, label, 1, 1])))


# --- memory ---------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys, torch
from distill.heads import Head
from distill.objectives import _divergences as d
from distill.objectives._fused import Term, fused, on_labels
torch.set_num_threads(1)
n, vocabulary = 4096, 16000

def step(n):
    hidden = torch.randn(n, 16, requires_grad=True)
    weight = torch.randn(vocabulary, 16, requires_grad=True)
    teacher = Head(torch.randn(n, 8), torch.randn(vocabulary, 8))
    terms = {"jsd": [Term(teacher, d.generalised_jsd(0.5))], "text": [on_labels(torch.zeros(n, dtype=torch.long))]}
    fused(Head(hidden, weight), *terms[sys.argv[1]]).backward()

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
step(1)
before = peak()
step(n)
print((peak() - before) / (4 * n * vocabulary))
"""


@pytest.mark.parametrize("what", ["jsd", "text"])
def test_memory_stays_far_under_all_logits(what: str) -> None:
    """Under a tenth of one [n, vocabulary] tensor (262 MB), gradients included; plain autograd takes several."""
    out = subprocess.run([sys.executable, "-c", MEMORY, what], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 0.1
