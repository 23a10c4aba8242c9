"""Context parallelism: which queries of a sequence a device computes.

A device that held the last eighth of a sequence would have 15 times the work of the one with the first. So the sequence
is in twice as many chunks as the C devices, and device d computes chunks d and 2 C - 1 - d: the same work on each.
Everything outside attention keeps its place: queries are exchanged before it, and results back after it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Axes = str | tuple[str, ...]


def balance(x: jax.Array, axes: Axes) -> jax.Array:
    """Exchanges the halves of [B, T, ...] along T; inside `jax.shard_map`, over the mesh axes `axes`."""
    return _exchange(x, axes, inverse=False)


def unbalance(x: jax.Array, axes: Axes) -> jax.Array:
    """The inverse of `balance`."""
    return _exchange(x, axes, inverse=True)


def rows(device: int, T: int, devices: int) -> np.ndarray:
    """The positions in the sequence of the T queries that a device computes, in order."""
    if devices == 1 or T % 2:
        return np.arange(T) + device * T
    (even,), (odd,) = (np.flatnonzero(_owner(half, devices) == device) for half in (0, 1))
    chunk = np.arange(T // 2)
    return np.concatenate([chunk + even * T, chunk + odd * T + T // 2])


def _owner(half: int, devices: int) -> np.ndarray:
    """Which device computes the first (or second) half of what each device holds."""
    chunk = 2 * np.arange(devices) + half
    return np.minimum(chunk, 2 * devices - 1 - chunk)


def _exchange(x: jax.Array, axes: Axes, *, inverse: bool) -> jax.Array:
    if x.shape[1] % 2:
        return x
    halves = []
    for half, part in enumerate(jnp.split(x, 2, axis=1)):
        pairs = [(i, int(owner)) for i, owner in enumerate(_owner(half, jax.lax.axis_size(axes)))]
        halves.append(jax.lax.ppermute(part, axes, [pair[::-1] if inverse else pair for pair in pairs]))
    return jnp.concatenate(halves, axis=1)
