"""Generalised knowledge distillation: some steps learn on text that the student has just written."""

from __future__ import annotations

from typing import Any

from distill.rollouts._rollout import Plain, sampling_of


class GKD(Plain):
    """With probability λ, a step's answers are drawn from the student as it is; else they are the synthetic set's.

    Paper: Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist and Bachem, "On-Policy Distillation of Language Models:
    Learning from Self-Generated Mistakes", ICLR 2024, algorithm 1; no gradient flows through drawing. λ = 1 is the
    paper's on-policy GKD, and 0.5 its mixed one. The divergence is the objective's: with token_reverse_kl and λ = 1
    this is on-policy distillation by reverse KL (Lu and Thinking Machines Lab, "On-Policy Distillation", 2025), summed
    over the vocabulary where theirs takes the drawn token for an estimate.

    The mean is over all tokens of a step, as everywhere here; the paper takes it over the tokens of each answer first.

    Args:
        lambda_: λ in [0, 1].
        temperature: Of drawing.
        top_p: Of drawing.
        max_tokens: Longest answer of the student.

    Raises:
        ValueError: λ is out of its range.
        DistillError: An option of drawing is.
    """

    def __init__(
        self, lambda_: float = 1.0, temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = 256
    ) -> None:
        if not 0 <= lambda_ <= 1:
            raise ValueError(f"lambda_ lies between 0 and 1, not {lambda_}")
        self.lambda_ = lambda_
        self.sampling = sampling_of(max_tokens, temperature, top_p)

    def examples(
        self, prompts: list[list[int]], write: Any, chance: float, progress: float
    ) -> list[tuple[list[int], list[int]]] | None:
        """See `distill.on_policy.Rollout`."""
        if chance >= self.lambda_:
            return None
        return list(zip(prompts, write(prompts, self.sampling), strict=True))
