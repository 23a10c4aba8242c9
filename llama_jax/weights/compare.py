"""Compares the weights of two checkpoints of any formats, one parameter at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from llama_jax.weights import params
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.source import Tensor, common_dtype


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one parameter of b is from that of a.

    Attributes:
      name: in our spelling, "blocks.3.attn.wq".
      max_abs: largest |b - a|.
      relative: root mean square of b - a, over that of a.
      same_bits: whether every number is the same, NaN and the sign of zero included; dtypes may differ.
      dtypes: as stored in a and in b.
    """

    name: str
    max_abs: float
    relative: float
    same_bits: bool
    dtypes: tuple[str, str]


def compare_parameter(
    a: Checkpoint,
    b: Checkpoint,
    row: params.ParamSpec,
    layer: int | None,
    *,
    expected: Callable[[np.ndarray], np.ndarray] = lambda piece: piece,
    tensor: Tensor | None = None,
) -> Difference:
    """Compares one parameter, in Hugging Face's order of rows, piece by piece.

    Args:
      a: the reference.
      b: of the same configuration.
      row: which parameter.
      layer: of which layer.
      expected: returns what b should hold for a piece of a, such as its rounding.
      tensor: where b holds it, if not under its usual name.
    """
    tensors = a.tensor(row, layer), tensor or b.tensor(row, layer)

    def both() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for x, y in _aligned(_pieces(a, row, tensors[0]), _pieces(b, row, tensors[1])):
            x = expected(x)
            common = common_dtype((x.dtype, y.dtype))
            yield x.astype(common, copy=False), y.astype(common, copy=False)

    name, dtypes = row.name("native", layer), (str(tensors[0].dtype), str(tensors[1].dtype))
    if all(_same_bits(x, y) for x, y in both()):
        return Difference(name, 0.0, 0.0, True, dtypes)
    worst, square, total = 0.0, 0.0, 0.0
    for x, y in both():
        x, y = x.astype(np.float32), y.astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, y - x)
            difference = np.nan_to_num(np.abs(difference), nan=np.inf, posinf=np.inf)
            worst = max(worst, float(difference.max()))
            square += float(np.sum(np.square(difference), dtype=np.float64))
            total += float(np.sum(np.square(np.nan_to_num(x)), dtype=np.float64))
    return Difference(name, worst, (square / total) ** 0.5 if total else worst, False, dtypes)


def _pieces(checkpoint: Checkpoint, row: params.ParamSpec, tensor: Tensor) -> Iterator[np.ndarray]:
    rows, *columns = params.stored_shape(row, checkpoint.config, "hf")
    width = columns[0] if columns else rows
    return params.pieces(tensor, row, checkpoint.config, checkpoint.format, "hf", slice(0, width), range(rows))


def _aligned(a: Iterator[np.ndarray], b: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields pairs of pieces with the same rows: dtypes of different width make pieces of different height."""
    x, y = next(a, None), next(b, None)
    while x is not None and y is not None:
        n = min(len(x), len(y))
        yield x[:n], y[:n]
        x = x[n:] if n < len(x) else next(a, None)
        y = y[n:] if n < len(y) else next(b, None)


def _same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    x, y = (np.ascontiguousarray(z).reshape(-1).view(np.uint8) for z in (x, y))
    return np.array_equal(x, y)
