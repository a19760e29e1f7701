"""What the pools share that take a part of another pool."""

from __future__ import annotations

from distill import records
from distill.contracts import Pool, of_language
from distill.errors import DistillError


def check_pool(pool: Pool) -> Pool:
    """Raises `DistillError` where it is no pool of a classifier's inputs."""
    if pool is None or isinstance(pool, (str, dict, list)) or of_language("pool", type(pool)):
        raise DistillError(f"pool is another pool of a classifier's inputs (pool@pool.pool=photographs), not {pool!r}")
    return pool


def load_within(pool: Pool, data: records.Dataset) -> records.Examples:
    """The rows of the other pool. What it speaks of as "pool" lies under "pool.pool" here."""
    try:
        return pool.load(data)
    except DistillError as error:
        if error.key is None or not error.key.startswith("pool"):
            raise
        message = str(error).removeprefix(f"{error.key}: ").replace("pool.", "pool.pool.")
        raise type(error)(message, "pool." + error.key) from error


def check_fits(size: int, rows: records.Examples) -> None:
    """Raises `DistillError` where the other pool is smaller than what is taken of it."""
    if size > len(rows):
        raise DistillError(f"{rows.name} has {len(rows)} rows, so not {size}; take fewer", "pool.size")
