"""Causal grouped-query attention behind one function, with an implementation for each machine."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.ops.attention import cpu, reference, xla

IMPLEMENTATIONS = {"reference": reference.attention, "xla": xla.attention, "cpu": cpu.attention}

# Scores [B, K, G, T, S] are computed for blocks of queries: at most so many, to bound memory ...
QUERY_BLOCK = 1024
# ... and where queries are in order, not fewer than this, each block with only the keys before its end.
SMALL_BLOCK = 256


def dot_product_attention(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    slots_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    ordered: bool = False,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """Each query attends to the keys at and before its own slot, within its segment.

    Args:
      q_BTKGH: queries: K kv heads, each shared by G query heads.
      k_BKSH: keys: a cache of S slots, or those of the same T tokens (S = T).
      v_BKSH: values.
      slots_BT: int: index along S of each query's own key. A slot of S or more (padding) sees every key.
      segment_ids_BT: int: documents packed in one row do not see each other; needs S = T.
      ordered: whether query t's own key is in slot t, padding excepted: spares half the work.
      scale: what the scores are multiplied by.
      implementation: "reference", "xla" (`jax.nn.dot_product_attention`) or "cpu"; None chooses by platform.

    Returns:
      [B, T, K, G, H] in q's dtype.

    Raises:
      ValueError: an unknown implementation.
    """
    name = implementation or ("cpu" if _platform() == "cpu" else "xla")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {name!r} is unknown; there are {', '.join(IMPLEMENTATIONS)}")

    def attend(q, k, v, mask):
        return IMPLEMENTATIONS[name](q, k, v, mask_BTS=mask, scale=scale)

    if name != "reference":  # written for one device's rows and heads; none needs another's
        attend = jax.shard_map(attend, out_specs=jax.typeof(q_BTKGH).sharding.spec)
    T, S = q_BTKGH.shape[1], k_BKSH.shape[2]
    width = min(QUERY_BLOCK, max(SMALL_BLOCK, T // 16)) if ordered else QUERY_BLOCK
    blocks = []
    for start in range(0, T, width):  # a Python loop: shapes differ, and 131072 tokens make 128 blocks
        queries = slice(start, min(start + width, T))
        keys = slice(0, min(queries.stop, S) if ordered else S)
        mask_BTS = jnp.arange(keys.stop) <= slots_BT[:, queries, None]
        if segment_ids_BT is not None:
            mask_BTS &= segment_ids_BT[:, queries, None] == segment_ids_BT[:, None, keys]
        blocks.append(attend(q_BTKGH[:, queries], k_BKSH[:, :, keys], v_BKSH[:, :, keys], mask_BTS))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _platform() -> str:
    """Of the mesh in use, which may be a machine that is not there (ahead-of-time compilation)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()
