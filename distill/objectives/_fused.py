"""The fused distillation loss: hidden states and output heads in, loss and gradients out, without [n, vocabulary].

A few rows are projected at a time. While their logits are at hand, their loss and its gradient with respect to them are
computed (`_divergences`), the gradient takes the place of the logits and is multiplied into the gradients of hidden
states and head. So four matrix products are made whatever the divergence (student, teacher, and two for the gradient),
and `backward` only scales what is there. The same code runs on CPU and CUDA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.objectives._divergences import Divergence, Rows, forward_kl


@dataclass(frozen=True)
class Term:
    """One part of a loss, for `fused`.

    Args:
        signal: The teacher, at the student's positions.
        divergence: What is computed from teacher and student.
        weight: Factor.
        temperature: Of both sides.
        tail: For a `Sparse` signal without weights: the mass that it does not list is an outcome of its own. False: it
            is shared out among the tokens that are listed.
        paired: Token v of the teacher is token v of the student. False for divergences across vocabularies.
    """

    signal: Head | Sparse
    divergence: Divergence
    weight: float = 1.0
    temperature: float = 1.0
    tail: bool = True
    paired: bool = True


def fused(student: Head, term: Term, other: Term | None = None) -> torch.Tensor:
    """The sum of one or two terms over all positions: a scalar, in float32 or wider.

    A teacher with another number of tokens (padding) is met on the shared first ones: both distributions are normalised
    over those, and the other rows of the student's head get no gradient.

    Arithmetic is in float32 (float64 for such inputs). Matrix products of float16 and bfloat16 inputs are rounded to
    that type, as in the models' own heads; everything else, sums over positions included, is not.

    Raises:
        DistillError: A signal has another number of positions, or lists tokens that the student lacks as labels.
    """
    for signal in (term.signal, *(() if other is None else (other.signal,))):
        if len(signal) != len(student):
            raise DistillError(
                f"the signal has {len(signal)} positions, the student {len(student)}; they must be the same"
            )
    leaves = student.hidden, student.weight, student.bias
    with torch.autocast(student.hidden.device.type, enabled=False):
        return _Fused.apply(*leaves, student.scale, student.softcap, term, other, torch.is_grad_enabled())


def on_labels(labels: torch.Tensor, weight: float = 1.0) -> Term:
    """Cross-entropy with labels (n,) int64: forward KL from a teacher that lists one token."""
    ids = labels.unsqueeze(1)
    return Term(Sparse(ids, torch.zeros_like(ids, dtype=torch.float32)), forward_kl, weight, tail=False)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        term: Term,
        other: Term | None,
        track: bool,
    ) -> torch.Tensor:
        work = torch.promote_types(hidden.dtype, torch.float32)
        size = min(_vocabulary(each, len(weight)) for each in (term, other))
        head = Head(hidden, weight[:size].to(hidden.dtype), _cut(bias, size, hidden.dtype), scale, softcap)
        plan = _Plan.fitting(size, work, hidden.device)
        first = _part(term, term.signal, size, work, plan)
        second = None if other is None else _part(other, other.signal, size, work, plan)
        logits = _empty(hidden, plan.chunk, size, work)
        copy = _empty(hidden, 0 if second is None else plan.group, size, work)
        slope = _empty(hidden, 0 if softcap is None else plan.group, size, work)
        to_hidden, to_weight, to_bias = (track and needed for needed in ctx.needs_input_grad[:3])
        d_hidden = torch.empty_like(hidden, dtype=work) if to_hidden else None
        d_weight = torch.empty_like(weight, dtype=work) if to_weight else None
        d_bias = torch.zeros_like(bias, dtype=work) if bias is not None and to_bias else None
        if d_weight is not None:  # the first chunk writes what is learnt
            d_weight[size if len(hidden) else 0 :] = 0
        losses = torch.empty(len(hidden), dtype=work, device=hidden.device)

        for start in range(0, len(hidden), plan.chunk):
            chunk = hidden[start : start + plan.chunk]
            z = _project(head, start, logits)
            for row in range(start, start + len(z), plan.group):
                y = z[row - start : row - start + plan.group]
                if softcap is not None:
                    torch.div(y, softcap, out=slope[: len(y)]).square_().neg_().add_(1)
                if second is not None:
                    copy[: len(y)] = y
                into = losses[row : row + len(y)].copy_(first.gradient(y, row))
                if second is not None:
                    into += second.gradient(copy[: len(y)], row)
                    y += copy[: len(y)]
                if softcap is not None:
                    y *= slope[: len(y)]
            if d_bias is not None:
                d_bias[:size].add_(z.sum(0), alpha=scale)
            if chunk.dtype != work:
                z = z.to(chunk.dtype)
            if d_hidden is not None:
                rows = d_hidden[start : start + plan.chunk]
                if chunk.dtype == work:
                    torch.mm(z, head.weight, out=rows)
                else:
                    rows.copy_(z @ head.weight)
            if d_weight is not None:
                if chunk.dtype == work:
                    d_weight[:size].addmm_(z.t(), chunk, beta=min(start, 1), alpha=scale)
                elif start == 0:
                    torch.mul(z.t() @ chunk, scale, out=d_weight[:size])
                else:
                    d_weight[:size].add_(z.t() @ chunk, alpha=scale)
        if d_hidden is not None and scale != 1:
            d_hidden.mul_(scale)
        ctx.types = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.types, strict=True)
        return *(None if g is None else (g * factor).to(dtype) for g, dtype in saved), *[None] * 5


@dataclass(frozen=True)
class _Plan:
    """How many rows are projected at once for the student and for the teacher, and how many are then looked at.

    On a CPU the products want many rows and everything else wants what fits the cache. On a GPU all want many.
    """

    chunk: int
    teacher: int
    group: int

    @classmethod
    def fitting(cls, vocabulary: int, dtype: torch.dtype, device: torch.device) -> _Plan:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            rows = max(64, min(4096, free // 8 // (6 * vocabulary * dtype.itemsize)))
            return cls(rows, rows, rows)
        rows = 256 if vocabulary <= 2**16 else 128
        return cls(rows, rows // 4 * 3, 1 << max(1, min(64, 2**18 // vocabulary)).bit_length() - 1)


def _vocabulary(term: Term | None, student: int) -> int:
    """How many of the student's tokens a term knows of."""
    if term is not None and term.paired and isinstance(term.signal, Head):
        return min(student, term.signal.vocabulary)
    return student


def _part(term: Term, signal: Head | Sparse, size: int, work: torch.dtype, plan: _Plan) -> _Whole | _Listed:
    if isinstance(signal, Head):
        return _Whole(term, signal, size, work, plan)
    return _Listed(term, signal, size, work, plan)


class _Whole:
    """The teacher tells whole distributions."""

    def __init__(self, term: Term, head: Head, size: int, work: torch.dtype, plan: _Plan) -> None:
        width = size if term.paired else head.vocabulary
        self.term, self.rows = term, plan.teacher
        self.head = Head(
            head.hidden.detach(),
            head.weight[:width].detach().to(head.hidden.dtype),
            _cut(head.bias, width, head.hidden.dtype),
            head.scale,
            head.softcap,
        )
        self.logits, self.p = (_empty(head.hidden, k, width, work) for k in (plan.teacher, plan.group))
        self.q, self.spare = (_empty(head.hidden, plan.group, size, work) for _ in range(2))

    def gradient(self, z: torch.Tensor, start: int) -> torch.Tensor:
        """The student's logits of the rows from `start` on become the gradient; returns their losses."""
        row = start % self.rows
        if row == 0:
            _project(self.head, start, self.logits)
        t, n = self.logits[row : row + len(z)], len(z)
        p, q = self.p[:n], self.q[:n]
        t.sub_(_softmax(t, self.term.temperature, p))
        z.sub_(_softmax(z, self.term.temperature, q))
        losses = self.term.divergence(Rows(t, p, z, q, self.spare[:n]))
        factor = self.term.weight / self.term.temperature
        if factor != 1:
            z.mul_(factor)
        return losses.mul_(self.term.weight)


class _Listed:
    """The teacher lists some tokens. Outcomes are these (columns 0 to k − 1) and any other token (column k)."""

    def __init__(self, term: Term, signal: Sparse, size: int, work: torch.dtype, plan: _Plan) -> None:
        ids, logprobs, weights = signal.ids, signal.logprobs.to(work), signal.weights
        self.term, self.floor = term, math.log(torch.finfo(work).tiny)
        self.q = _empty(logprobs, plan.group, size, work)
        self.listed = (ids >= 0) & (ids < size)
        self.ids = ids.where(self.listed, 0)
        if not term.tail or weights is not None:
            empty = (~self.listed.any(1)).nonzero()
            if len(empty):
                raise DistillError(
                    f"position {empty[0].item()} has no token of the student's {size}, only "
                    f"{ids[empty[0]].flatten().tolist()}; teacher and student must share the tokenizer"
                )
        if weights is not None:
            p = F.pad(weights.to(work).where(self.listed, 0), (0, 1))
            self.p = p.div_(p.sum(1, keepdim=True))
            self.log_p = F.pad(logprobs.masked_fill(~self.listed, self.floor), (0, 1), value=self.floor)
            return
        # Of the tokens that the student lacks nothing is asked: the others are normalised without them.
        beyond = logprobs.masked_fill(ids < size, -torch.inf).exp().sum(1, keepdim=True)
        beyond.clamp_max_(1 - torch.finfo(torch.float32).eps)
        known = logprobs.masked_fill(~self.listed, -torch.inf) - torch.log1p(-beyond)
        others = size - self.listed.sum(1, keepdim=True)
        if term.tail:
            # What float32 log-probabilities can't tell from nothing is taken for the smallest mass that they can tell.
            rest = torch.log1p(-known.exp().sum(1, keepdim=True).clamp_max_(1 - torch.finfo(torch.float32).eps))
        else:
            rest = torch.full_like(beyond, -torch.inf)
        if term.temperature != 1:
            known = known / term.temperature
            rest = rest / term.temperature + (1 - 1 / term.temperature) * others.to(work).log()
        log_p = torch.cat([known, rest.masked_fill_(others == 0, -torch.inf)], dim=1)
        log_p -= log_p.logsumexp(1, keepdim=True)
        self.p, self.log_p = log_p.exp(), log_p.masked_fill(log_p.isneginf(), self.floor)

    def gradient(self, z: torch.Tensor, start: int) -> torch.Tensor:
        """The student's logits of the rows from `start` on become the gradient; returns their losses."""
        here = slice(start, start + len(z))
        ids, listed, all_q = self.ids[here], self.listed[here], self.q[: len(z)]
        log_sum = _softmax(z, self.term.temperature, all_q)
        q = all_q.gather(1, ids).masked_fill_(~listed, 0)
        # Taking the listed ones out leaves a tail without cancellation.
        tail = all_q.scatter_add_(1, ids, -q).sum(1, keepdim=True)
        log_q = z.gather(1, ids).sub_(log_sum).masked_fill_(~listed, self.floor)
        log_q = torch.cat([log_q, tail.log().clamp_min_(self.floor)], dim=1)
        q = torch.cat([q, tail], dim=1)
        rows = Rows(self.log_p[here].clone(), self.p[here].clone(), log_q, q, torch.empty_like(q))
        losses = self.term.divergence(rows)
        g = log_q.mul_(self.term.weight / self.term.temperature)
        # A token of the tail gets its share of the tail's gradient.
        torch.mul(all_q, (g[:, -1:] / tail).masked_fill_(tail == 0, 0), out=z)
        z.scatter_add_(1, ids, g[:, :-1].masked_fill(~listed, 0))
        return losses.mul_(self.term.weight)


def _softmax(z: torch.Tensor, temperature: float, q: torch.Tensor) -> torch.Tensor:
    """Tempers the logits and writes their probabilities; returns the logarithm of their sum of exponentials (rows, 1).

    The largest probability is one over that sum relative to the largest logit, so each exponential is taken once.
    """
    if temperature != 1:
        z.div_(temperature)
    torch.softmax(z, dim=1, out=q)
    return z.amax(1, keepdim=True).sub_(q.amax(1, keepdim=True).log_())


def _project(head: Head, start: int, out: torch.Tensor) -> torch.Tensor:
    """The logits of as many rows from `start` on as fit into `out`."""
    hidden = head.hidden[start : start + len(out)]
    out = out[: len(hidden)]
    if hidden.dtype != out.dtype:
        out.copy_(F.linear(hidden, head.weight, head.bias))
    elif head.bias is None:
        torch.mm(hidden, head.weight.t(), out=out)
    else:
        torch.addmm(head.bias, hidden, head.weight.t(), out=out)
    if head.scale != 1:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _cut(bias: torch.Tensor | None, size: int, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bias is None else bias[:size].detach().to(dtype)


def _empty(like: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=like.device)
