"""Causal grouped-query attention behind one function, with an implementation for each machine."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.ops.attention import cpu, reference, xla

IMPLEMENTATIONS = {"reference": reference.attention, "xla": xla.attention, "cpu": cpu.attention}

# Scores [B, K, G, T, S] of more queries than this are computed block by block, to bound memory.
QUERY_BLOCK = 1024


def dot_product_attention(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    slots_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
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
    key_segments_BS = segment_ids_BT

    def block(q, slots, segments):
        mask_BTS = jnp.arange(k_BKSH.shape[2]) <= slots[..., None]
        if segments is not None:
            mask_BTS &= segments[..., None] == key_segments_BS[:, None, :]
        return attend(q, k_BKSH, v_BKSH, mask_BTS)

    T = q_BTKGH.shape[1]
    if T <= QUERY_BLOCK:
        return block(q_BTKGH, slots_BT, segment_ids_BT)
    starts = range(0, T, QUERY_BLOCK)
    blocks = []
    for start in starts:  # a Python loop: the last block may be shorter, and 128 blocks make a sequence of 131072
        part = slice(start, min(start + QUERY_BLOCK, T))
        segments = None if segment_ids_BT is None else segment_ids_BT[:, part]
        blocks.append(block(q_BTKGH[:, part], slots_BT[:, part], segments))
    return jnp.concatenate(blocks, axis=1)


def _platform() -> str:
    """Of the mesh in use, which may be a machine that is not there (ahead-of-time compilation)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()
