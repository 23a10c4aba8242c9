"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The filters apply in this order, each to what the one before left.

    Attributes:
      temperature: 0 takes the most likely token; else logits are divided by it.
      repetition_penalty: > 1 makes tokens of the prompt and the answer less likely: their positive logits are divided
        by it, their negative ones multiplied (the CTRL paper's rule, as in transformers). Applies at temperature 0 too.
      top_k: keep the k most likely tokens.
      top_p: keep the smallest set of most likely tokens whose probabilities exceed p together (Meta's rule: the token
        that crosses p is kept).
      min_p: keep tokens at least `min_p` times as likely as the most likely one.
      seed: of the random numbers; a row's tokens depend on its seed and place in the batch, not on the other rows.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self):
        def refuse(name: str, needs: str):
            raise ValueError(f"{name} must be {needs}, got {getattr(self, name)!r}")

        if not (self.temperature == 0 or 1e-6 <= self.temperature < math.inf):  # float32 must hold logits / temperature
            refuse("temperature", "0, or a finite number of at least 1e-6")
        if self.top_k is not None and self.top_k < 1:
            refuse("top_k", "at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            refuse("top_p", "in (0, 1]")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            refuse("min_p", "in [0, 1]")
        if self.repetition_penalty is not None and not (1e-6 <= self.repetition_penalty <= 1e6):
            refuse("repetition_penalty", "a positive number from 1e-6 to 1e6 (1 changes nothing)")
        if not 0 <= self.seed < 2**32:
            refuse("seed", "from 0 to 2**32 - 1")

    def values(self) -> dict[str, jax.Array]:
        """The filters that are on, as arrays: another value needs no new compilation, another set of filters does."""
        values: dict[str, float | None] = {"repetition_penalty": self.repetition_penalty}
        if self.temperature > 0:
            top_k = self.top_k and min(self.top_k, 2**31 - 1)
            values |= {"temperature": self.temperature, "top_k": top_k, "top_p": self.top_p, "min_p": self.min_p}
        neutral = {"repetition_penalty": 1.0, "top_p": 1.0, "min_p": 0.0}
        return {
            name: jnp.asarray(value, jnp.int32 if name == "top_k" else jnp.float32)
            for name, value in values.items()
            if value is not None and value != neutral.get(name)
        }


def sample(
    logits_BV: jax.Array, values: dict[str, jax.Array], key_B: jax.Array, seen_BV: jax.Array | None
) -> jax.Array:
    """One token for each row.

    Args:
      logits_BV: float32; without `values` it may be split over V, else not (sorting a split axis needs communication).
      values: of `Sampling.values`.
      key_B: one random key a row.
      seen_BV: bool: tokens that the repetition penalty applies to; None where it is off.

    Returns:
      int32 [B].
    """
    if "repetition_penalty" in values:
        assert seen_BV is not None
        penalty = values["repetition_penalty"]
        penalized = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalized, logits_BV)
    if "temperature" not in values:
        return greedy(logits_BV)
    logits_BV = keep(logits_BV / values["temperature"], values)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def greedy(logits_BV: jax.Array) -> jax.Array:
    """As `jnp.argmax` over V, which may be split over the mesh: what devices exchange is one number a row."""
    V, split = logits_BV.shape[-1], jax.typeof(logits_BV).sharding.spec[1]
    if split is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    ids_V = jnp.arange(V, dtype=jnp.int32, out_sharding=jax.P(split))
    top_BV = (logits_BV == logits_BV.max(axis=-1, keepdims=True)) | jnp.isnan(logits_BV)
    return jnp.where(top_BV, ids_V, V).min(axis=-1)


def keep(logits_BV: jax.Array, values: dict[str, jax.Array]) -> jax.Array:
    """The logits with those that top_k, top_p and min_p remove at -inf."""
    if "top_k" in values or "top_p" in values:
        sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        order_V = jnp.arange(sorted_BV.shape[-1])
        if "top_k" in values:
            sorted_BV = jnp.where(order_V < values["top_k"], sorted_BV, -jnp.inf)
        if "top_p" in values:
            probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
            before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
            sorted_BV = jnp.where((before_BV <= values["top_p"]) | (order_V == 0), sorted_BV, -jnp.inf)
        least_B1 = jnp.min(jnp.where(sorted_BV == -jnp.inf, jnp.inf, sorted_BV), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if "min_p" in values:
        least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(values["min_p"])
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV
