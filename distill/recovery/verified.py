from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill.errors import DistillError
from distill.language import SyntheticSet


class Verified:
    """Rejection sampling: only answers that the task's own checker finds right.

    Paper: Scaling Relationship on Learning Mathematical Reasoning with Large Language Models, Yuan et al., 2023
    (rejection sampling fine-tuning). Threat model: the attacker can check answers, or knows the right ones; a prompt of
    the attack's own, which no checker knows, can't be verified.

    Args:
        threshold: The score, in [0, 1], from which an answer is right.
        best_of_n: Keep one answer of each prompt: the best scored, the first among equals (with threshold 0 there is
            always one).

    Raises:
        DistillError: The threshold is out of range.
    """

    knows: ClassVar[str] = "the task's checker"

    def __init__(self, threshold: float = 1.0, best_of_n: bool = False) -> None:
        if not 0 <= threshold <= 1:
            raise DistillError(f"threshold must be between 0 and 1, not {threshold}")
        self.threshold, self.best_of_n = threshold, best_of_n

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """What is left, with counts of `wrong` and `not_best`. ``knowledge["check"]`` is the task's checker, or None.

        Raises `DistillError` where the task has none, or does not know these prompts.
        """
        check = knowledge["check"]
        if check is None:
            raise DistillError("verified needs a task with a checker; this one has none", "recovery")
        if synthetic.prompts.entries is None:
            raise DistillError(
                "verified needs prompts that the task's checker knows (attack=prompt_pool on pool=prompts_held_out); "
                "these are of another kind",
                "recovery",
            )
        scores = check(synthetic.prompts, synthetic.completions.column)
        right = scores >= self.threshold
        synthetic, scores = synthetic.keep(right, "wrong"), scores[right]
        if not self.best_of_n:
            return synthetic
        best: dict[bytes, int] = {}
        for row, key in enumerate(synthetic.prompts.keys.tolist()):
            if key not in best or scores[row] > scores[best[key]]:
                best[key] = row
        mask = np.zeros(len(synthetic), dtype=bool)
        mask[list(best.values())] = True
        return synthetic.keep(mask, "not_best")
