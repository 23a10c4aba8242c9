"""`jax.nn.dot_product_attention`, which XLA fuses."""

import jax
import jax.numpy as jnp


def attention(
    q_BTKGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *, mask_BTS: jax.Array, scale: float
) -> jax.Array:
    """As `reference.attention`, on the rows and heads of one device."""
    B, T, K, G, H = q_BTKGH.shape
    q_BTNH = q_BTKGH.reshape(B, T, K * G, H)
    with jax.default_matmul_precision("highest" if q_BTKGH.dtype == jnp.float32 else None):
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH,
            k_BKSH.swapaxes(1, 2),
            v_BKSH.swapaxes(1, 2),
            mask=mask_BTS[:, None],
            scale=scale,
            implementation="xla",
        )
    return out_BTNH.reshape(B, T, K, G, H)
