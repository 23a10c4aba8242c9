"""`jax.nn.dot_product_attention`, which XLA fuses; each device computes its own rows and heads."""

import functools

import jax


def attention(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask_BTS: jax.Array, scale: float
) -> jax.Array:
    """As `reference.attention`."""
    return jax.shard_map(functools.partial(_local, scale=scale), out_specs=jax.typeof(q_BTKGH).sharding.spec)(
        q_BTKGH, k_BSKH, v_BSKH, mask_BTS
    )


def _local(q_BTKGH, k_BSKH, v_BSKH, mask_BTS, *, scale):
    B, T, K, G, H = q_BTKGH.shape
    out_BTNH = jax.nn.dot_product_attention(
        q_BTKGH.reshape(B, T, K * G, H), k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale, implementation="xla"
    )
    return out_BTNH.reshape(B, T, K, G, H)
