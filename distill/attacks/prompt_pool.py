from __future__ import annotations

import logging
from typing import ClassVar

from distill.attacks.asking import Asking
from distill.contracts import LanguageOracle
from distill.language import Prompts, SyntheticSet
from distill.randomness import generator
from distill.records import Reveals

log = logging.getLogger(__name__)


class PromptPool:
    """Ask prompts of the pool, drawn at random without replacement, several times each.

    Paper: Sequence-Level Knowledge Distillation, Kim and Rush, EMNLP 2016 (sec. 3.2, with samples for the beam).
    Threat model: a pool of prompts, no knowledge of the teacher; works with text alone. What a smaller budget asks is
    the beginning of what a larger one asks.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True

    def synthesise(self, oracle: LanguageOracle, pool: Prompts, samples: int, seed: int) -> SyntheticSet:
        """`samples` answers to each prompt, until budget or pool end; the last prompt may get fewer."""
        total = oracle.affordable()
        asking = Asking(oracle, samples)
        asking.answer(shuffled(pool, -(-total // samples), seed))
        answers = asking.collected(f"PromptPool on {pool.name}")
        if len(answers) < total and not asking.over:
            log.warning("the attack ended after %d of %d affordable answers (pool: %d)", len(answers), total, len(pool))
        return answers


def shuffled(pool: Prompts, n: int, seed: int) -> Prompts:
    """n distinct prompts of the pool in random order, fewer where it is smaller; fewer are a prefix of more."""
    return pool.take(generator(seed, "attack").permutation(len(pool))[:n])
