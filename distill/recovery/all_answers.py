from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from distill.language import SyntheticSet


class AllAnswers:
    """The naive attacker: every answer, as it was returned, counts alike."""

    knows: ClassVar[str] = "nothing"

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """The same answers."""
        return synthetic
