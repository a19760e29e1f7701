from __future__ import annotations

from distill import records
from distill.errors import DistillError


class HeldOut:
    """In-distribution inputs: the part of the training data that the victim did not get.

    Threat model: the attacker holds unlabelled data of the victim's own distribution, but none of its training rows.
    Labels and classes are the data's own (for controls; an attack does not see them).
    """

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises `DistillError` when the victim got everything."""
        if len(data.held_out) == 0:
            raise DistillError(
                "the pool held_out is empty, because the victim got all training rows; "
                "set it below 1 (data.victim_share=0.5), or choose another pool",
                "data.victim_share",
            )
        return data.held_out
