"""NF4, the four-bit numbers of QLoRA, in NumPy: bit for bit those of bitsandbytes (Dettmers et al. 2023).

A row of a matrix [out, in] is cut into blocks of 64. A number is the nearest of 16 code points, times the block's
largest magnitude; double quantization stores these magnitudes in eight bits, in blocks of 256.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from llama_jax.config.quantization import BLOCK, CODES, SCALE_BLOCK, SCALES

CHUNK = 1 << 16  # numbers at a time, which stay in the processor's cache

_CODES = np.array(CODES, np.float32)
_SCALES = np.array(SCALES, np.float32)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix [out, in] in NF4.

    Attributes:
      codes: uint8 [out, in / 2]: of two neighbours, the first is in the high four bits.
      absmax: [out, in / 64]: the magnitudes, float32, or uint8 where these are quantized themselves.
      scales: float32 [blocks / 256, rounded up]: the largest magnitude of 256 deviations from `offset`; else None.
      offset: float32 scalar: the mean magnitude; else None.
      table: float32 [256]: what a magnitude in eight bits stands for, in units of its scale.
    """

    codes: np.ndarray
    absmax: np.ndarray
    scales: np.ndarray | None = None
    offset: np.float32 | None = None
    table: np.ndarray = dataclasses.field(default_factory=lambda: _SCALES)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def magnitudes(self) -> np.ndarray:
        """The magnitude of each block, float32 [out, in / 64]."""
        if self.scales is None or self.offset is None:
            return self.absmax
        of_block = np.repeat(self.scales, SCALE_BLOCK)[: self.absmax.size].reshape(self.absmax.shape)
        return self.table[self.absmax] * of_block + self.offset

    def dense(self, rows: slice = slice(None)) -> np.ndarray:
        """The numbers, float32 [out, in], or of some rows."""
        codes = self.codes[rows]
        numbers = np.empty((*codes.shape, 2), np.float32)
        numbers[..., 0], numbers[..., 1] = _CODES[codes >> 4], _CODES[codes & 15]
        blocks = numbers.reshape(len(codes), -1, BLOCK)
        blocks *= self.magnitudes()[rows, :, None]
        return blocks.reshape(len(codes), -1)


def quantize(w: np.ndarray, *, double: bool) -> Blocks:
    """Returns a matrix in NF4.

    Args:
      w: floating-point [out, in], `in` a multiple of 64.
      double: whether the magnitudes are quantized too: 4.127 bits a number instead of 4.5.

    Raises:
      ValueError: `in` is no multiple of 64.
    """
    if w.shape[1] % BLOCK:
        raise ValueError(f"NF4 has blocks of {BLOCK}, which do not divide rows of {w.shape[1]}")
    codes = np.empty((w.shape[0], w.shape[1] // 2), np.uint8)
    absmax = np.empty((w.shape[0], w.shape[1] // BLOCK), np.float32)
    step = max(1, CHUNK // w.shape[1])
    for start in range(0, len(w), step):
        rows = slice(start, start + step)
        blocks = w[rows].astype(np.float32).reshape(-1, BLOCK)
        largest = np.abs(blocks).max(axis=1)
        absmax[rows] = largest.reshape(-1, absmax.shape[1])
        unit = blocks / np.where(largest == 0, np.float32(1), largest)[:, None]
        nibbles = _code(unit).reshape(-1, 2)
        codes[rows] = (nibbles[:, 0] << 4 | nibbles[:, 1]).reshape(-1, codes.shape[1])
    return _double(codes, absmax) if double else Blocks(codes, absmax)


def _double(codes: np.ndarray, absmax: np.ndarray) -> Blocks:
    """The magnitudes as deviations from their mean, in eight bits."""
    offset = absmax.mean(dtype=np.float32)
    deviations = (absmax - offset).ravel()
    blocks = np.zeros((-(-deviations.size // SCALE_BLOCK), SCALE_BLOCK), np.float32)
    blocks.ravel()[: deviations.size] = deviations
    scales = np.abs(blocks).max(axis=1)
    unit = blocks / np.where(scales == 0, np.float32(1), scales)[:, None]
    nearest = np.searchsorted(_middles(_SCALES), unit, side="left").astype(np.uint8)
    return Blocks(codes, nearest.ravel()[: absmax.size].reshape(absmax.shape), scales, offset)


def _code(x: np.ndarray) -> np.ndarray:
    """The index of the nearest code point, uint8; of two at the same distance the lower one."""
    found, above = np.zeros(x.shape, np.uint8), np.empty(x.shape, np.bool_)
    for middle in _middles(_CODES):  # ten times as fast as a search in so short a list
        np.greater(x, middle, out=above)
        found += above.view(np.uint8)
    return found


def _middles(points: np.ndarray) -> np.ndarray:
    return (points[1:] + points[:-1]) / np.float32(2)
