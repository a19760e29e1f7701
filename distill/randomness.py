"""Every random stream of a run is derived from its one seed, by name.

Two kinds are needed. A *stream* (`generator`) is for things that happen in order: an attack's draws, a shuffle.
*Keyed* randomness (`KeyedRandom`) is for a defense's noise: it depends on the seed, the content of the query and how
often that content was asked before, and on nothing else, so an answer is the same whatever batch it came in.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for the stream called `names` of a run with this `seed`."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: object) -> np.random.Generator:
    """A numpy generator for the stream called `names`."""
    return np.random.default_rng(derive(seed, *names))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection on 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class KeyedRandom:
    """Random numbers for n answers at once, each row keyed by (seed, content of the query, repeat).

    Args:
        seed: The seed of the stream (derive it by name).
        keys: (n,) of dtype ``S16``, as `distill.records.content_keys` makes them.
        repeats: (n,) integers: how often the same content was asked before.
    """

    def __init__(self, seed: int, keys: np.ndarray, repeats: np.ndarray) -> None:
        words = np.frombuffer(np.ascontiguousarray(keys, dtype="S16").tobytes(), dtype="<u8").reshape(-1, 2)
        state = _mix(words[:, 0] ^ np.uint64(seed))
        state = _mix(state ^ words[:, 1])
        self._state = _mix(state ^ (repeats.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)))

    def __len__(self) -> int:
        return len(self._state)

    def child(self, name: str) -> KeyedRandom:
        """Random numbers for the same answers that have nothing to do with these: one for each member of a chain."""
        child = KeyedRandom.__new__(KeyedRandom)
        child._state = _mix(self._state ^ np.uint64(derive(0, "child", name)))
        return child

    def uniform(self, columns: int, stream: str = "") -> np.ndarray:
        """(n, columns) float64, uniform on the open interval (0, 1). Two calls with one `stream` agree."""
        offset = np.uint64(derive(0, stream))
        counters = _mix((np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ offset)
        bits = _mix(self._state[:, None] ^ counters[None, :])
        return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, columns: int, stream: str = "") -> np.ndarray:
        """(n, columns) float64, standard normal (Box and Muller, 1958)."""
        half = (columns + 1) // 2
        u = self.uniform(2 * half, stream)
        radius, angle = np.sqrt(-2.0 * np.log(u[:, :half])), 2.0 * np.pi * u[:, half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :columns]
