"""The static key/value cache, and the only code that knows its layout.

One slot a position: row b's token at position p lies in slot p. A slot is written before any query may see it (a query
sees the slots up to its own), so a cache needs no lengths, and rewinding a row is forgetting its later positions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.sharding import ShardingRules

AXES = ("batch", "cache_seq", "kv_heads", "head_dim")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys (rotated) and values of one layer, or of all layers stacked in front.

    Attributes:
      k: [B, S, K, H] or [L, B, S, K, H], in the compute dtype.
      v: likewise.
    """

    k: jax.Array
    v: jax.Array


# A list of blocks has a tuple of layer caches, stacked blocks one stacked cache.
KVCache = tuple[LayerCache, ...] | LayerCache


def init(
    config: ModelConfig, rules: ShardingRules, *, batch: int, size: int, dtype: str, stacked: bool = False
) -> KVCache:
    """An empty cache of `size` slots for `batch` rows, sharded over the mesh in use. Bytes: see `num_bytes`."""
    shape = (batch, size, config.num_kv_heads, config.head_dim)
    spec = rules.spec(AXES, shape)
    if stacked:
        shape, spec = (config.num_layers, *shape), jax.P(None, *spec)

    def zeros():
        return jnp.zeros(shape, dtype, out_sharding=spec)

    if stacked:
        return LayerCache(zeros(), zeros())
    return tuple(LayerCache(zeros(), zeros()) for _ in range(config.num_layers))


def num_bytes(config: ModelConfig, *, batch: int, size: int, dtype: str) -> int:
    """Bytes of the whole cache over all devices."""
    return 2 * config.num_layers * batch * size * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def write(layer: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, slots_BT: jax.Array) -> LayerCache:
    """Writes each row's T keys and values at its own slots; slots past the end are dropped, never clamped."""
    rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]

    def put(cache, new):
        spec = jax.typeof(cache).sharding.spec
        return cache.at[rows_B1, slots_BT].set(new.astype(cache.dtype), mode="drop", out_sharding=spec)

    return LayerCache(put(layer.k, k_BTKH), put(layer.v, v_BTKH))


def prefix(layer: LayerCache, span: int | None) -> LayerCache:
    """The first `span` slots: what attention needs to read when no later slot can be seen."""
    if span is None or span >= layer.k.shape[1]:
        return layer
    return LayerCache(layer.k[:, :span], layer.v[:, :span])


def num_slots(cache: KVCache) -> int:
    """S, the size of a cache."""
    return (cache.k if isinstance(cache, LayerCache) else cache[0].k).shape[-3]


def grow(cache: KVCache, size: int) -> KVCache:
    """A copy with `size` slots, the first ones as they were."""

    def pad(x):
        extra = [(0, 0)] * x.ndim
        extra[-3] = (0, size - x.shape[-3])
        return jnp.pad(x, extra)

    return jax.tree.map(pad, cache)
