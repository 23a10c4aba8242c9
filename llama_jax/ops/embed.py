"""Looking up tokens in an embedding table that is split over the mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.sharding import axes_of


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, out_sharding: jax.P) -> jax.Array:
    """The rows of the table at `tokens_BT`: [B, T, D] in the table's dtype.

    The table stays where it is. Each device gathers the token ids of its FSDP group, looks up its own columns, and then
    all-to-alls: [B, T, D] moves, not [V, D], and the gradient of the table is never whole on a device either.

    Args:
      table_VD: [V, D], either dimension split or not.
      tokens_BT: int ids. One that is not in the table gives NaN, on every mesh.
      out_sharding: of the result.
    """
    vocab, width = map(axes_of, jax.typeof(table_VD).sharding.spec)
    row_axes = jax.typeof(tokens_BT).sharding.spec
    split = {axis: i for i, entry in enumerate(row_axes) for axis in axes_of(entry)}  # which dimension each axis splits

    def local(table_VD, tokens_BT):
        for axis in reversed(width):
            if axis in split:
                tokens_BT = jax.lax.all_gather(tokens_BT, axis, axis=split[axis], tiled=True)
        rows = len(table_VD)
        first = jax.lax.axis_index(vocab) * rows if vocab else 0
        own_BT = (first <= tokens_BT) & (tokens_BT < first + rows)
        x_BTD = table_VD.at[jnp.where(own_BT, tokens_BT - first, rows)].get(mode="fill", fill_value=0)
        known_BT = own_BT
        if vocab:
            x_BTD = jax.lax.psum(x_BTD, vocab)
            known_BT = (tokens_BT >= 0) & (tokens_BT < rows * jax.lax.axis_size(vocab))
        x_BTD += jnp.where(known_BT, 0, jnp.nan).astype(x_BTD.dtype)[..., None]
        for axis in reversed(width):  # the last one splits D into the smallest parts
            if axis in split:
                x_BTD = jax.lax.all_to_all(x_BTD, axis, split[axis], 2, tiled=True)
            else:
                x_BTD = jax.lax.all_gather(x_BTD, axis, axis=2, tiled=True)
        return x_BTD

    # With one token a row `context` splits columns only: all devices then gather the same, which check_vma cannot see.
    check = all(axis in split for axis in width)
    return jax.reshard(
        jax.shard_map(local, out_specs=jax.P(*row_axes, None), check_vma=check)(table_VD, tokens_BT), out_sharding
    )
