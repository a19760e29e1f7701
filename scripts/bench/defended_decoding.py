"""Generation under defenses that ask proxies, against the forward passes that they need by definition.

    python scripts/bench/defended_decoding.py [--prompts 64] [--max-tokens 48] [--batch 32] [--repeats 7] [--threads 1]

Llamas of random weights: a teacher, and a proxy of half its width. What is needed by definition: the teacher's answers
without a defense, and each proxy's forward passes over these very tokens in the same batches, with a cache of its own
and without drawing anything. Antidistillation asks two proxies, product of experts and the fingerprint one. All take
turns, and every answer has the same number of tokens; the least time of the repeats counts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from distill.decoding import Decoder, Guided, Network, Slots
from distill.language import Sampling
from distill.provider.defenses.antidistillation import Antidistillation
from distill.provider.defenses.antidistillation_fingerprint import AntidistillationFingerprint
from distill.provider.defenses.product_of_experts import ProductOfExperts
from distill.randomness import generator
from distill.students.llama import Llama
from distill.training import Recipe

AT_MOST = 1.15
CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}


class NoText:
    """A tokenizer for answers that nobody reads."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return ""


def a_network(width: int, layers: int, vocabulary: int, seed: int) -> Network:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * round(width / 3),
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
    )
    return Network(LlamaForCausalLM(config).eval())


@torch.inference_mode()
def read(network: Network, prompts: list[list[int]], answers: np.ndarray, batch: int) -> None:
    """The forward passes that decoding these answers costs: each token but the last is read."""
    for start in range(0, len(prompts), batch):
        some, told = prompts[start : start + batch], torch.from_numpy(answers[start : start + batch])
        slots, lengths = Slots(len(some)), torch.tensor([len(prompt) for prompt in some])
        network.read(some, slots)
        for place in range(told.shape[1] - 1):
            network.step(told[:, place], lengths + place, slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"prompts": 64, "max-tokens": 48, "batch": 32, "repeats": 7, "threads": 1}
    sizes = {"width": 384, "layers": 6, "vocabulary": 8192}
    for name, value in (defaults | sizes).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    teacher = a_network(options.width, options.layers, options.vocabulary, 0)
    proxies = [a_network(options.width // 2, options.layers, options.vocabulary, seed) for seed in (1, 2)]
    rng = generator(0, "bench", "defended_decoding")
    # One length in each batch, so that no pass is spent on padding in one measurement and not in the other.
    prompts = [rng.integers(0, options.vocabulary, size=32).tolist() for _ in range(options.prompts)]
    uniforms = rng.random((options.prompts, options.max_tokens))
    sampling = Sampling(max_tokens=options.max_tokens)
    decoder = Decoder(teacher, NoText(), set(), options.batch)

    def answers(*processors: Guided) -> np.ndarray:
        told = decoder.generate(prompts, sampling, uniforms, 0, processors).token_ids
        assert told is not None
        return told.reshape(options.prompts, options.max_tokens).astype(np.int64)

    student: Any = Llama()
    recipe = Recipe()
    defenses = {
        "antidistillation": (Antidistillation(student, recipe, answers=0), 2),
        "product_of_experts": (ProductOfExperts(student, recipe, answers=0), 1),
        "antidistillation_fingerprint": (AntidistillationFingerprint(student, recipe, answers=0), 1),
    }
    written = answers()
    work: dict[str, Callable[[], object]] = {
        "teacher": answers,
        "proxy": lambda: read(proxies[0], prompts, written, options.batch),
    }
    for name, (defense, count) in defenses.items():
        defense.networks = proxies[:count]
        processor = defense.logits_processor(sampling)
        assert processor is not None
        work[name] = lambda processor=processor: answers(processor)  # type: ignore[misc]
    seconds: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in CLOCKS} for name in work}
    for repeat in range(options.repeats + 1):
        for name, do in work.items():
            started = {clock: now() for clock, now in CLOCKS.items()}
            do()
            for clock, now in CLOCKS.items():
                if repeat:  # the first round warms up
                    seconds[name][clock].append(now() - started[clock])
    least = {name: {clock: min(values) for clock, values in clocks.items()} for name, clocks in seconds.items()}
    table = Table("", *(f"{clock} s" for clock in CLOCKS), *(f"over the passes, {clock}" for clock in CLOCKS))
    for name in work:
        cells = [f"{least[name][clock]:.2f}" for clock in CLOCKS]
        if name in defenses:
            count = defenses[name][1]
            ratios = [least[name][c] / (least["teacher"][c] + count * least["proxy"][c]) for c in CLOCKS]
            cells += [f"{ratio:.3f}" for ratio in ratios]
        table.add_row(name, *cells)
    console = Console(width=110)
    console.print(table)
    console.print(f"asked for: at most {AT_MOST} of the passes; n={options.repeats}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
