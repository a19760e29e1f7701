"""What the attacks share that train a student of their own, in a loop of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional

from distill.contracts import Apprentice, Learner, Predictor
from distill.randomness import derive
from distill.training import Standardise, TensorFeatures

SHOWN = 10  # how often in a run the attack's own student is handed in
STANDARDISED_ON = 10_000  # rows of a table's pool


class Showing:
    """Hands in the attack's own student some ten times in a run.

    Args:
        student: Who takes it.
        total: How many answers there will be.
    """

    def __init__(self, student: Apprentice, total: int) -> None:
        self.student, self.total = student, total
        self._shown = 0

    def after(self, own: Predictor, queries: int) -> None:
        """`own` has learnt from so many answers: it is shown where a further tenth of them is passed."""
        if queries * SHOWN // self.total > self._shown:
            self._shown = queries * SHOWN // self.total
            self.student.show(own, queries)


def begin(student: Apprentice, table: np.ndarray) -> Learner:
    """An untrained student; where it standardises columns, with the statistics of `table`: (n, ...) of the pool."""
    own = student.fresh()
    for part in own.module.modules():
        if isinstance(part, Standardise):
            part.observe(TensorFeatures({part.feature: numbers(table, own.device)}), torch.arange(len(table)))
    return own


@contextmanager
def own_randomness(own: Learner, seed: int) -> Iterator[None]:
    """Dropout and fresh layers inside of this draw from a stream of the attack's, and nobody else's moves on."""
    with torch.random.fork_rng(devices=[own.device] if own.device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "attack", "training"))
        yield


def numbers(inputs: np.ndarray, device: torch.device) -> torch.Tensor:
    """Pixels of images as float32 in [0, 1], columns of tables as they are; a copy."""
    tensor = torch.tensor(inputs, device=device)
    return tensor / 255 if tensor.dtype == torch.uint8 else tensor


def soft_cross_entropy(logits: torch.Tensor, posteriors: torch.Tensor) -> torch.Tensor:
    """(n,) in nats, of (n, classes) each."""
    return functional.cross_entropy(logits, posteriors, reduction="none")
