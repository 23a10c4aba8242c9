"""RMSNorm."""

import jax
import jax.numpy as jnp


def rms_norm(x_BTD: jax.Array, weight_D: jax.Array, *, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis, computed in float32.

    The result is cast back to x's dtype *before* the multiplication by the weight, as Meta and transformers do.
    """
    x32 = x_BTD.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    weight_D = weight_D.astype(x_BTD.dtype)
    if any(jax.typeof(weight_D).sharding.spec):
        weight_D = jax.reshard(weight_D, jax.P(None))
    return (x32 * scale).astype(x_BTD.dtype) * weight_D
