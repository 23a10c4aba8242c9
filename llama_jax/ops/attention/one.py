"""Attention of one new token a row, whose key and value are not in the cache yet.

The cache is read as it was before the step, so that a TPU can fetch it while earlier layers compute, and in its own
layout: no head's keys are copied or turned.
"""

import jax
import jax.numpy as jnp


def attention(
    q_BKGH: jax.Array,
    own_k_BKH: jax.Array,
    own_v_BKH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    slots_B: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """As `reference.attention` on the rows and heads of one device, softmax and sums in float32.

    Args:
      q_BKGH: one query a row and head.
      own_k_BKH: the keys of the same tokens.
      own_v_BKH: their values.
      k_BKSH: a cache, of which each row sees the slots before its own.
      v_BKSH: likewise.
      slots_B: int: each row's own slot.
      scale: what the scores are multiplied by.
    """
    precision = jax.lax.Precision.HIGHEST if q_BKGH.dtype == jnp.float32 else None
    q32_BKGH, own_k32_BKH, own_v32_BKH = (x.astype(jnp.float32) for x in (q_BKGH, own_k_BKH, own_v_BKH))
    own_BKG1 = jnp.sum(q32_BKGH * own_k32_BKH[:, :, None], axis=-1, keepdims=True)
    scores_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, precision=precision, preferred_element_type=jnp.float32)
    slots_S, slots_B111 = jnp.arange(k_BKSH.shape[2]), slots_B[:, None, None, None]
    own_slot, before = slots_S == slots_B111, slots_S < slots_B111
    scores_BKGS = jnp.where(own_slot, own_BKG1, jnp.where(before, scores_BKGS, -jnp.inf)) * scale
    weights_BKGS = jnp.exp(scores_BKGS - scores_BKGS.max(axis=-1, keepdims=True))
    total_BKG1 = weights_BKGS.sum(axis=-1, keepdims=True)
    own_BKG1 = jnp.where(own_slot, weights_BKGS, 0).sum(axis=-1, keepdims=True)
    out_BKGH = jnp.einsum(
        "BKGS,BKSH->BKGH", jnp.where(before, weights_BKGS, 0).astype(q_BKGH.dtype), v_BKSH, precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return ((out_BKGH + own_BKG1 * own_v32_BKH[:, :, None]) / total_BKG1).astype(q_BKGH.dtype)
