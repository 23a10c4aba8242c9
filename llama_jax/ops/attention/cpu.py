"""Attention for XLA on CPU, whose batched products are naive loops (measured: SmolLM2's heads, 4096 slots)."""

import jax
import jax.numpy as jnp


def attention(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask_BTS: jax.Array, scale: float
) -> jax.Array:
    """As `reference.attention`, on the rows and heads of one device."""
    if q_BTKGH.shape[1] == 1:
        return _one_query(q_BTKGH, k_BSKH, v_BSKH, mask_BTS, scale)
    return jax.lax.map(lambda row: _one_row(*row, scale), (q_BTKGH, k_BSKH, v_BSKH, mask_BTS))


def _one_query(q_B1KGH, k_BSKH, v_BSKH, mask_B1S, scale):
    """Products as multiply and sum, which XLA fuses and splits over cores: 0.1 ms where the einsum takes 0.6."""
    scores_BSKG = jnp.sum((q_B1KGH * k_BSKH[:, :, :, None]).astype(jnp.float32), axis=-1) * scale
    scores_BKGS = jnp.where(mask_B1S[:, :, None], scores_BSKG.transpose(0, 2, 3, 1), -jnp.inf)
    weights_BSKG = jax.nn.softmax(scores_BKGS, axis=-1).astype(q_B1KGH.dtype).transpose(0, 3, 1, 2)
    return jnp.sum(weights_BSKG[..., None] * v_BSKH[:, :, :, None], axis=1, keepdims=True)


def _one_row(q_TKGH, k_SKH, v_SKH, mask_TS, scale):
    """One kv head after the other, each product one matrix product."""
    T, _, G, H = q_TKGH.shape

    def head(qkv):
        q_TGH, k_SH, v_SH = qkv
        scores_TGS = ((q_TGH.reshape(T * G, H) @ k_SH.T) * scale).reshape(T, G, -1).astype(jnp.float32)
        weights_TGS = jax.nn.softmax(jnp.where(mask_TS[:, None], scores_TGS, -jnp.inf), axis=-1)
        return (weights_TGS.astype(q_TGH.dtype).reshape(T * G, -1) @ v_SH).reshape(T, G, H)

    heads = (q_TKGH.swapaxes(0, 1), k_SKH.swapaxes(0, 1), v_SKH.swapaxes(0, 1))
    return jax.lax.map(head, heads).swapaxes(0, 1)
