from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from distill.language import Evidence


class TaskAccuracy:
    """Mean score of the answers to the test prompts, by the task's own checker."""

    section: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"accuracy": True}

    def judge(self, evidence: Evidence, who: str) -> dict[str, float]:
        """Empty for a task without a checker."""
        if evidence.check is None:
            return {}
        return {"accuracy": float(evidence.check(evidence.prompts, evidence.answers[who].column).mean())}
