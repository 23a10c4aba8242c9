"""Choosing the next token from logits.

Nothing sorts the vocabulary, and no noise is drawn for all of it: top-k and top-p become a threshold, found by
bisection, and a token comes from two random numbers a row. On a CPU with two cores, 16 rows of 49,152: a sort takes
427 ms and noise 65 to 105 ms, a threshold 25 ms and a draw 4 ms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256  # tokens of the draw's inner level


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
      seed: of the random numbers. A row's numbers depend on its seed and its position in the sequence alone: not on its
        place in a batch, nor on the other rows.
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

    @property
    def greedy(self) -> bool:
        """Whether it takes the most likely token of the logits as they are."""
        return self.temperature == 0 and self.repetition_penalty in (None, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """`Sampling` of each row, as arrays; a filter that a row does not use has its neutral value.

    Attributes:
      temperature_B: float32; 0 is greedy.
      top_k_B: int32; neutral: 2**31 - 1.
      top_p_B: float32; neutral: 1.
      min_p_B: float32; neutral: 0.
      penalty_B: float32, the repetition penalty; neutral: 1.
      seed_B: uint32.
      seen_BV: bool, the tokens that the penalty applies to.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    penalty_B: jax.Array
    seed_B: jax.Array
    seen_BV: jax.Array


def row_sampling(
    samplings: Sequence[Sampling],
    seen: Sequence[Sequence[int]],
    vocab_size: int,
    *,
    put: Callable[[np.ndarray], jax.Array],
) -> RowSampling:
    """Returns what each row asks for, on the devices; at temperature 0 its filters are neutral.

    Args:
      samplings: one a row.
      seen: each row's tokens so far.
      vocab_size: V.
      put: puts [B] or [B, V] on the devices.
    """

    def rows(name: str, neutral: float) -> list[float]:
        found = [getattr(s, name) if s.temperature or name == "repetition_penalty" else None for s in samplings]
        return [neutral if value is None else value for value in found]

    seen_BV, most = np.zeros((len(samplings), vocab_size), bool), 2**31 - 1
    for row_V, sampling, ids in zip(seen_BV, samplings, seen, strict=True):
        if sampling.repetition_penalty is not None:
            row_V[list(ids)] = True
    return RowSampling(
        temperature_B=put(np.asarray([s.temperature for s in samplings], np.float32)),
        top_k_B=put(np.asarray([min(k, most) for k in rows("top_k", most)], np.int32)),
        top_p_B=put(np.asarray(rows("top_p", 1), np.float32)),
        min_p_B=put(np.asarray(rows("min_p", 0), np.float32)),
        penalty_B=put(np.asarray(rows("repetition_penalty", 1), np.float32)),
        seed_B=put(np.asarray([s.seed for s in samplings], np.uint32)),
        seen_BV=put(seen_BV),
    )


def sample(logits_BV: jax.Array, rows: RowSampling, position_B: jax.Array, running_B: jax.Array) -> jax.Array:
    """Returns one token for each row, int32 [B].

    Args:
      logits_BV: float32, V not split over the mesh.
      rows: how each row chooses.
      position_B: int32, the position of each row's last token. The random numbers depend on it and the row's seed.
      running_B: bool: what other rows ask for costs nothing.
    """
    logits_BV = jax.lax.cond(
        any_row(running_B & (rows.penalty_B != 1)), lambda: penalized(logits_BV, rows), lambda: logits_BV
    )
    greedy_B = greedy(logits_BV)
    drawing_B = running_B & (rows.temperature_B > 0)

    def drawn() -> jax.Array:
        divisor_B1 = jnp.where(rows.temperature_B > 0, rows.temperature_B, 1)[:, None]
        weights_BV, kept_BV = keep(logits_BV / divisor_B1, rows, drawing_B)
        token_B = draw(jnp.where(kept_BV, weights_BV, 0), rows.seed_B, position_B)
        return jnp.where(drawing_B, token_B, greedy_B)

    return jax.lax.cond(any_row(drawing_B), drawn, lambda: greedy_B)


def penalized(logits_BV: jax.Array, rows: RowSampling) -> jax.Array:
    """Returns the logits after each row's repetition penalty."""
    penalty_B1 = rows.penalty_B[:, None]
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(rows.seen_BV, penalized_BV, logits_BV)


def greedy(logits_BV: jax.Array) -> jax.Array:
    """As `jnp.argmax` over V, which may be split over the mesh: what devices exchange is one number a row."""
    V, split = logits_BV.shape[-1], jax.typeof(logits_BV).sharding.spec[1]
    if split is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    ids_V = jnp.arange(V, dtype=jnp.int32, out_sharding=jax.P(split))
    top_BV = (logits_BV == logits_BV.max(axis=-1, keepdims=True)) | jnp.isnan(logits_BV)
    return jnp.where(top_BV, ids_V, V).min(axis=-1)


def keep(logits_BV: jax.Array, rows: RowSampling, drawing_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each token's probability over that of the most likely one, and whether top_k, top_p and min_p keep it.

    Args:
      logits_BV: float32, divided by the temperature.
      rows: the filters.
      drawing_B: bool: the filters of other rows may be passed over.
    """
    most_B1 = logits_BV.max(axis=-1, keepdims=True)
    weights_BV = jnp.exp(logits_BV - most_B1)
    keys_BV = _sortable(logits_BV)
    least_B = _sortable(most_B1[:, 0] + jnp.log(rows.min_p_B))

    def with_top_k():
        """The k-th largest logit, and the weights of k tokens: of equal ones only as many as make k."""
        least_B = _least(keys_BV, jnp.ones_like(keys_BV), rows.top_k_B - 1)
        above_BV, equal_BV = keys_BV > least_B[:, None], keys_BV == least_B[:, None]
        equal_B = jnp.minimum(equal_BV.sum(axis=-1), rows.top_k_B - above_BV.sum(axis=-1))
        one_B = jnp.where(equal_BV, weights_BV, 0).max(axis=-1)
        return least_B, jnp.where(above_BV, weights_BV, 0).sum(axis=-1) + equal_B * one_B

    def with_top_p(total_B):
        """The least logit above which there is at most p."""
        limit_B = jnp.where(rows.top_p_B < 1, rows.top_p_B * total_B, jnp.inf)
        return _least(keys_BV, weights_BV, limit_B)

    none_B = jnp.full_like(least_B, _LOWEST)
    top_k_B, total_B = jax.lax.cond(
        any_row(drawing_B & (rows.top_k_B < logits_BV.shape[-1])),
        with_top_k,
        lambda: (none_B, weights_BV.sum(axis=-1)),
    )
    top_p_B = jax.lax.cond(any_row(drawing_B & (rows.top_p_B < 1)), with_top_p, lambda _: none_B, total_B)
    least_B = jnp.maximum(least_B, jnp.maximum(top_k_B, top_p_B))
    return weights_BV, keys_BV >= least_B[:, None]


def draw(weights_BV: jax.Array, seed_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """Returns a token of each row with a probability in proportion to its weight.

    One random number chooses a block of tokens, another one a token of it. The tokens before the chosen one have at
    most the random share of the sum, and with it they have more: a weight of 0 is never chosen.
    """
    V = weights_BV.shape[-1]
    padded_BV = jnp.pad(weights_BV, ((0, 0), (0, -V % BLOCK)))

    def of_row(weights_V, seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        block, token = jax.random.uniform(key, (2,))
        blocks = weights_V.reshape(-1, BLOCK)
        block = _inverse(blocks.sum(axis=-1), block)
        return block * BLOCK + _inverse(jax.lax.dynamic_index_in_dim(blocks, block, keepdims=False), token)

    return jax.vmap(of_row)(padded_BV, seed_B, position_B).astype(jnp.int32)


def any_row(x_B: jax.Array) -> jax.Array:
    """Whether any is true, on every device."""
    return jax.reshard(x_B, jax.P()).any()


def _inverse(weights: jax.Array, share: jax.Array) -> jax.Array:
    """The index at which the running sum exceeds `share`, in [0, 1), of the whole."""
    sums = jnp.cumsum(weights)
    return jnp.minimum((sums <= share * sums[-1]).sum(), (sums < sums[-1]).sum())  # the product may round to the whole


_LOWEST = np.int32(-(2**31))


def _sortable(x: jax.Array) -> jax.Array:
    """Returns int32 in the order of float32: all bits of a logit take part in a bisection."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0 equals 0
    return jnp.where(bits < 0, bits ^ np.int32(2**31 - 1), bits)


def _least(keys_BV: jax.Array, weights_BV: jax.Array, limit_B: jax.Array) -> jax.Array:
    """Returns the least key of each row, present in it, that has weights of at most the limit above it."""

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # the mean, without overflow
        above_B = jnp.where(keys_BV > middle_B[:, None], weights_BV, 0).sum(axis=-1)
        enough_B = above_B <= limit_B
        return jnp.where(enough_B, low_B, middle_B), jnp.where(enough_B, middle_B, high_B)

    bounds = jnp.full_like(limit_B, _LOWEST, jnp.int32), keys_BV.max(axis=-1)
    _, least_B = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(keys_BV >= least_B[:, None], keys_BV, np.int32(2**31 - 1)).min(axis=-1)
