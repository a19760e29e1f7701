from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from distill.records import TransferSet


class AsReturned:
    """The naive attacker: the answers, as they were returned, are the targets."""

    knows: ClassVar[str] = "nothing"

    def targets(self, transfer_set: TransferSet, knowledge: Mapping[str, Any]) -> TransferSet:
        """`targets` = `posteriors`, (n, classes)."""
        return replace(transfer_set, targets=transfer_set.posteriors)
