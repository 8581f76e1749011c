"""An order that looks random, computed for one position at a time: no list of the length of the data is ever held."""

from __future__ import annotations

import hashlib
import struct

_ROUNDS = 4
_MASK = 2**64 - 1


class Permutation:
    """A permutation of range(size), chosen by a key.

    A Feistel network permutes the powers of four, and what falls outside of the range is permuted again until it falls
    inside (cycle walking; Black and Rogaway 2002). A value costs microseconds and no memory.
    """

    def __init__(self, size: int, key: str) -> None:
        """The permutation of ``range(size)`` that belongs to ``key``."""
        self._size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = struct.unpack(f"<{_ROUNDS}Q", hashlib.sha256(key.encode()).digest())

    def __call__(self, index: int) -> int:
        """Where ``index`` goes.

        Raises:
            IndexError: it is not in the range.
        """
        if not 0 <= index < self._size:
            raise IndexError(f"{index} is not in range({self._size})")
        index = self._once(index)
        while index >= self._size:
            index = self._once(index)
        return index

    def _once(self, value: int) -> int:
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << self._half | right


def _mixed(value: int) -> int:
    """A 64-bit finaliser: every bit of the value changes about half of the result (SplitMix64, Steele et al. 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
