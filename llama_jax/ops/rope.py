"""Rotary position embedding, half-split (Hugging Face's order): dimension i is paired with i + H / 2."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each pair: float32 [H / 2].

    Rounded to float32 at the same places as Meta's and transformers' code, which compute it in float32: at position
    100,000 one rounding step of a frequency is 6 milliradians.
    """
    powers = (theta ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    frequencies = np.float32(1) / powers
    if scaling is None:
        return frequencies
    return np.array([f / np.float32(scaling.divisor(float(f))) for f in frequencies], np.float32)


def rope_angles(positions_BT: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, H / 2]. An elementwise product: a dot would round to bfloat16 on a TPU."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, T, ..., H] by the angles of its positions, in float32; returns x's dtype."""
    cos, sin = (jnp.expand_dims(a, range(2, x.ndim - 1)) for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
