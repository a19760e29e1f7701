from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

FLOOR = 1e-12  # a probability of zero on the true class counts as this in the NLL


class Calibration:
    """Do the probabilities mean what they say: expected calibration error and negative log-likelihood.

    Paper: On Calibration of Modern Neural Networks, Guo et al., ICML 2017, eq. 3 (equal-width bins of the confidence).

    Args:
        bins: Number of confidence bins.
    """

    compares_with: ClassVar[str] = "labels"
    section: ClassVar[str] = "calibration"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"ece": False, "nll": False}

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise ValueError(f"bins is at least 1, not {bins}")
        self.bins = bins

    def measure(self, posteriors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """`posteriors` (n, classes), `reference` (n,) labels; ECE in [0, 1], NLL in nats."""
        confidence = posteriors.max(axis=1).astype(np.float64)
        correct = posteriors.argmax(axis=1) == reference
        # Bin b holds (b/bins, (b+1)/bins]: |sum of correct - sum of confidence| over n is its share of the error.
        which = np.clip(np.ceil(confidence * self.bins).astype(int) - 1, 0, self.bins - 1)
        gaps = np.bincount(which, weights=correct - confidence, minlength=self.bins)
        likelihood = posteriors[np.arange(len(reference)), reference].astype(np.float64)
        return {
            "ece": float(np.abs(gaps).sum() / len(reference)),
            "nll": float(-np.log(np.maximum(likelihood, FLOOR)).mean()),
        }
