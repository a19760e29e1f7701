from __future__ import annotations

from typing import ClassVar

from distill.attacks.ground_truth_answers import same_prompts
from distill.contracts import LanguageOracle
from distill.errors import DistillError
from distill.language import Prompts, SyntheticSet
from distill.randomness import generator
from distill.records import Reveals


class NoTeacherText:
    """Control: the same prompts, each with the reference of another prompt of the pool, drawn at random.

    The text looks as it should and says nothing about its prompt: what a student gets from form alone. One that scores
    above guessing means that the task can be had without its prompts.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = False

    def synthesise(self, oracle: LanguageOracle, pool: Prompts, samples: int, seed: int) -> SyntheticSet:
        """Raises `DistillError` where the pool has no references, or one prompt only."""
        if pool.references is None or len(pool) < 2:
            raise DistillError(
                f"this control needs a pool of two or more prompts with reference answers; {pool.name} is none",
                "attack",
            )
        order = generator(seed, "attack", "others").permutation(len(pool))
        # A cycle through all rows: each row gets the reference of the next, so never its own.
        answers = pool.references.copy()
        answers[order] = pool.references[order[[*range(1, len(order)), 0]]]
        prompts = same_prompts(oracle, pool, samples, seed)
        others = same_prompts(oracle, Prompts(answers), samples, seed)
        note = f"{pool.name} with the references of other prompts"
        return SyntheticSet.without_teacher(prompts, others.column, note)
