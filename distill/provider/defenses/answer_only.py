from __future__ import annotations

import numpy as np

from distill.language import Prompts, texts
from distill.provider.defenses._released import ANSWER, Released, found
from distill.randomness import KeyedRandom
from distill.rewriting import pattern


class AnswerOnly(Released):
    r"""The written-out reasoning is removed: the answer alone goes out.

    Paper: DistillGuard: Evaluating Defenses Against LLM Knowledge Distillation, arXiv 2603.07835, 2026: "CoT removal",
    the one of its output defenses that hurts a student's mathematics much (31.4 instead of 67.8 on MATH-500).
    Threat model: the attacker reads what goes out, which is a function of the prompt and of the answer alone: text,
    `finish` and billed tokens of two answers that differ in their reasoning are the same bytes. An answer that was cut
    looks like one that ended. What is exposed is text: the log-probabilities of an answer are given its reasoning, so
    they would tell of it, too. What remains open: `max_tokens` bounds reasoning and answer together, so whoever asks
    for less and less learns how long the reasoning is; and whoever asks nicely may be told the steps as an answer
    (`attack=re_elicited`).

    Args:
        answer: A regular expression (of Python's `re`); what stands from its first match to the end goes out.
        otherwise: What goes out where it does not match.

    Raises:
        DistillError: The expression is none; or the teacher's tokens are not known.
    """

    def __init__(self, answer: str = ANSWER, otherwise: str = "") -> None:
        self.answer, self.otherwise = pattern("answer", answer), otherwise

    def written(self, prompts: Prompts, column: np.ndarray, rng: KeyedRandom) -> np.ndarray:
        answers = (found(text, self.answer) for text in column)
        return texts([self.otherwise if answer is None else answer for answer in answers])
