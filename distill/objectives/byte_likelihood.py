"""Likelihood of aligned chunks of bytes, across vocabularies."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from distill.alignment import Aligned
from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.records import Reveals

ROWS = 256  # positions that are projected at a time


class ByteLikelihood:
    """Σ_c KL(Bernoulli(P_c^(1/τ)) ‖ Bernoulli(Q_c^(1/τ))) over chunks c of bytes: for teachers with another tokenizer.

    Paper: Minixhofer, Vulić and Ponti, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching",
    NeurIPS 2025: the binarised divergence. A chunk is a shortest stretch of the answer where tokens of both sides begin
    and end at the same bytes; P_c and Q_c are the products of the probabilities that teacher and student give to their
    own tokens of it. With p = P_c^(1/τ) and q = Q_c^(1/τ) its loss is p ln(p/q) + (1 − p) ln((1 − p)/(1 − q)).

    All that is asked of the teacher is the log-probability of each of its tokens. A chunk of which one is not told (it
    is not among the top k) is left out, as is what no chunk covers. The paper's correction for chunks that end where
    the teacher could go on within a word is not made.

    Args:
        temperature: τ > 0. The larger, the more a chunk counts that both sides find improbable. 100 is what all
            configurations of the authors' repository (tokenkit) have.

    Raises:
        ValueError: The temperature is out of its range.
    """

    requires: ClassVar[Reveals] = Reveals.TOP_K

    def __init__(self, temperature: float = 100.0) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is more than 0, not {temperature}")
        self.temperature = temperature

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        """A scalar in nats, summed over the positions, each a chunk of its own. `labels`: (n,) int64.

        Raises:
            DistillError: There is no signal, or one that was sampled for RS-KD.
        """
        if signal is None:
            raise DistillError("needs the log-probabilities of the teacher's tokens; take access=top_k", "objective")
        return self.across(student, labels, Aligned.same(labels, signal))

    def across(self, student: Head, labels: torch.Tensor, aligned: Aligned) -> torch.Tensor:
        """A scalar in nats, summed over the chunks. `labels`: (n,) int64.

        Raises:
            DistillError: The log-probabilities of the teacher's tokens are not told.
        """
        mine = _log_likelihoods(student, labels)
        theirs = _told(aligned).to(mine.device, mine.dtype)
        count = int(torch.cat([aligned.teacher, aligned.student]).max()) + 1 if len(labels) else 0
        log_p, theirs_in = _sums(theirs, aligned.teacher, count)
        log_q, ours_in = _sums(mine, aligned.student, count)
        used = (theirs_in > 0) & (ours_in > 0) & log_p.isfinite()
        # A chunk that is certain leaves nothing for the other outcome, whose logarithm must be finite.
        certain = -torch.finfo(mine.dtype).eps
        log_p, log_q = ((x[used] / self.temperature).clamp_max(certain) for x in (log_p, log_q))
        p, not_p = log_p.exp(), -torch.expm1(log_p)
        return (p * (log_p - log_q) + not_p * (not_p.log() - (-torch.expm1(log_q)).log())).sum()


def _told(aligned: Aligned) -> torch.Tensor:
    """(m,) what the teacher gave its tokens; NaN where that is not told."""
    if aligned.logprobs is not None:
        return aligned.logprobs
    if isinstance(aligned.signal, Head):
        with torch.no_grad():
            return _log_likelihoods(aligned.signal, aligned.tokens)
    if aligned.signal is None or aligned.signal.weights is not None:
        raise DistillError(
            "needs the log-probabilities of the teacher's tokens: an access that reveals them with the answers, or a "
            "signal of the top k tokens or of whole distributions",
            "objective",
        )
    listed = aligned.signal.ids == aligned.tokens[:, None]
    told = aligned.signal.logprobs.where(listed, 0).sum(1)
    return told.masked_fill(~listed.any(1), torch.nan)


def _sums(values: torch.Tensor, chunk: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of each chunk, and how many tokens it has: (count,) both."""
    inside = chunk >= 0
    sums = values.new_zeros(count).index_add(0, chunk[inside], values[inside])
    return sums, torch.bincount(chunk[inside], minlength=count)


def _log_likelihoods(head: Head, tokens: torch.Tensor) -> torch.Tensor:
    """(n,) the log-probability of each token, without [n, vocabulary] in memory: logits are made anew for `backward`.

    Raises:
        DistillError: A token is not in the vocabulary.
    """
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < head.vocabulary:
        raise DistillError(f"there are tokens beyond the vocabulary of {head.vocabulary}", "objective")

    def some(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
        logits = Head(hidden, weight, bias, head.scale, head.softcap).logits()
        return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)

    parts = [
        checkpoint(some, hidden, head.weight, head.bias, ids, use_reentrant=False)
        for hidden, ids in zip(head.hidden.split(ROWS), tokens.split(ROWS), strict=True)
    ]
    return torch.cat(parts)
