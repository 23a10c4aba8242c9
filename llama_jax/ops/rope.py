"""Rotary position embedding, half-split (Hugging Face's order): dimension i is paired with i + H / 2."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import AnyRopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: AnyRopeScaling | None) -> np.ndarray:
    """Radians per position of each pair: float32 [H / 2].

    Rounded to float32 at the same places as Meta's and transformers' code, which compute it in float32: at position
    100,000 one rounding step of a frequency is 6 milliradians.
    """
    powers = (theta ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    if scaling is None:
        return np.float32(1) / powers
    return np.array(scaling.frequencies(powers.tolist(), theta), np.float32)


def rope_angles(
    positions_BT: jax.Array, frequencies: np.ndarray, scaling: AnyRopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, H / 2], times the scaling's factor where it has one (YaRN). An elementwise
    product: a dot would round to bfloat16 on a TPU."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is None or scaling.cos_sin_factor == 1:
        return cos, sin
    return cos * scaling.cos_sin_factor, sin * scaling.cos_sin_factor


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, T, ..., H] by the angles of its positions, in float32; returns x's dtype."""
    cos, sin = (jnp.expand_dims(a, range(2, x.ndim - 1)) for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def apply_rope_by_product(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The same numbers as `apply_rope`: the halves are exchanged by a product with a matrix of ones and minus ones.

    For one key a row on TPU, where slices of a head are steps of their own: 3.8k cycles, against 0.3k for this (8B on 8
    v5e).
    """
    H = x.shape[-1]
    cos, sin = (jnp.expand_dims(jnp.concatenate([a, a], axis=-1), range(2, x.ndim - 1)) for a in angles)
    turn_HH = np.roll(np.eye(H), H // 2, axis=1) * np.where(np.arange(H) < H // 2, -1, 1)
    x32 = jax.lax.optimization_barrier(x.astype(jnp.float32))  # the projection is one step, and ends in float32
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    turned = jnp.einsum(
        "...H,HI->...I", x32.astype(x.dtype), jnp.asarray(turn_HH, x.dtype), precision=precision,
        preferred_element_type=jnp.float32, out_sharding=jax.typeof(x).sharding.spec,
    )  # fmt: skip
    return (x32 * cos + turned * sin).astype(x.dtype)
