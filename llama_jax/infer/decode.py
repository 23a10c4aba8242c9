"""The steps of generation, on the device: prefill (whole prompts into the cache), decode (token by token), the last
token, and rows that come and go.

Shapes are static: prompts are padded to a bucket, the cache has a fixed number of slots, and the decode loop runs on
the device until its steps are done or no row is running. The host sees tokens in chunks.

A step samples first and then runs the blocks on what it has sampled, so that the first block's weights can be fetched
while the head is multiplied: a loop's body cannot fetch what its next turn begins with. Cost: one wasted
step when the last row ends on a stop token or a full cache. Reaching max_new_tokens wastes none: `sample_last` runs no
blocks.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.caches import KVCache, insert_row, num_slots
from llama_jax.infer.sampling import RowSampling, any_row, greedy, sample
from llama_jax.model import Llama
from llama_jax.model.adapt import for_rows

RUNNING, STOP, LENGTH, CACHE = range(4)
FINISH_REASONS = {STOP: "stop", LENGTH: "length", CACHE: "cache"}
NO_TOKEN = -1
CHUNK = 64  # most tokens a row that one call of `decode` returns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The rows between two steps.

    Attributes:
      cache: keys and values, of running rows up to and with `position_B`; the token that ends a row is not written.
      x_B1D: output of the last block at `position_B`, for running rows. The next token is sampled from it.
      position_B: int32: the slot of the last token; past the end where the cache is full.
      remaining_B: int32: how many more tokens the row may emit.
      finish_B: int32: RUNNING, STOP, LENGTH or CACHE; a row that is not running is free.
      stop_BN: int32: tokens that end the row; NO_TOKEN fills up.
      sampling: how each row chooses; None where all are greedy.
      adapter_B: int32: which of a model's several adapters a row has; None where there are not several.
    """

    cache: KVCache
    x_B1D: jax.Array
    position_B: jax.Array
    remaining_B: jax.Array
    finish_B: jax.Array
    stop_BN: jax.Array
    sampling: RowSampling | None
    adapter_B: jax.Array | None = None


def prefill(
    model: Llama,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    length_B: jax.Array,
    remaining_B: jax.Array,
    stop_BN: jax.Array,
    cache: KVCache | None,
    adapter_B: jax.Array | None = None,
    *,
    size: int,
    span: int | None,
) -> DecodeState:
    """Runs the prompts, and returns the rows up to where each one's first token is sampled, all of them greedy.

    Args:
      model: the model.
      tokens_BT: right-padded prompts.
      start_B: the slot of each row's first token: 0, or what the cache already holds.
      length_B: tokens in each row; 0 is a dead row, which only fills the batch.
      remaining_B: how many tokens each row may emit.
      stop_BN: tokens that end each row.
      cache: of earlier turns, or None for a new one.
      adapter_B: which of the model's several adapters each row has.
      size: slots of a new cache.
      span: static bound on the slots that these queries can see.
    """
    B, T = tokens_BT.shape
    model = for_rows(model, adapter_B)
    fresh = cache is None
    cache = model.init_cache(B, size) if cache is None else cache
    order_BT = jnp.arange(T, dtype=jnp.int32)
    order_BT = jnp.broadcast_to(order_BT, (B, T), out_sharding=jax.typeof(tokens_BT).sharding.spec)
    # Padding goes past the end of the cache: its writes are dropped, and no later query sees it.
    positions_BT = jnp.where(order_BT < length_B[:, None], start_B[:, None] + order_BT, num_slots(cache) + T)
    x_BTD, filled = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache, span=span, ordered=fresh)
    last_BT = order_BT == jnp.maximum(length_B - 1, 0)[:, None]
    assert filled is not None
    return DecodeState(
        cache=filled,
        # A gather along T would make the whole residual stream whole on each device.
        x_B1D=jnp.sum(jnp.where(last_BT[..., None], x_BTD, 0), axis=1, keepdims=True),
        position_B=start_B + length_B - 1,
        remaining_B=remaining_B,
        finish_B=jnp.where(length_B > 0, RUNNING, LENGTH),
        stop_BN=stop_BN,
        sampling=None,
        adapter_B=adapter_B,
    )


def decode(
    model: Llama, state: DecodeState, halt_B: jax.Array, steps: jax.Array
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Samples up to `steps` tokens for each running row.

    Args:
      model: the model.
      state: the rows; donated.
      halt_B: bool: rows that the host ends (a stop string was found).
      steps: at most CHUNK.

    Returns:
      The state, and the tokens and log-probabilities [B, CHUNK] in order, with the stop id that ends a row, NO_TOKEN
      where a row had ended.
    """
    state = release(state, halt_B)
    model = for_rows(model, state.adapter_B)
    B = state.position_B.shape[0]
    spec = jax.P(jax.typeof(state.position_B).sharding.spec[0], None)
    tokens_BC = jnp.full((B, CHUNK), NO_TOKEN, jnp.int32, out_sharding=spec)
    logprobs_BC = jnp.zeros((B, CHUNK), jnp.float32, out_sharding=spec)

    def running(carry):
        step, state, _, _ = carry
        return (step < steps) & any_row(state.finish_B == RUNNING)

    def body(carry):
        step, state, tokens_BC, logprobs_BC = carry
        state, sampled_B, token_B, logprob_B = _emit(model, state)
        tokens_BC = jax.lax.dynamic_update_slice(tokens_BC, token_B[:, None], (0, step))
        logprobs_BC = jax.lax.dynamic_update_slice(logprobs_BC, logprob_B[:, None], (0, step))
        # Rows that have ended write past the end of the cache, that is nowhere.
        slot_B = jnp.where(state.finish_B == RUNNING, state.position_B, num_slots(state.cache))
        x_B1D, cache = model.hidden(sampled_B[:, None], positions_BT=slot_B[:, None], cache=state.cache)
        return step + 1, dataclasses.replace(state, x_B1D=x_B1D, cache=cache), tokens_BC, logprobs_BC

    _, state, tokens_BC, logprobs_BC = jax.lax.while_loop(running, body, (0, state, tokens_BC, logprobs_BC))
    return state, tokens_BC, logprobs_BC


def sample_last(model: Llama, state: DecodeState, halt_B: jax.Array) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Samples the last token of each row, which the blocks need not see: as `decode` of one step, [B, 1]."""
    state, _, token_B, logprob_B = _emit(model, release(state, halt_B))
    return state, token_B[:, None], logprob_B[:, None]


def release(state: DecodeState, rows_B: jax.Array) -> DecodeState:
    """Ends the rows, which are then free."""
    return dataclasses.replace(state, finish_B=jnp.where(rows_B, STOP, state.finish_B))


def insert(state: DecodeState, row: jax.Array, prefilled: DecodeState) -> DecodeState:
    """Returns the state with the only row of another one, whose cache has as many slots or fewer, as row `row`.

    Args:
      state: the rows; donated.
      row: int32 scalar.
      prefilled: a state of one row; both sample or neither, with as much room for stop ids.
    """

    def put(old, new):
        rows = jax.typeof(old).sharding.spec[0]
        here = jnp.arange(old.shape[0], out_sharding=jax.P(rows)).reshape(-1, *(1 for _ in old.shape[1:])) == row
        spread = jax.typeof(old).sharding.spec
        here, new = (jnp.broadcast_to(x, old.shape, out_sharding=spread) for x in (here, new))
        return jnp.where(here, new, old)

    cache = insert_row(state.cache, row, prefilled.cache)
    rest, other = (dataclasses.replace(of, cache=()) for of in (state, prefilled))
    return dataclasses.replace(jax.tree.map(put, rest, other), cache=cache)


def _emit(model: Llama, state: DecodeState) -> tuple[DecodeState, jax.Array, jax.Array, jax.Array]:
    """Samples each row's next token, and decides which rows have ended.

    Returns:
      The state, whose `x_B1D` is that of the token before; what was sampled; and that again as the host takes it,
      NO_TOKEN where the row had ended, with its log-probability.
    """
    was_running = state.finish_B == RUNNING
    with jax.named_scope("sample"):
        logits_BV = model.logits(state.x_B1D)[:, 0]
        token_B, sampling = _choose(model, state, logits_BV)
        ids_V = jnp.arange(logits_BV.shape[-1], out_sharding=jax.P(jax.typeof(logits_BV).sharding.spec[1]))
        chosen_BV = ids_V == token_B[:, None]
        logprob_B = jnp.sum(jnp.where(chosen_BV, logits_BV, 0), axis=-1) - jax.nn.logsumexp(logits_BV, axis=-1)
    stopped = (token_B[:, None] == state.stop_BN).any(axis=-1)
    position_B = jnp.where(was_running, state.position_B + 1, state.position_B)
    remaining_B = jnp.where(was_running, state.remaining_B - 1, state.remaining_B)
    full = position_B >= num_slots(state.cache)
    ending_B = jnp.where(stopped, STOP, jnp.where(remaining_B <= 0, LENGTH, jnp.where(full, CACHE, RUNNING)))
    state = dataclasses.replace(
        state,
        position_B=position_B,
        remaining_B=remaining_B,
        finish_B=jnp.where(was_running, ending_B, state.finish_B),
        sampling=sampling,
    )
    return state, token_B, jnp.where(was_running, token_B, NO_TOKEN), logprob_B


def _choose(model: Llama, state: DecodeState, logits_BV: jax.Array) -> tuple[jax.Array, RowSampling | None]:
    """Returns the token of each row, and how the next one is chosen."""
    rows, running_B = state.sampling, state.finish_B == RUNNING
    if rows is None:
        return greedy(logits_BV), None
    spec = model.rules.spec(("batch", "sampled"), logits_BV.shape)
    penalized_B = running_B & (rows.penalty_B != 1)
    token_B = jax.lax.cond(
        any_row(penalized_B | (running_B & (rows.temperature_B > 0))),
        lambda: sample(jax.reshard(logits_BV, spec), rows, state.position_B, running_B),
        lambda: greedy(logits_BV),
    )

    def seen_too():
        ids_V = jnp.arange(logits_BV.shape[-1], out_sharding=jax.P(spec[1]))
        return rows.seen_BV | ((ids_V == token_B[:, None]) & penalized_B[:, None])

    seen_BV = jax.lax.cond(any_row(penalized_B), seen_too, lambda: rows.seen_BV)
    return token_B, dataclasses.replace(rows, seen_BV=seen_BV)
