"""The full static cache, and the only code that knows its layout.

One slot a position: row b's token at position p is stored in slot p. A slot is written before any query may see it (a
query sees the slots up to its own), so a cache needs no lengths, and rewinding a row is forgetting its later positions.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from llama_jax.ops import put as kernel
from llama_jax.ops.attention import Way, attention_of_one, device, dot_product_attention
from llama_jax.sharding import ShardingRules, axes_of

AXES = ("batch", "kv_heads", "cache_seq", "head_dim")  # a head's keys are contiguous: attention reads them in order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullCache:
    """Keys (rotated) and values of every position. See `LayerCache`.

    Attributes:
      k: [B, K, S, H] or, stacked, [L, B, K, S, H], in the compute dtype.
      v: likewise.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def init(
        cls, rules: ShardingRules, *, batch: int, size: int, num_kv_heads: int, head_dim: int, dtype: str,
        layers: int | None = None,
    ) -> FullCache:  # fmt: skip
        """As `LayerCache.init`."""
        shape = (batch, num_kv_heads, size, head_dim)
        spec = rules.spec(AXES, shape)
        if layers is not None:
            shape, spec = (layers, *shape), jax.P(None, *spec)
        return cls(jnp.zeros(shape, dtype, out_sharding=spec), jnp.zeros(shape, dtype, out_sharding=spec))

    @property
    def num_slots(self) -> int:
        """S."""
        return self.k.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes over all devices."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in (self.k, self.v))

    @property
    def split(self) -> bool:
        """Whether each device holds some of the slots."""
        return jax.typeof(self.k).sharding.spec[-2] is not None

    def attend(
        self, q_BTKGH, k_BTKH, v_BTKH, *, positions_BT, order_BT, segment_ids_BT, span, ordered, scale: float, way: Way
    ) -> tuple[jax.Array, FullCache | _Unwritten]:
        """As `LayerCache.attend`. One token a row may be written when the block ends: see `Way.reads_first`."""
        if q_BTKGH.shape[1] == 1 and not ordered and way.reads_first and not self.split:
            with jax.named_scope("attention"):
                out_BTKGH = attention_of_one(
                    q_BTKGH, k_BTKH, v_BTKH, self.k, self.v, slots_B1=positions_BT, scale=scale
                )  # fmt: skip
            return out_BTKGH, _Unwritten(self, k_BTKH, v_BTKH, positions_BT)
        with jax.named_scope("cache"):
            cache = self.write(k_BTKH, v_BTKH, positions_BT, ordered=ordered)
            # The first tokens of a cache see one another only, as without one.
            k_BKSH, v_BKSH = (k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)) if ordered else cache._prefix(span)
        with jax.named_scope("attention"):
            out_BTKGH = dot_product_attention(
                q_BTKGH, k_BKSH, v_BKSH, slots_BT=positions_BT, segment_ids_BT=segment_ids_BT, ordered=ordered,
                scale=scale, implementation=way.implementation,
            )  # fmt: skip
        return out_BTKGH, cache

    def settle(self, x_BTD: jax.Array) -> tuple[jax.Array, FullCache]:
        """There is nothing to write."""
        return x_BTD, self

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, slots_BT: jax.Array, *, ordered: bool = False) -> FullCache:
        """Writes each row's T keys and values at its own slots; slots past the end are dropped, never clamped.

        With `ordered`, token t goes to slot t: one copy instead of a scatter. Padding is then written too, to slots
        that are written again before any query may see them.
        """
        put = _put_first if ordered else _put_one if slots_BT.shape[1] == 1 else _put_many
        if put is _put_one and not self.split and device()[0] == "tpu" and kernel.fits(self.k):
            return self.put_with_kernel(k_BTKH, v_BTKH, slots_BT, interpret=False)
        if self.split:
            put = functools.partial(_put_split, put)
        elif jax.typeof(slots_BT).sharding.spec[1] is not None:  # a cache that does not divide
            k_BTKH, v_BTKH, slots_BT = (_whole(x, 1) for x in (k_BTKH, v_BTKH, slots_BT))
        return FullCache(put(self.k, k_BTKH, slots_BT), put(self.v, v_BTKH, slots_BT))

    def put_with_kernel(self, k_B1KH, v_B1KH, slots_B1, *, interpret: bool) -> FullCache:
        """As `write` of one token a row, keys and values at once, by the TPU's kernel."""
        spec = jax.typeof(self.k).sharding.spec
        put = jax.shard_map(functools.partial(kernel.put, interpret=interpret), out_specs=(spec, spec), check_vma=False)
        return FullCache(*put(self.k, self.v, k_B1KH[:, 0], v_B1KH[:, 0], slots_B1[:, 0]))

    def _prefix(self, span: int | None) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the first `span` slots: what attention needs to read when no later slot can be seen.

        All of them where each device holds some of the slots: the first ones are not spread over all devices.
        """
        if span is None or span >= self.num_slots or self.split:
            return self.k, self.v
        return self.k[:, :, :span], self.v[:, :, :span]

    def products(self, q_BKGH: jax.Array) -> jax.Array:
        """As `LayerCache.products`."""

        def local(q_BKGH, k_BKSH, v_BKSH):
            return jnp.einsum("BKGS,BKSH->BKGH", jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH), v_BKSH)

        return jax.shard_map(local, out_specs=jax.typeof(q_BKGH).sharding.spec)(q_BKGH, self.k, self.v)

    def insert_row(self, row: jax.Array, other: FullCache) -> FullCache:
        """As `LayerCache.insert_row`; slots past those of `other` hold what no query sees."""
        return FullCache(_insert(self.k, row, other.k), _insert(self.v, row, other.v))

    def rewind(self, length_B: jax.Array) -> FullCache:
        """The cache as it is: later positions are written again before they are seen."""
        return self

    def grow(self, rules: ShardingRules, size: int) -> FullCache:
        """As `LayerCache.grow`."""

        def pad(x):
            extra = [(0, 0)] * x.ndim
            extra[-2] = (0, size - x.shape[-2])
            larger = jnp.pad(_whole(x, x.ndim - 2), extra)
            layers = (None,) * (x.ndim - len(AXES))
            return jax.reshard(larger, jax.P(*layers, *rules.spec(AXES, larger.shape[-len(AXES) :])))

        return FullCache(pad(self.k), pad(self.v))


@dataclasses.dataclass(frozen=True)
class _Unwritten:
    """A cache that has been attended to, and one token a row that it does not hold yet."""

    cache: FullCache
    k_B1KH: jax.Array
    v_B1KH: jax.Array
    slots_B1: jax.Array

    def settle(self, x_BTD: jax.Array) -> tuple[jax.Array, FullCache]:
        """Writes the token between two blocks."""
        # Left alone the TPU compiler writes for all blocks at the end of a step: until then the keys and values wait in
        # HBM (8B on 8 v5e: 4 % of the cycles). Written before the MLP, the next block's cache is not fetched ahead (70B
        # on 16 v5e: 10 %).
        with jax.named_scope("cache"):
            x_BTD, cache = jax.lax.optimization_barrier((x_BTD, self.cache))
            return jax.lax.optimization_barrier((x_BTD, cache.write(self.k_B1KH, self.v_B1KH, self.slots_B1)))


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


def _insert(cache: jax.Array, row: jax.Array, other: jax.Array) -> jax.Array:
    """[..., B, K, S, H] with its row `row` as the only one of `other`, [..., 1, K, up to S, H]."""
    spec = tuple(jax.typeof(cache).sharding.spec)
    *layers, rows, heads, slots, width = spec
    if slots is not None:  # each device takes its own slots of all
        extra = [(0, 0)] * other.ndim
        extra[-2] = (0, cache.shape[-2] - other.shape[-2])
        other = jnp.pad(_whole(other, other.ndim - 2), extra)
    other = jax.reshard(other.astype(cache.dtype), jax.P(*layers, None, heads, slots, width))
    axis, names = cache.ndim - len(AXES), axes_of(rows)

    def local(cache, row, other):
        first = jax.lax.axis_index(names) * cache.shape[axis] if names else 0
        at = jnp.clip(row - first, 0, cache.shape[axis] - 1)
        start = (*(0 for _ in layers), at, 0, 0, 0)
        own = (first <= row) & (row < first + cache.shape[axis])
        old = jax.lax.dynamic_slice(cache, start, other.shape)
        return jax.lax.dynamic_update_slice(cache, jnp.where(own, other, old), start)

    return jax.shard_map(local, out_specs=jax.P(*spec))(cache, jnp.asarray(row, jnp.int32), other)


def _whole(x: jax.Array, axis: int) -> jax.Array:
    """`x`, not split along `axis`."""
    spec = list(jax.typeof(x).sharding.spec)
    spec[axis] = None
    return jax.reshard(x, jax.P(*spec))
