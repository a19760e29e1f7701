"""How rows of (token, log-probability) pairs are coded: what `top_k` and `rs_kd` have in common.

A row lists tokens by falling log-probability. The tokens are coded with frequencies that were counted once, in the
first rows of a cache; the rows are grouped into a few *topics*, each with frequencies of its own, and every row names
the topic that codes it best. Log-probabilities are rounded to multiples of `step` below the row's largest and coded as
differences. Among tokens with equal rounded log-probabilities the order says nothing, so they are listed by their place
in the topic's frequency table, and what comes before the last one's place need not be told apart any more. The mass of
all other tokens is stored, and the listed ones are scaled to add up to the rest.
"""

from __future__ import annotations

import numpy as np

from distill.errors import DistillError
from distill.randomness import generator
from distill.signals._lanes import LaneReader, LaneWriter, spans

BITS = 28  # tokens are coded with frequencies out of 2^BITS
CELL_BITS = 12  # all tokens of a level have one frequency; a level has a multiple of 2^-CELL_BITS of the whole
LEVELS = 64  # level l: about 2^(-l/2) of the row's mass a token
TABLE_BITS = 12  # everything else is coded with frequencies out of 2^TABLE_BITS
ESCAPE = 63  # a difference that is at least this is written out
DEEPEST = 65_535  # the largest rounded difference to the largest log-probability of a row
TAIL_BITS, TAIL_RANGE = 12, 24.0  # the log-odds of the tail mass, in nats, and how finely they are told apart
ENTRIES_AT_ONCE = 1 << 19  # bounds the memory of coding

PRIOR = 3000.0  # how many tokens the frequencies over all rows count for in a topic
RARE = 3  # tokens that are rarer in a topic have the frequency that they have over all rows
MOST_TOPICS, ROWS_OF_A_TOPIC, ROUNDS = 16, 256, 12
FITTED_ENTRIES = 1 << 21  # more would take longer and change little


def fit(ids: np.ndarray, depths: np.ndarray, repeats: np.ndarray | None, vocabulary: int) -> dict[str, np.ndarray]:
    """The tables that code such rows well.

    Args:
        ids: (n, k) int64, -1 pads.
        depths: (n, k) int64 ≥ 0: by how many steps each is below the largest of its row.
        repeats: (n, k) int64 ≥ 1: how often each was drawn; None where nothing is drawn.
        vocabulary: One more than the largest possible id.
    """
    _check(ids, vocabulary)
    k = ids.shape[1]
    fitted = slice(0, max(1, FITTED_ENTRIES // k))
    ids, depths = ids[fitted], depths[fitted]
    count = (ids >= 0).sum(axis=1)
    everywhere, counts, topic = _topics(ids, vocabulary)
    common = np.clip(np.rint(-2 * np.log2(everywhere)), 0, LEVELS - 1).astype(np.uint8)
    often = np.where(counts >= RARE, np.rint(2 * np.log2(np.maximum(counts, 1))) + 1, 0).astype(np.uint8)
    # All that depends on how a machine rounds is done here and stored; reading the tables takes integers alone.
    number = np.where(np.arange(LEVELS) > 0, 2.0 ** ((np.arange(LEVELS) - 1) / 2), 0)
    blend = np.rint(-2 * np.log2(number + PRIOR * 2.0 ** (-np.arange(LEVELS)[:, None] / 2))).astype(np.int16)
    offset = np.rint(2 * np.log2(counts.sum(axis=1) + PRIOR)).astype(np.int16)
    levels = _levels(common, often, blend, offset)
    share = (counts + PRIOR * everywhere) / (counts.sum(axis=1, keepdims=True) + PRIOR)
    mass = np.stack([np.bincount(level, row, LEVELS) for level, row in zip(levels, share, strict=True)])
    sizes = np.stack([np.bincount(level, minlength=LEVELS) for level in levels])
    tables = {
        "common": common,
        "often": often,
        "blend": blend,
        "offset": offset,
        "cells": _counts_to_frequencies(mass, -(-sizes >> (BITS - CELL_BITS)), CELL_BITS),
        "topics": _frequencies(np.zeros_like(topic), topic, 1, len(levels) + 1),
        "shortfalls": _frequencies(np.zeros_like(count), _length(k - count), 1, k.bit_length() + 1),
    }
    contexts = _contexts(k)
    listed = ids[:, 1:] >= 0
    places = np.broadcast_to(contexts[1:], listed.shape)[listed]
    steps = np.minimum(np.diff(depths, axis=1)[listed], ESCAPE)
    tables["steps"] = _frequencies(places, steps, int(contexts[-1]) + 1, ESCAPE + 1)
    if repeats is not None:
        listed = ids >= 0
        places = np.broadcast_to(contexts, listed.shape)[listed]
        lengths = _length(repeats[fitted][listed])
        tables["repeats"] = _frequencies(places, lengths, int(contexts[-1]) + 1, 32)
    return tables


def _check(ids: np.ndarray, vocabulary: int) -> None:
    if ids.max(initial=-1) >= vocabulary:
        raise DistillError(f"token {ids.max()} is outside the vocabulary of {vocabulary}", "signal")


def _levels(common: np.ndarray, often: np.ndarray, blend: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """(topics, vocabulary) uint8: the level of each token in each topic."""
    return np.clip(blend[common, often] + offset[:, None], 0, LEVELS - 1).astype(np.uint8)


def _topics(ids: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group rows so that the tokens of a group are alike: a mixture of unigrams, each row with its likeliest one.

    Returns the share of each token over all ((vocabulary,)), its count in each topic and the topic of each row.
    """
    n = len(ids)
    flat = ids.ravel()
    prior = 1 / (np.arange(vocabulary) + 100.0)  # merges are numbered in the order of frequency
    everywhere = np.bincount(flat[flat >= 0], minlength=vocabulary) + prior * (0.5 * vocabulary / prior.sum())
    everywhere /= everywhere.sum()
    topics = int(np.clip(n // ROWS_OF_A_TOPIC, 1, MOST_TOPICS))
    topic = generator(0, "signals", "topics").integers(0, topics, n)
    for _ in range(ROUNDS if topics > 1 else 0):
        mixed = _counts(ids, topic, topics, vocabulary) + PRIOR * everywhere
        cost = -np.log2(mixed / mixed.sum(axis=1, keepdims=True)).astype(np.float32)
        topic = np.stack([np.where(ids >= 0, row[ids], 0).sum(axis=1) for row in cost]).argmin(axis=0)
    return everywhere, _counts(ids, topic, topics, vocabulary), topic


def _counts(ids: np.ndarray, topic: np.ndarray, topics: int, vocabulary: int) -> np.ndarray:
    """(topics, vocabulary) int64: how often each token is listed in the rows of each topic."""
    members = (ids[topic == t] for t in range(topics))
    return np.stack([np.bincount(rows[rows >= 0], minlength=vocabulary) for rows in members])


def _contexts(k: int) -> np.ndarray:
    """(k,) which places of a row share a table: the more, the further down."""
    return np.floor(2 * np.log2(np.arange(1.0, k + 1)) + 1e-9).astype(np.int64)


def _length(numbers: np.ndarray) -> np.ndarray:
    """How many binary digits."""
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int64)


def _frequencies(contexts: np.ndarray, symbols: np.ndarray, many: int, alphabet: int) -> np.ndarray:
    counts = np.bincount(contexts * alphabet + symbols, minlength=many * alphabet).reshape(many, alphabet)
    smoothed = counts + 0.1 * (counts.sum(axis=0) + 0.01) / (counts.sum() + 0.01 * alphabet)
    return _counts_to_frequencies(smoothed, np.ones(counts.shape, np.int64), TABLE_BITS)


def _counts_to_frequencies(counts: np.ndarray, least: np.ndarray, bits: int) -> np.ndarray:
    """Integers that add up to 2^bits in each row, about in proportion, at least `least` and 0 where that is 0."""
    spare = (1 << bits) - least.sum(axis=1, keepdims=True)
    shares = np.where(least > 0, counts, 0)
    given = least + np.floor(shares / shares.sum(axis=1, keepdims=True) * spare).astype(np.int64)
    rows = np.arange(len(given))
    given[rows, given.argmax(axis=1)] += (1 << bits) - given.sum(axis=1)
    return given.astype(np.uint16)


class _Table:
    """Symbols with frequencies out of 2^TABLE_BITS, in one of several contexts."""

    def __init__(self, frequencies: np.ndarray) -> None:
        self.width = frequencies.astype(np.uint64)
        self.start = np.cumsum(self.width, axis=1) - self.width
        symbols = np.arange(frequencies.shape[1], dtype=np.uint16)
        self.symbol = np.stack([np.repeat(symbols, row) for row in frequencies])

    def push(self, writer: LaneWriter, lanes: slice | np.ndarray, context: int, symbols: np.ndarray) -> None:
        writer.push(lanes, self.start[context][symbols], self.width[context][symbols], TABLE_BITS)

    def pop(self, reader: LaneReader, lanes: slice | np.ndarray, context: int) -> np.ndarray:
        symbols = self.symbol[context][reader.slots(lanes, TABLE_BITS)]
        reader.pop(lanes, self.start[context][symbols], self.width[context][symbols], TABLE_BITS)
        return symbols.astype(np.int64)


def _push_digits(writer: LaneWriter, lanes: np.ndarray, numbers: np.ndarray, digits: np.ndarray) -> None:
    """The last so many binary digits of numbers below 2^32."""
    one = np.ones(1, np.uint64)
    for bits in np.unique(digits[digits > 0])[::-1]:
        some = digits == bits
        writer.push(lanes[some], numbers[some].astype(np.uint64) & np.uint64((1 << int(bits)) - 1), one, int(bits))


def _pop_digits(reader: LaneReader, lanes: np.ndarray, digits: np.ndarray) -> np.ndarray:
    one = np.ones(1, np.uint64)
    numbers = np.zeros(len(lanes), np.int64)
    for bits in np.unique(digits[digits > 0]):
        some = np.flatnonzero(digits == bits)
        slots = reader.slots(lanes[some], int(bits))
        reader.pop(lanes[some], slots, one, int(bits))
        numbers[some] = slots
    return numbers


class RowCoder:
    """Codes rows with tables that `fit` made.

    Args:
        tables: What `fit` returned.
        k: The longest row.
    """

    def __init__(self, tables: dict[str, np.ndarray], k: int) -> None:
        self.k = k
        self._contexts = _contexts(k).tolist()
        self._level = _levels(tables["common"], tables["often"], tables["blend"], tables["offset"])
        self._level_of = np.pad(self._level.T, ((0, 1), (0, 0)))  # (vocabulary + 1, topics), the last one for pads
        sizes = np.stack([np.bincount(level, minlength=LEVELS) for level in self._level])
        cells = tables["cells"].astype(np.uint64)
        self._base = (np.cumsum(cells, axis=1) - cells) << np.uint64(BITS - CELL_BITS)
        self._width = (cells << np.uint64(BITS - CELL_BITS)) // np.maximum(sizes, 1).astype(np.uint64)
        self._first = np.cumsum(sizes, axis=1) - sizes
        self._ids = np.argsort(self._level, axis=1, kind="stable").astype(np.int32)
        place = np.empty(self._ids.shape, np.int64)
        np.put_along_axis(place, self._ids.astype(np.int64), np.arange(self._ids.shape[1])[None], axis=1)
        level = self._level.astype(np.int64)
        within = place - np.take_along_axis(self._first, level, axis=1)
        self._start = np.take_along_axis(self._base, level, axis=1)
        self._start += within.astype(np.uint64) * np.take_along_axis(self._width, level, axis=1)
        self._start = self._start.astype(np.uint32)
        self._cell = np.stack([np.repeat(np.arange(LEVELS, dtype=np.uint8), row) for row in tables["cells"]])
        self._topic, self._shortfall = _Table(tables["topics"]), _Table(tables["shortfalls"])
        self._step = _Table(tables["steps"])
        self._repeat = _Table(tables["repeats"]) if "repeats" in tables else None

    def encode(
        self, ids: np.ndarray, depths: np.ndarray, tail: np.ndarray, repeats: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bytes (uint8), one row after the other, and how many each row has. Arguments as of `fit`; tail: (n,) mass."""
        _check(ids, self._ids.shape[1])
        at_once = max(1, ENTRIES_AT_ONCE // self.k)
        parts = []
        for first in range(0, len(ids), at_once):
            rows = slice(first, first + at_once)
            part = None if repeats is None else repeats[rows]
            parts.append(self._encode(ids[rows], depths[rows], tail[rows], part))
        if not parts:
            return np.empty(0, np.uint8), np.empty(0, np.int64)
        return np.concatenate([data for data, _ in parts]), np.concatenate([lengths for _, lengths in parts])

    def _encode(
        self, ids: np.ndarray, depths: np.ndarray, tail: np.ndarray, repeats: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        n, k = ids.shape
        listed = ids >= 0
        count = listed.sum(axis=1)
        topic = self._level_of[ids].sum(axis=1, dtype=np.int32).argmin(axis=1)  # levels are code lengths
        start = self._start[topic[:, None], ids].astype(np.int64)
        key = np.where(listed, (depths << BITS) | start, np.iinfo(np.int64).max)
        order = np.argsort(key, axis=1)
        rows = np.argsort(-count, kind="stable")
        order, topic, count = order[rows], topic[rows], count[rows]
        ids, depths, start = (np.take_along_axis(a[rows], order, axis=1).T.copy() for a in (ids, depths, start))
        if repeats is not None:
            repeats = np.take_along_axis(repeats[rows], order, axis=1).T.copy()
        width = self._width[topic, self._level[topic, ids]]
        start = start.astype(np.uint64)
        writer = LaneWriter(_tail_codes(tail[rows]) + np.uint64(1 << TAIL_BITS), 64 + k * (BITS + 2 * TABLE_BITS + 32))
        for j in range(k - 1, -1, -1):
            m = int(np.searchsorted(-count, -j))  # the rows that have a j-th token
            if m == 0:
                continue
            lanes = slice(0, m)
            if repeats is not None and self._repeat is not None:
                digits = _length(repeats[j, :m])
                _push_digits(writer, np.arange(m), repeats[j, :m], digits - 1)
                self._repeat.push(writer, lanes, self._contexts[j], digits)
            if j == 0:
                writer.push(lanes, start[j, :m], width[j, :m], BITS)
                break
            step = depths[j, :m] - depths[j - 1, :m]
            passed = np.where(step == 0, start[j - 1, :m] + width[j - 1, :m], np.uint64(0))
            if (passed > start[j, :m]).any():
                raise DistillError("a position lists a token twice", "signal")
            writer.push(lanes, *_without(passed, start[j, :m], width[j, :m]), BITS)
            far = np.flatnonzero(step >= ESCAPE)
            if len(far):
                _push_digits(writer, far, step[far], np.full(len(far), 16))
            self._step.push(writer, lanes, self._contexts[j], np.minimum(step, ESCAPE))
        shortfall = k - count
        digits = _length(shortfall)
        _push_digits(writer, np.arange(n), shortfall, digits - 1)
        everyone = slice(0, n)
        self._shortfall.push(writer, everyone, 0, digits)
        self._topic.push(writer, everyone, 0, topic)
        return _unsorted(*writer.finish(), rows)

    def decode(
        self, data: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """What was encoded: ids, depths, tail and repeats, the pairs of a row by depth."""
        at_once = max(1, ENTRIES_AT_ONCE // self.k)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        ids = np.full((len(lengths), self.k), -1, np.int64)
        depths = np.zeros((len(lengths), self.k), np.int64)
        tail = np.zeros(len(lengths))
        repeats = None if self._repeat is None else np.zeros((len(lengths), self.k), np.int64)
        for first in range(0, len(lengths), at_once):
            rows = slice(first, min(first + at_once, len(lengths)))
            part = None if repeats is None else repeats[rows]
            content = data[ends[rows.start] : ends[rows.stop]]
            self._decode(content, lengths[rows], ids[rows], depths[rows], tail[rows], part)
        return ids, depths, tail, repeats

    def _decode(
        self,
        data: np.ndarray,
        lengths: np.ndarray,
        ids: np.ndarray,
        depths: np.ndarray,
        tail: np.ndarray,
        repeats: np.ndarray | None,
    ) -> None:
        n, k = ids.shape
        reader = LaneReader(data, lengths)
        everyone = slice(0, n)
        topic = self._topic.pop(reader, everyone, 0)
        digits = self._shortfall.pop(reader, everyone, 0)
        leading = np.where(digits > 0, 1 << np.maximum(digits - 1, 0), 0)
        count = k - (leading + _pop_digits(reader, np.arange(n), digits - 1))
        rows = np.argsort(-count, kind="stable")
        reader.reorder(rows)
        topic, count = topic[rows], count[rows]
        found = np.full((k, n), -1, np.int64)
        deep = np.zeros((k, n), np.int64)
        often = np.zeros((k, n), np.int64)
        passed = np.zeros(n, np.uint64)
        for j in range(k):
            m = int(np.searchsorted(-count, -j))
            if m == 0:
                break
            lanes = slice(0, m)
            if j:
                step = self._step.pop(reader, lanes, self._contexts[j])
                far = np.flatnonzero(step == ESCAPE)
                if len(far):
                    step[far] = _pop_digits(reader, far, np.full(len(far), 16))
                deep[j, :m] = deep[j - 1, :m] + step
                passed = np.where(step == 0, passed[:m], np.uint64(0))
            slots = _with(passed[:m], reader.slots(lanes, BITS))
            t = topic[:m]
            level = self._cell[t, slots >> np.uint64(BITS - CELL_BITS)]
            base, width = self._base[t, level], self._width[t, level]
            index = (slots - base) // width
            found[j, :m] = self._ids[t, self._first[t, level] + index.astype(np.int64)]
            start = base + index * width
            reader.pop(lanes, *_without(passed[:m], start, width), BITS)
            passed = start + width
            if self._repeat is not None:
                digits = self._repeat.pop(reader, lanes, self._contexts[j])
                often[j, :m] = (1 << (digits - 1)) + _pop_digits(reader, np.arange(m), digits - 1)
        ids[rows], depths[rows] = found.T, deep.T
        tail[rows] = _tails((reader.states() - np.uint64(1 << TAIL_BITS)).astype(np.int64))
        if repeats is not None:
            repeats[rows] = often.T


def _without(passed: np.ndarray, start: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slots of a token when the first `passed` are left out and the others are stretched to fill the whole."""
    bits, rest = np.uint64(BITS), np.uint64(1 << BITS) - passed
    first = ((start - passed) << bits) // rest
    return first, ((start + width - passed) << bits) // rest - first


def _with(passed: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """A slot of the same token before `passed` were left out."""
    one, rest = np.uint64(1), np.uint64(1 << BITS) - passed
    return passed + (((slots + one) * rest - one) >> np.uint64(BITS))


def _tail_codes(tail: np.ndarray) -> np.ndarray:
    """0 for no tail at all; else the log-odds of the tail in steps of 2·TAIL_RANGE / (2^TAIL_BITS - 2)."""
    odds = np.log(np.maximum(tail, 1e-300)) - np.log(np.maximum(1 - tail, 1e-300))
    steps = (1 << TAIL_BITS) - 2
    codes = 1 + np.rint((np.clip(odds, -TAIL_RANGE, TAIL_RANGE) / TAIL_RANGE + 1) / 2 * steps)
    return np.where(odds < -TAIL_RANGE, 0, codes).astype(np.uint64)


def _tails(codes: np.ndarray) -> np.ndarray:
    odds = ((codes - 1) / ((1 << TAIL_BITS) - 2) * 2 - 1) * TAIL_RANGE
    return np.where(codes == 0, 0.0, 1 / (1 + np.exp(-odds)))


def _unsorted(data: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes whose row i belongs at ``rows[i]``, put there."""
    back = np.argsort(rows)
    if (back == np.arange(len(back))).all():
        return data, lengths
    return data[spans((np.cumsum(lengths) - lengths)[back], lengths[back])], lengths[back]


def rounded(ids: np.ndarray, logprobs: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `RowCoder.encode` takes: ids and depths (n, k), and the mass that is not listed (n,).

    Args:
        ids: (n, k) int64, -1 pads.
        logprobs: (n, k), falling in each row.
        step: In nats.
    """
    values = np.where(ids >= 0, logprobs, -np.inf).astype(np.float64)
    tail = np.maximum(1 - np.exp(values).sum(axis=1), 0)
    first = np.where(ids[:, :1] >= 0, values[:, :1], 0)
    depths = np.rint(np.minimum((first - values) / step, DEEPEST + 1)).astype(np.int64)
    ids = np.where(depths > DEEPEST, -1, ids)
    return ids, np.where(ids >= 0, depths, 0), tail


def restored(ids: np.ndarray, depths: np.ndarray, tail: np.ndarray, step: float) -> np.ndarray:
    """(n, k) float32 log-probabilities that add up, with the tail, to one; -inf where nothing is listed."""
    relative = np.where(ids >= 0, np.exp(-step * depths), 0)
    total = np.log(relative.sum(axis=1, keepdims=True).clip(1e-300))
    return np.where(ids >= 0, -step * depths - total + np.log1p(-tail)[:, None], -np.inf).astype(np.float32)
