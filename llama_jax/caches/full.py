"""The static key/value cache, and the only code that knows its layout.

One slot a position: row b's token at position p lies in slot p. A slot is written before any query may see it (a query
sees the slots up to its own), so a cache needs no lengths, and rewinding a row is forgetting its later positions.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.ops import put as kernel
from llama_jax.ops.attention import device
from llama_jax.sharding import ShardingRules

AXES = ("batch", "kv_heads", "cache_seq", "head_dim")  # a head's keys lie together: attention reads them in order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys (rotated) and values of one layer, or of all layers stacked in front.

    Attributes:
      k: [B, K, S, H] or [L, B, K, S, H], in the compute dtype.
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
    shape = (batch, config.num_kv_heads, size, config.head_dim)
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


def write(
    layer: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, slots_BT: jax.Array, *, ordered: bool = False
) -> LayerCache:
    """Writes each row's T keys and values at its own slots; slots past the end are dropped, never clamped.

    With `ordered`, token t goes to slot t: one copy instead of a scatter. Padding is then written too, to slots that
    are written again before any query may see them.
    """
    put = _put_first if ordered else _put_one if slots_BT.shape[1] == 1 else _put_many
    whole = jax.typeof(layer.k).sharding.spec[2] is None
    if put is _put_one and whole and device()[0] == "tpu" and kernel.fits(layer.k):
        return _put_with_kernel(layer, k_BTKH, v_BTKH, slots_BT, interpret=False)
    if jax.typeof(layer.k).sharding.spec[2] is not None:
        put = functools.partial(_put_split, put)
    elif jax.typeof(slots_BT).sharding.spec[1] is not None:  # a cache that does not divide
        k_BTKH, v_BTKH, slots_BT = (_whole(x, 1) for x in (k_BTKH, v_BTKH, slots_BT))
    return LayerCache(put(layer.k, k_BTKH, slots_BT), put(layer.v, v_BTKH, slots_BT))


def _put_split(put, cache_BKSH: jax.Array, new_BTKH: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """As `put`, where each device holds some of the slots: it gets all tokens and keeps those that are its own."""
    spec, tokens = (jax.typeof(x).sharding.spec for x in (cache_BKSH, slots_BT))
    T, S = new_BTKH.shape[1], cache_BKSH.shape[2]

    def local(cache_BKSH, new_BTKH, slots_BT):
        if tokens[1] is not None:
            new_BTKH, slots_BT = (jax.lax.all_gather(x, tokens[1], axis=1, tiled=True) for x in (new_BTKH, slots_BT))
        size = cache_BKSH.shape[2]
        first = jax.lax.axis_index(spec[2]) * size
        if put is _put_first:
            new_BTKH = jnp.pad(new_BTKH, ((0, 0), (0, size), (0, 0), (0, 0)))
            new_BTKH = jax.lax.dynamic_slice_in_dim(new_BTKH, jnp.minimum(first, T), size, axis=1)
        own_BT = (first <= slots_BT) & (slots_BT < first + size)
        return put(cache_BKSH, new_BTKH, jnp.where(own_BT, slots_BT - first, size))

    if put is _put_first and T == S and tokens[1] == spec[2]:  # each device has computed just the keys of its slots
        local = put
    return jax.shard_map(local, out_specs=spec)(cache_BKSH, new_BTKH, slots_BT)


def _put_many(cache_BKSH: jax.Array, new_BTKH: jax.Array, slots_BT: jax.Array) -> jax.Array:
    rows_B1 = jnp.arange(len(new_BTKH))[:, None]
    new_BTKH = new_BTKH.astype(cache_BKSH.dtype)
    spec = None if jax.typeof(cache_BKSH).sharding.mesh.are_all_axes_manual else jax.typeof(cache_BKSH).sharding.spec
    return cache_BKSH.at[rows_B1, :, slots_BT].set(new_BTKH, mode="drop", out_sharding=spec)


def _put_first(cache_BKSH: jax.Array, new_BTKH: jax.Array, slots_BT: jax.Array) -> jax.Array:
    new_BKTH = new_BTKH.swapaxes(1, 2)[:, :, : cache_BKSH.shape[2]].astype(cache_BKSH.dtype)
    return jax.lax.dynamic_update_slice(cache_BKSH, new_BKTH, (0, 0, 0, 0))


def _put_one(cache_BKSH: jax.Array, new_B1KH: jax.Array, slots_B1: jax.Array) -> jax.Array:
    """A dropping scatter of one row becomes a select over the whole cache in XLA; this writes one slot."""
    last = cache_BKSH.shape[2] - 1

    def put(cache_KSH, new_1KH, slots_1):
        at = (0, jnp.minimum(slots_1[0], last), 0)
        new_K1H = new_1KH.swapaxes(0, 1).astype(cache_KSH.dtype)
        old_K1H = jax.lax.dynamic_slice(cache_KSH, at, new_K1H.shape)
        return jax.lax.dynamic_update_slice(cache_KSH, jnp.where(slots_1[0] <= last, new_K1H, old_K1H), at)

    return jax.vmap(put)(cache_BKSH, new_B1KH, slots_B1)


def _put_with_kernel(layer: LayerCache, k_B1KH, v_B1KH, slots_B1, *, interpret: bool) -> LayerCache:
    """As `_put_one`, for keys and values at once."""
    spec = jax.typeof(layer.k).sharding.spec
    put = jax.shard_map(functools.partial(kernel.put, interpret=interpret), out_specs=(spec, spec), check_vma=False)
    return LayerCache(*put(layer.k, layer.v, k_B1KH[:, 0], v_B1KH[:, 0], slots_B1[:, 0]))


def of_tokens(k_BTKH: jax.Array, v_BTKH: jax.Array) -> LayerCache:
    """The keys and values of T tokens as a cache of T slots."""
    return LayerCache(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))


def prefix(layer: LayerCache, span: int | None) -> LayerCache:
    """The first `span` slots: what attention needs to read when no later slot can be seen.

    All of them where each device holds some of the slots: the first ones are not spread over all devices.
    """
    if span is None or span >= num_slots(layer) or jax.typeof(layer.k).sharding.spec[2] is not None:
        return layer
    return LayerCache(layer.k[:, :, :span], layer.v[:, :, :span])


def num_slots(cache: KVCache) -> int:
    """S, the size of a cache."""
    return (cache.k if isinstance(cache, LayerCache) else cache[0].k).shape[-2]


def grow(cache: KVCache, rules: ShardingRules, size: int) -> KVCache:
    """A copy with `size` slots, the first ones as they were; it may divide where the smaller one did not."""

    def pad(x):
        extra = [(0, 0)] * x.ndim
        extra[-2] = (0, size - x.shape[-2])
        larger = jnp.pad(_whole(x, x.ndim - 2), extra)
        layers = (None,) * (x.ndim - len(AXES))
        return jax.reshard(larger, jax.P(*layers, *rules.spec(AXES, larger.shape[-len(AXES) :])))

    return jax.tree.map(pad, cache)


def _whole(x: jax.Array, axis: int) -> jax.Array:
    """`x`, not split along `axis`."""
    spec = list(jax.typeof(x).sharding.spec)
    spec[axis] = None
    return jax.reshard(x, jax.P(*spec))
