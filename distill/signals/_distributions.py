"""Reading the distributions that are to be stored, a few positions at a time, and measuring what storing loses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from distill.errors import DistillError
from distill.heads import Head, Sparse

LOGITS_AT_ONCE = 1 << 24  # 64 MiB of float32
NOISE = 1e-6  # a tail mass below this may be float32 rounding


def logprobs_of(head: Head) -> Iterator[tuple[slice, torch.Tensor]]:
    """Log-probabilities of a few positions after another: which, and (m, vocabulary) float32.

    Raises:
        DistillError: A logit is NaN or +inf, or a position has no finite one. (-inf means: never.)
    """
    at_once = max(1, LOGITS_AT_ONCE // head.vocabulary)
    for first in range(0, len(head), at_once):
        rows = slice(first, min(first + at_once, len(head)))
        part = Head(head.hidden[rows], head.weight, head.bias, head.scale, head.softcap)
        logprobs = torch.log_softmax(part.logits().detach().float(), dim=-1)
        bad = int(logprobs.isnan().any(dim=1).sum())
        if bad:
            raise DistillError(f"{bad} of {len(logprobs)} positions have logits that are not finite", "teacher")
        yield rows, logprobs


def largest(distributions: Head | Sparse, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most probable tokens that are listed: ids (n, k) int64, -1 pads, and log-probabilities (n, k) float32."""
    if isinstance(distributions, Sparse):
        values, ids = distributions.logprobs.detach().float(), distributions.ids
        if values.isnan().any() or (values > 1e-3).any():
            raise DistillError("a log-probability is a number that is at most 0", "signal")
        values = torch.where(ids >= 0, values, -torch.inf)
        if values.shape[1] > k or (values.diff(dim=1) > 0).any():
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            ids = ids.gather(1, order)
        missing = k - values.shape[1]
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    else:
        if k > distributions.vocabulary:
            raise DistillError(f"at most {distributions.vocabulary}, the size of the vocabulary, not {k}", "signal.k")
        parts = [logprobs.topk(k, dim=1) for _, logprobs in logprobs_of(distributions)]
        if not parts:
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        values, ids = torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
    ids = torch.where(values > -torch.inf, ids, -1)
    return ids.cpu().numpy().astype(np.int64), values.cpu().numpy()


def round_trip(original: Head | Sparse, decoded: Head | Sparse) -> dict[str, float]:
    """What decoding n positions lost, for `result.json`, in nats.

    ``kl_mean`` and ``kl_max``: KL(original ‖ decoded) over the listed tokens and "any other token" (over the whole
    vocabulary for a `Head`); left out for drawn tokens, which estimate a distribution and don't list it.
    ``logprob_error_mean`` and ``logprob_error_max``: of the listed tokens. ``listed_mean``: how many they are.
    ``mass_mean``: how probable they are together.
    """
    kl: list[np.ndarray] = []
    errors: list[np.ndarray] = []
    listed: list[np.ndarray] = []
    mass: list[np.ndarray] = []
    for rows, before in _few(original):
        if isinstance(decoded, Head):
            part = Head(decoded.hidden[rows], decoded.weight, decoded.bias, decoded.scale, decoded.softcap)
            after = torch.log_softmax(part.logits().float(), dim=-1).double()
            ids = torch.arange(decoded.vocabulary).expand(len(after), -1)
        else:
            ids, after = decoded.ids[rows], decoded.logprobs[rows].double()
        if isinstance(original, Head):
            before = before.double().gather(1, ids.clamp(min=0))
        else:
            before = _aligned(original, rows, ids)
        there = (ids >= 0) & (before > -torch.inf)
        before, after = (torch.where(there, values, -torch.inf) for values in (before, after))
        p, q = before.exp(), after.exp()
        rest, rest_after = (1 - p.sum(1)).clamp(min=0), (1 - q.sum(1)).clamp(min=NOISE)
        lost = torch.where(there, p * (before - after), 0).sum(1)
        lost += torch.where(rest > NOISE, rest * (rest.clamp(min=NOISE) / rest_after).log(), 0)
        kl.append(lost.clamp(min=0).numpy())
        errors.append((before - after)[there].abs().numpy())
        listed.append(there.sum(1).double().numpy())
        mass.append(p.sum(1).numpy())
    divergence, error = np.concatenate(kl), np.concatenate(errors)
    result = {"listed_mean": float(np.concatenate(listed).mean()), "mass_mean": float(np.concatenate(mass).mean())}
    if len(error):
        result |= {"logprob_error_mean": float(error.mean()), "logprob_error_max": float(error.max())}
    if isinstance(decoded, Head) or decoded.weights is None:
        result |= {"kl_mean": float(divergence.mean()), "kl_max": float(divergence.max())}
    return result


def _few(distributions: Head | Sparse) -> Iterator[tuple[slice, torch.Tensor]]:
    if isinstance(distributions, Head):
        for rows, logprobs in logprobs_of(distributions):
            yield rows, logprobs.cpu()
    else:
        yield slice(0, len(distributions)), distributions.logprobs.cpu()


def _aligned(original: Sparse, rows: slice, ids: torch.Tensor) -> torch.Tensor:
    """The original's log-probabilities of these tokens; -inf where it does not list one."""
    known, order = original.ids[rows].cpu().sort(dim=1)
    place = torch.searchsorted(known, ids).clamp(max=known.shape[1] - 1)
    values = original.logprobs[rows].cpu().double().gather(1, order).gather(1, place)
    return torch.where(known.gather(1, place) == ids, values, -torch.inf)
