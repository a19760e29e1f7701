from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np


class TotalVariation:
    """Total variation distance to the teacher, and L1 distance (twice that), in which defenses state their budget."""

    compares_with: ClassVar[str] = "teacher"
    section: ClassVar[str] = "fidelity"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"total_variation": False, "l1_mean": False, "l1_max": False}

    def measure(self, posteriors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """`posteriors` and `reference` (n, classes); total variation in [0, 1], L1 in [0, 2]."""
        l1 = np.abs(posteriors.astype(np.float64) - reference.astype(np.float64)).sum(axis=1)
        return {"total_variation": float(l1.mean() / 2), "l1_mean": float(l1.mean()), "l1_max": float(l1.max())}
