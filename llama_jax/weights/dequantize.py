"""GGML's quantized blocks back to float32: llama.cpp's arithmetic in the same order, so bit for bit equal.

A row of weights is cut into blocks of 32 or 256 elements. A block holds its elements as small integers q
beside a float16 scale d and perhaps a float16 minimum m. The "K" blocks of 256 divide further, into groups of
16 or 32 elements that have an integer scale of their own. Arrays below are [n blocks, bytes or elements].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Elements at a time: the temporaries of a chunk (under 1 MB) stay in the processor's cache. Larger is slower.
CHUNK = 1 << 16


def dequantize(blocks: np.ndarray, kind: str) -> np.ndarray:
    """Turns quantized blocks into float32.

    Args:
      blocks: uint8 [..., blocks in a row, bytes in a block].
      kind: GGML's name of the format, a key of `BLOCK_FORMATS`.

    Returns:
      float32 [..., blocks in a row * elements in a block]. Damaged scales give inf or NaN, unwarned.
    """
    elements, nbytes, write, _ = BLOCK_FORMATS[kind]
    *leading, row_blocks, _ = blocks.shape
    rows = blocks.reshape(-1, row_blocks, nbytes)
    out = np.empty((len(rows), row_blocks, elements), np.float32)
    step = max(1, CHUNK // (row_blocks * elements))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            write(rows[chunk].reshape(-1, nbytes), out[chunk].reshape(-1, elements))
    return out.reshape(*leading, row_blocks * elements)


def _float16(blocks: np.ndarray, at: int) -> np.ndarray:
    """Returns the float16 at byte `at` of each block: float32 [n, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, group: int) -> np.ndarray:
    """Splits bytes in two: `group` low halves, then their high halves, then the next group.

    Returns uint8 [n, 2 * bytes].
    """
    packed = packed.reshape(len(packed), -1, 1, group)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _bits(packed: np.ndarray, width: int) -> np.ndarray:
    """Splits bytes in fields of `width` bits: the lowest of 32 bytes first, the next of the same 32, ...

    Returns uint8 [n, bytes * 8 / width].
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields = packed.reshape(len(packed), -1, 1, 32) >> shifts
    return (fields & ((1 << width) - 1)).reshape(len(packed), -1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """Returns the 32 bits at byte `at`, one for each element, as 0 or 16: uint8 [n, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:  # d | 16 bytes of nibbles
    np.subtract(_nibbles(blocks[:, 2:], 16), np.float32(8), out=out)
    out *= _float16(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:  # d, m | 16 bytes of nibbles
    np.multiply(_nibbles(blocks[:, 4:], 16), _float16(blocks, 0), out=out)
    out += _float16(blocks, 2)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:  # d | 32 fifth bits | 16 bytes of nibbles
    np.subtract(_nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2), np.float32(16), out=out)
    out *= _float16(blocks, 0)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:  # d, m | 32 fifth bits | 16 bytes of nibbles
    np.multiply(_nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4), _float16(blocks, 0), out=out)
    out += _float16(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:  # d | 32 signed bytes
    np.multiply(blocks[:, 2:].view(np.int8), _float16(blocks, 0), out=out)


def _scale_and_offset(blocks: np.ndarray, q: np.ndarray, out: np.ndarray) -> None:
    """Q4_K and Q5_K: (d * scale) * q - (dmin * minimum) over 8 groups of 32.

    The 6-bit scales and minima are stored in 12 bytes. Those of groups 0 to 3 are in the low bits of the first
    and the second four bytes; the others have 4 bits in the last four bytes, and 2 on top of the first eight.
    """
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], axis=1)
    minima = np.concatenate([mid & 63, (high >> 4) | (mid >> 2 & 48)], axis=1)
    out = out.reshape(-1, 8, 32)
    np.multiply(q.reshape(out.shape), (_float16(blocks, 0) * scales)[:, :, None], out=out)
    out -= (_float16(blocks, 2) * minima)[:, :, None]


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:  # d, dmin | scales and minima | 128 bytes of nibbles
    _scale_and_offset(blocks, _nibbles(blocks[:, 16:], 32), out)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:  # as Q4_K, with 256 fifth bits before the nibbles
    _scale_and_offset(blocks, _nibbles(blocks[:, 48:], 32) | (_bits(blocks[:, 16:48], 1) << 4), out)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:  # nibbles | pairs of upper bits | int8 scales | d
    q = _nibbles(blocks[:, :128], 64) | (_bits(blocks[:, 128:192], 2) << 4)
    scales = _float16(blocks, 208) * blocks[:, 192:208].view(np.int8)
    out = out.reshape(-1, 16, 16)
    np.subtract(q.reshape(out.shape), np.float32(32), out=out)
    out *= scales[:, :, None]


class BlockFormat(NamedTuple):
    """How GGML stores a block.

    Attributes:
      elements: numbers in a block.
      nbytes: bytes of a block.
      write: dequantizes blocks uint8 [n, nbytes] into float32 [n, elements].
      largest: the largest integer that a block holds, times its scale; 0 for blocks that are only read.
    """

    elements: int
    nbytes: int
    write: Callable[[np.ndarray, np.ndarray], None]
    largest: int = 0


BLOCK_FORMATS = {
    "Q4_0": BlockFormat(32, 18, _q4_0, largest=8),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q8_0": BlockFormat(32, 34, _q8_0, largest=127),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q6_K": BlockFormat(256, 210, _q6_k),
}
QUANTIZATIONS = ("q8_0", "q4_0")  # what is written, by its name on the command line
