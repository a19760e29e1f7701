"""Generation of a local teacher against transformers' text-generation pipeline: same model, dtype, threads, prompts.

    python scripts/bench/generation.py [--prompts 256] [--max-tokens 128] [--repeats 1] [--threads 2]

Greedy answers of SmolLM2-135M-Instruct in bfloat16 to prompts of mixed length that call for answers of mixed length. An
answer's tokens count up to its end token and no further: padding that a batch computes behind it is no answer. The
pipeline is asked in batches of 16, once in the order of the prompts and once sorted by length. All take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import pipeline

from distill.config import cache_dir
from distill.language import Prompts, Sampling, Task, texts
from distill.provider.teachers.smollm2 import SmolLM2
from distill.randomness import generator
from distill.training import Trainer

TOPICS = (
    "France", "the sea", "photosynthesis", "a bicycle", "the number seven", "winter", "Shakespeare", "copper", "bees",
    "the moon", "bread", "a black hole", "democracy", "the piano", "Kenya", "volcanoes", "a library", "gravity",
)  # fmt: skip
ORDERS = (
    "Name one thing that has to do with {}.",
    "Is {} a plant? Answer yes or no.",
    "Write one sentence about {}.",
    "Explain {} to a child in three sentences.",
    "List five facts about {}.",
    "Write a short story in which {} plays a part.",
)
CONTEXT = (
    "I have read a lot about this lately and would like to hear what you make of it. My friends and I disagree, and "
    "each of us has found a source that says something else, so be careful and stay with what is well known. "
)
AT_LEAST = 1.4
PEER_BATCH = 16
CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}


def questions(count: int) -> list[str]:
    """Orders and topics in every combination, behind none to four times the same words."""
    rng = generator(0, "bench", "generation")
    asked = [order.format(topic) for topic in TOPICS for order in ORDERS]
    return [CONTEXT * int(rng.integers(0, 5)) + asked[int(rng.integers(len(asked)))] for _ in range(count)]


def until_end(answer: list[int], end: int) -> list[int]:
    """The answer with its end token, without what a batch computed behind it."""
    return answer[: answer.index(end) + 1] if end in answer else answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument("--cache", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    teacher = SmolLM2(batch_size=options.batch_size)
    prompts = Prompts.of_users(questions(options.prompts))
    nothing = Prompts(texts([]))
    teacher.prepare(Task("bench", nothing, nothing, nothing), Trainer(device="cpu"), options.cache or cache_dir())
    sampling = Sampling(max_tokens=options.max_tokens, temperature=0)
    lengths = teacher.count_tokens(prompts, sampling)
    chats = [prompts.messages(row) for row in range(len(prompts))]

    folder, _ = teacher._find(options.cache or cache_dir())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")

    def ours() -> list[list[int]]:
        answers = teacher.generate(prompts, sampling, np.zeros(len(prompts), np.int64))
        return [answers.tokens(row).tolist() for row in range(len(prompts))]

    def peer(order: np.ndarray) -> list[list[int]]:
        found = ask(
            [chats[row] for row in order],
            batch_size=PEER_BATCH,
            max_new_tokens=options.max_tokens,
            do_sample=False,
            return_tensors=True,
        )
        answers: list[list[int]] = [[] for _ in order]
        for place, (row, (one,)) in enumerate(zip(order.tolist(), found, strict=True)):
            first = place - place % PEER_BATCH  # a batch is padded to its longest prompt, on the left
            answers[row] = until_end(
                one["generated_token_ids"][lengths[order[first : first + PEER_BATCH]].max() :], tokenizer.eos_token_id
            )
        return answers

    ways: dict[str, Callable[[], list[list[int]]]] = {
        f"distill, {options.batch_size}": ours,
        f"pipeline, {PEER_BATCH}": lambda: peer(np.arange(len(prompts))),
        f"pipeline, {PEER_BATCH}, sorted by length": lambda: peer(np.argsort(lengths)),
    }
    seconds: dict[str, dict[str, list[float]]] = {way: {clock: [] for clock in CLOCKS} for way in ways}
    answers: dict[str, list[list[int]]] = {}
    for repeat in range(options.repeats):
        for way in list(ways) if repeat % 2 == 0 else reversed(ways):
            started = {clock: read() for clock, read in CLOCKS.items()}
            answers[way] = ways[way]()
            for clock, read in CLOCKS.items():
                seconds[way][clock].append(read() - started[clock])

    told = f"{lengths.min()} to {lengths.max()} prompt tokens, answers of at most {options.max_tokens}"
    table = Table(title=f"SmolLM2, bfloat16, {options.prompts} prompts, {told}, {options.threads} threads")
    for column in ("way", "answer tokens", "shortest", "longest", "wall s", "tokens/s", "tokens/CPU s"):
        table.add_column(column, justify="right")
    rates: dict[tuple[str, str], float] = {}
    for way, some in answers.items():
        counts = [len(answer) for answer in some]
        middle = {clock: statistics.median(seconds[way][clock]) for clock in CLOCKS}
        for clock in CLOCKS:
            rates[way, clock] = sum(counts) / middle[clock]
        numbers = [f"{value}" for value in (sum(counts), min(counts), max(counts))]
        numbers += [f"{value:.1f}" for value in (middle["wall"], rates[way, "wall"], rates[way, "CPU"])]
        table.add_row(way, *numbers)
    console = Console()
    console.print(table)
    own, *peers = answers
    for way in peers:
        console.print(
            f"against {way}: {rates[own, 'wall'] / rates[way, 'wall']:.2f} times the tokens a second (wall), "
            f"{rates[own, 'CPU'] / rates[way, 'CPU']:.2f} (CPU), n={options.repeats}; at least {AT_LEAST} is asked for"
        )
        same = statistics.mean(a == b for a, b in zip(answers[own], answers[way], strict=True))
        console.print(f"{same:.0%} of the answers are the same to the last token (bfloat16 rounds by batch)")
    console.print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
