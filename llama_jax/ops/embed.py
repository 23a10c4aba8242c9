"""Looking up tokens in an embedding table that is split over the mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def embed(table_VD: jax.Array, tokens_BT: jax.Array, *, out_sharding: jax.P) -> jax.Array:
    """The rows of the table at `tokens_BT`: [B, T, D] in the table's dtype.

    The table stays where it is. A device that has some of the columns looks up the tokens of all devices that split the
    rows of `tokens_BT` over the same mesh axes (FSDP), and then they exchange: what moves is [B, T, D] and not [V, D],
    and the gradient of the table is never whole on a device either.

    Args:
      table_VD: [V, D], either dimension split or not.
      tokens_BT: int ids.
      out_sharding: of the result.
    """
    vocab, width = (_axes(entry) for entry in _spec(table_VD))
    rows = _spec(tokens_BT)
    split = {axis: i for i, entry in enumerate(rows) for axis in _axes(entry)}  # which dimension each axis splits

    def local(table_VD, tokens_BT):
        for axis in reversed(width):
            if axis in split:
                tokens_BT = jax.lax.all_gather(tokens_BT, axis, axis=split[axis], tiled=True)
        if vocab:
            row_BT = tokens_BT - jax.lax.axis_index(vocab) * len(table_VD)
            row_BT = jnp.where((row_BT >= 0) & (row_BT < len(table_VD)), row_BT, len(table_VD))
            x_BTD = table_VD.at[row_BT].get(mode="fill", fill_value=0)
            x_BTD = jax.lax.psum(x_BTD, vocab)
        else:
            x_BTD = table_VD[tokens_BT]
        for axis in reversed(width):  # the last one splits D into the smallest parts
            if axis in split:
                x_BTD = jax.lax.all_to_all(x_BTD, axis, split[axis], 2, tiled=True)
            else:
                x_BTD = jax.lax.all_gather(x_BTD, axis, axis=2, tiled=True)
        return x_BTD

    # With one token a row `context` splits columns only: all devices then gather the same, which check_vma cannot see.
    check = all(axis in split for axis in width)
    return jax.reshard(
        jax.shard_map(local, out_specs=jax.P(*rows, None), check_vma=check)(table_VD, tokens_BT), out_sharding
    )


def _spec(x: jax.Array) -> tuple:
    return tuple(jax.typeof(x).sharding.spec)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()
