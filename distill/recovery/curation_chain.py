from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.contracts import Curation, PreparedCuration
from distill.errors import DistillError
from distill.language import SyntheticSet, Task


class CurationChain:
    """Several curations, one after the other: each sees what the one before it left.

    Args:
        members: The curations, in order. They know nothing, or all of those that know something know the same.

    Raises:
        DistillError: There is none, or two know different things.
    """

    def __init__(self, members: Sequence[Curation]) -> None:
        if not members:
            raise DistillError("needs at least one curation", "recovery.members")
        known = {member.knows for member in members} - {"nothing"}
        if len(known) > 1:
            raise DistillError(f"know different things ({', '.join(sorted(known))})", "recovery.members")
        self.members = list(members)
        self.knows = known.pop() if known else "nothing"

    def prepare(self, task: Task, trainer: Any, cache: Path) -> None:
        """Load the members' models."""
        for member in self.members:
            if isinstance(member, PreparedCuration):
                member.prepare(task, trainer, cache)

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """What is left. Counts stand under ``place.filter``, such as ``2.cut``; raises whatever a member raises."""
        for place, member in enumerate(self.members, start=1):
            left = member.curate(replace(synthetic, dropped={}), {} if member.knows == "nothing" else knowledge)
            counts = {f"{place}.{name}": count for name, count in left.dropped.items()}
            synthetic = replace(left, dropped=synthetic.dropped | counts)
        return synthetic
