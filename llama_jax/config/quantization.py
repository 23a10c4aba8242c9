"""Quantized forms of a model's matrices: their names, their numbers, and the bytes that they take. No JAX."""

from __future__ import annotations

import itertools
import math
import struct
from typing import Literal, get_args

Quantize = Literal["nf4", "nf4-single"]
"""nf4: NF4 with double quantization, 4.13 bits a number; nf4-single: 4.5 bits."""

BLOCK = 64  # numbers that share a magnitude
SCALE_BLOCK = 256  # magnitudes that share a scale, where they are quantized too

_HEX = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
    " 3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
CODES = tuple(struct.unpack(">f", bytes.fromhex(word))[0] for word in _HEX.split())
"""The 16 code points of NF4, ascending: quantiles of a normal distribution, with an exact zero."""


def _float32(x: float) -> float:
    return struct.unpack("<f", struct.pack("<f", x))[0]


def _dynamic_map() -> tuple[float, ...]:
    """The 256 numbers of bitsandbytes' signed dynamic data type, ascending: seven powers of ten, each in steps.

    In float32 as `torch.linspace` has them, a product and its sum rounded once: the numbers in its files, to the bit.
    """
    found = [0.0, 1.0]
    for power in range(7):
        steps = 2**power
        step = _float32(_float32(1.0 - _float32(0.1)) / steps)
        edges = [
            _float32(_float32(0.1) + step * i) if 2 * i < steps + 1 else _float32(1.0 - step * (steps - i))
            for i in range(steps + 1)
        ]  # fmt: skip
        for low, high in itertools.pairwise(edges):
            middle = _float32(_float32(_float32(low + high) / 2) * _float32(10.0 ** (power - 6)))
            found += [middle, -middle]
    return tuple(sorted(found))


SCALES = _dynamic_map()
"""The eight-bit numbers in which magnitudes are stored, where they are quantized too."""


def check_quantize(name: str | None) -> None:
    """Raises ValueError where there is no quantized form of that name."""
    if name is not None and name not in get_args(Quantize):
        raise ValueError(f"quantize must be one of {', '.join(get_args(Quantize))}, got {name!r}")


def quantized_bytes(quantize: str, inputs: int, *, numbers: int, outputs: int) -> int:
    """Bytes that a device holds of a matrix.

    Args:
      quantize: its form.
      inputs: numbers of each output, on all devices together.
      numbers: that the device holds, in whole blocks.
      outputs: of which it holds some.
    """
    if quantize == "nf4-single":
        return numbers // 2 + 4 * numbers // BLOCK
    return numbers // 2 + numbers // BLOCK + 4 * scale_rows(inputs) * outputs + 4 + 4 * len(SCALES)


def scale_rows(inputs: int) -> int:
    """How many scales the magnitudes of one output use at most, as 256 of them in a row share one."""
    per_output = inputs // BLOCK
    if SCALE_BLOCK % per_output == 0:
        return 1
    if per_output % SCALE_BLOCK == 0:
        return per_output // SCALE_BLOCK
    return math.ceil((per_output + SCALE_BLOCK - 1) / SCALE_BLOCK)
