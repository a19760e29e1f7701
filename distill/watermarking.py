"""What watermarks of text have in common: keyed marks of tokens, which tokens a test may count, exact chances of tails.

A *window* is the `width` tokens before a token. A keyed hash makes a *seed* of it, and of seed and token a *mark*: 64
bits that are uniform and independent for whoever does not know the key. What a watermark does with a token is a
function of its mark alone. Words are int64 in numpy and in torch, where sums and products wrap alike, so that both have
the same bits: text is marked in torch, on the device of the logits, and scored in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from scipy.special import betainc, gammaincc, gammaln, log_ndtr, xlog1py, xlogy

from distill.errors import DistillError
from distill.randomness import derive

Words = TypeVar("Words", np.ndarray, torch.Tensor)

SCHEMES = ("left", "ordered", "skip", "min", "self")
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's increment and factors, as signed words
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
CHUNK = 1 << 14  # rows that are scored at once: their words stay in the processor's cache
CUT = 256  # tokens in which top-p is looked for before the whole vocabulary is sorted


# --- marks ----------------------------------------------------------------------------------------------------------


def seeds(windows: Words, key: int, scheme: str) -> Words:
    """(n,) int64: the seeds of (n, width) windows.

    Paper: On the Reliability of Watermarks for Large Language Models (Kirchenbauer et al., ICLR 2024), whose schemes
    "left", "skip", "min" and "self" are, with a 64-bit hash in place of a table of integers. They differ in how many
    of the `width` seeds that look at a token change where it is edited, and in how hard the lists are to learn.

    Args:
        windows: Any integers.
        key: The secret; those of two keys have nothing to do with one another.
        scheme: "left", the hash of the sum of the window (of the token before, at width 1); "ordered", of the window
            as it stands; "skip", of its first token; "min", the smallest of the tokens' hashes; "self", as "min", with
            the marked token among them (`marks`).
    """
    if scheme not in SCHEMES:
        raise DistillError(f"{scheme!r} is none of {', '.join(SCHEMES)}", "defense.scheme")
    base = derive(key, "watermark", scheme)
    if scheme == "left":
        return _mixed(_words(windows).sum(1) * GOLDEN + base)
    seed = _mixed(_words(windows[:, 0]) * GOLDEN + base)
    if scheme == "skip":
        return seed
    for i in range(1, windows.shape[1]):
        token = _words(windows[:, i]) * GOLDEN
        seed = _mixed(token + seed) if scheme == "ordered" else _smaller(seed, _mixed(token + base))
    return seed


def marks(seeds: Words, tokens: Words, key: int, scheme: str) -> Words:
    """int64: the marks of tokens after windows with these seeds, which are of the same key and scheme.

    Args:
        seeds: (n,), or (n, 1) for a whole vocabulary.
        tokens: (n,) or (vocabulary,), any integers.
        key: As in `seeds`.
        scheme: As in `seeds`.
    """
    spread = _words(tokens) * GOLDEN
    if scheme == "self":
        seeds = _smaller(seeds, _mixed(spread + derive(key, "watermark", scheme)))
    return _mixed(seeds + spread)


def green(marks: Words, share: float) -> Words:
    """bool: the marks that are on a list with this share of all tokens, between 0 and 1."""
    return marks < round(share * 2**64) - 2**63


def uniforms(marks: Words) -> Words:
    """float64: the marks as numbers in the open interval (0, 1)."""
    bits = (marks >> 12) & (2**52 - 1)  # with one more, the largest would round to 1
    return ((bits.astype(np.float64) if isinstance(bits, np.ndarray) else bits.double()) + 0.5) * 2.0**-52


def in_chunks(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray], windows: np.ndarray, tokens: np.ndarray, dtype: type
) -> np.ndarray:
    """(n,) what `score` says of (n, width) windows and (n,) tokens, which it is handed some at a time."""
    scored: np.ndarray = np.empty(len(tokens), dtype)
    for start in range(0, len(tokens), CHUNK):
        part = slice(start, start + CHUNK)
        scored[part] = score(windows[part], tokens[part])
    return scored


def permuted_list(window: int, key: int, share: float, vocabulary: int) -> np.ndarray:
    """(vocabulary,) bool: the green list after the token `window` as the first code of such a mark draws it.

    Paper: A Watermark for Large Language Models (Kirchenbauer et al., ICML 2023): the first ``share * vocabulary``
    tokens of a permutation from torch's generator on the processor, seeded with ``key * window``. After token 0 the
    list is the same for every key.
    """
    generator = torch.Generator().manual_seed(key * window)
    listed = np.zeros(vocabulary, bool)
    listed[torch.randperm(vocabulary, generator=generator)[: int(share * vocabulary)].numpy()] = True
    return listed


def _words(values: Words) -> Words:
    return values.astype(np.int64, copy=False) if isinstance(values, np.ndarray) else values.long()


def _smaller(a: Words, b: Words) -> Words:
    return np.minimum(a, b) if isinstance(a, np.ndarray) else torch.minimum(a, b)


def _mixed(x: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); a signed shift is cut to an unsigned one."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FACTORS[0]
    x = (x ^ ((x >> 27) & (2**37 - 1))) * FACTORS[1]
    return x ^ ((x >> 31) & (2**33 - 1))


# --- while text is marked -------------------------------------------------------------------------------------------


def last_windows(tokens: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(m,) the rows with at least `width` tokens, and (m, width) int64 the last ones of each."""
    rows = [row for row, some in enumerate(tokens) if len(some) >= width]
    windows = np.array([tokens[row][-width:] for row in rows], np.int64).reshape(len(rows), width)
    return np.array(rows, np.int64), windows


def repeated(tokens: Sequence[int], width: int) -> bool:
    """Whether the last `width` tokens stand in front of an earlier token of the same sequence too."""
    earlier = np.lib.stride_tricks.sliding_window_view(np.array(tokens), width)
    return bool((earlier[:-1] == earlier[-1]).all(axis=1).any())


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """(n, vocabulary) logits, -inf outside the smallest set of tokens with mass `top_p`: what `decoding.draw` keeps."""
    if top_p == 1:
        return logits
    probs = logits.softmax(dim=-1)
    cut = torch.full_like(logits, -torch.inf)
    left = torch.arange(len(probs), device=probs.device)
    for k in (min(CUT, probs.shape[1]), probs.shape[1]):
        values, tokens = probs[left].topk(k, dim=-1)
        mass = values.cumsum(dim=-1, dtype=torch.float64)
        kept = torch.cat([torch.ones_like(mass[:, :1], dtype=torch.bool), mass[:, :-1] < top_p], dim=1)
        some = cut[left].scatter(1, tokens, logits[left].gather(1, tokens).masked_fill(~kept, -torch.inf))
        cut[left] = some
        left = left[mass[:, -1] < top_p]
        if not len(left):
            break
    return cut


# --- which tokens a test may count ----------------------------------------------------------------------------------


def windows(sequences: Sequence[Sequence[int] | np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every token of n sequences that has a whole window in its own.

    Returns:
        (t, width) int64 windows, (t,) int64 tokens, and (t, 2) int64 where each stands: its sequence and place in it.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    if not lengths.sum() > width:
        return np.empty((0, width), np.int64), np.empty(0, np.int64), np.empty((0, 2), np.int64)
    flat = np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences])
    place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    whole = np.flatnonzero(place >= width)
    where = np.stack([np.repeat(np.arange(len(lengths)), lengths)[whole], place[whole]], axis=1)
    return np.lib.stride_tricks.sliding_window_view(flat, width)[whole - width], flat[whole], where


def first_seen(windows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(n,) bool: where a pair of a window and a token occurs for the first time.

    Paper: Three Bricks to Consolidate Watermarks for Large Language Models (Fernandez et al., WIFS 2023): a pair always
    has the same mark, so that p-values that count it as often as it occurs are too small.
    Where a scheme looks at a part of the window ("skip", "min", "self", a wide "left"), unequal pairs can have equal
    marks: there `first_of` the marks is what may be counted.
    """
    return first_of(
        in_chunks(lambda some, these: marks(seeds(some, 0, "ordered"), these, 0, "ordered"), windows, tokens, np.int64)
    )


def first_of(words: np.ndarray) -> np.ndarray:
    """(n,) bool: where each of n words occurs for the first time."""
    if not len(words):
        return np.zeros(0, bool)
    order = np.argsort(words)  # not stable, and several times as fast
    ordered = words[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    seen = np.zeros(len(words), bool)
    seen[np.minimum.reduceat(order, starts)] = True
    return seen


# --- chances --------------------------------------------------------------------------------------------------------
# Logarithms to base 10, right where the chance itself is too small for a float64.


def log10_binomial_tail(hits: int, n: int, share: float) -> float:
    """Of at least `hits` successes in n trials of this chance: I_share(hits, 1 + n - hits)."""
    if hits == 0:
        return 0.0
    chance = float(betainc(hits, 1 + n - hits, share))
    if chance > 1e-290:
        return math.log10(chance)
    first = gammaln(n + 1) - gammaln(hits + 1) - gammaln(n - hits + 1) + xlogy(hits, share) + xlog1py(n - hits, -share)
    return _log10_sum(first, lambda k: (n - hits - k) / (hits + 1 + k) * share / (1 - share))


def log10_gamma_tail(total: float, n: int) -> float:
    """Of a sum of at least `total` of n standard exponential variables."""
    chance = float(gammaincc(n, total)) if n else 1.0
    if chance > 1e-290:
        return math.log10(chance)
    # As many points of a Poisson process, fewer than n, fall below `total`.
    return _log10_sum(xlogy(n - 1, total) - total - gammaln(n), lambda k: (n - 1 - k) / total)


def log10_normal_tail(z: float) -> float:
    """Of at least z under the standard normal distribution."""
    return float(log_ndtr(-z)) / math.log(10)


def _log10_sum(first: float, ratio: Callable[[np.ndarray], np.ndarray]) -> float:
    """Of a sum whose logarithm begins with `first` and whose term k + 1 is term k times `ratio(k)`, which falls."""
    begin = float(ratio(np.zeros(1))[0])
    terms = np.arange(1 if begin <= 0 else math.ceil(-40 / math.log(begin)), dtype=np.float64)  # e^-40 is left
    return (first + math.log1p(float(np.cumprod(np.maximum(ratio(terms), 0)).sum()))) / math.log(10)
