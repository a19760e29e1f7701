from __future__ import annotations

from dataclasses import replace

from distill import contracts, records
from distill.data.pools._within import check_fits, check_pool, load_within
from distill.data.pools.fitting import check_size
from distill.randomness import generator


class Subset:
    """Some random rows of another pool: the pool's size as a variable.

    Threat model: that of the other pool, of which the attacker holds less. A smaller size takes the first of the rows
    of a larger one, in the same order, so sizes nest as budgets do.

    Args:
        pool: The other pool: ``pool=subset pool@pool.pool=photographs``.
        size: Number of rows.
        seed: Which rows; not the run's seed, so that its runs share a pool.

    Raises:
        DistillError: `pool` is no pool of a classifier's inputs, or `size` is below 1.
    """

    def __init__(self, pool: contracts.Pool, size: int = 1000, seed: int = 0) -> None:
        self.pool, self.size, self.seed = check_pool(pool), check_size(size), seed

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises whatever the other pool raises, and `DistillError` when it has fewer rows."""
        rows = load_within(self.pool, data)
        check_fits(self.size, rows)
        some = rows.take(generator(self.seed, "pool", "subset").permutation(len(rows))[: self.size])
        return replace(some, name=f"{self.size} of {rows.name}")
