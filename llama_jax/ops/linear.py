"""Products of activations with a weight matrix that is one array; `ops.weights` has the seam for all kinds."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax.sharding import axes_of


def product(equation: str, x: jax.Array, array: jax.Array, out_sharding: P) -> jax.Array:
    """Activation times weight, in the activation's dtype; float32 at full precision on every platform.

    Lowered to one two-dimensional matmul wherever sharding allows: XLA on CPU runs the three-dimensional contraction of
    `wo_KGHD` ten times slower (2.1 against 20 GB/s). Weights split over a mesh axis that also splits the rows of `x`
    (FSDP) are gathered first; where they are split otherwise (`context`, for one token), `x` is split likewise and the
    partial products are summed.

    Args:
      equation: such as "BTD,DKGH->BTKGH": the contracted dimensions are the last of `x` and the first or last of `w`,
        and the result has the rows of `x` followed by the remaining dimensions of the weight.
      x: activations.
      array: the weight. What is gathered is the array in the dtype of `x`.
      out_sharding: of the result.
    """
    w = gather(array.astype(x.dtype), axes_of_rows(equation, x))
    return multiply(equation, x, w, out_sharding)


def axes_of_rows(equation: str, x: jax.Array) -> set[str]:
    """The mesh axes that split the rows of `x`, over which a weight is gathered."""
    return {axis for entry in spec_of(x)[: -_contracted(equation)[0]] for axis in axes_of(entry)}


def multiply(equation: str, x: jax.Array, w: jax.Array, out_sharding: P) -> jax.Array:
    """As `einsum`, with an array in the dtype of `x` that is whole over the mesh axes that split the rows of `x`."""
    x = _split_as(equation, x, w)
    matmul = _as_matmul(equation, x, w, out_sharding)
    if matmul is None:
        return jnp.einsum(equation, x, w, precision=precision_of(x), out_sharding=out_sharding)
    x_RC, w_2d, contract, shape, spec_2d = matmul
    y = jax.lax.dot_general(
        x_RC, w_2d, (((1,), (contract,)), ((), ())), precision=precision_of(x), out_sharding=spec_2d
    )
    return jax.lax.reshape(y, shape, out_sharding=out_sharding)


def precision_of(x: jax.Array) -> jax.lax.Precision | None:
    """Of products with `x`: those of a float32 model are float32; the default on TPU is bfloat16, on GPU TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _as_matmul(equation: str, x: jax.Array, w: jax.Array, out: P):
    """Both operands in two dimensions, or None where merging dimensions would need communication."""
    contracted, first = _contracted(equation)
    rows = x.ndim - contracted
    split = contracted if first else w.ndim - contracted
    x_spec, w_spec = spec_of(x), spec_of(w)
    out_spec = (*out,) + (None,) * (rows + w.ndim - contracted - len(out))
    groups = (x_spec[:rows], x_spec[rows:], w_spec[:split], w_spec[split:], out_spec[:rows], out_spec[rows:])
    if any(axis is not None for group in groups for axis in group[1:]):
        return None
    x_RC = jax.lax.reshape(
        x, (math.prod(x.shape[:rows]), math.prod(x.shape[rows:])), out_sharding=P(x_spec[0], x_spec[rows])
    )
    w_2d = jax.lax.reshape(
        w, (math.prod(w.shape[:split]), math.prod(w.shape[split:])), out_sharding=P(w_spec[0], w_spec[split])
    )
    kept = w.shape[split:] if first else w.shape[:split]
    return x_RC, w_2d, 0 if first else 1, (*x.shape[:rows], *kept), P(out_spec[0], out_spec[rows])


def _contracted(equation: str) -> tuple[int, bool]:
    """How many dimensions are contracted, and whether they come first in `w` (else last)."""
    operands, result = equation.split("->")
    x_axes, w_axes = operands.split(",")
    contracted = "".join(axis for axis in x_axes if axis not in result)
    kept = "".join(axis for axis in w_axes if axis not in contracted)
    n = len(contracted)
    orders = (contracted + kept, kept + contracted)
    if contracted != x_axes[-n:] or x_axes[:-n] + kept != result or w_axes not in orders:
        raise ValueError(f"einsum {equation!r}: contract the last dimensions of x with the first or last of w")
    return n, w_axes == contracted + kept


def _split_as(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x` with its contracted dimensions split as those of `w`: each device takes a part of what it has."""
    n, first = _contracted(equation)
    spec = spec_of(w)[:n] if first else spec_of(w)[-n:]
    return x if spec == spec_of(x)[-n:] else jax.reshard(x, P(*spec_of(x)[:-n], *spec))


def gather(w: jax.Array, axes: set[str]) -> jax.Array:
    """`w` made whole over the mesh axes `axes`."""
    spec = spec_of(w)
    kept = [_without(entry, axes) for entry in spec]
    return w if kept == list(spec) else jax.reshard(w, P(*kept))


def _without(entry, axes: set[str]):
    kept = tuple(axis for axis in axes_of(entry) if axis not in axes)
    return kept if len(kept) > 1 else (kept[0] if kept else None)


def spec_of(x: jax.Array) -> tuple:
    """The mesh axes of each dimension."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))
