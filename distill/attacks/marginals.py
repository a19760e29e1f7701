from __future__ import annotations

from typing import ClassVar

import numpy as np

from distill.attacks._made import Asked
from distill.contracts import Apprentice, Oracle
from distill.randomness import generator
from distill.records import Examples, Queries, Reveals, TransferSet


class Marginals:
    """Ask about rows each of whose columns has the value of a random row of the pool, drawn for each column anew.

    Paper: Membership Inference Attacks Against Machine Learning Models, Shokri et al., IEEE S&P 2017, sec. V-C ("the
    marginal distribution of each feature"), who train shadow models on such rows. Threat model: the attacker knows how
    often each value of each column comes, and not which values come together; any profile. A smaller budget asks the
    first rows of a larger one.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("table",)

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. All inputs are made: float32 (n, features)."""
        asked = Asked(oracle, pool)
        table = pool.inputs[: len(pool)]
        columns = table.shape[1]
        rows = generator(seed, "attack", "marginals").integers(len(table), size=(asked.total, columns))
        asked.ask(Queries.made(table[rows, np.arange(columns)]))
        return asked.transfer_set("Marginals")
