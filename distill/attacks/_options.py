"""Checks of options, whose messages begin with the option's name."""

from __future__ import annotations

import math


def at_least(least: int, **options: int) -> None:
    """Raises `ValueError` that names the option."""
    for name, value in options.items():
        if value < least:
            raise ValueError(f"{name} is at least {least}, not {value}")


def positive(**options: float) -> None:
    """Raises `ValueError` that names the option."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is more than 0, not {value}")


def one_of(known: tuple[str, ...], **options: str) -> None:
    """Raises `ValueError` that names the option."""
    for name, value in options.items():
        if value not in known:
            raise ValueError(f"{name} is {' or '.join(known)}, not {value!r}")
