from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

FLOOR = 1e-12  # a probability of zero where the teacher's is not counts as this


class KL:
    """KL(teacher ‖ subject) in nats, averaged over inputs."""

    compares_with: ClassVar[str] = "teacher"
    section: ClassVar[str] = "fidelity"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"kl": False}

    def measure(self, posteriors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """`posteriors` (the subject) and `reference` (the teacher), both (n, classes)."""
        p = reference.astype(np.float64)
        logs = np.log(np.maximum(p, FLOOR)) - np.log(np.maximum(posteriors.astype(np.float64), FLOOR))
        return {"kl": float((p * logs).sum(axis=1).mean())}
