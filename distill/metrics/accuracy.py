from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np


class Accuracy:
    """Share of inputs whose most likely class is the true one."""

    compares_with: ClassVar[str] = "labels"
    section: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"accuracy": True}

    def measure(self, posteriors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """`posteriors` (n, classes), `reference` (n,) labels."""
        return {"accuracy": float((posteriors.argmax(axis=1) == reference).mean())}
