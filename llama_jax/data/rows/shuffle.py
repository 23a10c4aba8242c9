"""A random order of n things that is computed, not stored: a keyed bijection of [0, n), the same on every machine."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

ROUNDS = 6  # of a Feistel network: four are a strong pseudorandom permutation when the rounds are random functions
_WORD = 0xFFFFFFFF


class Permutation:
    """Position -> element of a shuffled [0, n), in constant memory; NumPy's own shuffles may change with its version.

    A Feistel network over the smallest power of two that holds n. An image of n or more is sent through it again until
    it falls below n (cycle walking): fewer than two passes on average.

    Args:
      n: how many elements, below 2**63.
      *key: what decides the order, for example seed, name of the use and epoch.
    """

    def __init__(self, n: int, *key: int | str) -> None:
        self.n = n
        bits = max((n - 1).bit_length(), 2)  # each half needs a bit
        self._low_bits = bits // 2
        self._masks = ((1 << (bits - bits // 2)) - 1, (1 << (bits // 2)) - 1)  # high half, low half
        digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u4").tolist()

    def __call__(self, position: int) -> int:
        """The element at one position."""
        position = self._pass(position)
        while position >= self.n:
            position = self._pass(position)
        return position

    def many(self, positions: np.ndarray) -> np.ndarray:
        """The elements at many positions.

        Args:
          positions: integers [...] in [0, n).

        Returns:
          int64 of the same shape.
        """
        elements = self._pass_many(np.asarray(positions))
        outside = np.flatnonzero(elements.ravel() >= self.n)
        while outside.size:
            again = self._pass_many(elements.ravel()[outside])
            elements.ravel()[outside] = again
            outside = outside[again >= self.n]
        return elements

    def _pass_many(self, x: np.ndarray) -> np.ndarray:
        high, low = (x >> self._low_bits).astype(np.uint32), (x & self._masks[1]).astype(np.uint32)
        high, low = self._rounds(high, low)
        return high.astype(np.int64) << self._low_bits | low

    def _pass(self, x: int) -> int:
        high, low = self._rounds(x >> self._low_bits, x & self._masks[1])
        return high << self._low_bits | low

    def _rounds(self, high: Any, low: Any) -> tuple[Any, Any]:
        for i, key in enumerate(self._keys):
            if i % 2:
                low = low ^ _mix(high, key) & self._masks[1]
            else:
                high = high ^ _mix(low, key) & self._masks[0]
        return high, low


def _mix(x: Any, key: int) -> Any:
    """A hash of 32 bits (lowbias32, by C. Wellons), of Python's integers and of uint32 arrays alike."""
    x = x ^ key
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16
