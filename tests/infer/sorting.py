"""Sampling as it is read: the vocabulary is sorted, and noise drawn for all of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax import Sampling


def keep(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits with those that top_k, top_p and min_p remove at -inf."""
    if sampling.top_k is not None or sampling.top_p not in (None, 1):
        sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        order_V = jnp.arange(sorted_BV.shape[-1])
        if sampling.top_k is not None:
            sorted_BV = jnp.where(order_V < min(sampling.top_k, order_V.size), sorted_BV, -jnp.inf)
        if sampling.top_p not in (None, 1):
            probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
            before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
            sorted_BV = jnp.where((before_BV <= sampling.top_p) | (order_V == 0), sorted_BV, -jnp.inf)
        least_B1 = jnp.min(jnp.where(sorted_BV == -jnp.inf, jnp.inf, sorted_BV), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.min_p is not None:
        least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def sample(logits_BV: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """One token for each row, without a penalty."""
    return jax.random.categorical(key, keep(logits_BV / sampling.temperature, sampling), axis=-1)
