from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np


class OODAUROC:
    """Can a user of these answers tell inputs from elsewhere by their lower confidence?

    Paper: A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks, Hendrycks and
    Gimpel, ICLR 2017, sec. 2 (the largest posterior as the score). 1 is perfect, 0.5 is chance.
    """

    compares_with: ClassVar[str] = "outliers"
    section: ClassVar[str] = "calibration"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"ood_auroc": True}

    def measure(self, posteriors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """`posteriors` (n, classes) of test inputs, `reference` (m, classes) of inputs from elsewhere."""
        from sklearn.metrics import roc_auc_score  # a second, which runs without such inputs do without

        inside = np.repeat([1, 0], [len(posteriors), len(reference)])
        return {"ood_auroc": float(roc_auc_score(inside, np.concatenate([posteriors, reference]).max(axis=1)))}
