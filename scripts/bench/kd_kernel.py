"""The fused distillation loss against liger-kernel and TRL: forward and backward, float32, one thread, CPU.

    pip install trl liger-kernel
    python scripts/bench/kd_kernel.py [--repeats 5] [--shapes all|base|masked|wide] [--memory]

Student and teacher are hidden states and output matrices; the gradients of the student's two are computed. The peers:

- liger: liger-kernel's chunked fused-linear JSD loss, at each of several chunk sizes; the best one counts;
- trl: the tiled kernel of TRL's DistillationTrainer (its torch path);
- naive: the loss of TRL's GKDTrainer on full logits.

All take turns and the least CPU time of each counts, so that other processes disturb less. Losses are compared first:
they must agree to four digits. Peak memory is measured in a process of its own for each (Linux): what forward and
backward add to the inputs, gradients included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
from rich.console import Console
from rich.table import Table
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from distill.heads import Head
from distill.objectives.token_jsd import TokenJSD

# positions, vocabulary, widths of student and teacher, share of the positions that are masked
SHAPES = {
    "base": (1024, 32_000, 128, 256, 0.0),
    "masked": (1024, 32_000, 128, 256, 0.5),
    "wide": (256, 151_936, 256, 512, 0.0),
}
CHUNKS = (32, 64, 128, 256, 1024)
BETAS = (0.0, 0.5, 1.0)


class Case:
    """Inputs, and each implementation as a function from β to the mean loss over the valid positions."""

    def __init__(self, n: int, vocabulary: int, width: int, teacher_width: int, masked: float) -> None:
        rng = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(n, width, generator=rng).requires_grad_()
        self.weight = (torch.randn(vocabulary, width, generator=rng) * width**-0.5).requires_grad_()
        self.teacher = torch.randn(n, teacher_width, generator=rng)
        self.teacher_weight = torch.randn(vocabulary, teacher_width, generator=rng) * teacher_width**-0.5
        self.valid = torch.rand(n, generator=rng) >= masked
        self.labels = torch.randint(vocabulary, (n,), generator=rng).masked_fill(~self.valid, -100)
        self.count = int(self.valid.sum())

    def distill(self, beta: float) -> torch.Tensor:
        valid = self.valid
        student, teacher = Head(self.hidden[valid], self.weight), Head(self.teacher[valid], self.teacher_weight)
        return TokenJSD(beta).loss(student, self.labels[valid], teacher) / self.count

    def liger(self, chunk: int) -> Callable[[float], torch.Tensor]:
        def loss(beta: float) -> torch.Tensor:
            module = LigerFusedLinearJSDLoss(0.0, 1.0, beta, temperature=1.0, compiled=False, chunk_size=chunk)
            return module(self.hidden, self.weight, self.teacher, self.teacher_weight, self.labels)

        return loss

    def trl(self, beta: float) -> torch.Tensor:
        states = self.hidden[None], self.teacher[None], self.weight, self.teacher_weight
        return _chunked_divergence_loss(*states, self.valid[None].long(), beta, self.count)[0]

    def naive(self, beta: float) -> torch.Tensor:
        student, teacher = self.hidden @ self.weight.T, self.teacher @ self.teacher_weight.T
        return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], self.labels[None], beta)

    def implementations(self) -> dict[str, Callable[[float], torch.Tensor]]:
        ligers = {f"liger {chunk}": self.liger(chunk) for chunk in CHUNKS if chunk <= len(self.hidden)}
        return {"distill": self.distill, **ligers, "trl": self.trl, "naive": self.naive}

    def step(self, loss: Callable[[float], torch.Tensor], beta: float) -> tuple[float, float]:
        """CPU seconds of forward and backward, and the loss."""
        self.hidden.grad = self.weight.grad = None
        started = time.process_time()
        value = loss(beta)
        value.backward()
        return time.process_time() - started, value.item()


def peak_mib(shape: str, implementation: str, beta: float) -> float:
    """What one step adds to a process that holds the inputs."""
    command = [sys.executable, __file__, "--measure", shape, implementation, str(beta)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(shape: str, implementation: str, beta: float) -> None:
    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    small = Case(8, 64, 8, 8, 0.0)
    small.step(small.implementations().get(implementation, small.liger(8)), beta)  # loads what is loaded once
    case = Case(*SHAPES[shape])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    case.step(case.implementations()[implementation], beta)
    print((resident("VmHWM") - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", choices=["all", *SHAPES], default="all")
    parser.add_argument("--memory", action="store_true", help="measure the peaks too")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        shape, implementation, beta = options.measure
        return measure(shape, implementation, float(beta))
    console = Console(width=120)
    for shape in SHAPES if options.shapes == "all" else [options.shapes]:
        n, vocabulary, width, teacher_width, masked = SHAPES[shape]
        case = Case(*SHAPES[shape])
        table = Table(
            title=f"N={n}, V={vocabulary}, widths {width}/{teacher_width}, {masked:.0%} masked; least of "
            f"{options.repeats}, in brackets: times distill"
        )
        for column in ("β", "distill s", "liger (best chunk)", "trl", "naive", *(["MiB"] if options.memory else [])):
            table.add_column(column, justify="right")
        for beta in BETAS:
            implementations = case.implementations()
            losses = {name: case.step(loss, beta)[1] for name, loss in implementations.items()}  # warms up as well
            worst = max(abs(loss / losses["naive"] - 1) for loss in losses.values())
            if worst > 1e-4:
                raise SystemExit(f"the losses differ: {losses}")
            least = dict.fromkeys(implementations, float("inf"))
            for repeat in range(options.repeats):
                for name in list(implementations)[:: 1 if repeat % 2 else -1]:
                    least[name] = min(least[name], case.step(implementations[name], beta)[0])
            best = min((name for name in least if name.startswith("liger")), key=least.__getitem__)
            ours = least["distill"]
            peers = [f"{least[name]:.3f} ({least[name] / ours:.2f})" for name in (best, "trl", "naive")]
            peers[0] = f"{best.split()[1]}: {peers[0]}"
            row = [f"{beta:g}", f"{ours:.3f}", *peers]
            if options.memory:
                peaks = {name: peak_mib(shape, name, beta) for name in ("distill", best, "trl", "naive")}
                row.append(", ".join(f"{peak:.0f} ({peak / peaks['distill']:.1f})" for peak in peaks.values()))
            table.add_row(*row)
        console.print(table)
    console.print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs")
    return None


if __name__ == "__main__":
    main()
