"""Each metric against numbers worked out by hand or by an independent library."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss

from distill.metrics.accuracy import Accuracy
from distill.metrics.agreement import Agreement
from distill.metrics.calibration import Calibration
from distill.metrics.kl import KL
from distill.metrics.total_variation import TotalVariation

RNG = np.random.default_rng(0)
P = RNG.dirichlet(np.ones(5), 400).astype(np.float32)
Q = RNG.dirichlet(np.ones(5), 400).astype(np.float32)
LABELS = RNG.integers(0, 5, 400)


def test_accuracy_and_agreement_count_equal_arg_maxima() -> None:
    p = np.array([[0.6, 0.4], [0.2, 0.8], [0.5, 0.5], [0.1, 0.9]])
    assert Accuracy().measure(p, np.array([0, 0, 0, 1])) == {"accuracy": 0.75}
    q = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
    assert Agreement().measure(p, q) == {"agreement": 0.5}


def test_kl_is_of_the_teacher_from_the_subject() -> None:
    teacher, subject = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert KL().measure(subject, teacher)["kl"] == pytest.approx(expected)
    assert KL().measure(P, P)["kl"] == pytest.approx(0, abs=1e-9)
    assert np.isfinite(KL().measure(np.eye(3), np.roll(np.eye(3), 1, axis=0))["kl"])


def test_total_variation_is_half_of_l1() -> None:
    measured = TotalVariation().measure(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.5, 0.5]]))
    assert measured == {"total_variation": 0.5, "l1_mean": 1.0, "l1_max": 2.0}


def test_nll_is_that_of_scikit_learn() -> None:
    p = P.astype(np.float64) / P.sum(axis=1, keepdims=True, dtype=np.float64)
    assert Calibration().measure(p, LABELS)["nll"] == pytest.approx(log_loss(LABELS, p, labels=range(5)), rel=1e-6)


def test_ece_is_the_sum_over_bins() -> None:
    confidence, correct = P.max(axis=1).astype(np.float64), P.argmax(axis=1) == LABELS
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert Calibration().measure(P, LABELS)["ece"] == pytest.approx(expected, abs=1e-9)
    assert Calibration().measure(np.eye(3), np.arange(3))["ece"] == 0
