"""A student that takes the mark of its teacher's text out of what it says."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from distill.contracts import LanguageStudent
from distill.decoding import Processor
from distill.heads import Head
from distill.language import SyntheticSet
from distill.packing import encode
from distill.records import Reveals
from distill.speaker import CausalLM

ANSWER_TOKENS = 200  # of each answer that are looked at, as in the authors' code
ROWS = 1024  # positions whose whole distributions are held at once


class Neutralised:
    """Watermark neutralisation: what training made more probable after a few tokens is subtracted while it speaks.

    logits - delta * (d_0 + Σ_n w_n d_n), with d_n = min(2, P_after / P_before) / 2 for the tokens that rose and 0 for
    the others. P(· | last n tokens) is the student's, after and before training, averaged over the places in the
    transfer set that follow these n tokens. w_n = (ln f / ln f_max)^-alpha, with f the share of such places and f_max
    that of the most frequent n tokens.

    Paper: Can LLM Watermarks Robustly Prevent Unauthorized Knowledge Distillation?, Pan et al., ACL 2025. Formulas and
    numbers were compared with the authors' code, which leaves d_0 (whatever was before, over the whole vocabulary)
    unweighted and takes no tokens but the `top_k` most probable ones into d_n.
    Threat model: the student knows that its teacher's text may be marked and how many tokens before decide at most;
    never the key. It asks nothing for this. It must have spoken the language before: whatever one from fresh weights
    knows has risen, and is subtracted with the mark. Take one that was trained on other text (`causal_lm`).
    Departs from the code, which reads answers without their prompts and draws the places at random: they are read as
    the student speaks, prompt included, and the first `max_contexts` are taken.

    Args:
        student: Whose logits are changed: any student of the generation domain.
        delta: Strength of the subtraction; 0 leaves the student as it is.
        width: Up to so many tokens before.
        top_k: So many tokens behind each.
        min_frequency: Tokens before with a smaller share are left out.
        max_contexts: So many places behind the same tokens are averaged.
        alpha: See above.

    Raises:
        ValueError: A value is out of its range.
    """

    requires: Reveals = Reveals.LABEL  # of an instance: the student's own

    def __init__(
        self,
        student: LanguageStudent,
        delta: float = 2.5,
        width: int = 2,
        top_k: int = 50,
        min_frequency: float = 5e-5,
        max_contexts: int = 1000,
        alpha: float = 0.3,
    ) -> None:
        for name, number in {"width": width, "top_k": top_k, "max_contexts": max_contexts}.items():
            if number < 1:
                raise ValueError(f"{name} is at least 1, not {number}")
        for name, value in {"delta": delta, "min_frequency": min_frequency, "alpha": alpha}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is at least 0, not {value}")
        self.student, self.delta, self.width, self.top_k = student, delta, width, top_k
        self.requires = student.requires
        self.min_frequency, self.max_contexts, self.alpha = min_frequency, max_contexts, alpha
        self._before: Any = None

    def tokenizer(self, teachers: Any) -> Any:
        """The student's own. Raises as it does."""
        return self.student.tokenizer(teachers)

    def build_language(self, tokenizer: Any) -> nn.Module:
        """The student's own; a copy is kept as it is before training. Raises as it does."""
        network = self.student.build_language(tokenizer)
        self._before = copy.deepcopy(network)
        return network

    def adapt(self, network: nn.Module, tokenizer: Any, synthetic: SyntheticSet) -> dict[str, torch.Tensor]:
        """What rose, for each n from 0 to `width`.

        Args:
            network: Trained, of what `build_language` returned last.
            tokenizer: Its own.
            synthetic: What it was trained on.

        Returns:
            ``before/n`` (p, n) int64, the frequent n tokens; ``behind/n`` (p, k) int64, tokens behind them;
            ``weights/n`` (p, k) float32, w_n d_n of those.
        """
        encoded = encode(synthetic, tokenizer)
        texts = [asked + told[:ANSWER_TOKENS] for asked, told in zip(encoded.prompts, encoded.answers, strict=True)]
        starts = [len(asked) for asked in encoded.prompts]
        device = next(network.parameters()).device
        after, before = (_read(each, tokenizer, texts, starts) for each in (network, self._before.to(device)))
        memory: dict[str, torch.Tensor] = {}
        for n in range(self.width + 1):
            places = _places(texts, starts, n)
            total = sum(map(len, places.values()))
            frequent = {some: rows for some, rows in places.items() if len(rows) > self.min_frequency * total}
            most = max(map(len, frequent.values()), default=total) / total
            k = min(self.top_k, after.vocabulary) if n else after.vocabulary
            behind, weights = torch.zeros(len(frequent), k, dtype=torch.int64), torch.zeros(len(frequent), k)
            for i, rows in enumerate(frequent.values()):
                some = rows[: self.max_contexts] if n else rows
                now, then = _mean(after, some), _mean(before, some)
                now, behind[i] = now.topk(k)
                risen = torch.where(now > then[behind[i]], (now / then[behind[i]]).clamp(max=2) / 2, 0)
                share = len(rows) / total
                weights[i] = risen if share == most else risen * (math.log(share) / math.log(most)) ** -self.alpha
            memory[f"before/{n}"] = torch.tensor(list(frequent), dtype=torch.int64).reshape(len(frequent), n)
            memory |= {f"behind/{n}": behind, f"weights/{n}": weights}
        return memory

    def speaking(self, memory: dict[str, torch.Tensor]) -> Processor:
        """Subtracts what rose behind the last tokens of each row."""
        tables = [
            ({tuple(tokens): i for i, tokens in enumerate(memory[f"before/{n}"].tolist())}, n)
            for n in range(self.width + 1)
        ]

        def change(tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
            changed = logits.clone()
            for known, n in tables:
                ends = [tuple(some[len(some) - n :]) for some in tokens]
                rows = [row for row, end in enumerate(ends) if end in known]
                found = torch.tensor([known[ends[row]] for row in rows], dtype=torch.int64)
                behind = memory[f"behind/{n}"][found].to(logits.device)
                less = self.delta * memory[f"weights/{n}"][found].to(logits)
                changed[rows] = changed[rows].scatter_add(1, behind, -less)
            return changed

        return change


def _read(network: Any, tokenizer: Any, texts: list[list[int]], starts: list[int]) -> Head:
    """The distributions of all answer tokens, one text after the other."""
    speaker = CausalLM(batch_size=1)
    speaker.hold(network, tokenizer)
    heads = speaker.heads(texts, starts)
    return replace(heads[0], hidden=torch.cat([head.hidden for head in heads]))


def _places(texts: list[list[int]], starts: list[int], n: int) -> dict[tuple[int, ...], list[int]]:
    """By n tokens, the answer tokens that they stand before, counted over all texts."""
    places: dict[tuple[int, ...], list[int]] = {}
    row = 0
    for text, start in zip(texts, starts, strict=True):
        for place in range(start, len(text)):
            if place >= n:
                places.setdefault(tuple(text[place - n : place]), []).append(row)
            row += 1
    return places


def _mean(head: Head, rows: list[int]) -> torch.Tensor:
    """(vocabulary,) the mean distribution at these places, on the CPU."""
    sums = torch.zeros(head.vocabulary)
    for part in torch.tensor(rows).split(ROWS):
        sums += head.take(part).logits().softmax(dim=1).sum(dim=0).cpu()
    return sums / len(rows)
