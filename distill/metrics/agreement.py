from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np


class Agreement:
    """Share of inputs with the same most likely class as the undefended teacher ("fidelity").

    Paper: High Accuracy and High Fidelity Extraction of Neural Networks, Jagielski et al., USENIX Security 2020,
    sec. 3.
    """

    compares_with: ClassVar[str] = "teacher"
    section: ClassVar[str] = "fidelity"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"agreement": True}

    def measure(self, posteriors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """`posteriors` and `reference` (n, classes)."""
        return {"agreement": float((posteriors.argmax(axis=1) == reference.argmax(axis=1)).mean())}
