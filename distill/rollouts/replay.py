"""Adaptive off-policy replay: the student's text is used more as validation worsens, and used again."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from distill.rollouts._rollout import Plain, sampling_of


class Replay(Plain):
    """With probability φ a step learns on the student's text, less and less of it fresh; φ grows as validation worsens.

    Paper: Ko, Kim, Chen and Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024,
    section 3.2 and algorithm 1, as the authors run it. φ begins at 0 and grows by `share_step` (up to 1) whenever the
    validation loss is at least `loss_rise` above what it was when φ last grew. In a step, with r uniform in [0, 1) and
    a share τ of the training over:

    * r < φ (1 − τ), or r < φ while the buffer is not full: the student writes, and the buffer keeps it (the oldest
      goes);
    * else r < φ: answers, with their prompts, are drawn from the buffer;
    * else: the synthetic set's.

    The first validation here is after the first epoch, the paper's before training; and ours is the objective's loss,
    where theirs is the cross-entropy.

    Args:
        loss_rise: ε, in nats per token.
        share_step: By how much φ grows.
        capacity: Answers in the buffer.
        temperature: Of drawing.
        top_p: Of drawing.
        max_tokens: Longest answer of the student.

    Raises:
        ValueError: A value is out of its range.
        DistillError: An option of drawing is.
    """

    needs_validation: ClassVar[bool] = True

    def __init__(
        self,
        loss_rise: float = 0.1,
        share_step: float = 0.1,
        capacity: int = 1000,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
    ) -> None:
        if not 0 <= loss_rise < float("inf"):
            raise ValueError(f"loss_rise is at least 0, not {loss_rise}")
        if not 0 < share_step <= 1:
            raise ValueError(f"share_step is more than 0 and at most 1, not {share_step}")
        if capacity < 1:
            raise ValueError(f"capacity is at least 1, not {capacity}")
        self.loss_rise, self.share_step, self.capacity = loss_rise, share_step, capacity
        self.sampling = sampling_of(max_tokens, temperature, top_p)

    def state(self, width: int) -> nn.Module | None:
        """An empty buffer and φ = 0."""
        self._memory = _Memory(self.capacity, width)
        return self._memory

    def examples(
        self, prompts: list[list[int]], write: Any, chance: float, progress: float
    ) -> list[tuple[list[int], list[int]]] | None:
        """See `distill.on_policy.Rollout`."""
        share = float(self._memory.share)
        full = int(self._memory.kept) >= self.capacity
        if chance >= share:
            return None
        if full and chance >= share * (1 - progress):
            return self._memory.recall(torch.randperm(self.capacity)[: len(prompts)])
        written = list(zip(prompts, write(prompts, self.sampling), strict=True))
        for prompt, answer in written:
            self._memory.keep(prompt, answer)
        return written

    def validated(self, loss: float) -> None:
        """See `distill.on_policy.Rollout`."""
        if self._memory.loss.isnan():
            self._memory.loss.fill_(loss)
        elif loss >= float(self._memory.loss) + self.loss_rise:
            self._memory.share.add_(self.share_step).clamp_(max=1)
            self._memory.loss.fill_(loss)


class _Memory(nn.Module):
    """φ (`share`), the validation loss when it last grew (NaN: none yet), and examples of at most `width` tokens."""

    share: torch.Tensor
    loss: torch.Tensor
    kept: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor

    def __init__(self, capacity: int, width: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.zeros((), dtype=torch.float64))
        self.register_buffer("loss", torch.full((), torch.nan, dtype=torch.float64))
        self.register_buffer("kept", torch.zeros((), dtype=torch.int64))  # so far, those that had to go included
        self.register_buffer("tokens", torch.zeros(capacity, width, dtype=torch.int32))
        self.register_buffer("lengths", torch.zeros(capacity, 2, dtype=torch.int32))  # of prompt and answer

    def keep(self, prompt: list[int], answer: list[int]) -> None:
        row, both = int(self.kept) % len(self.tokens), prompt + answer
        self.tokens[row, : len(both)] = torch.tensor(both, dtype=torch.int32)
        self.lengths[row] = torch.tensor([len(prompt), len(answer)], dtype=torch.int32)
        self.kept += 1

    def recall(self, rows: torch.Tensor) -> list[tuple[list[int], list[int]]]:
        rows = rows.to(self.tokens.device)
        found = zip(self.tokens[rows].tolist(), self.lengths[rows].tolist(), strict=True)
        return [(both[:prompt], both[prompt : prompt + answer]) for both, (prompt, answer) in found]
