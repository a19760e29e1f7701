"""Entropy coding of many rows at once: one asymmetric numeral system a row, advanced together by numpy.

Every row is a bit string of its own, so any row is read without the others. The state of a row starts as a small number
that the caller chooses (it carries information, too), so a row costs what its symbols cost, rounded up to whole bytes.
"""

from __future__ import annotations

import numpy as np

Lanes = slice | np.ndarray  # which rows take part in a step: the first m as slice(0, m), or an array of rows

_WORD = np.uint64(32)
_LOW = np.uint64(1 << 32)  # a state below this takes in a word, if its row has one left


def spans(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The integers starts[0] … starts[0] + sizes[0] - 1, then those of the next span, and so on."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(ends[-1] if len(ends) else 0)


class LaneWriter:
    """Codes symbols, the last one first: what is pushed last is popped first.

    Paper: Duda, "Asymmetric numeral systems", arXiv:1311.2540, 2013 (the range variant: equation 4).

    Args:
        states: (n,) uint64 in [1, 2³²): what the reader finds when it has popped all symbols.
        bits: Upper bound on the bits pushed into one row.
    """

    def __init__(self, states: np.ndarray, bits: int) -> None:
        self._states = states.astype(np.uint64)
        self._words = np.zeros((len(states), bits // 32 + 1), dtype="<u4")
        self._next = np.full(len(states), self._words.shape[1])  # words are filled from the right: the reader's order

    def push(self, lanes: Lanes, start: np.ndarray, width: np.ndarray, bits: int) -> None:
        """A symbol that has the slots start … start + width - 1 of 2^bits, for each of `lanes`."""
        state = self._states[lanes]
        full = np.flatnonzero((state >> np.uint64(64 - bits)) >= width)
        if len(full):
            rows = full if isinstance(lanes, slice) else lanes[full]
            self._next[rows] -= 1
            self._words[rows, self._next[rows]] = state[full]  # the low half
            state[full] >>= _WORD
        quotient = state // width
        self._states[lanes] = (quotient << np.uint64(bits)) + (state - quotient * width) + start

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of all rows (uint8), one row after the other, and the length of each ((n,) int64)."""
        n, columns = self._words.shape
        state = self._states.astype("<u8").view(np.uint8).reshape(n, 8)
        used = 8 - (state[:, ::-1] != 0).argmax(axis=1)  # without leading zeros
        content = np.concatenate([state, self._words.view(np.uint8)], axis=1)
        column = np.arange(8 + 4 * columns)
        taken = (column < used[:, None]) | (column >= 8 + 4 * self._next[:, None])
        return content[taken], used + 4 * (columns - self._next)


class LaneReader:
    """Reads what `LaneWriter` wrote.

    Args:
        data: The bytes of n rows, one after the other.
        lengths: (n,) how many bytes each row has.
    """

    def __init__(self, data: np.ndarray, lengths: np.ndarray) -> None:
        lengths = lengths.astype(np.int64)
        self._left = np.maximum(lengths - 5, 0) // 4  # a state that has given off a word is at least 2³²: 5 bytes
        used = lengths - 4 * self._left
        self._at = np.cumsum(lengths) - lengths
        padded = np.concatenate([data, np.zeros(8, np.uint8)])
        at_any_byte = {size: np.ndarray(len(data) + 1, f"<u{size}", padded, strides=(1,)) for size in (4, 8)}
        self._states = at_any_byte[8][self._at] & (np.uint64(2**64 - 1) >> (64 - 8 * used).astype(np.uint64))
        self._words = at_any_byte[4]
        self._at += used

    def reorder(self, order: np.ndarray) -> None:
        """Row i is from now on what row ``order[i]`` was."""
        self._states, self._at, self._left = self._states[order], self._at[order], self._left[order]

    def slots(self, lanes: Lanes, bits: int) -> np.ndarray:
        """uint64 in [0, 2^bits): the next symbol of each lane is the one whose slots these lie in."""
        return self._states[lanes] & np.uint64((1 << bits) - 1)

    def pop(self, lanes: Lanes, start: np.ndarray, width: np.ndarray, bits: int) -> None:
        """Take the symbol with these slots off each of `lanes`."""
        state = self._states[lanes]
        state = width * (state >> np.uint64(bits)) + (state & np.uint64((1 << bits) - 1)) - start
        low = np.flatnonzero((state < _LOW) & (self._left[lanes] > 0))
        if len(low):
            rows = low if isinstance(lanes, slice) else lanes[low]
            state[low] = (state[low] << _WORD) | self._words[self._at[rows]]
            self._at[rows] += 4
            self._left[rows] -= 1
        self._states[lanes] = state

    def states(self) -> np.ndarray:
        """(n,) uint64: what the writer started from, once all symbols are popped."""
        return self._states
