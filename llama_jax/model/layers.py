"""Layers one after the other: how blocks are stored, stacked or listed, and what a gradient computes again."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.caches import KVCache
from llama_jax.model.blocks import Block

_POLICIES = jax.checkpoint_policies
# What is kept of a block for the gradient; the rest is computed again. From the most memory to the least:
REMAT = {
    "none": _POLICIES.everything_saveable,
    "matmuls": _POLICIES.save_only_these_names("qkv", "attention", "out", "mlp"),  # of products, as LLaMA 1 did
    "attention": _POLICIES.save_only_these_names("qkv", "attention"),
    "full": _POLICIES.nothing_saveable,  # but the block's input
    "groups": _POLICIES.nothing_saveable,  # but the input of a group of about sqrt(L) blocks: a third forward pass
    "offload": _POLICIES.save_and_offload_only_these_names(  # and that in the host's memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block"], offload_src="device",
        offload_dst="pinned_host",
    ),
}  # fmt: skip


def stack(x: jax.ShapeDtypeStruct, num_layers: int) -> jax.ShapeDtypeStruct:
    """Returns the abstract array of that many layers, stacked along a new first axis."""
    sharding = jax.NamedSharding(x.sharding.mesh, jax.P(None, *x.sharding.spec))
    return jax.ShapeDtypeStruct((num_layers, *x.shape), x.dtype, sharding=sharding)


def group_size(num_layers: int) -> int:
    """Blocks in a group of two-level recomputation: the divisor of the layers whose two sums of inputs are least."""
    return min((n for n in range(1, num_layers + 1) if num_layers % n == 0), key=lambda n: n + num_layers // n)


def apply_blocks(
    blocks: nnx.List | Block,
    x_BTD: jax.Array,
    cache: KVCache | None,
    where: dict[str, Any],
    static: dict[str, Any],
    *,
    remat: str = "none",
) -> tuple[jax.Array, KVCache | None]:
    """Runs the blocks one after the other: the one function that knows how they are stored.

    Args:
      blocks: a list, or one block with a leading layer axis.
      x_BTD: the residual stream.
      cache: one layer cache a block, stacked if the blocks are; None without a cache.
      where: arrays that every block takes: angles, positions, order and segments.
      static: what every block takes that is no array.
      remat: of REMAT.
    """
    if isinstance(blocks, Block):
        assert not isinstance(cache, tuple), "stacked blocks take a stacked cache"

        def step(x_BTD, layer):
            return layer[0](checkpoint_name(x_BTD, "block"), layer[1], **where, **static)

        if remat != "none" and cache is None:  # a scan cannot merge the two computations: no barrier is needed
            step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
        if remat == "groups" and cache is None:
            size = group_size(jax.tree.leaves(blocks)[0].shape[0])
            groups = jax.tree.map(lambda w: w.reshape(-1, size, *w.shape[1:]), blocks)
            group = jax.checkpoint(
                lambda x_BTD, layers: jax.lax.scan(step, x_BTD, (layers, None)),
                policy=REMAT[remat],
                prevent_cse=False,
            )
            return jax.lax.scan(group, x_BTD, groups)
        return jax.lax.scan(step, x_BTD, (blocks, cache))
    # Jitted within the jitted step, so that a list of blocks is traced once and not once a layer.
    apply = jax.jit(lambda block, x_BTD, layer, where: block(x_BTD, layer, **where, **static))
    assert cache is None or isinstance(cache, tuple), "a list of blocks takes a list of caches"
    layers = []
    for i, block in enumerate(blocks):
        x_BTD, layer = apply(block, x_BTD, None if cache is None else cache[i], where)
        layers.append(layer)
    return x_BTD, None if cache is None else tuple(layers)
