"""Weights in NF4: four bits a number. They are gathered over the mesh so, and expanded where they are multiplied."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.config.quantization import BLOCK, CODES, SCALE_BLOCK
from llama_jax.ops import linear
from llama_jax.ops.weights import Stored
from llama_jax.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Stored):
    """A weight [*in, *out] in blocks of 64 along the last dimension of *in; it does not train.

    Its numbers are those of bitsandbytes (`weights.nf4`), in an order that needs no shuffling here: byte j of a block
    has number j in its high four bits and number 32 + j in its low ones.

    Attributes:
      codes: uint8 [*in / 64, 32, *out], the last dimension of *in divided; of a stack of layers with L in front, as
        the others.
      absmax: [*in / 64, *out]: the largest magnitude of a block, float32, or uint8 where these are quantized too.
      scales: float32 [J, *out]: of the magnitudes of each output, where 256 of them in a row share one; else None.
      offset: float32 scalar, [L] of a stack: the mean magnitude; else None.
      table: float32 [256], [L, 256] of a stack: what a magnitude in eight bits stands for, times its scale; else None.
      number: the dtype of what it stands for.
      inner: how many dimensions *in has.
      outer: how many *out has.
    """

    codes: jax.Array
    absmax: jax.Array
    scales: jax.Array | None
    offset: jax.Array | None
    table: jax.Array | None
    number: np.dtype = dataclasses.field(metadata={"static": True})
    inner: int = dataclasses.field(metadata={"static": True})
    outer: int = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> np.dtype:
        """Of what it stands for."""
        return self.number

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        axis = self.absmax.ndim - self.outer - 1
        return (*self.absmax.shape[:axis], self.absmax.shape[axis] * BLOCK, *self.absmax.shape[axis + 1 :])

    @property
    def spec(self) -> P:
        """As its magnitudes are split: of the blocks, in whole ones."""
        absmax: PyTree = self.absmax
        spec = (absmax if isinstance(absmax, jax.ShapeDtypeStruct) else jax.typeof(absmax)).sharding.spec
        return P(*spec, *(None for _ in range(self.absmax.ndim - len(spec))))

    def dense(self) -> jax.Array:
        """The weight, computed in float32 and rounded once."""
        if self.absmax.ndim > self.inner + self.outer:
            return jnp.stack([jax.tree.map(lambda x: x[i], self).dense() for i in range(len(self.absmax))])  # noqa: B023
        axis = self.inner - 1
        high, low = (_code_point(half) for half in (self.codes >> 4, self.codes & 15))
        numbers = jnp.concatenate([high, low], axis=axis + 1)
        numbers = numbers * jnp.expand_dims(self._magnitudes(), axis + 1)
        return jax.lax.reshape(numbers.astype(self.number), self.shape, out_sharding=self.spec)

    def _magnitudes(self) -> jax.Array:
        """Float32, as `absmax`."""
        if self.scales is None or self.table is None or self.offset is None:
            return self.absmax
        shape = self.absmax.shape
        inputs, outputs = range(self.inner), range(self.inner, len(shape))
        blocks = math.prod(shape[i] for i in inputs)

        def position(dimensions: range) -> PyTree:
            """Of each magnitude along some dimensions, as if they were one."""
            found = jnp.int32(0)
            for i in dimensions:
                found = found * shape[i] + jax.lax.broadcasted_iota(jnp.int32, shape, i, out_sharding=self.spec)
            return found

        first = position(outputs) * blocks  # bitsandbytes counts all blocks of one output, then those of the next
        own = (first + position(inputs)) // SCALE_BLOCK - first // SCALE_BLOCK
        # By selects, as the code points, they would be 255 operations for each of hundreds of weights, to compile.
        unit = self.table.at[self.absmax].get(mode="promise_in_bounds", out_sharding=self.spec)
        deviation = unit
        for j, of_output in enumerate(self.scales):
            # The product is in here so that no compiler joins it with the sum, and rounds once instead of twice.
            scaled = unit * jnp.expand_dims(of_output, tuple(inputs))
            deviation = jax.lax.select_n(own == j, deviation, scaled)
        return deviation + self.offset

    def product(self, equation: str, x: jax.Array, out_sharding: P) -> jax.Array:
        """Gathers the codes and multiplies with what they stand for, which the gradient computes again."""
        like = x.shape, x.dtype, P(*linear.spec_of(x))
        return _product(equation, out_sharding, like, x, self)

    def lookup(self, ids: jax.Array, out_sharding: P) -> jax.Array:
        """Not of tables."""
        raise NotImplementedError("an embedding table is not stored in NF4")


def _code_point(index: jax.Array) -> jax.Array:
    """The code point of each index, float32: by its four bits, as a vector unit has no table to look it up in.

    The choice between two constants is a product and a sum of integers, the bits of float32 numbers: a constant that is
    spread over an array does not depend on the weight, and JAX would keep one of the weight's size for each of the 16.
    """
    bits = [(index >> i & 1).astype(jnp.int32) for i in range(4)]
    points = np.array(CODES, np.float32).view(np.int32).tolist()
    found = [bits[0] * _wrapped(odd - even) + even for even, odd in zip(points[::2], points[1::2], strict=True)]
    chosen = [jax.lax.bitcast_convert_type(x, jnp.float32) for x in found]
    for bit in bits[1:]:
        pairs = zip(chosen[::2], chosen[1::2], strict=True)
        chosen = [jax.lax.select_n(bit == 1, low, high) for low, high in pairs]
    return chosen[0]


def _wrapped(x: int) -> int:
    """As int32 holds it."""
    return (x + 2**31) % 2**32 - 2**31


def _whole(equation: str, x: jax.Array, weight: NF4, after: jax.Array) -> jax.Array:
    """The weight gathered and expanded, once `after` is there: else a compiler expands those of a whole block at its
    beginning, and keeps what the forward pass expanded for the backward pass."""
    axes = linear.axes_of_rows(equation, x)
    weight, _ = jax.lax.optimization_barrier((weight, after))
    return jax.tree.map(lambda part: linear.gather(part, axes), weight).dense().astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(equation: str, out_sharding: P, like: PyTree, x: jax.Array, weight: NF4) -> jax.Array:
    return linear.multiply(equation, x, _whole(equation, x, weight, x), out_sharding)


def _forward(equation: str, out_sharding: P, like: PyTree, x: jax.Array, weight: NF4):
    # Nothing but the codes is kept for the backward pass: neither `x` nor the expanded weights of all layers.
    return _product(equation, out_sharding, like, x, weight), weight


def _backward(equation: str, out_sharding: P, like: PyTree, weight: NF4, cotangent: jax.Array):
    shape, dtype, spec = like
    x = jnp.zeros(shape, dtype, out_sharding=spec)  # the product is linear: its numbers are not used
    w = _whole(equation, x, weight, cotangent)
    _, transposed = jax.vjp(lambda x: linear.multiply(equation, x, w, out_sharding), x)
    return *transposed(cotangent), None


_product.defvjp(_forward, _backward)
