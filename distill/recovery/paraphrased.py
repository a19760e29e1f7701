from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from distill.language import SyntheticSet, Task
from distill.randomness import KeyedRandom, derive
from distill.rewriting import Rewriter


class Paraphrased:
    """Each answer is said in other words before a student learns from it.

    Paper: Can LLM Watermarks Robustly Prevent Unauthorized Knowledge Distillation?, Pan et al., ACL 2025 (untargeted
    training data paraphrasing): what is told by the choice of words, such as a watermark, is to be lost on the way.
    Threat model: text alone, and a rewriter of the attacker's own. Nothing more is asked of the provider: usage and
    prices of the answers stay what they were. Tokens and log-probabilities are those of other words and are given up:
    take signal=text.

    Args:
        rewriter: How it is said (`distill.rewriting`).
        seed: Of what the rewriter draws. It draws anew for each answer.
    """

    knows: ClassVar[str] = "nothing"

    def __init__(self, rewriter: Rewriter, seed: int = 0) -> None:
        self.rewriter, self.seed = rewriter, seed

    def prepare(self, task: Task, trainer: Any, cache: Path) -> None:
        """Load the rewriter's model, where it has one."""
        self.rewriter.prepare(task, trainer, cache)

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """All answers, rewritten."""
        rng = KeyedRandom(derive(self.seed, "paraphrase"), synthetic.prompts.keys, synthetic.repeats)
        told = synthetic.completions.without_tokens()
        written = self.rewriter.rewrite(told.column, synthetic.prompts, rng)
        return replace(synthetic, completions=replace(told, column=written))
