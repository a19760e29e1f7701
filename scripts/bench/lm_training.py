"""Training a 15 M-parameter student on text and on a teacher's distributions, against TRL's SFTTrainer and GKDTrainer.

    pip install trl && python scripts/bench/lm_training.py --teacher FOLDER [--steps 4] [--threads 1] [--repeats 2]

FOLDER holds SmolLM2-135M-Instruct with its tokenizer (what the teacher `smollm2` keeps in its cache will do). Both
sides train the same network from the same first weights on the same eight examples of 256 tokens, float32, AdamW,
clipped at 1. All eight are one batch, so that the losses of each step can be compared: they must agree. Tokens are
those of all examples, prompts included, for both. With `--prompt-tokens 1` every position is learnt, which favours a
trainer that computes every position anyway; with more, positions of prompts are not learnt, on either side.

Each contender has a process of its own (its peak memory is that of the whole process, teacher and libraries included)
and they take turns. Seconds are medians over all steps but the first. "replayed" keeps the teacher's hidden states
from the first epoch, as the signal cache does: a student that is trained on stored signals never waits for the teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, LENGTH, LR = 8, 256, 1e-3
CONTENDERS = {
    "text": ("trl SFT", "distill SFT"),
    "JSD": ("trl GKD", "distill GKD", "distill GKD, replayed"),
}
GOALS = {"distill SFT": (1.2, None), "distill GKD": (2.5, 1 / 3)}  # times the tokens/s, share of the memory


class Clock:
    """When each step ended, on the wall and on this process's CPUs."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def tick(self) -> None:
        self.ticks.append((time.perf_counter(), time.process_time()))

    def seconds(self, which: int) -> list[float]:
        return [b[which] - a[which] for a, b in zip(self.ticks, self.ticks[1:], strict=False)]


def examples(tokenizer: Any, prompt_tokens: int) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """Prompts as text and as tokens, and answers as tokens: words drawn at random from the vocabulary."""
    import numpy as np

    words = [i for token, i in tokenizer.get_vocab().items() if token[:1] == "Ġ" and token[1:].isalpha()]
    rng = np.random.default_rng(0)
    texts, prompts, answers = [], [], []
    while len(texts) < BATCH:
        ids = rng.choice(sorted(words), LENGTH).tolist()
        text = tokenizer.decode(ids[:prompt_tokens])
        if tokenizer(text).input_ids == ids[:prompt_tokens]:
            texts.append(text)
            prompts.append(ids[:prompt_tokens])
            answers.append(ids[prompt_tokens:])
    return texts, prompts, answers


def student() -> Any:
    from distill.students.llama import Llama

    return Llama(width=256, layers=4, heads=4, kv_heads=2)


def train_trl(name: str, options: argparse.Namespace, clock: Clock) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from distill.language_training import build_language

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **others: Any) -> None:
            clock.tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **others: Any) -> None:
            if "loss" in logs:
                clock.losses.append(logs["loss"])

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    _, prompts, answers = examples(tokenizer, options.prompt_tokens)
    rows = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in zip(prompts, answers, strict=True)]
    network = build_language(student(), tokenizer, 0)
    kind, extra = (SFTConfig, {}) if name == "trl SFT" else (GKDConfig, {"lmbda": 0.0, "beta": 0.5})
    with tempfile.TemporaryDirectory() as folder:
        config = kind(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=options.steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=None,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            **extra,
        )
        others: dict[str, Any] = {}
        if name == "trl GKD":
            others["teacher_model"] = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32)
        trainer = {"trl SFT": SFTTrainer, "trl GKD": GKDTrainer}[name](
            model=network,
            args=config,
            data_collator=collate,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Tick()],
            **others,
        )
        trainer.train()


def train_distill(name: str, options: argparse.Namespace, clock: Clock) -> None:
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from distill.heads import Head
    from distill.language import Completions, Prompts, SyntheticSet, texts
    from distill.language_training import TeacherSignal, fit_language_student
    from distill.objectives.sequence_kd import SequenceKD
    from distill.objectives.token_jsd import TokenJSD
    from distill.provider.teachers.hf_causal_lm import HFCausalLM
    from distill.training import Recipe, Trainer

    class Replayed:
        """The hidden states of the first time."""

        def __init__(self, signal: TeacherSignal) -> None:
            sequence = np.repeat(np.arange(BATCH), LENGTH - options.prompt_tokens)
            token = np.tile(np.arange(LENGTH - options.prompt_tokens), BATCH)
            self.head = signal.for_positions(sequence, token)

        def for_positions(self, sequence: np.ndarray, token: np.ndarray) -> Head:
            rows = torch.from_numpy(sequence.astype(np.int64) * (LENGTH - options.prompt_tokens) + token)
            return Head(self.head.hidden[rows], self.head.weight)

    def log(row: dict[str, Any]) -> None:
        clock.tick()
        clock.losses.append(row["loss"])

    trainer = Trainer(device="cpu", progress=False, log=log)
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    asked, _, answers = examples(tokenizer, options.prompt_tokens)
    long = np.full(BATCH, LENGTH, np.int64)
    completions = Completions(
        column=texts([tokenizer.decode(ids) for ids in answers]),
        finish=texts(["length"] * BATCH),
        prompt_tokens=long,
        completion_tokens=long,
        offsets=np.cumsum([0, *map(len, answers)]),
        token_ids=np.concatenate(answers).astype(np.int32),
    )
    prompts = Prompts(texts(asked), chat=False)
    synthetic = SyntheticSet(prompts, completions, np.arange(BATCH), None, np.zeros(BATCH))
    signal: Any = None
    if name != "distill SFT":
        teacher = HFCausalLM(options.teacher, dtype="float32")
        teacher.prepare(None, trainer, Path("unused"))
        signal = TeacherSignal(teacher, synthetic)
        if name == "distill GKD, replayed":
            signal = Replayed(signal)
            del teacher
    fit_language_student(
        trainer,
        student(),
        synthetic,
        SequenceKD() if signal is None else TokenJSD(beta=0.5),
        Recipe(
            epochs=options.steps,
            batch_size=BATCH,
            optimizer="adamw",
            lr=LR,
            schedule="constant",
            gradient_clip=1.0,
            log_steps=1,
        ),
        signal=signal,
        teachers=tokenizer,
        max_length=LENGTH,
        seed=0,
        name="student",
    )


def contend(name: str, options: argparse.Namespace) -> None:
    """One contender, in this process; the last line that it prints is what was measured."""
    import torch

    torch.set_num_threads(options.threads)
    clock = Clock()
    (train_trl if name.startswith("trl") else train_distill)(name, options, clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"wall": clock.seconds(0), "cpu": clock.seconds(1), "peak_gb": peak, "losses": clock.losses}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--signals", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        options.prompt_tokens = options.prompt_tokens[0]
        contend(options.contender, options)
        return

    from rich.console import Console
    from rich.table import Table

    console = Console()
    for prompt_tokens in options.prompt_tokens:
        table = Table(title=f"{BATCH} × {LENGTH} tokens, {prompt_tokens} of each a prompt; {options.threads} thread(s)")
        for column in ("signal", "trainer", "tokens/s", "CPU s/step", "peak GB", "× tokens/s", "× memory", "losses"):
            table.add_column(column, justify="right")
        for signal in options.signals:
            names = CONTENDERS[signal]
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for repeat in range(options.repeats):
                for name in names if repeat % 2 == 0 else names[::-1]:
                    found[name].append(measure(name, prompt_tokens, options))
            rival = None
            for name, runs in found.items():
                speed = BATCH * LENGTH / statistics.median(s for run in runs for s in run["wall"])
                cpu = statistics.median(s for run in runs for s in run["cpu"])
                peak = max(run["peak_gb"] for run in runs)
                rival = rival or (speed, peak)
                losses = " ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:3])
                ratios = speed / rival[0], peak / rival[1]
                table.add_row(
                    signal, name, f"{speed:.0f}", f"{cpu:.2f}", f"{peak:.2f}", *map("{:.2f}".format, ratios), losses
                )
        console.print(table)
    for name, (faster, memory) in GOALS.items():
        least = f" with at most {memory:.2f} times the memory" if memory else ""
        console.print(f"asked for of {name}: {faster} times the tokens/s{least}")
    console.print(
        f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs; n = {options.repeats} × {options.steps - 1} steps"
    )


def measure(name: str, prompt_tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    words = ["--contender", name, "--teacher", options.teacher, "--prompt-tokens", str(prompt_tokens)]
    words += ["--steps", str(options.steps), "--threads", str(options.threads)]
    threads = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, __file__, *words], env={**os.environ, **threads}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
