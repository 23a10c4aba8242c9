"""Attention for XLA on CPU, whose batched products are naive loops (measured: SmolLM2's heads, 4096 slots)."""

import jax
import jax.numpy as jnp

BLOCK = 256  # slots; small enough to stay in a core's cache


def attention(
    q_BTKGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *, mask_BTS: jax.Array, scale: float
) -> jax.Array:
    """As `reference.attention`, on the rows and heads of one device."""
    if q_BTKGH.dtype == jnp.float16:  # scores are beyond its range before they are scaled
        wide = attention(*(x.astype(jnp.float32) for x in (q_BTKGH, k_BKSH, v_BKSH)), mask_BTS=mask_BTS, scale=scale)
        return wide.astype(jnp.float16)
    if q_BTKGH.shape[1] == 1 < k_BKSH.shape[2]:
        return _one_query(q_BTKGH, k_BKSH, v_BKSH, mask_BTS, scale)
    rows = (q_BTKGH, k_BKSH, v_BKSH, mask_BTS)
    return jax.lax.map(lambda row: _one_row(row[0], row[1], row[2], row[3], scale), rows)


def _one_query(q_B1KGH, k_BKSH, v_BKSH, mask_B1S, scale):
    """Blocks of the cache up to the last slot in use, with a running softmax: a cache of 4096 slots that holds 200
    tokens costs one block. No gradient passes: the number of blocks is not static. Products are multiply and sum,
    which XLA fuses: 0.1 ms where the einsum takes 0.6."""
    S = k_BKSH.shape[2]
    width = min(BLOCK, S)
    q_BKG1H = q_B1KGH[:, 0, :, :, None].astype(jnp.float32) * scale
    in_use = jnp.max(jnp.where(mask_B1S, jnp.arange(S) + 1, 0))

    def block(i, carry):
        top_BKG, total_BKG, out_BKGH = carry
        start = jnp.minimum(i * width, S - width)  # the last block may overlap the one before
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, width, axis=2) for x in (k_BKSH, v_BKSH))
        seen_B11S = jax.lax.dynamic_slice_in_dim(mask_B1S, start, width, axis=2)[:, None]
        seen_B11S &= start + jnp.arange(width) >= i * width
        scores_BKGS = jnp.where(seen_B11S, jnp.sum(q_BKG1H * k[:, :, None], axis=-1), -jnp.inf)
        new_top_BKG = jnp.maximum(top_BKG, scores_BKGS.max(axis=-1))
        weights_BKGS = jnp.exp(scores_BKGS - new_top_BKG[..., None])
        shrink_BKG = jnp.exp(top_BKG - new_top_BKG)
        total_BKG = total_BKG * shrink_BKG + weights_BKGS.sum(axis=-1)
        out_BKGH = out_BKGH * shrink_BKG[..., None] + jnp.sum(weights_BKGS[..., None] * v[:, :, None], axis=3)
        return new_top_BKG, total_BKG, out_BKGH

    # Slot 0 is visible to every query, so that the first block has a finite maximum.
    start = tuple(jnp.zeros_like(x, jnp.float32) for x in (q_BKG1H[..., 0, 0], q_BKG1H[..., 0, 0], q_BKG1H[..., 0, :]))
    start = (start[0] - jnp.inf, *start[1:])
    _, total_BKG, out_BKGH = jax.lax.fori_loop(0, (in_use + width - 1) // width, block, start)
    return (out_BKGH / total_BKG[..., None]).astype(q_B1KGH.dtype)[:, None]


def _one_row(q_TKGH, k_KSH, v_KSH, mask_TS, scale):
    """One kv head after the other, each product one matrix product."""
    T, _, G, H = q_TKGH.shape

    def head(qkv):
        q_TGH, k_SH, v_SH = qkv
        scores_TGS = ((q_TGH.reshape(T * G, H) @ k_SH.T) * scale).reshape(T, G, -1).astype(jnp.float32)
        weights_TGS = jax.nn.softmax(jnp.where(mask_TS[:, None], scores_TGS, -jnp.inf), axis=-1)
        return (weights_TGS.astype(q_TGH.dtype).reshape(T * G, -1) @ v_SH).reshape(T, G, H)

    return jax.lax.map(head, (q_TKGH.swapaxes(0, 1), k_KSH, v_KSH)).swapaxes(0, 1)
