"""Divergences between rows of probabilities, each with its gradient: what `_fused` calls for every few rows of logits.

Outcomes are the whole vocabulary or, for a signal that lists some tokens, those and "any other". With g_v = ∂D/∂q_v,
the gradient with respect to the student's logits is q_v (g_v − Σ_u q_u g_u). These loops are bound by memory:
everything is done in place, so far as torch allows.

A probability may be zero where its logarithm is finite (it underflowed): such an outcome counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.linalg import vecdot


@dataclass(frozen=True)
class Rows:
    """Teacher p and student q at some positions, each tensor (rows, outcomes). All of them may be overwritten."""

    log_p: torch.Tensor
    p: torch.Tensor
    log_q: torch.Tensor
    q: torch.Tensor
    spare: torch.Tensor


# Returns (rows,) in nats and leaves the gradient with respect to the student's logits in `log_q`.
Divergence = Callable[[Rows], torch.Tensor]


def _pull_back(g: torch.Tensor, q: torch.Tensor, factor: float = 1.0) -> None:
    """g, the derivative by q, becomes the derivative by the logits, times `factor`."""
    g.sub_(vecdot(q, g).unsqueeze(1)).mul_(q)
    if factor != 1:
        g.mul_(factor)


def _mixture(p: torch.Tensor, q: torch.Tensor, share: float, out: torch.Tensor) -> torch.Tensor:
    """(1 − share) p + share q, never zero."""
    return torch.lerp(p, q, share, out=out).clamp_min_(torch.finfo(p.dtype).tiny)


def forward_kl(r: Rows) -> torch.Tensor:
    """Σ p ln(p/q)."""
    losses = vecdot(r.p, r.log_p.sub_(r.log_q))
    torch.sub(r.q, r.p, out=r.log_q)
    return losses


def reverse_kl(r: Rows) -> torch.Tensor:
    """Σ q ln(q/p)."""
    losses = vecdot(r.q, r.log_q.sub_(r.log_p))
    r.log_q.sub_(losses.unsqueeze(1)).mul_(r.q)
    return losses


def generalised_jsd(beta: float, normalised: bool = False) -> Divergence:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q, for 0 < β < 1; normalised: divided by β(1 − β)."""
    scale = 1 / (beta * (1 - beta)) if normalised else 1.0
    of_p, of_q = scale * beta, scale * (1 - beta)

    def divergence(r: Rows) -> torch.Tensor:
        log_m = _mixture(r.q, r.p, beta, r.spare).log_()
        teacher = vecdot(r.p, r.log_p.sub_(log_m))
        student = vecdot(r.q, r.log_q.sub_(log_m))
        r.log_q.sub_(student.unsqueeze(1)).mul_(r.q.mul_(of_q))
        return of_p * teacher + of_q * student

    return divergence


def skew_forward_kl(alpha: float) -> Divergence:
    """KL(p ‖ m) with m = αp + (1 − α)q."""

    def divergence(r: Rows) -> torch.Tensor:
        m = _mixture(r.q, r.p, alpha, r.spare)
        torch.div(r.p, m, out=r.log_q)
        losses = vecdot(r.p, r.log_p.sub_(m.log_()))
        _pull_back(r.log_q, r.q, alpha - 1)
        return losses

    return divergence


def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(q ‖ m) with m = (1 − α)p + αq. The gradient flows through both places of q."""

    def divergence(r: Rows) -> torch.Tensor:
        m = _mixture(r.p, r.q, alpha, r.spare)
        losses = vecdot(r.q, r.log_q.sub_(torch.log(m, out=r.log_p)))
        r.log_q.sub_(torch.div(r.q, m, out=r.p), alpha=alpha)
        _pull_back(r.log_q, r.q)
        return losses

    return divergence


def total_variation(r: Rows) -> torch.Tensor:
    """½ Σ |p − q|. Where p = q the derivative is taken as zero."""
    torch.sub(r.q, r.p, out=r.log_q)
    losses = torch.abs(r.log_q, out=r.spare).sum(1) / 2
    _pull_back(r.log_q.sign_(), r.q, 0.5)
    return losses


def symmetric_kl(reverse_share: float) -> Divergence:
    """(1 − s) KL(p ‖ q) + s KL(q ‖ p)."""
    return lambda r: _two_kls(r, torch.full_like(r.q[:, 0], reverse_share))


def adaptive_kl(head_mass: float) -> Divergence:
    """w KL(p ‖ q) + (1 − w) KL(q ‖ p), w = the share of Σ|p − q| that lies on the teacher's head; w is a constant.

    The head are the fewest most probable tokens with a mass of at least `head_mass`.
    """

    def divergence(r: Rows) -> torch.Tensor:
        outcomes = r.p.shape[1]
        k = min(64, outcomes)  # few tokens mostly hold the head's mass, and sorting all of them is slow
        while True:
            top, ids = r.p.topk(k, dim=1)
            before = top.cumsum(1).sub_(top)
            if k == outcomes or bool((before[:, -1] >= head_mass).all()):
                break
            k = min(8 * k, outcomes)
        gaps = torch.sub(r.p, r.q, out=r.spare).abs_()
        on_head, total = gaps.gather(1, ids).masked_fill_(before >= head_mass, 0).sum(1), gaps.sum(1)
        return _two_kls(r, torch.where(total > 0, 1 - on_head / total, 0.5))

    return divergence


def _two_kls(r: Rows, share: torch.Tensor) -> torch.Tensor:
    """(1 − share) KL(p ‖ q) + share KL(q ‖ p) with a share (rows,) of its own for each row."""
    log_ratio = r.log_q.sub_(r.log_p)
    forward, reverse = -vecdot(r.p, log_ratio), vecdot(r.q, log_ratio)
    log_ratio.sub_(reverse.unsqueeze(1)).mul_(r.q).mul_(share.unsqueeze(1))
    log_ratio.addcmul_(torch.sub(r.q, r.p, out=r.spare), (1 - share).unsqueeze(1))
    return (1 - share) * forward + share * reverse


def sorted_l1(r: Rows) -> torch.Tensor:
    """Σ_i |p_(i) − q_(i)|, both sorted from the largest down; the one with fewer outcomes is padded with zeros."""
    difference, ids = r.q.sort(dim=1, descending=True)
    sorted_p = r.p.sort(dim=1, descending=True).values
    shared = min(r.p.shape[1], r.q.shape[1])
    difference[:, :shared] -= sorted_p[:, :shared]
    r.log_q.scatter_(1, ids, difference.sign())
    _pull_back(r.log_q, r.q)
    return difference.abs_().sum(1) + sorted_p[:, shared:].sum(1)
