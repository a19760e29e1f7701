from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from distill import contracts, records
from distill.data.pools._within import check_fits, check_pool, load_within
from distill.data.pools.fitting import check_size
from distill.errors import DistillError
from distill.randomness import generator

BASIS_ROWS = 1000  # of the pool, which the principal components are found on, besides the examples
ROWS_AT_ONCE = 4096
WORD_BUCKETS = 1024


class DistributionAware:
    """The part of another pool that is nearest to what the teacher is for.

    Paper: How to Steer Your Adversary: Targeted and Efficient Model Stealing Defenses with Gradient Redirection,
    Mazeika et al., ICML 2022 (queries are taken from the classes of a public data set that resemble the teacher's).
    Threat model: a large public pool, and a few unlabelled inputs such as the teacher is for, `examples` of
    ``data.held_out``; nothing else of the teacher. The examples are no part of the pool, unless it holds them itself.

    Rows are compared by the Euclidean distance of pixels in [0, 1], standardised columns or the frequencies of hashed
    words, on the first principal components of examples and pool together. Each example in turn takes the row that is
    nearest to it, then each its second nearest, until there are `size`, so sizes nest, and no example takes them all:
    the rows nearest to whichever example are dull ones, all alike. Near: ``pool=held_out``, inputs of the same kind;
    far: ``photographs`` and ``mnist_5k``; this takes of a far pool what is least far. Departs from the paper, whose
    choice is by names of classes, which pools here need not have.

    Args:
        pool: The other pool: ``pool=distribution_aware pool@pool.pool=photographs``.
        size: Number of rows that are kept.
        examples: How many held-out rows the attacker has.
        components: Principal components, at most.
        seed: Of which examples, and of the rows that the components are found on.

    Raises:
        DistillError: `pool` is no pool of a classifier's inputs, or a number is below 1.
    """

    def __init__(
        self, pool: contracts.Pool, size: int = 1000, examples: int = 100, components: int = 32, seed: int = 0
    ) -> None:
        for name, count in {"examples": examples, "components": components}.items():
            if count < 1:
                raise DistillError(f"{name} must be at least 1, not {count}")
        self.pool, self.size = check_pool(pool), check_size(size)
        self.examples, self.components, self.seed = examples, components, seed

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises whatever the other pool raises, and `DistillError` when it or the held-out rows are too few."""
        if len(data.held_out) < self.examples:
            raise DistillError(
                f"{self.examples} examples are to be held-out rows, and there are {len(data.held_out)}; "
                "set data.victim_share below 1, such as 0.5, or take fewer",
                "pool.examples",
            )
        rows = load_within(self.pool, data)
        check_fits(self.size, rows)
        rng = generator(self.seed, "pool", "distribution aware")
        own = _features(data.held_out.inputs[rng.permutation(len(data.held_out))[: self.examples]], data.spec)
        some = _features(rows.inputs[np.sort(rng.permutation(len(rows))[:BASIS_ROWS])], data.spec)
        known = np.concatenate([own, some])
        mean, scale = known.mean(axis=0), np.ones(known.shape[1])
        if data.spec.kind == "table":
            scale = np.where(known.std(axis=0) > 0, known.std(axis=0), 1)
        basis = np.linalg.svd((known - mean) / scale, full_matrices=False)[2][: self.components].T
        examples = (own - mean) / scale @ basis
        points = np.concatenate(
            [
                (_features(rows.inputs[start : start + ROWS_AT_ONCE], data.spec) - mean) / scale @ basis
                for start in range(0, len(rows), ROWS_AT_ONCE)
            ]
        )
        rank = np.full(len(rows), len(rows))  # of each row, among the rows, for the example that likes it best
        for example in examples:
            order = np.argsort(np.square(points - example).sum(axis=1), kind="stable")
            rank[order] = np.minimum(rank[order], np.arange(len(rows)))
        chosen = rows.take(np.argsort(rank, kind="stable")[: self.size])
        return replace(chosen, name=f"the {self.size} of {rows.name} nearest to {data.name}")


def _features(inputs: np.ndarray, spec: records.InputSpec) -> np.ndarray:
    """(n, m) float32."""
    if spec.kind == "text":
        counts = np.zeros((len(inputs), WORD_BUCKETS), dtype=np.float32)
        for i, text in enumerate(inputs):
            for word in text.lower().split():
                counts[i, zlib.crc32(word.encode()) % WORD_BUCKETS] += 1
        return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    flat = inputs.reshape(len(inputs), -1).astype(np.float32)
    return flat / 255 if inputs.dtype == np.uint8 else flat
