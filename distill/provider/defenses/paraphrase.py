from __future__ import annotations

import numpy as np

from distill.errors import DistillError
from distill.language import Prompts
from distill.provider.defenses._released import ANSWER, RewrittenReasoning
from distill.randomness import KeyedRandom
from distill.rewriting import Rewriter


class Paraphrase(RewrittenReasoning):
    r"""The reasoning goes out in other words, which also washes out marks that its tokens carry.

    Paper: DistillGuard: Evaluating Defenses Against LLM Knowledge Distillation, arXiv 2603.07835, 2026 (students lose
    little: 59.6 instead of 67.8 on MATH-500).
    Threat model: the attacker reads what goes out; text alone is exposed, reason of the end and billed tokens are those
    of the released text.

    Departs from the paper: its strength α was read of, but not what it scales; `share` is ours. By default rules
    rewrite (those of straight_line); ``rewriter@defense.rewriter=by_model`` asks a second model.

    Args:
        rewriter: Paraphrases (`distill.rewriting`).
        answer: A regular expression; what stands from its first match to the end is left as it is. Where it does not
            match, all is paraphrased.
        share: Of the answers that are paraphrased.

    Raises:
        DistillError: The expression is none, or the share is out of range; or the teacher's tokens are not known.
    """

    def __init__(self, rewriter: Rewriter, answer: str = ANSWER, share: float = 1.0) -> None:
        if not 0 <= share <= 1:
            raise DistillError(f"share must be at least 0 and at most 1, not {share}")
        super().__init__(rewriter, answer)
        self.share = share

    def written(self, prompts: Prompts, column: np.ndarray, rng: KeyedRandom) -> np.ndarray:
        chosen = rng.uniform(1, "share")[:, 0] < self.share
        rewritten = super().written(prompts, np.where(chosen, column, ""), rng)  # nobody is asked about the others
        return np.where(chosen, rewritten, column)
