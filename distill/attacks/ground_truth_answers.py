from __future__ import annotations

from typing import ClassVar

import numpy as np

from distill.attacks.prompt_pool import shuffled
from distill.contracts import LanguageOracle
from distill.errors import DistillError
from distill.language import Prompts, SyntheticSet
from distill.records import Reveals


class GroundTruthAnswers:
    """Control: the reference answers of the very prompts that `prompt_pool` asks. The teacher is never asked.

    What a student reaches beyond this is what the teacher's answers were worth. There are as many examples as answers:
    of several samples of a prompt, each is its reference.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = False

    def synthesise(self, oracle: LanguageOracle, pool: Prompts, samples: int, seed: int) -> SyntheticSet:
        """Raises `DistillError` where the pool has no references."""
        prompts = same_prompts(oracle, pool, samples, seed)
        if prompts.references is None:
            raise DistillError(
                f"this control needs a pool with reference answers, such as prompts_held_out; {pool.name} has none",
                "attack",
            )
        return SyntheticSet.without_teacher(prompts, prompts.references, f"ground truth of {pool.name}")


def same_prompts(oracle: LanguageOracle, pool: Prompts, samples: int, seed: int) -> Prompts:
    """The prompts that `prompt_pool` would ask with this budget of queries, as often as it would."""
    total = oracle.affordable()
    prompts = shuffled(pool, -(-total // samples), seed)
    return prompts.take(np.repeat(np.arange(len(prompts)), samples)[:total])
