from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from distill.attacks._made import Asked, column_ranges
from distill.contracts import Apprentice, Oracle
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import Examples, Queries, Reveals, TransferSet


class UniformTable:
    """Ask about rows whose columns are uniform and independent within their ranges.

    Paper: Stealing Machine Learning Models via Prediction APIs, Tramèr et al., USENIX Security 2016 (its uniform
    queries). Threat model: the attacker knows the range of each column, which it reads off its pool here, and nothing
    else; any profile. Whole numbers are not kept whole. A smaller budget asks the first rows of a larger one.

    Args:
        feature_range: ``[low, high]`` of every column; null: the least and the largest value of each in the pool.

    Raises:
        DistillError: The range is none.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("table",)

    def __init__(self, feature_range: Sequence[float] | None = None) -> None:
        if feature_range is not None and not (len(feature_range) == 2 and feature_range[0] < feature_range[1]):
            raise DistillError(f"feature_range is [low, high] with low < high, not {list(feature_range)}")
        self.feature_range = feature_range

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. All inputs are made: float32 (n, features)."""
        asked = Asked(oracle, pool)
        low, high = column_ranges(pool) if self.feature_range is None else np.array(self.feature_range, np.float32)
        shares = generator(seed, "attack", "uniform_table").random((asked.total, *pool.spec.shape))
        asked.ask(Queries.made((low + (high.astype(np.float64) - low) * shares).astype(np.float32)))
        return asked.transfer_set("UniformTable")
