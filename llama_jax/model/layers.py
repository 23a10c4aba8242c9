"""Layers one after the other: how blocks are stored, stacked or listed, and what a gradient computes again."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.caches import KVCache, layers_of
from llama_jax.config.params import group_size, period_of
from llama_jax.model.blocks import Block, Params
from llama_jax.typing import JsonObject

_POLICIES = jax.checkpoint_policies
# What is kept of a block for the gradient; the rest is computed again. From the most memory to the least:
REMAT = {
    "none": _POLICIES.everything_saveable,
    "matmuls": _POLICIES.save_only_these_names("qkv", "attention", "out", "mlp"),  # of products, as LLaMA 1 did
    "attention": _POLICIES.save_only_these_names("qkv", "attention"),
    "full": _POLICIES.nothing_saveable,  # but the block's input
    "groups": _POLICIES.nothing_saveable,  # save only the input of every ~sqrt(L) blocks (one extra forward pass)
    "offload": _POLICIES.save_and_offload_only_these_names(  # save block inputs in host memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block"], offload_src="device",
        offload_dst="pinned_host",
    ),
}  # fmt: skip


# The class of each kind of layers (`ModelConfig.layers`); its parameters are in `config.params`. Another kind is an
# entry in both: a subclass of Block, or a module with the same constructor and methods.
BLOCKS: dict[str, type[Block]] = {"plain": Block}


class Periods(nnx.Module):
    """Blocks of several kinds, stacked: for each place in a period, the blocks of all periods along a first axis."""

    def __init__(self, stacks: Sequence[Block]):
        self.period = nnx.List(stacks)


Blocks = nnx.List | Block | Periods


def make_blocks(params: Params, attention: str | None, *, stacked: bool) -> Blocks:
    """Returns the blocks of a model: a list, or stacked by period."""
    kinds = params.config.layers

    def block(kind: str, key: jax.Array | None = None) -> Block:
        return BLOCKS[kind](params.of_layer(kind, key), attention)

    if not stacked:
        return nnx.List([block(kind) for kind in kinds])
    period = period_of(kinds)
    times = len(kinds) // len(period)
    if params.rngs is None:
        stacks = [jax.tree.map(lambda x: _stack(x, times), block(kind)) for kind in period]
    else:
        keys = jax.random.split(params.rngs.params(), len(kinds))
        stacks = [
            jax.vmap(functools.partial(block, kind))(keys[place :: len(period)]) for place, kind in enumerate(period)
        ]
    return stacks[0] if len(stacks) == 1 else Periods(stacks)


def _stack(x: jax.ShapeDtypeStruct, times: int) -> jax.ShapeDtypeStruct:
    sharding = jax.NamedSharding(x.sharding.mesh, jax.P(None, *x.sharding.spec))
    return jax.ShapeDtypeStruct((times, *x.shape), x.dtype, sharding=sharding)


def stacks_of(blocks: Blocks) -> tuple[Block, ...] | None:
    """The stacks of a period's places; None of a list of blocks."""
    if isinstance(blocks, nnx.List):
        return None
    return tuple(blocks.period) if isinstance(blocks, Periods) else (blocks,)


def listed(blocks: Blocks) -> Sequence[Block]:
    """The blocks of a model that decodes, one for each layer."""
    assert isinstance(blocks, nnx.List), "decoding walks a list of blocks"
    return blocks


def init_cache(blocks: Blocks, batch: int, size: int, dtype: str) -> KVCache:
    """Returns an empty cache of `size` slots for `batch` rows: one of its kind for each layer, or each stack."""
    stacks = stacks_of(blocks)
    if stacks is None:
        return tuple(block.init_cache(batch, size, dtype) for block in listed(blocks))
    layers = tuple(stack.init_cache(batch, size, dtype, _length(stack)) for stack in stacks)
    return layers if isinstance(blocks, Periods) else layers[0]


def _length(stack: Block) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def apply_blocks(
    blocks: Blocks,
    x_BTD: jax.Array,
    cache: KVCache | None,
    where: JsonObject,
    static: JsonObject,
    *,
    remat: str = "none",
) -> tuple[jax.Array, KVCache | None]:
    """Runs the blocks one after the other: the one function that knows how they are stored.

    Args:
      blocks: of `make_blocks`.
      x_BTD: the residual stream.
      cache: of `init_cache`; None without a cache.
      where: arrays that every block takes: angles, positions, order and segments.
      static: what every block takes that is no array.
      remat: of REMAT.
    """
    stacks = stacks_of(blocks)
    if stacks is None:
        assert cache is None or isinstance(cache, tuple), "a list of blocks takes a list of caches"
        # Jitted within the jitted step, so that a list of blocks is traced once and not once a layer.
        apply = jax.jit(lambda block, x_BTD, layer, where: block(x_BTD, layer, **where, **static))
        layers = []
        for i, block in enumerate(listed(blocks)):
            x_BTD, layer = apply(block, x_BTD, None if cache is None else cache[i], where)
            layers.append(layer)
        return x_BTD, None if cache is None else tuple(layers)
    assert cache is None or isinstance(cache, tuple) == isinstance(blocks, Periods), "stacked blocks, stacked caches"

    def step(x_BTD, block, layer):
        return block(checkpoint_name(x_BTD, "block"), layer, **where, **static)

    if remat != "none" and cache is None:  # a scan cannot merge the two computations: no barrier is needed
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)

    def period(x_BTD, pairs):
        layers = []
        for block, layer in pairs:
            x_BTD, layer = step(x_BTD, block, layer)
            layers.append(layer)
        return x_BTD, tuple(layers)

    pairs = tuple(zip(stacks, (None,) * len(stacks) if cache is None else layers_of(cache), strict=True))
    if remat == "groups" and cache is None:
        size = group_size(_length(stacks[0]))
        groups = jax.tree.map(lambda w: w.reshape(-1, size, *w.shape[1:]), pairs)
        group = jax.checkpoint(
            lambda x_BTD, pairs: jax.lax.scan(period, x_BTD, pairs), policy=REMAT[remat], prevent_cse=False
        )
        return jax.lax.scan(group, x_BTD, groups)[0], None
    x_BTD, layers = jax.lax.scan(period, x_BTD, pairs)
    if cache is None:
        return x_BTD, None
    return x_BTD, layers if isinstance(cache, tuple) else layers[0]
