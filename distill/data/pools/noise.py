from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill import records
from distill.data.pools.fitting import check_size
from distill.errors import DistillError, nearest
from distill.randomness import generator

DISTRIBUTIONS = ("uniform", "gaussian")


class Noise:
    """Inputs without any structure: independent pixels, or independent features within their ranges.

    Threat model: the attacker has no data at all; for a table it knows the features' ranges, from `feature_range` or
    from held-out rows. Gaussian noise has the middle of the range as its mean, a quarter of it as its standard
    deviation, and is clipped to it.

    Args:
        size: Number of rows.
        seed: Which noise.
        distribution: uniform or gaussian.
        feature_range: ``[low, high]`` of every feature of a table; null: the range of each in the held-out rows.
    """

    def __init__(
        self,
        size: int = 10_000,
        seed: int = 0,
        distribution: str = "uniform",
        feature_range: Sequence[float] | None = None,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise DistillError(f"no distribution '{distribution}'.{nearest(str(distribution), DISTRIBUTIONS)}")
        if feature_range is not None and not (len(feature_range) == 2 and feature_range[0] < feature_range[1]):
            raise DistillError(f"feature_range must be [low, high] with low < high, not {list(feature_range)}")
        self.size, self.seed = check_size(size), seed
        self.distribution, self.feature_range = distribution, feature_range

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises `DistillError` for texts, and for tables whose ranges are unknown."""
        if data.spec.kind == "text":
            raise DistillError("noise makes pictures and tables, but the victim takes texts; use random_words", "pool")
        low, high = self._range(data)
        rng = generator(self.seed, "pool", "noise", self.distribution)
        shape = (self.size, *data.spec.shape)
        if data.spec.kind == "image" and self.distribution == "uniform":
            inputs = rng.integers(256, size=shape, dtype=np.uint8)
        elif self.distribution == "uniform":
            inputs = low + (high - low) * rng.random(shape, dtype=np.float32)
        else:
            inputs = (low + high) / 2 + (high - low) / 4 * rng.standard_normal(shape, dtype=np.float32)
            inputs = np.clip(inputs, low, high)
        if data.spec.kind == "image":
            inputs = np.rint(inputs).astype(np.uint8) if inputs.dtype != np.uint8 else inputs
        return records.Examples(inputs, data.spec, name=f"{self.distribution} noise")

    def _range(self, data: records.Dataset) -> tuple[np.ndarray, np.ndarray]:
        if data.spec.kind == "image":
            return np.zeros(1, np.float32), np.full(1, 255, np.float32)
        if self.feature_range is not None:
            low, high = np.array(self.feature_range, dtype=np.float32)[:, None]
            return low, high
        if len(data.held_out) == 0:
            raise DistillError(
                "which range do the features have? Set pool.feature_range=[low,high], or leave rows to learn it from "
                "with data.victim_share=0.5",
                "pool.feature_range",
            )
        rows = data.held_out.inputs[:]
        return rows.min(axis=0), rows.max(axis=0)
