"""The one decode engine: rows of a state, which requests fill and leave, and the compiled steps that run them.

`generate`, conversations and the samples of a training run are its clients. A server would keep one state, and between
two chunks insert rows that it has prefilled and release rows that have ended.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import distributed
from llama_jax.caches import KVCache, num_slots
from llama_jax.costs import tuned
from llama_jax.infer import decode
from llama_jax.infer.decode import LENGTH, NO_TOKEN, DecodeState
from llama_jax.infer.sampling import Sampling, row_sampling
from llama_jax.model import Llama
from llama_jax.model.adapt import for_rows, has_several_adapters
from llama_jax.sharding import pad_batch, whole_sequences
from llama_jax.typing import Fields, Foreign, PyTree

if TYPE_CHECKING:
    from llama_jax.weights.load import LoadedLlama

MIN_BUCKET = 16  # a shorter prompt compiles nothing smaller
STOPS = 8  # stop ids of a row; more take the next power of two, and other programs


@dataclasses.dataclass(frozen=True)
class Request:
    """What one row is to do.

    Attributes:
      ids: tokens to prefill; at least one.
      max_new_tokens: most tokens to sample.
      sampling: how they are chosen.
      stop_ids: tokens that end the row.
      held: the tokens before `ids`, which the cache already holds.
      adapter: of a model with several adapters: 0 is none, i the one number i - 1.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_ids: Collection[int] = ()
    held: Sequence[int] = ()
    adapter: int = 0

    @property
    def length(self) -> int:
        """Slots that the prompt takes."""
        return len(self.held) + len(self.ids)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What some steps gave; the same on every process.

    Attributes:
      tokens: the new tokens of each row, with the stop id that ends it.
      logprobs: their natural log-probabilities under the model, before temperature and filters.
      finish: each row's code: RUNNING, STOP, LENGTH or CACHE.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish: np.ndarray


class Engine:
    """Runs the rows of one model; the model's mesh must be in use. Every state that it takes is donated.

    Programs are compiled once for models of the same structure, whatever their weights and the rows' settings: one for
    greedy states, one for states that sample. It holds the model's leaves, because flattening a module at every call
    would cost more than a small model's step.

    Args:
      model: the model.
      compiler_options: of `decode`.
    """

    def __init__(self, model: Llama, compiler_options: Fields | None = None):
        self._model, (self._leaves, self._structure) = model, jax.tree.flatten(model)
        self._several = has_several_adapters(model)
        self._decode = _decode_program(tuple(sorted((compiler_options or {}).items())))

    @classmethod
    def of(cls, llama: LoadedLlama) -> Engine:
        """Returns the engine of a loaded model."""
        return cls(llama.model, tuned.options(llama.config, list(llama.mesh.devices.flat)))

    def empty(self, rows: int, size: int) -> DecodeState:
        """Returns a state of free rows.

        Args:
          rows: B.
          size: slots of each row's cache.
        """
        model, none = self._model, np.zeros(rows, np.int32)
        x_B1D = np.zeros((rows, 1, model.config.embed_dim), model.dtype)
        return DecodeState(
            cache=model.init_cache(rows, size),
            x_B1D=self._put(x_B1D, "seq", "act_embed"),
            position_B=self._put(none),
            remaining_B=self._put(none),
            finish_B=self._put(none + LENGTH),
            stop_BN=self._put(np.full((rows, STOPS), NO_TOKEN, np.int32), "sampled"),
            sampling=None,
            adapter_B=self._put(none) if self._several else None,
        )

    def prefill(
        self, requests: Sequence[Request], *, size: int, cache: KVCache | None = None, rows: int | None = None
    ) -> DecodeState:
        """Runs prompts as one batch, and returns their rows, ready to decode.

        Args:
          requests: one a row.
          size: slots of a new cache.
          cache: holds the `held` tokens of all requests; donated. None for a new one.
          rows: rows of the state; dead ones fill it up. Default: as many as the mesh divides. To be put into another
            state a request needs 1.
        """
        B = rows or pad_batch(len(requests))
        longest = max(len(request.ids) for request in requests)
        T, size = bucket(longest), num_slots(cache) if cache is not None else size
        for length in (T, size):
            whole_sequences(length, jax.sharding.get_abstract_mesh().shape["context"])
        tokens_BT, start_B, length_B, remaining_B, adapter_B = (np.zeros(s, np.int32) for s in ((B, T), B, B, B, B))
        width = bucket(max(len(request.stop_ids) for request in requests), STOPS)
        stop_BN = np.full((B, width), NO_TOKEN, np.int32)
        for i, request in enumerate(requests):
            length_B[i], start_B[i], adapter_B[i] = len(request.ids), len(request.held), request.adapter
            remaining_B[i] = min(request.max_new_tokens, 2**31 - 1)
            tokens_BT[i, : len(request.ids)] = request.ids
            stop_BN[i, : len(request.stop_ids)] = sorted(request.stop_ids)
        state = _prefill(
            self._leaves, self._put(tokens_BT, "seq"), *map(self._put, (start_B, length_B, remaining_B)),
            self._put(stop_BN, "sampled"), cache, self._put(adapter_B) if self._several else None,
            structure=self._structure, size=size, span=min(size, bucket(max(request.length for request in requests))),
        )  # fmt: skip
        return state if all(request.sampling.greedy for request in requests) else self._sampling(state, requests)

    def insert(self, state: DecodeState, row: int, prefilled: DecodeState) -> DecodeState:
        """Returns the state with a prefilled request as row `row`; no other row changes.

        Args:
          state: the rows.
          row: a free one.
          prefilled: of `prefill` with one row, and a cache of as many slots or fewer.
        """
        if state.sampling is None and prefilled.sampling is not None:
            state = self._sampling(state, ())
        elif prefilled.sampling is None and state.sampling is not None:
            prefilled = self._sampling(prefilled, ())
        widest = max(of.stop_BN.shape[1] for of in (state, prefilled))
        state, prefilled = (_with_room(of, widest) for of in (state, prefilled))
        return _insert(state, np.int32(row), prefilled)

    def release(self, state: DecodeState, row: int) -> DecodeState:
        """Returns the state with row `row` free; no other row changes."""
        return _release(state, self._put(np.arange(state.finish_B.shape[0]) == row))

    def steps(self, state: DecodeState, steps: int, halt: np.ndarray | None = None) -> tuple[DecodeState, Chunk]:
        """Decodes up to `steps` tokens, at most CHUNK, for each running row.

        Args:
          state: the rows.
          steps: how many.
          halt: bool [B]: rows to release before; None is none.

        Raises:
          ValueError: the model computed NaN.
        """
        return self._run(self._decode, state, halt, steps)

    def last(self, state: DecodeState, halt: np.ndarray | None = None) -> tuple[DecodeState, Chunk]:
        """As `steps` of one token where no running row may emit more: it costs no step of the blocks."""
        return self._run(_sample_last, state, halt)

    def _run(
        self, program: Foreign, state: DecodeState, halt: np.ndarray | None, *steps: int
    ) -> tuple[DecodeState, Chunk]:
        halt = np.zeros(state.finish_B.shape[0], bool) if halt is None else halt
        state, *found = program(self._leaves, state, self._put(halt), *steps, structure=self._structure)
        tokens_BC, logprobs_BC, finish_B = map(np.asarray, found)
        kept_BC = tokens_BC != NO_TOKEN
        if np.isnan(logprobs_BC[kept_BC]).any():
            raise ValueError("the model computed NaN: its weights are damaged, or float16 overflowed; try float32")
        tokens, logprobs = (
            [row[kept].tolist() for row, kept in zip(x, kept_BC, strict=True)] for x in (tokens_BC, logprobs_BC)
        )
        return state, Chunk(tokens, logprobs, finish_B)

    def logits(self, tokens_BT: np.ndarray, adapter: int = 0) -> jax.Array:
        """Float32 logits [B, T, V], without a cache, with an adapter of several, as of `Request`."""
        rows = self._put(np.full(len(tokens_BT), adapter, np.int32)) if self._several else None
        return _logits(self._leaves, self._put(tokens_BT, "seq"), rows, structure=self._structure)

    def lower_prefill(self, *args: PyTree, **static: int) -> Foreign:
        """The program of `decode.prefill` for abstract arguments, to compile for machines that are not there."""
        return _prefill.lower(self._leaves, *args, structure=self._structure, **static)

    def lower_decode(self, *args: PyTree) -> Foreign:
        """The program of `decode.decode`, likewise."""
        return self._decode.lower(self._leaves, *args, structure=self._structure)

    def _sampling(self, state: DecodeState, requests: Sequence[Request]) -> DecodeState:
        """The state with the sampling of the requests; other rows are greedy."""
        others = state.finish_B.shape[0] - len(requests)
        samplings = [*(request.sampling for request in requests), *[Sampling()] * others]
        seen = [*([*request.held, *request.ids] for request in requests), *[()] * others]
        rows = row_sampling(
            samplings, seen, self._model.config.vocab_size, put=lambda x: self._put(x, *["sampled"] * (x.ndim - 1))
        )
        return dataclasses.replace(state, sampling=rows)

    def _put(self, x: np.ndarray, *axes: str) -> jax.Array:
        return distributed.put(x, self._model.rules.sharding(("batch", *axes), x.shape))


def bucket(length: int, least: int = MIN_BUCKET) -> int:
    """The next power of two: prompts of all lengths share a few compiled programs."""
    return max(least, 1 << (length - 1).bit_length())


def _with_room(state: DecodeState, stops: int) -> DecodeState:
    """The state with so many stop ids a row."""
    missing = stops - state.stop_BN.shape[1]
    if not missing:
        return state
    stop_BN = jnp.pad(state.stop_BN, ((0, 0), (0, missing)), constant_values=NO_TOKEN)
    return dataclasses.replace(state, stop_BN=stop_BN)


def _on_leaves(function: Foreign) -> Foreign:
    """The function, called with a model's leaves; their structure is static."""

    def call(leaves, *args, structure, **kwargs):
        return function(jax.tree.unflatten(structure, leaves), *args, **kwargs)

    call.__name__ = function.__name__
    return call


def _for_the_host(step: Foreign) -> Foreign:
    """With the finish codes, and all that the host reads replicated: every process has it whole."""

    @functools.wraps(step)
    def call(*args, **kwargs):
        state, token, logprob = step(*args, **kwargs)
        return state, *(jax.reshard(x, jax.P()) for x in (token, logprob, state.finish_B))

    return call


# The head is not used but held: a plan counts it.
_prefill = jax.jit(
    _on_leaves(decode.prefill), static_argnames=("structure", "size", "span"), donate_argnums=6, keep_unused=True
)
_sample_last = jax.jit(_on_leaves(_for_the_host(decode.sample_last)), static_argnames="structure", donate_argnums=1)
_logits = jax.jit(
    _on_leaves(lambda model, tokens_BT, adapter_B: for_rows(model, adapter_B)(tokens_BT)[0]),
    static_argnames="structure",
)
_insert = jax.jit(decode.insert, donate_argnums=0)
_release = jax.jit(decode.release, donate_argnums=0)


@functools.cache
def _decode_program(compiler_options: tuple[tuple[str, Any], ...]) -> Foreign:
    return jax.jit(
        _on_leaves(_for_the_host(decode.decode)),
        static_argnames="structure",
        donate_argnums=1,
        compiler_options=dict(compiler_options) or None,
    )
