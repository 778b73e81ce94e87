"""Which rows an exchange needs, so that few others travel: a bit for each hash of a key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from zlib import crc32

import numpy as np

_FEWEST_BITS, _MOST_BITS = 16, 28  # by their logarithm: 8 KiB and 32 MiB
_BITS_PER_KEY = 64


def codes(ids: Sequence[str]) -> np.ndarray:
    """Returns a number of 32 bits for each id, uint32 ``[ids]``; few have one in common.

    The ids of passages are hashes: of others that resemble each other, more numbers are alike.
    """
    return np.array([crc32(id_.encode()) for id_ in ids], np.uint32)


class KeyFilter:
    """A Bloom filter of one hash (Bloom 1970): all keys pass that were added, and few others.

    Its size has a bound, whatever is added: of n keys, about n / 2^28 of all others pass.
    """

    def __init__(self, num_keys: int) -> None:
        """Makes a filter to which about so many keys will be added."""
        num_bits = (_BITS_PER_KEY * num_keys).bit_length()
        self._unused = 32 - min(max(num_bits, _FEWEST_BITS), _MOST_BITS)
        self._bits = np.zeros(1 << 32 - self._unused - 3, np.uint8)

    @classmethod
    def of(cls, num_keys: int, parts: Iterable[np.ndarray]) -> KeyFilter:
        """Makes a filter of codes, uint32 ``[keys]`` in each part."""
        made = cls(num_keys)
        for part in parts:
            byte, bit = made._place(part)
            np.bitwise_or.at(made._bits, byte, bit)
        return made

    @property
    def share(self) -> float:
        """The share of other keys that pass."""
        return float(np.bitwise_count(self._bits).sum(dtype=np.int64)) / (8 * len(self._bits))

    def passes(self, codes: np.ndarray) -> np.ndarray:
        """Says which of these codes, uint32 ``[keys]``, pass: bool ``[keys]``."""
        byte, bit = self._place(codes)
        passed: np.ndarray = (self._bits[byte] & bit) != 0
        return passed

    def _place(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        used = codes >> np.uint32(self._unused)
        return used >> np.uint32(3), np.uint8(1) << (used & np.uint32(7)).astype(np.uint8)
