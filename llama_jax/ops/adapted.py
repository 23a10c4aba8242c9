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
      gate: float32 [R], or [L, R]: what the product of a column of `a` and a row of `b` counts, alpha / r. Of several
        adapters, whose factors are side by side in `a` and `b`, [adapters, R]: each counts in its own part alone.
      adapter_B: int32 [B]: of several adapters, which one each row of a batch has; None where there is one.
    """

    base: PyTree
    a: jax.Array
    b: jax.Array
    gate: jax.Array
    adapter_B: jax.Array | None = None

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
        if self.a.ndim + self.b.ndim - 2 - base.ndim + 1 < self.gate.ndim:
            raise ValueError("several adapters are no one weight: load the model with one of them")
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
        gate = self.gate.astype(x.dtype)
        if gate.ndim > 1 and self.adapter_B is None:
            raise ValueError("each row of a batch must have one of the model's several adapters (`adapt.for_rows`)")
        if self.adapter_B is not None:
            rows_spec = P(linear.spec_of(x)[0], *(None for _ in range(len(rows))))
            gate = gate.at[self.adapter_B].get(mode="promise_in_bounds", out_sharding=P(rows_spec[0], None))
            gate = jax.lax.reshape(gate, (len(gate), *(1 for _ in rows[1:]), gate.shape[1]), out_sharding=rows_spec)
        x_R = x_R * gate
        return y + linear.product(f"{rows}R,R{outer}->{result}", x_R, self.b, out_sharding)

    def lookup(self, ids: jax.Array, out_sharding: P) -> jax.Array:
        """Not of tables."""
        raise NotImplementedError("an embedding table has no adapter")

    def parts(self) -> dict[str, jax.Array]:
        """The factors, and the base's own parts."""
        several = {} if self.adapter_B is None else {"adapter_B": self.adapter_B}
        return {"a": self.a, "b": self.b, "gate": self.gate, **several} | {
            f"base.{name}".removesuffix("."): part for name, part in leaf_of(self.base).parts().items()
        }
