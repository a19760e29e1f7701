"""Logit vectors of the first token of an answer, put together from what an interface tells: what every leak needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distill.contracts import Inside, LanguageOracle, Verdict
from distill.errors import BudgetExceeded, DistillError
from distill.language import Completions, Prompts, Sampling
from distill.randomness import generator
from distill.records import Reveals

FIRST_TOKEN = Sampling(max_tokens=1, temperature=0)
AT_ONCE = 64  # prompts that are asked in one call where answers may list a whole vocabulary
SURE = 1e-3  # what is left beside a probability must be at least this for its logarithm to tell its logit in float32
STEP = 6.0  # nats: less than the range of biases between "not the most probable token" and "too sure"


class Withheld(DistillError):
    """The answers do not tell what the interface promised."""


@dataclass(frozen=True)
class Vectors:
    """Logits of n prompts at l tokens.

    Args:
        prompts: n prompts.
        tokens: (l,) int64.
        values: (n, l) float64, each row up to a constant of its own.
        formula: How many queries the paper's formula says that they take.
    """

    prompts: Prompts
    tokens: np.ndarray
    values: np.ndarray
    formula: int

    @property
    def centred(self) -> np.ndarray:
        """The values less the mean of their row, which the constant has no part in."""
        return self.values - self.values.mean(axis=1, keepdims=True)


def check(least: Mapping[str, tuple[float | None, int]], above_zero: Mapping[str, float]) -> None:
    """Raises `DistillError` for an option that is below its least value, or not above 0."""
    for name, (value, bound) in least.items():
        if value is not None and value < bound:
            raise DistillError(f"{name} must be at least {bound}, not {value}")
    for name, number in above_zero.items():
        if not 0 < number < math.inf:
            raise DistillError(f"{name} must be more than 0, not {number}")


# --- what is asked about --------------------------------------------------------------------------------------------


def refusal(oracle: LanguageOracle, least_told: int) -> str:
    """Why log-probabilities of given tokens can't be had of this interface; "" where they can.

    `least_told`: How many log-probabilities an answer must tell; 0 where the text will do.
    """
    if oracle.tokenizer is None:
        return "no public tokenizer"
    told = told_at_once(oracle)
    if told < least_told:
        return "no log-probabilities" if told == 0 else f"{told} log-probability, not {least_told}"
    if told < len(oracle.tokenizer) and not oracle.profile.logit_bias:
        return "no logit bias"
    return ""


def bias_refusal(oracle: LanguageOracle) -> str:
    """The same for what needs a bias whatever is told."""
    return "" if oracle.profile.logit_bias else "no logit bias"


def told_at_once(oracle: LanguageOracle) -> int:
    """How many log-probabilities an answer tells at each position."""
    return 0 if oracle.profile.reveals is Reveals.TEXT else oracle.profile.top_k or 0


def chosen_prompts(pool: Prompts, n: int, seed: int) -> Prompts:
    """n prompts of the pool at random. Raises `DistillError` where it is smaller."""
    if len(pool) < n:
        raise DistillError(f"{n} prompts are needed, and {pool.name or 'it'} has {len(pool)}", "pool")
    return pool.take(generator(seed, "leak", "prompts").permutation(len(pool))[:n])


def chosen_tokens(oracle: LanguageOracle, n: int | None, seed: int) -> np.ndarray:
    """(n,) int64 tokens with a text of their own, at random, in order; with None, or where there are no more, all
    tokens that there are."""
    if n is None or n >= len(oracle.tokenizer):
        return np.arange(len(oracle.tokenizer))
    own = np.array(sorted(own_texts(oracle.tokenizer).values()), dtype=np.int64)
    return np.sort(generator(seed, "leak", "tokens").permutation(own)[:n])


def own_texts(tokenizer: Any) -> dict[str, int]:
    """The tokens that an answer of one token tells apart by its text."""
    written = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    times = Counter(written)
    return {text: token for token, text in enumerate(written) if text and times[text] == 1}


# --- how it is asked ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Vectors of many prompts at the same tokens, in the cheapest way that the interface offers.

    Args:
        prompts: How many.
        tokens: How many; None for all that there are. Some may be left out where there is text alone.
        bias: As of `by_top_k`.
        resolution: As of `by_argmax`.
        together: As of `by_argmax`.
        repeats: Answers to each request that tells log-probabilities, which are averaged.
    """

    prompts: int
    tokens: int | None
    bias: float
    resolution: float
    together: int
    repeats: int

    def __post_init__(self) -> None:
        least = {"prompts": (self.prompts, 3), "tokens": (self.tokens, 3)}
        least |= {"together": (self.together, 1), "repeats": (self.repeats, 1)}
        check(least, {"resolution": self.resolution, "bias": self.bias - self.resolution})

    def of(self, oracle: LanguageOracle, pool: Prompts, seed: int, further: int = 0) -> Vectors:
        """With `further`, so many other prompts at the same tokens instead.

        Raises:
            BudgetExceeded: See `distill.contracts.LanguageOracle`.
            DistillError: The answers do not tell what the interface promised, or the pool is too small.
        """
        prompts = chosen_prompts(pool, self.prompts + further, seed)
        prompts = prompts.take(slice(self.prompts, None) if further else slice(0, self.prompts))
        tokens = chosen_tokens(oracle, self.tokens, seed)
        told = told_at_once(oracle)
        try:
            if told >= len(oracle.tokenizer):
                return whole(oracle, prompts, tokens, self.repeats)
            if told >= 2:
                return by_top_k(oracle, prompts, tokens, self.bias, self.repeats)
            if told == 1:
                return by_top_1(oracle, prompts, tokens, self.bias, self.repeats)
        except Withheld:
            if not oracle.profile.logit_bias:
                raise
        return by_argmax(oracle, prompts, tokens, self.bias, self.resolution, self.together)


def whole(oracle: LanguageOracle, prompts: Prompts, tokens: np.ndarray, repeats: int) -> Vectors:
    """From answers that tell the log-probability of every token, the mean of `repeats` of them."""
    _afford(oracle, len(prompts) * repeats)
    return Vectors(prompts, tokens, _told(oracle, prompts, tokens, {}, repeats), len(prompts) * repeats)


def by_top_k(oracle: LanguageOracle, prompts: Prompts, tokens: np.ndarray, bias: float, repeats: int) -> Vectors:
    """From the K most probable tokens: K - 1 tokens at a time and a reference R are lifted above all others, and then
    z_i - z_R = y_i - y_R, whatever the bias.

    Args:
        oracle: It tells at least 2 log-probabilities.
        prompts: n prompts.
        tokens: (l,) int64; the first is the reference.
        bias: Enough to lift any token above any other; float32 adds it with an error of 2^-24 of it.
        repeats: Answers to each request, which are averaged.
    """
    at_once = told_at_once(oracle) - 1
    queries = max(1, math.ceil((len(tokens) - 1) / at_once)) * len(prompts) * repeats
    _afford(oracle, queries)
    values = np.zeros((len(prompts), len(tokens)))
    for start in range(1, len(tokens), at_once):
        lifted = np.append(tokens[:1], tokens[start : start + at_once])
        told = _told(oracle, prompts, lifted, dict.fromkeys(lifted.tolist(), bias), repeats)
        values[:, start : start + at_once] = told[:, 1:] - told[:, :1]
    return Vectors(prompts, tokens, values, queries)


def by_top_1(oracle: LanguageOracle, prompts: Prompts, tokens: np.ndarray, most: float, repeats: int) -> Vectors:
    """From the log-probability of the most probable token alone: under a bias b on token i that makes it that token,
    with probability p', its own logit is logit(p') - b.

    A probability near 1 tells its logit no more, so a bias that was too large or too small is corrected, which takes
    more queries than the one a token of the formula.

    Args:
        oracle: It tells at least 1 log-probability.
        prompts: n prompts.
        tokens: (l,) int64.
        most: The largest bias either way.
        repeats: Answers to each request, which are averaged.
    """
    _afford(oracle, len(prompts) * len(tokens) * repeats)
    values = np.empty((len(prompts), len(tokens)))
    guess = np.zeros(len(prompts))
    for column, token in enumerate(tokens.tolist()):
        bias, low, high = np.round(guess), np.full(len(prompts), -most), np.full(len(prompts), most)
        left = np.arange(len(prompts))
        while len(left):
            for value in np.unique(bias[left]):
                rows = left[bias[left] == value]
                found, y = _first(oracle, prompts.take(rows), {token: value} if value else {}, repeats)
                first, sure = found == token, y > -SURE
                done = rows[first & ~sure]
                logit = y[first & ~sure] - np.log(-np.expm1(y[first & ~sure])) - value
                values[done, column] = -np.logaddexp(0.0, -logit)
                guess[done] += (value - guess[done]) / (column + 1)
                low[rows[~first]], high[rows[first & sure]] = value, value
                bias[rows[~first]] = np.minimum(value + STEP, (value + high[rows[~first]]) / 2)
                bias[rows[first & sure]] = np.maximum(value - STEP, (value + low[rows[first & sure]]) / 2)
                left = np.setdiff1d(left, done)
            if len(left) and (high - low)[left].min() < SURE:
                raise Withheld(f"no bias up to {most:g} makes the log-probability of token {token} tell its logit")
    return Vectors(prompts, tokens, values, len(prompts) * len(tokens) * repeats)


def by_argmax(
    oracle: LanguageOracle, prompts: Prompts, tokens: np.ndarray, most: float, resolution: float, together: int
) -> Vectors:
    """From the text alone: the smallest bias that makes a token the most probable one is how far it is below that.

    `together` tokens are biased at once. Token i is known to be between ``low_i`` and ``high_i`` of the most probable
    one (a hyper-rectangle), and is lifted so that each of them, and the unbiased one, would win equally often if all
    places in there were as likely: (1 + m)^(-1/m) of the way up. Whoever wins bounds all others. With one at a time
    that is bisection.

    Args:
        oracle: Of any kind that takes a bias.
        prompts: n prompts.
        tokens: (l,) int64. Those without a text of their own are left out.
        most: The largest bias.
        resolution: How well each is to be known, in nats.
        together: At least 1.
    """
    names = own_texts(oracle.tokenizer)
    tokens = tokens[np.isin(tokens, list(names.values()))]
    steps = math.ceil(math.log2(most / resolution))
    formula = len(prompts) * (1 + len(tokens) * steps)
    _afford(oracle, formula if together == 1 else math.ceil(formula / math.log2(1 + together)))
    values = [
        _boxes(oracle, prompts.take([row]), tokens, names, most, resolution, together) for row in range(len(prompts))
    ]
    return Vectors(prompts, tokens, np.stack(values), formula)


def _boxes(
    oracle: LanguageOracle,
    prompt: Prompts,
    tokens: np.ndarray,
    names: Mapping[str, int],
    most: float,
    resolution: float,
    together: int,
) -> np.ndarray:
    """(l,) float64: how far each token is below the most probable one, at most 0."""
    column = {token: place for place, token in enumerate(tokens.tolist())}
    low, high = np.full(len(tokens), -most), np.zeros(len(tokens))
    best = _ask(oracle, prompt, {}).column[0]
    if (place := column.get(names.get(best, -1))) is not None:
        low[place] = 0.0
    waiting, active = list(range(len(tokens)))[::-1], np.empty(0, np.int64)
    while True:
        active = active[(high - low)[active] > resolution]
        while waiting and len(active) < together:
            if high[waiting[-1]] - low[waiting[-1]] > resolution:
                active = np.append(active, waiting[-1])
            waiting.pop()
        if not len(active):
            break
        share = (1 + len(active)) ** (-1 / len(active))
        bias = -(low + share * (high - low))[active]
        text = _ask(oracle, prompt, dict(zip(tokens[active].tolist(), bias.tolist(), strict=True))).column[0]
        if text == best:
            high[active] = -bias
            continue
        won = np.flatnonzero(tokens[active] == names.get(text, -1))
        if not len(won):
            raise Withheld("an answer is neither the most probable token nor one that was made so")
        low[active[won]] = -bias[won]
        high[active] = np.minimum(high[active], high[active[won]] + bias[won] - bias)
        high[active] = np.maximum(high[active], low[active])
    if beyond := int((low == -most).sum()):
        raise Withheld(f"{beyond} of {len(tokens)} tokens can't be made the most probable one")
    return (low + high) / 2


def _ask(oracle: LanguageOracle, prompts: Prompts, bias: Mapping[int, float], samples: int = 1) -> Completions:
    return oracle.ask(prompts, replace(FIRST_TOKEN, logit_bias=tuple(bias.items())), samples).completions


def _told(
    oracle: LanguageOracle, prompts: Prompts, tokens: np.ndarray, bias: Mapping[int, float], repeats: int
) -> np.ndarray:
    """(n, l) float64 log-probabilities of these tokens, all of which must be listed."""
    told = np.concatenate(
        [
            _means(oracle, prompts.take(slice(start, start + AT_ONCE)), bias, repeats)[:, tokens]
            for start in range(0, len(prompts), AT_ONCE)
        ]
    )
    if missing := int(np.isnan(told).any(axis=0).sum()):
        raise Withheld(f"{missing} of {len(tokens)} tokens that were asked about are not told")
    return told


def _first(
    oracle: LanguageOracle, prompts: Prompts, bias: Mapping[int, float], repeats: int
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the most probable token of each answer and (n,) float64 its log-probability."""
    told = _means(oracle, prompts, bias, repeats)
    told = np.where(np.isnan(told), -np.inf, told)
    first = told.argmax(axis=1)
    return first, told[np.arange(len(told)), first]


def _means(oracle: LanguageOracle, prompts: Prompts, bias: Mapping[int, float], repeats: int) -> np.ndarray:
    """(n, V) float64 log-probabilities at the first position, the means of `repeats` answers to each prompt; NaN for
    tokens that are not listed in each of them."""
    total = np.zeros((len(prompts), len(oracle.tokenizer)))
    at_once = max(1, AT_ONCE // len(prompts))
    for start in range(0, repeats, at_once):
        samples = min(at_once, repeats - start)
        ids, logprobs = _listed(_ask(oracle, prompts, bias, samples))
        for sample in range(samples):
            # A model may have more tokens than its tokenizer; the last column is that of -1.
            told = np.full((len(total), max(total.shape[1], int(ids.max()) + 1) + 1), np.nan)
            np.put_along_axis(told, ids[sample::samples], logprobs[sample::samples].astype(np.float64), axis=1)
            total += told[:, : total.shape[1]]
    return total / repeats


def _listed(answers: Completions) -> tuple[np.ndarray, np.ndarray]:
    """(n, k) the tokens that are listed at the first position of each answer, and their log-probabilities."""
    if answers.offsets is None or answers.top_ids is None or answers.top_logprobs is None:
        raise Withheld("the answers come without log-probabilities")
    if (np.diff(answers.offsets) < 1).any():
        raise Withheld("an answer comes without its token")
    return answers.top_ids[answers.offsets[:-1]], answers.top_logprobs[answers.offsets[:-1]]


def _afford(oracle: LanguageOracle, queries: int) -> None:
    """Raises `BudgetExceeded`, before anything is asked, where the bound on queries is too low."""
    if (left := oracle.affordable()) < queries:
        raise BudgetExceeded(queries, left, "budget.queries")


# --- what is seen in them -------------------------------------------------------------------------------------------


def width_of(centred: np.ndarray) -> tuple[int, float]:
    """The number of singular values before the largest gap in their logarithms, and by which factor they fall there.

    The rows are centred, so there is one direction fewer than there are columns.
    """
    values = np.linalg.svd(centred, compute_uv=False)[: min(len(centred), centred.shape[1] - 1)]
    if len(values) < 2 or values[0] == 0:
        return len(values), 1.0
    logs = np.log(np.maximum(values, values[0] * np.finfo(np.float64).eps))
    gaps = logs[:-1] - logs[1:]
    return int(gaps.argmax()) + 1, float(np.exp(gaps.max()))


def image_of(centred: np.ndarray, width: int) -> np.ndarray:
    """(width, l) orthonormal rows: the directions in which the vectors lie."""
    return np.linalg.svd(centred, full_matrices=False)[2][:width]


def apart(found: np.ndarray, true: np.ndarray) -> float:
    """The largest difference of two rows of vectors, each row up to a constant, in nats."""
    difference = found - true
    return float(np.abs(difference - difference.mean(axis=1, keepdims=True)).max())


def verdict_on_logits(found: Vectors, inside: Inside | None, tolerance: float) -> Verdict:
    """Recovered: none of them is off by more than `tolerance` nats."""
    note = f"{found.values.size:,} logits"
    if inside is None:
        return Verdict(None, None, note, found.formula)
    error = apart(found.values, inside.logits(found.prompts)[:, found.tokens])
    return Verdict(error <= tolerance, error, note, found.formula)
