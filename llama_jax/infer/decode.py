"""The programs of generation, on the device: prefill (whole prompts into the cache), decode (token by token), and the
last token.

Shapes are static: prompts are padded to a bucket, the cache has a fixed number of slots, and the decode loop runs on
the device until its steps are done or no row is running. The host sees tokens in chunks.

A step samples first and then runs the blocks on what it has sampled, so that the first block's weights can be fetched
while the head is multiplied: a loop's body cannot fetch what its next turn begins with. The price is one step for
nothing where the last row stops or fills the cache; rows that end by their length cost none: `sample_last` runs no
blocks.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.caches import KVCache, num_slots
from llama_jax.costs import tuned
from llama_jax.infer.sampling import sample
from llama_jax.model import Llama

RUNNING, STOP, LENGTH, CACHE = range(4)
FINISH_REASONS = {STOP: "stop", LENGTH: "length", CACHE: "cache"}
NO_TOKEN = -1
CHUNK = 64  # most tokens a row that one call of `decode` returns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where every row stands between two steps.

    Attributes:
      cache: keys and values, of running rows up to and with `position_B`; what ends a row is not written.
      x_B1D: of running rows the residual stream after the last block at `position_B`: of it the next token is sampled.
      position_B: int32: the slot of the last token; past the end where the cache is full.
      remaining_B: int32: how many more tokens the row may emit.
      finish_B: int32: RUNNING, STOP, LENGTH or CACHE.
      key_B: each row's random key.
      seen_BV: bool: tokens so far, for the repetition penalty; None where it is off.
    """

    cache: KVCache
    x_B1D: jax.Array
    position_B: jax.Array
    remaining_B: jax.Array
    finish_B: jax.Array
    key_B: jax.Array
    seen_BV: jax.Array | None


def prefill(
    model: Llama,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    length_B: jax.Array,
    remaining_B: jax.Array,
    seed: jax.Array,
    seen_BV: jax.Array | None,
    cache: KVCache | None,
    *,
    size: int,
    span: int | None,
) -> DecodeState:
    """Runs the prompts, up to where each row's first token is sampled.

    Args:
      model: the model.
      tokens_BT: right-padded prompts.
      start_B: the slot of each row's first token: 0, or what the cache already holds.
      length_B: tokens in each row; 0 is a dead row, which only fills the batch.
      remaining_B: how many tokens each row may emit.
      seed: uint32.
      seen_BV: tokens of the prompts, where the repetition penalty needs them.
      cache: of earlier turns, or None for a new one.
      size: slots of a new cache.
      span: static bound on the slots that these queries can see.
    """
    B, T = tokens_BT.shape
    fresh = cache is None
    cache = model.init_cache(B, size) if cache is None else cache
    row = jax.typeof(length_B).sharding.spec[0]
    order_BT = jnp.arange(T, dtype=jnp.int32)
    order_BT = jnp.broadcast_to(order_BT, (B, T), out_sharding=jax.typeof(tokens_BT).sharding.spec)
    # Padding goes past the end of the cache: its writes are dropped, and no later query sees it.
    positions_BT = jnp.where(order_BT < length_B[:, None], start_B[:, None] + order_BT, num_slots(cache) + T)
    x_BTD, filled = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache, span=span, ordered=fresh)
    last_BT = order_BT == jnp.maximum(length_B - 1, 0)[:, None]
    # A gather along T would make the whole residual stream whole on each device.
    x_B1D = jnp.sum(jnp.where(last_BT[..., None], x_BTD, 0), axis=1, keepdims=True)
    rows_B = jnp.arange(B, dtype=jnp.uint32, out_sharding=jax.P(row))
    assert filled is not None
    return DecodeState(
        cache=filled,
        x_B1D=x_B1D,
        position_B=start_B + length_B - 1,
        remaining_B=remaining_B,
        finish_B=jnp.where(length_B > 0, RUNNING, LENGTH),
        key_B=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B),
        seen_BV=seen_BV,
    )


def decode(
    model: Llama,
    state: DecodeState,
    halt_B: jax.Array,
    steps: jax.Array,
    stop_ids: jax.Array,
    values: dict[str, jax.Array],
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Up to `steps` tokens for each running row.

    Args:
      model: the model.
      state: where the rows stand; its cache is donated.
      halt_B: bool: rows that the host ends (a stop string was found).
      steps: at most CHUNK.
      stop_ids: tokens that end a row.
      values: of `Sampling.values`.

    Returns:
      The state, and the tokens and log-probabilities [B, CHUNK] in order, NO_TOKEN where a row had ended.
    """
    state = _halted(state, halt_B)
    B = state.position_B.shape[0]
    spec = jax.P(jax.typeof(state.position_B).sharding.spec[0], None)
    tokens_BC = jnp.full((B, CHUNK), NO_TOKEN, jnp.int32, out_sharding=spec)
    logprobs_BC = jnp.zeros((B, CHUNK), jnp.float32, out_sharding=spec)

    def running(carry):
        step, state, _, _ = carry
        return (step < steps) & jax.reshard(state.finish_B == RUNNING, jax.P()).any()

    def body(carry):
        step, state, tokens_BC, logprobs_BC = carry
        state, sampled_B, token_B, logprob_B = _emit(model, state, stop_ids, values)
        tokens_BC = jax.lax.dynamic_update_slice(tokens_BC, token_B[:, None], (0, step))
        logprobs_BC = jax.lax.dynamic_update_slice(logprobs_BC, logprob_B[:, None], (0, step))
        # Rows that have ended write past the end of the cache, that is nowhere.
        slot_B = jnp.where(state.finish_B == RUNNING, state.position_B, num_slots(state.cache))
        x_B1D, cache = model.hidden(sampled_B[:, None], positions_BT=slot_B[:, None], cache=state.cache)
        return step + 1, dataclasses.replace(state, x_B1D=x_B1D, cache=cache), tokens_BC, logprobs_BC

    _, state, tokens_BC, logprobs_BC = jax.lax.while_loop(running, body, (0, state, tokens_BC, logprobs_BC))
    return state, tokens_BC, logprobs_BC


def sample_last(
    model: Llama,
    state: DecodeState,
    halt_B: jax.Array,
    stop_ids: jax.Array,
    values: dict[str, jax.Array],
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """The last token of each row, which the blocks need not see: as `decode` of one step, and nothing after it."""
    state, _, token_B, logprob_B = _emit(model, _halted(state, halt_B), stop_ids, values)
    return state, token_B[:, None], logprob_B[:, None]


def _halted(state: DecodeState, halt_B: jax.Array) -> DecodeState:
    return dataclasses.replace(state, finish_B=jnp.where(halt_B, STOP, state.finish_B))


def _emit(model: Llama, state: DecodeState, stop_ids, values) -> tuple[DecodeState, jax.Array, jax.Array, jax.Array]:
    """Samples each row's next token, and decides which rows have ended.

    Returns:
      The state, whose residual stream is that of the token before; what was sampled; and that again as the host takes
      it, NO_TOKEN where there is none, with its log-probability.
    """
    with jax.named_scope("sample"):
        logits_BV = model.logits(state.x_B1D)[:, 0]
        if values:
            logits_BV = jax.reshard(logits_BV, model.rules.spec(("batch", "sampled"), logits_BV.shape))
        key_B = jax.vmap(jax.random.fold_in)(state.key_B, state.position_B)
        token_B = sample(logits_BV, values, key_B, state.seen_BV)
        ids_V = jnp.arange(logits_BV.shape[-1], out_sharding=jax.P(jax.typeof(logits_BV).sharding.spec[1]))
        chosen_BV = ids_V == token_B[:, None]
        logprob_B = jnp.sum(jnp.where(chosen_BV, logits_BV, 0), axis=-1) - jax.nn.logsumexp(logits_BV, axis=-1)
    was_running = state.finish_B == RUNNING
    stopped = (token_B[:, None] == stop_ids).any(axis=-1)
    position_B = jnp.where(was_running, state.position_B + 1, state.position_B)
    remaining_B = jnp.where(was_running, state.remaining_B - 1, state.remaining_B)
    full = position_B >= num_slots(state.cache)
    ending_B = jnp.where(stopped, STOP, jnp.where(remaining_B <= 0, LENGTH, jnp.where(full, CACHE, RUNNING)))
    state = dataclasses.replace(
        state,
        position_B=position_B,
        remaining_B=remaining_B,
        finish_B=jnp.where(was_running, ending_B, state.finish_B),
        seen_BV=None if state.seen_BV is None else state.seen_BV | (chosen_BV & was_running[:, None]),
    )
    return state, token_B, jnp.where(was_running & ~stopped, token_B, NO_TOKEN), logprob_B


class Programs:
    """`prefill`, `decode` and `sample_last` compiled for one model, called with its leaves: flattening a module at
    every call would cost more than a small model's step."""

    def __init__(self, model: Llama, compiler_options: dict[str, Any] | None = None):
        self.leaves, treedef = jax.tree.flatten(model)

        def on_leaves(function):
            @functools.wraps(function)
            def call(leaves, *args, **kwargs):
                return function(jax.tree.unflatten(treedef, leaves), *args, **kwargs)

            return call

        def for_the_host(step):
            """With the finish codes, and all that the host reads replicated: every process has it whole."""

            @functools.wraps(step)
            def call(*args, **kwargs):
                state, token, logprob = step(*args, **kwargs)
                return state, *(jax.reshard(x, jax.P()) for x in (token, logprob, state.finish_B))

            return call

        # The head is not used but held: a plan counts it.
        self._prefill = jax.jit(
            on_leaves(prefill), static_argnames=("size", "span"), donate_argnums=7, keep_unused=True
        )
        self._decode = jax.jit(
            on_leaves(for_the_host(decode)), donate_argnums=1, compiler_options=compiler_options or None
        )
        self._sample_last = jax.jit(on_leaves(for_the_host(sample_last)), donate_argnums=1)
        self._forward = jax.jit(on_leaves(lambda model, tokens_BT: model(tokens_BT)[0]))

    def on(self, model: Llama) -> Programs:
        """The same programs, compiled as they are, for other weights of the same kind."""
        other = copy.copy(self)
        other.leaves = jax.tree.leaves(model)
        return other

    def prefill(self, *args: Any, **kwargs: Any):
        """As `prefill` without the model; the cache is donated."""
        return self._prefill(self.leaves, *args, **kwargs)

    def decode(self, *args: Any):
        """As `decode` without the model, with the finish codes beside the state, which is donated."""
        return self._decode(self.leaves, *args)

    def sample_last(self, *args: Any):
        """As `sample_last`, likewise."""
        return self._sample_last(self.leaves, *args)

    def lower_prefill(self, *args: Any, **kwargs: Any) -> Any:
        """The program of `prefill` for abstract arguments, to compile for machines that are not there."""
        return self._prefill.lower(self.leaves, *args, **kwargs)

    def lower_decode(self, *args: Any) -> Any:
        """The program of `decode`, likewise."""
        return self._decode.lower(self.leaves, *args)

    def forward(self, tokens_BT: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V], without a cache."""
        return self._forward(self.leaves, tokens_BT)


_PROGRAMS: weakref.WeakKeyDictionary[Any, Programs] = weakref.WeakKeyDictionary()


def programs_of(llama: Any) -> Programs:
    """The compiled programs of a loaded model, made once."""
    if llama not in _PROGRAMS:
        _PROGRAMS[llama] = Programs(llama.model, tuned.options(llama.config, list(llama.mesh.devices.flat)))
    return _PROGRAMS[llama]


def with_model(llama: Any, model: Llama) -> Any:
    """A loaded model with other weights of the same shapes, which shares the compiled programs: during training."""
    other = dataclasses.replace(llama, model=model)
    _PROGRAMS[other] = programs_of(llama).on(model)
    return other
