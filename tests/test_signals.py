"""The signal cache: what comes back is what was stored, within the stated error, whatever happens to the files."""

from __future__ import annotations

import errno
import inspect
import json
import math
import os
import signal as signals
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from distill.config import build
from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.signals._distributions import round_trip as measured
from distill.signals._lanes import LaneReader, LaneWriter
from distill.signals.hidden_states import HiddenStates
from distill.signals.rs_kd import RSKD
from distill.signals.store import SignalCache
from distill.signals.text import Text
from distill.signals.top_k import TopK

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
SLACK = 0.006 + 1e-4  # of the stored tail mass, and of float32


def head_of(logits: torch.Tensor) -> Head:
    """A head whose logits are exactly these (and -1e30 where they are -inf, for 0 · inf is not 0)."""
    return Head(torch.eye(len(logits), dtype=logits.dtype), logits.clamp(min=-1e30).T.contiguous())


def keys(n: int) -> np.ndarray:
    return np.arange(n).astype("S16")


def zipf(n: int, vocabulary: int, seed: int, sharpness: float = 2.0) -> torch.Tensor:
    """(n, vocabulary) logits: some tokens are frequent everywhere, and each row has favourites of its own."""
    rng = torch.Generator().manual_seed(seed)
    common = -torch.log(torch.arange(1, vocabulary + 1.0))
    return common + sharpness * torch.randn(n, vocabulary, generator=rng)


def round_trip(signal, distributions, vocabulary):
    codec = signal.codec(signal.fit(distributions, vocabulary))
    return codec.decode(*codec.encode(distributions, keys(len(distributions))))


def same_tokens(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.sort(dim=1).values, b.sort(dim=1).values)


def assert_within(step: float, decoded: Sparse, logprobs: torch.Tensor) -> None:
    """Every listed token within the stated bound of its log-probability ((n, vocabulary)), and the tail, too."""
    listed = decoded.ids >= 0
    true = logprobs.double().gather(1, decoded.ids.clamp(min=0))
    assert (decoded.logprobs == -torch.inf).logical_xor(listed).all()
    if listed.any():
        error = decoded.logprobs.double() - true
        assert error[listed].abs().max() <= step + SLACK
        scaling = decoded.logprobs[:, :1] - torch.where(listed, true, -torch.inf).amax(dim=1, keepdim=True)
        assert (error - scaling)[listed].abs().max() <= step / 2 + 1e-4
    tail = 1 - torch.where(listed, true.exp(), 0).sum(1)
    back = 1 - torch.where(listed, decoded.logprobs.double().exp(), 0).sum(1)
    assert (tail - back).abs().max() <= 0.0015 + 1e-5


# --- the coder ------------------------------------------------------------------------------------------------------


@QUICK
@given(st.data())
def test_lanes_give_back_what_was_pushed(data):
    n, steps = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 30))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    states = rng.integers(1, 1 << 32, n).astype(np.uint64)
    pushed, ideal = [], np.log2(states.astype(float))
    for _ in range(steps):
        bits = int(rng.integers(1, 29))
        width = rng.integers(1, (1 << bits) + 1, n) if rng.random() < 0.5 else np.ones(n, np.int64)
        start = (rng.random(n) * ((1 << bits) - width + 1)).astype(np.int64)
        lanes = np.flatnonzero(rng.random(n) < 0.7)
        pushed.append((lanes, start[lanes].astype(np.uint64), width[lanes].astype(np.uint64), bits))
        ideal[lanes] += bits - np.log2(width[lanes])
    writer = LaneWriter(states, 64 + 28 * steps)
    for step in pushed:
        writer.push(*step)
    content, lengths = writer.finish()
    assert lengths.sum() == len(content)
    assert (8 * lengths <= ideal + 28 + 8).all()  # a small first state may be no finer than a symbol's slots
    reader = LaneReader(content, lengths)
    for lanes, start, width, bits in reversed(pushed):
        slots = reader.slots(lanes, bits)
        assert ((slots >= start) & (slots < start + width)).all()
        reader.pop(lanes, start, width, bits)
    assert (reader.states() == states).all()


# --- the rooms' rules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs" / "signal").glob("*.yaml")), ids=str)
def test_yaml_defaults_are_the_constructors(path):
    node = OmegaConf.to_container(OmegaConf.load(path))
    made = build(node, "signal")
    assert made.identity == type(made)().identity
    assert set(node) - {"_target_"} == set(inspect.signature(type(made)).parameters)
    assert made.identity["signal"] == path.stem == type(made).__module__.rpartition(".")[2]


# --- the measure ----------------------------------------------------------------------------------------------------


def test_the_stated_error_is_that_of_the_formulas():
    p = torch.log_softmax(zipf(40, 60, 8), 1)
    decoded = round_trip(TopK(k=6, step=0.3), head_of(p), 60)
    stated = measured(head_of(p), decoded)
    both = [stated, measured(Sparse(*p.topk(9)[::-1]), decoded)]  # a list that is longer than what is kept
    kl, errors = [], []
    for row in range(40):
        ids, q = decoded.ids[row].tolist(), decoded.logprobs[row].double().tolist()
        true = [float(p[row, i].double()) for i in ids]
        rest, rest_after = 1 - sum(map(math.exp, true)), 1 - sum(map(math.exp, q))
        kl.append(sum(math.exp(a) * (a - b) for a, b in zip(true, q, strict=True)) + rest * math.log(rest / rest_after))
        errors += [abs(a - b) for a, b in zip(true, q, strict=True)]
    for found in both:
        assert found["kl_mean"] == pytest.approx(np.mean(kl), abs=1e-6)
        assert found["kl_max"] == pytest.approx(np.max(kl), abs=1e-6)
        assert found["logprob_error_mean"] == pytest.approx(np.mean(errors), abs=1e-6)
        assert found["logprob_error_max"] == pytest.approx(np.max(errors), abs=1e-6)
        assert found["listed_mean"] == 6


# --- top_k ----------------------------------------------------------------------------------------------------------


@QUICK
@given(st.data())
def test_top_k_keeps_the_tokens_and_its_bound(data):
    vocabulary = data.draw(st.sampled_from([2, 3, 17, 300, 70_000]))
    k = (
        data.draw(st.sampled_from([1, 2, 7, vocabulary]))
        if vocabulary <= 300
        else data.draw(st.sampled_from([1, 5, 60]))
    )
    k = min(k, vocabulary)
    n = data.draw(st.integers(1, 30 if vocabulary > 300 else 200))
    step = data.draw(st.sampled_from([0.001, 0.03, 0.1, 0.5]))
    logits = zipf(n, vocabulary, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 0.5, 4.0, 60.0])))
    if data.draw(st.booleans()):
        logits = logits.round()  # ties
    logprobs = torch.log_softmax(logits, dim=1)
    decoded = round_trip(TopK(k=k, step=step), head_of(logits), vocabulary)
    assert decoded.ids.shape == decoded.logprobs.shape == (n, k)
    values = logprobs.topk(k).values
    found = logprobs.gather(1, decoded.ids.clamp(min=0))
    listed = decoded.ids >= 0
    assert torch.equal(listed.sum(1), (values[:, :1] - values <= 65_535.5 * step).sum(1))
    kept = torch.where(listed, found, -torch.inf).sort(dim=1, descending=True).values
    assert torch.equal(kept, torch.where(listed, values, -torch.inf))
    assert_within(step, decoded, logprobs)


def test_peaked_rows_have_no_tail():
    logits = torch.zeros(40, 500)
    logits[torch.arange(40), torch.arange(40) * 3] = 80.0
    decoded = round_trip(TopK(k=5), head_of(logits), 500)
    assert (decoded.ids[:, 0] == torch.arange(40) * 3).all()
    assert decoded.logprobs[:, 0].abs().max() < 1e-6
    assert_within(0.1, decoded, torch.log_softmax(logits, 1))


def test_rows_may_list_fewer_than_k_tokens_or_none():
    logits = zipf(50, 40, 0)
    for row in range(50):
        logits[row, torch.randperm(40, generator=torch.Generator().manual_seed(row))[: min(row, 39)]] = -torch.inf
    decoded = round_trip(TopK(k=20), head_of(logits), 40)
    assert torch.equal((decoded.ids >= 0).sum(1), logits.isfinite().sum(1).clamp(max=20))
    assert_within(0.1, decoded, torch.log_softmax(logits, 1))
    nothing = Sparse(torch.full((3, 4), -1), torch.full((3, 4), -torch.inf))
    back = round_trip(TopK(k=4), nothing, 40)
    assert torch.equal(back.ids, nothing.ids)
    assert torch.equal(back.logprobs, nothing.logprobs)


def test_lists_of_an_api_in_any_order_and_of_any_length():
    logprobs = torch.log_softmax(zipf(60, 1000, 1), 1)
    values, ids = logprobs.topk(12)
    mixed = torch.rand(60, 12, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    given_ids, given_values = ids.gather(1, mixed), values.gather(1, mixed)
    for k in (5, 12, 20):  # the API lists more, as many, and fewer
        decoded = round_trip(TopK(k=k), Sparse(given_ids, given_values), 1000)
        assert same_tokens(decoded.ids[:, : min(k, 12)], ids[:, : min(k, 12)])
        assert (decoded.ids[:, 12:] == -1).all()
        assert_within(0.1, decoded, logprobs)


def test_adaptive_k_is_the_smallest_that_reaches_the_mass():
    logprobs = torch.log_softmax(zipf(300, 2000, 2, 4.0), 1)
    decoded = round_trip(TopK(k=64, mass=0.8), head_of(logprobs), 2000)
    p = logprobs.double().exp().sort(dim=1, descending=True).values
    count = (decoded.ids >= 0).sum(1)
    reached = p.cumsum(1).gather(1, count[:, None] - 1)[:, 0]
    before = reached - p.gather(1, count[:, None] - 1)[:, 0]
    assert ((reached >= 0.8 - 1e-6) | (count == 64)).all()
    assert (before < 0.8 + 1e-6).all()
    assert count.float().std() > 1
    assert_within(0.1, decoded, logprobs)


def test_tables_fit_rows_that_they_were_not_made_from():
    """Rare and unseen tokens, another shape of distribution, escaped differences: only the size suffers."""
    signal = TopK(k=30)
    codec = signal.codec(signal.fit(head_of(zipf(20, 3000, 3, 0.3)), 3000))
    other = zipf(100, 3000, 4, 20.0).flip(1)
    decoded = codec.decode(*codec.encode(head_of(other), keys(100)))
    assert_within(0.1, decoded, torch.log_softmax(other, 1))


def test_a_row_costs_less_than_packed_ids_and_more_rows_share_topics():
    logits = torch.cat([zipf(600, 4000, s, 0.5) for s in (0, 1)])
    logits[600:] = logits[600:].flip(1)  # two topics
    signal = TopK(k=50)
    codec = signal.codec(signal.fit(head_of(logits), 4000))
    content, lengths = codec.encode(head_of(logits), keys(1200))
    assert lengths.sum() == len(content)
    assert lengths.mean() < 50 * 12 / 8  # ids, values and tail together


def test_a_twice_listed_token_and_a_token_outside_the_vocabulary_are_refused():
    values = torch.log(torch.tensor([[0.4, 0.4]]))
    with pytest.raises(DistillError, match="twice"):
        round_trip(TopK(k=2), Sparse(torch.tensor([[3, 3]]), values), 10)
    with pytest.raises(DistillError, match="vocabulary"):
        round_trip(TopK(k=2), Sparse(torch.tensor([[3, 10]]), values), 10)
    codec = TopK(k=2).codec(TopK(k=2).fit(Sparse(torch.tensor([[3, 9]]), values), 10))
    with pytest.raises(DistillError, match="token 10 is outside the vocabulary"):
        codec.encode(Sparse(torch.tensor([[3, 10]]), values), keys(1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    head = head_of(zipf(5, 20, 0))
    head.hidden[2, 2] = bad
    for signal in (TopK(k=3), RSKD(draws=3)):
        with pytest.raises(DistillError, match="1 of 5 positions"):
            signal.fit(head, 20)


def test_options_out_of_range_are_refused():
    for make in (
        lambda: TopK(k=0),
        lambda: TopK(mass=0),
        lambda: TopK(step=2),
        lambda: RSKD(draws=0),
        lambda: RSKD(exponent=-1),
        lambda: RSKD(step=0),
        lambda: TopK(k=21).fit(head_of(zipf(2, 20, 0)), 20),
    ):
        with pytest.raises(DistillError, match=r"^signal\."):
            make()


# --- rs_kd ----------------------------------------------------------------------------------------------------------


def dense(decoded: Sparse, vocabulary: int) -> torch.Tensor:
    full = torch.zeros(len(decoded), vocabulary, dtype=torch.float64)
    return full.scatter_add_(1, decoded.ids.clamp(min=0), torch.where(decoded.ids >= 0, decoded.weights, 0).double())


@pytest.mark.parametrize("exponent", [1.0, 0.8])
def test_rs_kd_is_right_on_average(exponent):
    """One distribution at 3,000 keys: the mean estimate is within five standard errors of p for every token."""
    p = torch.log_softmax(zipf(1, 30, 5), 1)
    many = Head(torch.ones(3000, 1), p.T.contiguous())
    signal = RSKD(draws=100 if exponent != 1 else 20, exponent=exponent, step=0.001)
    decoded = round_trip(signal, many, 30)
    estimates = dense(decoded, 30)
    assert torch.allclose(estimates.sum(1), torch.ones(3000, dtype=torch.float64), atol=1e-5)
    error = estimates.std(0) / 3000**0.5
    bias = 0 if exponent == 1 else 3e-3  # of dividing by the sum, O(1 / draws)
    assert ((estimates.mean(0) - p[0].double().exp()).abs() <= 5 * error + bias + 1e-5).all()
    assert_within(0.001, decoded, p.expand(3000, -1))


def test_rs_kd_counts_are_exact_and_depend_on_seed_and_key_alone():
    logits = zipf(90, 500, 6)
    signal = RSKD(draws=40)
    shared = signal.fit(head_of(logits), 500)

    def run(rows: np.ndarray, s: RSKD) -> torch.Tensor:
        part = head_of(logits[torch.from_numpy(rows)])
        codec = s.codec(shared)
        return dense(codec.decode(*codec.encode(part, keys(90)[rows])), 500)

    whole = run(np.arange(90), signal)
    assert (whole * 40 - (whole * 40).round()).abs().max() < 1e-4
    shuffled = np.random.default_rng(0).permutation(90)
    assert torch.equal(run(shuffled, signal), whole[torch.from_numpy(shuffled)])
    assert torch.equal(run(np.array([7]), signal), whole[7:8])
    assert not torch.equal(run(np.arange(90), RSKD(draws=40, seed=1)), whole)


def test_rs_kd_weights_keep_their_bound():
    head = head_of(zipf(150, 400, 9, 3.0))
    fine, coarse = (dense(round_trip(RSKD(30, 0.7, step), head, 400), 400) for step in (1e-3, 0.5))
    assert torch.equal(fine > 0, coarse > 0)
    difference = (fine.log() - coarse.log())[fine > 0].abs()
    assert 0.01 < difference.max() <= 0.3 * 0.501 + 1e-4


def test_rs_kd_never_draws_what_is_impossible():
    bias = torch.full((50,), -torch.inf)
    bias[[0, 20, 49]] = torch.tensor([1.0, 0.0, -1.0])
    for exponent in (0.0, 1.0, 2.0):
        decoded = round_trip(RSKD(draws=30, exponent=exponent), Head(torch.zeros(200, 1), torch.zeros(50, 1), bias), 50)
        assert set(decoded.ids.unique().tolist()) == {-1, 0, 20, 49}


def test_rs_kd_needs_whole_distributions():
    with pytest.raises(DistillError, match="top_k"):
        RSKD().fit(Sparse(torch.tensor([[1]]), torch.tensor([[-0.1]])), 10)


# --- hidden_states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hidden_states_come_back_bit_for_bit(dtype, tmp_path):
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=rng).to(dtype) for n in (21, 30))
    hidden[0, 0] = -0.0
    head = Head(hidden, weight, torch.randn(30, generator=rng).to(dtype), 0.5, 30.0)
    cache = SignalCache(tmp_path, HiddenStates(), "t", 30)
    cache.write([4, 2], [20, 1], head)
    back = SignalCache(tmp_path, HiddenStates(), "t", 30).read([4, 2])
    assert back.hidden.dtype == dtype
    for one, other in ((back.hidden, hidden), (back.weight, weight), (back.bias, head.bias)):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert (back.scale, back.softcap) == (0.5, 30.0)
    assert cache.summary()["kl_max"] == 0
    with pytest.raises(DistillError, match="width"):
        cache.write([5], [1], Head(torch.zeros(1, 8, dtype=dtype), torch.zeros(30, 8, dtype=dtype)))


# --- the store ------------------------------------------------------------------------------------------------------

V, LENGTHS = 600, [30, 0, 1, 17, 64]


def distributions(seed: int, n: int = sum(LENGTHS)) -> Head:
    return head_of(zipf(n, V, seed))


def filled(folder: Path, signal=None) -> SignalCache:
    """Sequences 10 … 14 and, in a second file, 20 … 24."""
    cache = SignalCache(folder, signal or TopK(k=12), "teacher", V)
    cache.write(np.arange(10, 15), LENGTHS, distributions(0))
    cache.write(np.arange(20, 25), LENGTHS, distributions(1))
    return cache


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.signal"))


def equal(a: Sparse, b: Sparse) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("signal", [TopK(k=12), TopK(k=12, mass=0.5), TopK(k=V), RSKD(draws=9)])
def test_random_access_equals_sequential(tmp_path, signal):
    filled(tmp_path, signal)
    cache = SignalCache(tmp_path, signal, "teacher", V)
    order = np.array([23, 10, 14, 20, 13, 24, 12, 11])
    whole = cache.read(order)
    lengths = cache.lengths(order)
    assert lengths.tolist() == [LENGTHS[s % 10] for s in order]
    assert len(whole) == lengths.sum()
    each = [cache.read([s]) for s in order]
    assert torch.equal(torch.cat([part.ids for part in each]), whole.ids)
    rng = np.random.default_rng(0)
    take = rng.integers(0, len(whole), 200)  # any order, some several times
    sequence = np.repeat(order, lengths)[take]
    position = (np.arange(len(whole)) - np.repeat(np.cumsum(lengths) - lengths, lengths))[take]
    rows = cache.rows(sequence, position)
    assert torch.equal(rows.ids, whole.ids[take])
    assert torch.equal(rows.logprobs, whole.logprobs[take])
    if rows.weights is not None:
        assert torch.equal(rows.weights, whole.weights[take])


def test_what_is_there_and_what_is_asked_wrongly(tmp_path):
    cache = filled(tmp_path)
    assert cache.have(12)
    assert not cache.have(15)
    assert cache.missing([24, 25, 10, 9]).tolist() == [25, 9]
    assert cache.sequences.tolist() == [*range(10, 15), *range(20, 25)]
    for ask in (lambda: cache.read([10, 77]), lambda: cache.rows([77], [0])):
        with pytest.raises(DistillError, match="77"):
            ask()
    for position in (-1, 17):
        with pytest.raises(DistillError, match="sequence 13 has 17 positions"):
            cache.rows([13], [position])
    for bad in (([1, 1], [2, 2], 4), ([-1], [4], 4), ([1], [3], 4), ([1, 2], [4], 4)):
        with pytest.raises(DistillError):
            cache.write(bad[0], bad[1], distributions(0, bad[2]))
    cache.write([], [], distributions(0, 1).__class__(torch.empty(0, 1), torch.zeros(V, 1)))
    assert len(cache.rows([], [])) == 0


def test_what_is_there_is_not_written_again(tmp_path):
    other = SignalCache(tmp_path, TopK(k=12), "teacher", V)  # opened while nothing was there
    cache = filled(tmp_path)
    before = cache.read([13])
    other.write([13, 30], [17, 3], distributions(5, 20))
    cache.refresh()
    assert equal(cache.read([13]), before)
    assert cache.lengths([13, 30]).tolist() == [17, 3]
    cache.write([13, 30], [17, 3], distributions(6, 20))
    assert len(shards(tmp_path)) == 3


def test_the_error_and_size_are_stated(tmp_path):
    summary = filled(tmp_path).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["tokens"] == 224
    assert summary["measured"] == 224
    assert 0 < summary["logprob_error_mean"] <= summary["logprob_error_max"] <= 0.1 + SLACK
    assert 0 < summary["kl_mean"] <= summary["kl_max"] < 0.01
    stored = sum(path.stat().st_size for path in [*shards(tmp_path), *tmp_path.glob("shared-*")])
    assert summary["bytes_per_token"] == stored / 224


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch):
    cache = filled(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DistillError, match="No space left on device"):
            cache.write([30], [3], distributions(2, 3))
    assert list(tmp_path.glob("*.unfinished")) == []
    assert cache.missing([30, 10]).tolist() == [30]
    cache.write([30], [3], distributions(2, 3))
    assert len(cache.read([30, 10])) == 33


def test_text_stores_nothing(tmp_path):
    cache = SignalCache(tmp_path, Text(), "teacher", V)
    cache.write([0, 1], [5, 6], distributions(0, 11))
    assert cache.read([0]) is None
    assert cache.lengths([1, 0]).tolist() == [6, 5]


# --- damage ---------------------------------------------------------------------------------------------------------


@QUICK
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path_factory, where, bit):
    folder = tmp_path_factory.mktemp("flipped")
    good = filled(folder)
    truth = {s: good.read([s]) for s in good.sequences.tolist()}
    victim = shards(folder)[0]
    content = bytearray(victim.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    victim.write_bytes(content)
    cache = SignalCache(folder, TopK(k=12), "teacher", V)
    bad = set(cache.verify().tolist()) | set(cache.missing(range(10, 15)).tolist())
    assert 1 <= len(bad) <= 5
    assert set(cache.sequences.tolist()) == set(truth) - bad
    for sequence in cache.sequences.tolist():
        assert equal(cache.read([sequence]), truth[sequence])


def test_a_damaged_sequence_is_named_and_can_be_made_again(tmp_path):
    truth = filled(tmp_path).read([14])
    victim = shards(tmp_path)[0]
    content = bytearray(victim.read_bytes())
    content[-3] ^= 4  # the last sequence of the file
    victim.write_bytes(content)
    cache = SignalCache(tmp_path, TopK(k=12), "teacher", V)
    assert equal(cache.rows([13], [2]), Sparse(*(column[2:3] for column in _columns(cache.read([13])))))
    with pytest.raises(DistillError, match=f"{victim.name}.*the sequences 14 again"):
        cache.rows([14, 13], [0, 0])
    assert cache.missing(range(10, 15)).tolist() == [14]
    cache.write([14], [64], head_of(zipf(sum(LENGTHS), V, 0)[-64:]))
    assert equal(cache.read([14]), truth)
    again = SignalCache(tmp_path, TopK(k=12), "teacher", V)
    assert again.verify().tolist() == []  # the later file counts
    assert equal(again.read([14]), truth)


def _columns(sparse: Sparse) -> tuple[torch.Tensor, torch.Tensor]:
    return sparse.ids, sparse.logprobs


def test_a_cut_file_loses_the_sequences_at_its_end(tmp_path):
    filled(tmp_path)
    victim = shards(tmp_path)[0]
    os.truncate(victim, victim.stat().st_size - 1)
    cache = SignalCache(tmp_path, TopK(k=12), "teacher", V)
    assert cache.verify().tolist() == [14]
    assert len(cache.read([10, 11, 12, 13])) == 48
    os.truncate(victim, 40)
    assert SignalCache(tmp_path, TopK(k=12), "teacher", V).sequences.tolist() == [20, 21, 22, 23, 24]
    assert [path.name for path in tmp_path.glob("*.damaged")] == [victim.name + ".damaged"]


def test_a_damaged_or_lost_shared_file_is_told(tmp_path):
    filled(tmp_path)
    [shared] = tmp_path.glob("shared-*")
    content = bytearray(shared.read_bytes())
    content[50] ^= 1
    shared.write_bytes(content)
    with pytest.raises(DistillError, match="damaged; delete"):
        SignalCache(tmp_path, TopK(k=12), "teacher", V).read([10])
    shared.unlink()
    with pytest.raises(DistillError, match="lacks its shared file"):
        SignalCache(tmp_path, TopK(k=12), "teacher", V).write([1], [1], distributions(0, 1))


@pytest.mark.parametrize(
    ("named", "signal", "teacher", "vocabulary", "temperature"),
    [
        ("teacher 'teacher', not 'other'", TopK(k=12), "other", V, 1.0),
        ("vocabulary 600, not 601", TopK(k=12), "teacher", V + 1, 1.0),
        ("temperature 1.0, not 2.0", TopK(k=12), "teacher", V, 2.0),
        ("k 12, not 13", TopK(k=13), "teacher", V, 1.0),
        ("signal 'top_k', not 'rs_kd'", RSKD(), "teacher", V, 1.0),
    ],
)
def test_another_identity_is_refused(tmp_path, named, signal, teacher, vocabulary, temperature):
    filled(tmp_path)
    with pytest.raises(DistillError, match=named):
        SignalCache(tmp_path, signal, teacher, vocabulary, temperature)


# --- several processes ----------------------------------------------------------------------------------------------


def lists(seed: int) -> Sparse:
    """What an API tells of 8 positions."""
    rng = torch.Generator().manual_seed(seed)
    values, ids = torch.log_softmax(3 * torch.randn(8, 600, generator=rng), dim=1).topk(12)
    return Sparse(ids, values)


WRITER = f"""
import sys
from pathlib import Path
import torch
from distill.heads import Sparse
from distill.signals.store import SignalCache
from distill.signals.top_k import TopK
{inspect.getsource(lists)}
cache = SignalCache(Path(sys.argv[1]), TopK(k=12), "teacher", 600)
for first in range(0, int(sys.argv[2]), 2):
    cache.write([first, first + 1], [5, 3], lists(first))
    print(first, flush=True)
"""


def writer(folder: Path, sequences: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(folder), str(sequences)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_killed_writer_loses_nothing_that_was_written(tmp_path):
    process = writer(tmp_path, 1_000_000)
    assert process.stdout is not None
    for _ in range(6):
        last = process.stdout.readline()
    time.sleep(0.02)
    process.send_signal(signals.SIGKILL)
    process.wait()
    (tmp_path / "00000099-0.signal.unfinished").write_bytes(b"half a file")
    cache = SignalCache(tmp_path, TopK(k=12), "teacher", V)
    done = cache.sequences
    assert len(done) >= int(last) + 2
    assert cache.verify().tolist() == []
    wanted = np.arange(int(done[-1]) + 5)
    rest = cache.missing(wanted)
    assert sorted([*done, *rest]) == wanted.tolist()
    cache.write(rest, [2] * len(rest), distributions(7, 2 * len(rest)))
    assert cache.missing(wanted).tolist() == []
    assert list(tmp_path.glob("*.unfinished")) == []
    fresh = SignalCache(tmp_path / "fresh", TopK(k=12), "teacher", V)
    fresh.write([0, 1], [5, 3], lists(0))
    assert equal(cache.read([0, 1]), fresh.read([0, 1]))


def test_two_processes_may_fill_one_cache(tmp_path):
    both = [writer(tmp_path, 24) for _ in range(2)]
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    cache = SignalCache(tmp_path, TopK(k=12), "teacher", V)
    assert cache.sequences.tolist() == list(range(24))
    assert cache.verify().tolist() == []
    assert len(list(tmp_path.glob("shared-*"))) == 1
    assert len(shards(tmp_path)) == 12  # nothing was stored twice
    assert len(cache.read(np.arange(24))) == 12 * 8


def test_a_reader_learns_what_another_wrote(tmp_path):
    reader = SignalCache(tmp_path, TopK(k=12), "teacher", V)
    with pytest.raises(DistillError, match="10"):
        reader.read([10])
    other = filled(tmp_path)
    reader.refresh()
    assert equal(reader.read([10]), other.read([10]))
