"""What a cache of one layer is, whatever its kind, and what is done with those of a whole model.

A kind is a pytree class with the methods of `LayerCache`; the layer that needs it makes it (`Block.init_cache`). The
cache of a model holds one for each layer, and may mix kinds.
"""

from __future__ import annotations

from typing import Protocol, Self

import jax

from llama_jax.ops.attention import Way
from llama_jax.sharding import ShardingRules


class LayerCache(Protocol):
    """The keys and values of one layer, or of several layers alike, stacked in front. A frozen pytree.

    A position that a row has not reached yet is written before any of its queries may see it, so that rewinding a row
    is forgetting its later positions, unless a kind says otherwise.
    """

    @classmethod
    def init(
        cls, rules: ShardingRules, *, batch: int, size: int, num_kv_heads: int, head_dim: int, dtype: str,
        layers: int | None = None,
    ) -> Self:  # fmt: skip
        """Returns an empty cache, sharded over the mesh in use.

        Args:
          rules: from logical to mesh axes.
          batch: rows.
          size: slots, most tokens of a row.
          num_kv_heads: K.
          head_dim: H.
          dtype: what the model computes in.
          layers: how many layers are stacked in front; None for one layer alone.
        """
        ...

    @property
    def num_slots(self) -> int | None:
        """Most tokens of a row; None where the kind sets no limit."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes over all devices."""
        ...

    def attend(
        self,
        q_BTKGH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        *,
        positions_BT: jax.Array,
        order_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        span: int | None,
        ordered: bool,
        scale: float,
        way: Way,
    ) -> tuple[jax.Array, Unsettled]:
        """Attends from T tokens a row to what the cache holds and to the tokens themselves.

        Args:
          q_BTKGH: queries, rotated.
          k_BTKH: keys of the same tokens, rotated.
          v_BTKH: values of the same tokens.
          positions_BT: int32, the position of each token in its row; padding is past the end of the cache.
          order_BT: int32: 0, 1, 2, ... along T.
          segment_ids_BT: int32, documents packed in one row (without a cache); or None.
          span: static bound on the positions that the queries can see; None is no bound.
          ordered: whether token t is at position t, padding excepted.
          scale: what the scores are multiplied by.
          way: how this machine attends.

        Returns:
          [B, T, K, G, H] in q's dtype, and the cache, which may not hold the tokens before `settle`.
        """
        ...

    def products(self, q_BKGH: jax.Array) -> jax.Array:
        """The products of one query a row with all keys and values, and nothing else: what a step computes at least."""
        ...

    def insert_row(self, row: jax.Array, other: Self) -> Self:
        """Returns the cache with the only row of `other`, which has as many slots or fewer, as row `row`, an int32."""
        ...

    def rewind(self, length_B: jax.Array) -> Self:
        """Returns the cache with the first `length_B` positions of each row."""
        ...

    def grow(self, rules: ShardingRules, size: int) -> Self:
        """Returns a copy with `size` slots, the first ones as they were."""
        ...


class Unsettled(Protocol):
    """A cache after `attend`, inside a block."""

    def settle(self, x_BTD: jax.Array) -> tuple[jax.Array, LayerCache | None]:
        """Writes what is still to be written, as the block ends.

        Args:
          x_BTD: what the block's last part returns, whose use may be made to wait.

        Returns:
          The same numbers, and the cache.
        """
        ...


# A list of blocks has a tuple of layer caches, stacked blocks one stacked cache.
KVCache = tuple[LayerCache, ...] | LayerCache


def layers_of(cache: KVCache) -> tuple[LayerCache, ...]:
    """The caches of a model's layers, or its stacks."""
    return cache if isinstance(cache, tuple) else (cache,)


def num_slots(cache: KVCache) -> int:
    """Most tokens of a row: the least of any layer's."""
    return min(size for layer in layers_of(cache) if (size := layer.num_slots) is not None)


def nbytes(cache: KVCache) -> int:
    """Bytes over all devices."""
    return sum(layer.nbytes for layer in layers_of(cache))


def insert_row(cache: KVCache, row: jax.Array, other: KVCache) -> KVCache:
    """Returns the cache with the only row of `other`, of as many slots or fewer, as row `row`, an int32 scalar."""
    pairs = zip(layers_of(cache), layers_of(other), strict=True)
    return _like(cache, tuple(layer.insert_row(row, new) for layer, new in pairs))


def rewind(cache: KVCache, length_B: jax.Array) -> KVCache:
    """Returns the cache with the first `length_B` positions of each row."""
    return _like(cache, tuple(layer.rewind(length_B) for layer in layers_of(cache)))


def grow(cache: KVCache, rules: ShardingRules, size: int) -> KVCache:
    """Returns a copy with `size` slots, the first ones as they were; it may divide where the smaller one did not."""
    return _like(cache, tuple(layer.grow(rules, size) for layer in layers_of(cache)))


def _like(cache: KVCache, layers: tuple[LayerCache, ...]) -> KVCache:
    return layers if isinstance(cache, tuple) else layers[0]
