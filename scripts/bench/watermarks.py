"""What watermarks of text cost: to score text, to test it, and to generate it.

    python scripts/bench/watermarks.py [--tokens 10000000] [--repeats 3] [--vocabulary 32000] [--prompts 64]

Scoring is of random tokens, on one thread. The permutation scheme is scored on text whose tokens are as frequent as
words are (Zipf's law), against a permutation drawn for each token. Generation is that of a random Llama (42 million
parameters at a vocabulary of 32,000) in float32, with answers of one length. All take turns on one thread, and seconds
of the processor are told beside those of the clock, so that what else runs matters less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from distill.decoding import Decoder, Network
from distill.language import Sampling
from distill.provider.defenses.gumbel import Gumbel
from distill.provider.defenses.kgw import KGW
from distill.provider.defenses.synthid import SynthID
from distill.randomness import generator
from distill.watermarking import SCHEMES, first_seen, permuted_list

AT_LEAST = 10_000_000  # tokens a second, hashed
TIMES = 20  # the permutation scheme against a permutation for each token
LOOPED = 5_000  # tokens


class Numbers:
    """In place of a tokenizer: tokens as numbers."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """By the clock and of the processor."""
    started, spent = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - spent


def taking_turns(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Medians, by the clock and of the processor."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(seconds(work))
    return {name: tuple(map(statistics.median, zip(*some, strict=True))) for name, some in found.items()}


def zipf(n: int, vocabulary: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) tokens, the kth most frequent of which has a chance that is proportional to 1 / k."""
    mass = np.cumsum(1 / np.arange(1, vocabulary + 1))
    return np.searchsorted(mass / mass[-1], rng.random(n))


def looped(before: np.ndarray, tokens: np.ndarray, mark: KGW, vocabulary: int) -> int:
    """Green tokens as the first code of such a mark counts them: a permutation for each token."""
    return sum(
        bool(permuted_list(window, mark.key, mark.gamma, vocabulary)[token])
        for window, token in zip(before.tolist(), tokens.tolist(), strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    rng = generator(0, "bench", "watermarks")

    before = rng.integers(0, options.vocabulary, (options.tokens, 4)).astype(np.int32)
    tokens = rng.integers(0, options.vocabulary, options.tokens).astype(np.int32)
    scored = {
        f"kgw, {scheme}, width {width}": KGW(scheme=scheme, width=width) for width in (1, 4) for scheme in SCHEMES
    }
    scored |= {"gumbel, ordered, width 4": Gumbel(), "synthid, ordered, width 4": SynthID()}
    works = {
        name: lambda mark=mark: mark.evidence(before[:, : mark.width], tokens)  # type: ignore[misc]
        for name, mark in scored.items()
    }
    table = Table(title=f"Scoring {options.tokens:,} tokens, one thread, n={options.repeats}")
    for column in ("watermark", "million tokens/CPU s", "million tokens/s (wall)"):
        table.add_column(column, justify="right")
    rates = {}
    for name, (wall, spent) in taking_turns(works, options.repeats).items():
        rates[name] = options.tokens / spent
        table.add_row(name, f"{rates[name] / 1e6:.1f}", f"{options.tokens / wall / 1e6:.1f}")
    console.print(table)
    console.print(f"slowest {min(rates.values()) / 1e6:.1f} million/CPU s; at least {AT_LEAST / 1e6:.0f} are asked for")

    million = min(1_000_000, options.tokens)
    once = zipf(million + 4, options.vocabulary, rng)
    some = np.lib.stride_tricks.sliding_window_view(once, 4)[:-1], once[4:]
    mark = KGW(width=4, scheme="ordered")

    def tested() -> float:
        counted = first_seen(*some)
        return mark.log10_p_value(mark.evidence(some[0][counted], some[1][counted]))

    parts = {"first_seen": lambda: first_seen(*some), "first_seen, scoring and p-value": tested}
    for name, (wall, spent) in taking_turns(parts, options.repeats).items():
        console.print(f"{name} of {million:,} tokens: {spent:.2f} CPU s, {wall:.2f} s")

    text = zipf(million + 1, options.vocabulary, rng)
    windows, after = text[:-1, None], text[1:]
    empty = seconds(lambda: KGW(scheme="permutation", vocabulary=options.vocabulary).evidence(windows, after))[1]
    warm_mark = KGW(scheme="permutation", vocabulary=options.vocabulary)
    few = slice(0, LOOPED)
    warm_mark.evidence(windows[few], after[few])
    warm = seconds(lambda: warm_mark.evidence(windows[few], after[few]))[1] / LOOPED
    each = seconds(lambda: looped(windows[few, 0], after[few], warm_mark, options.vocabulary))[1] / LOOPED
    assert (
        looped(windows[:200, 0], after[:200], warm_mark, options.vocabulary)
        == warm_mark.evidence(windows[:200], after[:200]).sum()
    )
    console.print(
        f"permutations of {options.vocabulary:,}: {1 / each:,.0f} tokens/CPU s one by one; "
        f"{million / empty:,.0f} over {million:,} tokens, from an empty cache ({each * million / empty:.0f} times); "
        f"{1 / warm:,.0f} with the lists of {LOOPED:,} tokens in it ({each / warm:.0f} times); {TIMES} are asked for"
    )

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    decoder = Decoder(Network(model), Numbers(), set(), batch_size=64)
    prompts = rng.integers(0, options.vocabulary, (options.prompts, 16)).tolist()
    sampling = Sampling(max_tokens=options.max_tokens)
    uniforms = rng.random((options.prompts, options.max_tokens))
    marked = {
        "undefended": KGW(delta=0),
        "kgw": KGW(),
        "kgw, self, width 4": KGW(scheme="self", width=4),
        "kgw, permutation": KGW(scheme="permutation", vocabulary=options.vocabulary),
        "gumbel": Gumbel(),
        "synthid": SynthID(),
    }
    works = {}
    for name, mark in marked.items():
        change = mark.logits_processor(sampling)
        works[name] = lambda change=change: decoder.generate(  # type: ignore[misc]
            prompts, sampling, uniforms, processors=[] if change is None else [change]
        )
    table = Table(
        title=f"{options.prompts} answers of {options.max_tokens} tokens, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters, one thread, n={options.repeats}"
    )
    for column in ("watermark", "tokens/CPU s", "CPU time against undefended"):
        table.add_column(column, justify="right")
    spent = {name: some[1] for name, some in taking_turns(works, options.repeats).items()}
    for name in marked:
        rate = options.prompts * options.max_tokens / spent[name]
        table.add_row(name, f"{rate:.0f}", f"{spent[name] / spent['undefended']:.2f}")
    console.print(table)
    console.print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
