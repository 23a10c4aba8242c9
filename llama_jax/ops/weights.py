"""The leaf protocol: what a model's weight is, however it is stored.

The model uses every weight through `einsum` and `embed`, the embedding table and a tied head included; these ask the
leaf. A new way to store a weight is a new leaf: a frozen pytree with the methods of `Leaf`, most of them inherited from
`Stored`. It is put where the array was, in an `nnx.Param`.

Leaves nest in one order: an adapter round a quantized weight, `Flattened` outermost, and that at load only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from llama_jax.ops import linear
from llama_jax.ops.embed import lookup
from llama_jax.sharding import axes_of
from llama_jax.typing import PyTree


class Leaf(Protocol):
    """One weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, [D, K, G, H] and the like."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers, `dense`."""
        ...

    @property
    def spec(self) -> P:
        """How its dimensions are split over the mesh."""
        ...

    def product(self, equation: str, x: jax.Array, out_sharding: P) -> jax.Array:
        """Activations times the weight, in the dtype of `x`; as `linear.product`. What is gathered over the mesh is the
        leaf's own choice: the form with the fewest bytes."""
        ...

    def lookup(self, ids: jax.Array, out_sharding: P) -> jax.Array:
        """Rows of a table [V, D] at int ids [B, T]: [B, T, D]; as `ops.embed.lookup`."""
        ...

    def dense(self) -> jax.Array:
        """The weight as one array."""
        ...

    def parts(self) -> dict[str, jax.Array]:
        """Its arrays by name, as they are saved: of one array "", of several the names of the leaf's fields."""
        ...


class Stored:
    """What a leaf need not say itself: a frozen dataclass with its arrays as fields, and `dense`."""

    def dense(self) -> jax.Array:
        """The weight as one array."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return jax.eval_shape(self.dense).shape

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers."""
        return jax.eval_shape(self.dense).dtype

    @property
    def spec(self) -> P:
        """How its dimensions are split."""
        return jax.eval_shape(self.dense).sharding.spec  # pyright: ignore[reportAttributeAccessIssue]

    def product(self, equation: str, x: jax.Array, out_sharding: P) -> jax.Array:
        """Activations times the weight: of its dense form."""
        return linear.product(equation, x, self.dense(), out_sharding)

    def lookup(self, ids: jax.Array, out_sharding: P) -> jax.Array:
        """Rows of the table: of its dense form."""
        return lookup(self.dense(), ids, out_sharding)

    def parts(self) -> dict[str, jax.Array]:
        """The fields that are arrays."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(cast(Any, self))}
        return {name: value for name, value in fields.items() if hasattr(value, "sharding")}


@dataclasses.dataclass(frozen=True)
class Dense(Stored):
    """A plain array, which has no methods of its own."""

    array: jax.Array

    def dense(self) -> jax.Array:
        """The array."""
        return self.array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    def parts(self) -> dict[str, jax.Array]:
        """The array alone."""
        return {"": self.array}


def leaf_of(weight: PyTree) -> Leaf:
    """The leaf of a parameter: of an `nnx.Param`, an array, or a leaf itself."""
    value = weight.get_value() if isinstance(weight, nnx.Variable) else weight
    return value if is_leaf(value) else Dense(value)


def is_leaf(value: PyTree) -> bool:
    """Whether this is a leaf that is not a plain array: `is_leaf` of `jax.tree`."""
    return all(hasattr(type(value), method) for method in ("product", "lookup", "dense", "parts"))


def einsum(equation: str, x: jax.Array, weight: PyTree, *, out_sharding: P) -> jax.Array:
    """Activation times weight, in the activation's dtype: the one seam through which every weight matrix is used.

    Args:
      equation: such as "BTD,DKGH->BTKGH"; see `linear.product`.
      x: activations.
      weight: a parameter, an array, or another leaf, which decides how it is multiplied.
      out_sharding: of the result.
    """
    return leaf_of(weight).product(equation, x, out_sharding)


def embed(table: PyTree, tokens_BT: jax.Array, *, out_sharding: P) -> jax.Array:
    """The rows of an embedding table at `tokens_BT`: [B, T, D] in the table's dtype; see `ops.embed.lookup`.

    Args:
      table: [V, D]: a parameter, an array, or another leaf.
      tokens_BT: int ids.
      out_sharding: of the result.
    """
    return leaf_of(table).lookup(tokens_BT, out_sharding)


def name_of(path: Any) -> str:
    """The name of an array of a model by its path in the tree, as `config.params` spells it: "blocks.3.attn.wq"."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.replace(".value.", ".").removesuffix(".value")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Narrowed(Stored):
    """A float32 weight whose gradient is kept in the dtype that it is computed in: half the memory, the same numbers.

    JAX gives a float32 weight a float32 gradient, though products in bfloat16 make bfloat16 ones. Differentiate with
    respect to `gradient` instead of `value`.

    Attributes:
      value: the weight.
      gradient: any array of the same shape and sharding in the dtype of the computation; its numbers are not used.
    """

    value: jax.Array
    gradient: jax.Array

    def dense(self) -> jax.Array:
        """The weight in the dtype of the computation."""
        return _narrow(self.value, self.gradient)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.value.shape

    def parts(self) -> dict[str, jax.Array]:
        """The weight alone."""
        return {"": self.value}


@jax.custom_vjp
def _narrow(value: jax.Array, gradient: jax.Array) -> jax.Array:
    if (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16):
        # Rounds as `astype` does. With that alone XLA casts the stacked weights of all layers before their loop, and
        # keeps them: 1.0 GB a chip for 8B on 16 chips, and as much for its gradient.
        value = jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
    return value.astype(gradient.dtype)


_narrow.defvjp(lambda value, gradient: (_narrow(value, gradient), None), lambda _, cotangent: (None, cotangent))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flattened(Stored):
    """A weight with its output dimensions merged, as a TPU multiplies with it.

    XLA turns the [D, 1, 4, 128] of a chip's query heads into that form before the loop of decoding, and holds copies of
    all layers: 0.67 GB for 70B on 16 v5e, and no room is left to fetch other weights ahead. Of the keys' and values'
    [D, 10, 128], with as many heads as queries, it holds 1 GB for Llama 2 13B on 4 v5e.

    Attributes:
      matrix: [D, outputs].
      whole_shape: of the weight.
      whole_spec: how its dimensions are split.
    """

    matrix: jax.Array
    whole_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    whole_spec: P = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.whole_shape

    @property
    def spec(self) -> P:
        """How the weight's dimensions are split."""
        return self.whole_spec

    @property
    def dtype(self) -> np.dtype:
        """Of the weight."""
        return self.matrix.dtype

    def dense(self) -> jax.Array:
        """The weight as it was."""
        local = jax.NamedSharding(jax.sharding.get_abstract_mesh(), self.spec).shard_shape(self.shape)
        return jax.jit(jax.shard_map(lambda x: x.reshape(local), out_specs=self.spec))(self.matrix)

    def product(self, equation: str, x: jax.Array, out_sharding: P) -> jax.Array:
        """As `Stored.product`, of x [B, T, D], without the weight's own shape."""
        rows = linear.spec_of(x)[:-1]
        matrix = linear.gather(self.matrix.astype(x.dtype), {axis for entry in rows for axis in axes_of(entry)})
        inner, outer = linear.spec_of(matrix)
        x = x if linear.spec_of(x)[-1] == inner else jax.reshard(x, P(*rows, inner))
        y = jax.lax.dot_general(
            x, matrix, (((x.ndim - 1,), (0,)), ((), ())), precision=linear.precision_of(x),
            out_sharding=P(*rows, outer),
        )  # fmt: skip
        shape = (*x.shape[:-1], *self.shape[1:])
        local = jax.NamedSharding(jax.sharding.get_abstract_mesh(), out_sharding).shard_shape(shape)
        return jax.shard_map(lambda y: y.reshape(local), out_specs=out_sharding)(y)

    def parts(self) -> dict[str, jax.Array]:
        """The weight as it was: this form is of a loaded model alone."""
        return {"": self.dense()}


def flatten(w: PyTree) -> PyTree:
    """Returns the weight [D, ...], abstract or not, flattened.

    It stays as it is where a device's part would not be contiguous, and where it is a leaf of another kind.
    """
    if is_leaf(w):
        return w
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
