"""Pools are made to fit the victim's inputs, or refused."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distill.data.pictures import fit_pixels
from distill.data.splits import check
from distill.errors import DistillError
from distill.records import Examples, Inputs, InputSpec

MEMORY_BYTES = 1 << 30  # pools of pictures that need more than this are made when they are asked for


@dataclass(frozen=True)
class Fitting:
    """A column of pictures that are resized and recoloured when they are asked for."""

    source: Inputs
    spec: InputSpec

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        return fit_pixels(self.source[rows], self.spec)


def fit(pool: Examples, spec: InputSpec, key: str) -> Examples:
    """The pool with inputs of the spec: pictures are cropped, resized and recoloured; anything else must fit.

    Raises:
        DistillError: Texts for pictures, tables of another width, or a pool that can't be what it claims to be.
    """
    check(pool.name, pool, key)
    if pool.spec.kind != spec.kind:
        raise DistillError(f"{pool.name} holds {pool.spec.kind}s, but the victim takes {spec.kind}s", key)
    if pool.spec == spec:
        return pool
    if spec.kind != "image":
        raise DistillError(f"{pool.name} has {pool.spec.shape[0]} features, but the victim takes {spec.shape[0]}", key)
    inputs: Inputs = Fitting(pool.inputs, spec)
    stated = pool.stated_fingerprint
    if len(pool) * np.prod(spec.shape) <= MEMORY_BYTES:
        inputs = inputs[:]
    if stated is not None or not isinstance(inputs, np.ndarray):
        stated = hashlib.blake2b(f"{pool.fingerprint} {spec}".encode(), digest_size=16).hexdigest()
    return replace(pool, inputs=inputs, spec=spec, stated_fingerprint=stated)


def images_only(spec: InputSpec, what: str) -> None:
    """Raises `DistillError` where the victim takes no pictures."""
    if spec.kind != "image":
        raise DistillError(f"{what} are pictures, but the victim takes {spec.kind}s; choose another pool", "pool")


def check_size(size: int) -> int:
    """A number of rows to make."""
    if size < 1:
        raise DistillError(f"size must be at least 1, not {size}")
    return size
