"""The synthetic set as it is."""

from __future__ import annotations

from typing import Any, ClassVar

from distill.records import Reveals
from distill.rollouts._rollout import Plain


class OffPolicy(Plain):
    """Every step learns from the synthetic set's answers: distillation as usual."""

    requires: ClassVar[Reveals] = Reveals.LABEL
    writes: ClassVar[bool] = False

    def examples(self, prompts: list[list[int]], write: Any, chance: float, progress: float) -> None:
        """None: those of the synthetic set."""
