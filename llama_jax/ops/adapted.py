"""A weight with a LoRA adapter: the base is any other leaf, and only the two small factors train."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.ops import linear
from llama_jax.ops.weights import Stored, leaf_of
from llama_jax.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(Stored):
    """W + A diag(gate) B, of which W, A and B are never added up.

    Attributes:
      base: W [*in, *out], any leaf or array; of a stack of layers [L, *in, *out].
      a: float32 [*in, R], or [L, *in, R].
      b: float32 [R, *out], or [L, R, *out].
      gate: float32 [R], or [L, R]: what the product of a column of `a` and a row of `b` counts, alpha / r.
    """

    base: PyTree
    a: jax.Array
    b: jax.Array
    gate: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base."""
        return leaf_of(self.base).shape

    @property
    def dtype(self) -> np.dtype:
        """Of the base."""
        return leaf_of(self.base).dtype

    @property
    def spec(self) -> P:
        """Of the base."""
        return leaf_of(self.base).spec

    def dense(self) -> jax.Array:
        """The merged weight, in the base's dtype, rounded once."""
        base = leaf_of(self.base).dense()
        stack = "l" * (self.gate.ndim - 1)  # of a stack's layers
        inner, outer = "abcd"[: self.a.ndim - 1 - len(stack)], "wxyz"[: self.b.ndim - 1 - len(stack)]
        gate = self.gate.reshape(*self.gate.shape[:-1], *(1 for _ in inner), -1)
        update = jnp.einsum(
            f"{stack}{inner}r,{stack}r{outer}->{stack}{inner}{outer}", self.a * gate, self.b,
            precision=jax.lax.Precision.HIGHEST, out_sharding=self.spec,
        )  # fmt: skip
        return (base.astype(jnp.float32) + update).astype(base.dtype)

    def product(self, equation: str, x: jax.Array, out_sharding: P) -> jax.Array:
        """x W + ((x A) gate) B, of one layer: two thin products beside the base's own, all in the dtype of `x`."""
        y = leaf_of(self.base).product(equation, x, out_sharding)
        operands, result = equation.split("->")
        of_x, of_w = operands.split(",")
        inner = "".join(axis for axis in of_x if axis not in result)
        rows, outer = of_x[: -len(inner)], "".join(axis for axis in of_w if axis not in inner)
        thin = P(*linear.spec_of(x)[: len(rows)], None)
        x_R = linear.product(f"{of_x},{inner}R->{rows}R", x, self.a, thin)
        x_R = x_R * self.gate.astype(x.dtype)
        return y + linear.product(f"{rows}R,R{outer}->{result}", x_R, self.b, out_sharding)

    def lookup(self, ids: jax.Array, out_sharding: P) -> jax.Array:
        """Not of tables."""
        raise NotImplementedError("an embedding table has no adapter")

    def parts(self) -> dict[str, jax.Array]:
        """The factors, and the base's own parts."""
        return {"a": self.a, "b": self.b, "gate": self.gate} | {
            f"base.{name}".removesuffix("."): part for name, part in leaf_of(self.base).parts().items()
        }
