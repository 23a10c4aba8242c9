"""The one seam through which every weight matrix is used."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from llama_jax.sharding import axes_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Narrowed:
    """A float32 weight whose gradient is kept in the dtype that it is computed in: half the memory, the same numbers.

    JAX gives a float32 weight a float32 gradient, though products in bfloat16 make bfloat16 ones. Differentiate with
    respect to `gradient` instead of `value`.

    Attributes:
      value: the weight.
      gradient: any array of the same shape and sharding in the dtype of the computation; its numbers are not used.
    """

    value: jax.Array
    gradient: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.value.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flattened:
    """A weight with its output dimensions merged, as a TPU multiplies with it.

    XLA turns the [D, 1, 4, 128] of a chip's query heads into that form before the loop of decoding, and holds copies of
    all layers: 0.67 GB for 70B on 16 v5e, and no room is left to fetch other weights ahead. Of the keys' and values'
    [D, 10, 128], with as many heads as queries, it holds 1 GB for Llama 2 13B on 4 v5e.

    Attributes:
      matrix: [D, outputs].
      shape: of the weight.
      spec: how its dimensions are split.
    """

    matrix: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    spec: P = dataclasses.field(metadata={"static": True})


def flatten(w: jax.Array) -> jax.Array | Flattened:
    """The weight [D, ...], abstract or not, flattened; as it is where a device's part would not lie together."""
    D, sharding = w.shape[0], cast(Any, w.sharding)
    spec = (*sharding.spec, *(None for _ in range(w.ndim - len(sharding.spec))))
    rows, *outputs = spec
    last = max((i for i, entry in enumerate(outputs) if entry is not None), default=0)
    if any(size > 1 for size in sharding.shard_shape(w.shape)[1 : 1 + last]):
        return w
    merged = tuple(axis for entry in outputs for axis in axes_of(entry))
    flat = P(rows, merged if len(merged) > 1 else merged[0] if merged else None)
    if isinstance(w, jax.ShapeDtypeStruct):
        where = jax.NamedSharding(sharding.mesh, flat)
        matrix = jax.ShapeDtypeStruct((D, math.prod(w.shape[1:])), w.dtype, sharding=where)
    else:
        matrix = jax.jit(jax.shard_map(lambda w: w.reshape(len(w), -1), out_specs=flat))(w)
    return Flattened(matrix, w.shape, P(*spec))  # pyright: ignore[reportArgumentType]


def unflatten(w: Flattened) -> jax.Array:
    """The weight as it was."""
    local = jax.NamedSharding(jax.sharding.get_abstract_mesh(), w.spec).shard_shape(w.shape)
    return jax.jit(jax.shard_map(lambda x: x.reshape(local), out_specs=w.spec))(w.matrix)


@jax.custom_vjp
def _narrow(value: jax.Array, gradient: jax.Array) -> jax.Array:
    if (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16):
        # Rounds as `astype` does. With that alone XLA casts the stacked weights of all layers before their loop, and
        # keeps them: 1.0 GB a chip for 8B on 16 chips, and as much for its gradient.
        value = jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
    return value.astype(gradient.dtype)


_narrow.defvjp(lambda value, gradient: (_narrow(value, gradient), None), lambda _, cotangent: (None, cotangent))


def einsum(
    equation: str, x: jax.Array, w: nnx.Param | jax.Array | Narrowed | Flattened, *, out_sharding: P
) -> jax.Array:
    """Activation times weight, in the activation's dtype; float32 at full precision on every platform.

    Lowered to one two-dimensional matmul wherever sharding allows: XLA on CPU runs the three-dimensional contraction of
    `wo_KGHD` ten times slower (2.1 against 20 GB/s). Weights split over a mesh axis that also splits the rows of `x`
    (FSDP) are gathered first; where they are split otherwise (`context`, for one token), `x` is split likewise and the
    partial products are summed.

    Args:
      equation: such as "BTD,DKGH->BTKGH": the contracted dimensions are the last of `x` and the first or last of `w`,
        and the result has the rows of `x` followed by the remaining dimensions of `w`.
      x: activations.
      w: the weight; its type decides how it is multiplied.
      out_sharding: of the result.
    """
    leaf: Any = w.get_value() if isinstance(w, nnx.Variable) else w
    # The products of a float32 model are float32: the default on TPU is bfloat16, on GPU TF32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if isinstance(leaf, Flattened):
        return _flattened_product(x, leaf, precision, out_sharding)
    array = _narrow(leaf.value, leaf.gradient) if isinstance(leaf, Narrowed) else leaf
    rows = _spec(x)[: -_contracted(equation)[0]]
    w = _gather(array.astype(x.dtype), {axis for entry in rows for axis in axes_of(entry)})
    x = _split_as(equation, x, w)
    matmul = _as_matmul(equation, x, w, out_sharding)
    if matmul is None:
        return jnp.einsum(equation, x, w, precision=precision, out_sharding=out_sharding)
    x_RC, w_2d, contract, shape, spec_2d = matmul
    y = jax.lax.dot_general(x_RC, w_2d, (((1,), (contract,)), ((), ())), precision=precision, out_sharding=spec_2d)
    return jax.lax.reshape(y, shape, out_sharding=out_sharding)


def _flattened_product(x_BTD: jax.Array, w: Flattened, precision: Any, out: P) -> jax.Array:
    rows = _spec(x_BTD)[:-1]
    matrix = _gather(w.matrix.astype(x_BTD.dtype), {axis for entry in rows for axis in axes_of(entry)})
    inner, outer = _spec(matrix)
    x_BTD = x_BTD if _spec(x_BTD)[-1] == inner else jax.reshard(x_BTD, P(*rows, inner))
    y = jax.lax.dot_general(
        x_BTD, matrix, (((x_BTD.ndim - 1,), (0,)), ((), ())), precision=precision, out_sharding=P(*rows, outer)
    )
    shape = (*x_BTD.shape[:-1], *w.shape[1:])
    local = jax.NamedSharding(jax.sharding.get_abstract_mesh(), out).shard_shape(shape)
    return jax.shard_map(lambda y: y.reshape(local), out_specs=out)(y)


def _as_matmul(equation: str, x: jax.Array, w: jax.Array, out: P):
    """Both operands in two dimensions, or None where merging dimensions would need communication."""
    contracted, first = _contracted(equation)
    rows = x.ndim - contracted
    split = contracted if first else w.ndim - contracted
    x_spec, w_spec = _spec(x), _spec(w)
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
    spec = _spec(w)[:n] if first else _spec(w)[-n:]
    return x if spec == _spec(x)[-n:] else jax.reshard(x, P(*_spec(x)[:-n], *spec))


def _gather(w: jax.Array, axes: set[str]) -> jax.Array:
    """`w` made whole over the mesh axes `axes`."""
    spec = _spec(w)
    kept = [_without(entry, axes) for entry in spec]
    return w if kept == list(spec) else jax.reshard(w, P(*kept))


def _without(entry, axes: set[str]):
    kept = tuple(axis for axis in axes_of(entry) if axis not in axes)
    return kept if len(kept) > 1 else (kept[0] if kept else None)


def _spec(x: jax.Array) -> tuple:
    """The mesh axes of each dimension."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))
