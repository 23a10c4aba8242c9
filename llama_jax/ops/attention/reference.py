"""Attention as the formula says: slow, readable, and what every kernel is tested against."""

import jax
import jax.numpy as jnp


def attention(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    mask_BTS: jax.Array,
    scale: float,
    out_sharding: jax.P | None = None,
) -> jax.Array:
    """softmax(q k^T * scale) v, the softmax in float32; `mask_BTS` is true where a query may look.

    `out_sharding` is the sharding of the result where S is split over the mesh.
    """
    dtype = q_BTKGH.dtype
    if dtype == jnp.float16:  # scores are beyond its range before they are scaled
        q_BTKGH, k_BKSH, v_BKSH = (x.astype(jnp.float32) for x in (q_BTKGH, k_BKSH, v_BKSH))
    precision = jax.lax.Precision.HIGHEST if q_BTKGH.dtype == jnp.float32 else None
    scores_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, precision=precision) * scale
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS.astype(jnp.float32), -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTKGH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS, v_BKSH, precision=precision, out_sharding=out_sharding)
    return out_BTKGH.astype(dtype)
