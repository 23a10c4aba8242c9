"""`generate` and `logits`: from prompts to completions, on any mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llama_jax.caches import KVCache, num_slots
from llama_jax.infer.decode import CHUNK, FINISH_REASONS, RUNNING, DecodeState
from llama_jax.infer.engine import Chunk, Engine, Request, bucket
from llama_jax.infer.sampling import Sampling
from llama_jax.sharding import pad_batch, whole_sequences
from llama_jax.text.stream import StopStrings, StreamDecoder

if TYPE_CHECKING:
    from llama_jax.loaded import LoadedLlama

STOP_CHUNK = 8  # tokens in the first chunk where the host looks for stop strings: what follows one is for nothing


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one prompt was continued with.

    Attributes:
      text: the new text, without a stop string.
      tokens: the new ids, without the prompt and without the stop id.
      finish_reason: "stop" (a stop id or stop string), "length" (max_new_tokens) or "cache" (no slot left: the model's
        context or `max_seq_len` is full).
      logprobs: natural log-probability of each token under the model, before temperature and filters; None unless asked
        for.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None = None


class ContinuedText(tuple[int, ...]):
    """A prompt of ids that spell a text: a space at the beginning of its completion is text, as after a prompt of text.

    After a plain list of ids nobody knows, and SentencePiece's first space is dropped.
    """


def generate(
    llama: LoadedLlama,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    min_p: float | Sequence[float | None] | None = None,
    repetition_penalty: float | Sequence[float | None] | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
    adapter: str | Sequence[str | None] | None = None,
    logprobs: bool = False,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Continues each prompt. Of several processes, all call this alike, and all get the result.

    The options up to `stop` are for all prompts, or lists of one for each prompt. A row's tokens do not depend on the
    other rows nor on its place among them.

    Args:
      llama: of `load`.
      prompts: texts (BOS is added where the checkpoint's tokenizer says so, control strings stay text), or lists of
        ids, taken as they are. Any number, any lengths: they run as one batch.
      max_new_tokens: most tokens for each prompt.
      temperature: see `Sampling`, as the following ones.
      top_k: see `Sampling`.
      top_p: see `Sampling`.
      min_p: see `Sampling`.
      repetition_penalty: see `Sampling`.
      seed: see `Sampling`. One number is the first prompt's seed, and each prompt's is one more than that of the prompt
        before it, so that equal prompts get different answers; a list gives each prompt its own.
      stop: texts that end a completion, and are not part of it; one list a prompt is a list of lists.
      adapter: name of one of the model's several adapters (`load(adapters={...})`), or None for the model without; a
        list gives each prompt its own.
      logprobs: whether to return each token's log-probability.
      on_tokens: called with the number of new tokens after each chunk, for a display of progress.

    Returns:
      One Completion for each prompt, in order.

    Raises:
      ValueError: an argument is wrong, a prompt is empty, or one does not fit into the cache.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of prompts, not one string: write [prompt]")
    options = temperature, top_k, top_p, min_p, repetition_penalty, seed
    samplings, budgets = _samplings(options, len(prompts)), _budgets(max_new_tokens, len(prompts))
    if not prompts:
        return []
    stops, names = _stops(stop, len(prompts)), _each("adapter", adapter, len(prompts))
    ids = [encode_prompt(llama, prompt, where=f"prompt {i}") for i, prompt in enumerate(prompts)]
    rows = [
        RowText(llama, stop, goes_on=isinstance(prompt, (str, ContinuedText)))
        for prompt, stop in zip(prompts, stops, strict=True)
    ]
    stop_ids = llama.tokenizer.stop_ids if llama.tokenizer else ()
    requests = [
        Request(tokens, budget, sampling, stop_ids, adapter=llama.adapter_number(name))
        for tokens, budget, sampling, name in zip(ids, budgets, samplings, names, strict=True)
    ]
    with jax.set_mesh(llama.mesh):
        run = Generation(llama, requests, first_chunk=STOP_CHUNK if any(stops) else CHUNK)
        for tokens, token_logprobs in run:
            for i, row in enumerate(rows):
                row.push(tokens[i], token_logprobs[i])
                if row.stopped:
                    run.halt(i)
            if on_tokens:
                on_tokens(sum(map(len, tokens)))
    return [row.completion(reason, logprobs) for row, reason in zip(rows, run.finish_reasons(), strict=False)]


def _samplings(options: Sequence[Any], count: int) -> list[Sampling]:
    """How each prompt's tokens are chosen; one seed counts up over the prompts."""
    *options, seed = options
    if not isinstance(seed, (list, tuple, np.ndarray)):
        seed = [(int(Sampling(seed=seed).seed) + i) % 2**32 for i in range(count)]
    names = [field.name for field in dataclasses.fields(Sampling)]
    columns = [_each(name, value, count) for name, value in zip(names, [*options, seed], strict=True)]
    return [Sampling(*values) for values in zip(*columns, strict=True)]


def _budgets(max_new_tokens: int | Sequence[int], count: int) -> list[int]:
    budgets = _each("max_new_tokens", max_new_tokens, count)
    if min(budgets, default=1) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {min(budgets)}")
    return budgets


def _stops(stop: str | Sequence[str] | Sequence[Sequence[str]], count: int) -> list[Any]:
    """The stop strings of each prompt."""
    if isinstance(stop, str):
        return [[stop]] * count
    return [list(stop)] * count if all(isinstance(text, str) for text in stop) else _each("stop", stop, count)


def _each(name: str, value: Any, count: int) -> list[Any]:
    """The value of each prompt.

    Raises:
      ValueError: there are more or fewer than prompts.
    """
    if not isinstance(value, (list, tuple, np.ndarray)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} prompts: give one, or one for each prompt")
    return list(value)


def logits(llama: LoadedLlama, tokens: Any, *, adapter: str | None = None) -> jax.Array:
    """Logits of the next token at every position.

    Args:
      llama: of `load`.
      tokens: int [B, T] ids.
      adapter: name of one of the model's several adapters, or None for the model without.

    Returns:
      float32 [B, T, V].

    Raises:
      ValueError: not two-dimensional integers, or an id outside the vocabulary (which XLA would clamp silently).
    """
    tokens_BT = np.asarray(tokens)
    if tokens_BT.ndim != 2 or tokens_BT.size == 0 or not np.issubdtype(tokens_BT.dtype, np.integer):
        raise ValueError(f"tokens must be integers of shape [batch, length], got {tokens_BT.dtype} {tokens_BT.shape}")
    _check_ids(tokens_BT, llama.config.vocab_size, "tokens")
    if tokens_BT.shape[1] > llama.config.max_seq_len:
        raise ValueError(
            f"tokens has {tokens_BT.shape[1]} positions, but the model's context is {llama.config.max_seq_len}"
        )
    B = len(tokens_BT)
    with jax.set_mesh(llama.mesh):
        padded_BT = np.zeros((pad_batch(B), tokens_BT.shape[1]), np.int32)
        padded_BT[:B] = tokens_BT
        whole_sequences(padded_BT.shape[1], llama.mesh.shape["context"])
        logits_BTV = Engine.of(llama).logits(padded_BT, llama.adapter_number(adapter))
        if len(padded_BT) == B:
            return logits_BTV
        return jax.reshard(logits_BTV, jax.P(None, *jax.typeof(logits_BTV).sharding.spec[1:]))[:B]


def encode_prompt(llama: LoadedLlama, prompt: str | Sequence[int], *, where: str) -> list[int]:
    """The ids of a prompt.

    Raises:
      ValueError: it has none, or one outside the vocabulary, or there is no tokenizer.
    """
    if isinstance(prompt, str):
        tokenizer = llama.require_tokenizer()
        ids = tokenizer.encode(prompt, bos=tokenizer.add_bos)
    else:
        tokens = np.asarray(prompt if isinstance(prompt, np.ndarray) else list(prompt))
        if isinstance(prompt, bytes) or tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iuO"):
            raise ValueError(f"{where} must be a text or a list of integer ids, got {prompt!r:.60}")
        ids = tokens.tolist()
    if not ids:
        raise ValueError(f"{where} is empty: give some text (this model's tokenizer adds no start token of its own)")
    _check_ids(np.asarray(ids), llama.config.vocab_size, where)
    return ids


def _check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)].flat[0]
        raise ValueError(f"{where} has the id {bad}, but the model's vocabulary has {vocab_size} tokens")


class RowText:
    """Text of one row as its tokens arrive; it may continue the text of a prompt."""

    def __init__(self, llama: LoadedLlama, stops: Sequence[str], *, goes_on: bool = False):
        if stops:
            llama.require_tokenizer()
        self._decoder = StreamDecoder(llama.tokenizer, goes_on=goes_on) if llama.tokenizer else None
        self._stops = StopStrings(stops)
        self._num_known = llama.tokenizer.vocab_size if llama.tokenizer else 0
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.pieces: list[str] = []
        self.stopped = False

    def push(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        """Takes new tokens, up to the one that completes a stop string; returns the text that is now certain."""
        before = len(self.pieces)
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.stopped:
                break
            self.tokens.append(int(token))
            self.logprobs.append(float(logprob))
            if self._decoder:
                known = int(token) < self._num_known  # padding rows of the embedding are no text
                self.pieces.append(self._stops.push(self._decoder.push([int(token)] if known else [])))
                self.stopped = self._stops.found is not None
        return "".join(self.pieces[before:])

    def finish(self) -> str:
        """The text that was held back because more might have changed it."""
        if not self._decoder or self.stopped:
            return ""
        tail = self._stops.push(self._decoder.finish()) + self._stops.finish()
        self.stopped = self._stops.found is not None
        self.pieces.append(tail)
        return tail

    def completion(self, reason: str, logprobs: bool) -> Completion:
        """The row's result; the last call."""
        self.finish()
        reason = "stop" if self.stopped else reason
        return Completion("".join(self.pieces), self.tokens, reason, self.logprobs if logprobs else None)


class Generation:
    """One batch from prefill to the last token: an iterator over chunks of (tokens, logprobs), a list for each row.

    Args:
      llama: the model; its mesh must be in use.
      requests: one a row.
      cache: of an earlier run, donated; then there is one request, which says what the cache holds.
      size: slots of a new cache; None fits them to the requests.
      first_chunk: tokens in the first chunk; chunks double up to CHUNK, and the last possible token is one of its own.
        Streaming wants few.

    Attributes:
      state: after prefill or the last finished chunk; its cache outlives the run. None while a program runs, which owns
        it.
      emitted: every token of the first row, those after a stop string included: what the cache holds.
    """

    def __init__(
        self,
        llama: LoadedLlama,
        requests: Sequence[Request],
        *,
        cache: KVCache | None = None,
        size: int | None = None,
        first_chunk: int = CHUNK,
    ):
        self._engine, self._requests, self._cache, self._first_chunk = Engine.of(llama), requests, cache, first_chunk
        rows = pad_batch(len(requests))
        self._halt, self._finish_B = np.zeros(rows, bool), np.full(rows, RUNNING, np.int32)
        longest = max(request.length for request in requests)
        if cache is not None:
            size = num_slots(cache)
        self.size = size or cache_size(llama, longest, max(request.max_new_tokens for request in requests))
        if longest > self.size:
            raise ValueError(
                f"the prompt has {longest} tokens, but the cache has {self.size} slots: shorten the prompt"
                + (" or raise max_seq_len" if self.size < llama.config.max_seq_len else "")
            )
        self.state: DecodeState | None = None
        self.emitted: list[int] = []

    def halt(self, row: int) -> None:
        """Ends a row before the next chunk."""
        self._halt[row] = True

    def finish_reasons(self) -> list[str]:
        """Why each row ended; after the last chunk."""
        return [FINISH_REASONS.get(int(code), "stop") for code in self._finish_B[: len(self._requests)]]

    def __iter__(self) -> Iterator[tuple[list[list[int]], list[list[float]]]]:
        state = self.state = self._engine.prefill(self._requests, size=self.size, cache=self._cache)
        left_B = np.zeros(len(self._halt), np.int64)
        left_B[: len(self._requests)] = [request.max_new_tokens for request in self._requests]
        steps = self._first_chunk
        while most := int(np.max(left_B, where=~self._halt & (self._finish_B == RUNNING), initial=0)):
            self.state = None
            steps = max(1, min(steps, CHUNK, most - 1))
            if most == 1:
                state, chunk = self._engine.last(state, self._halt)
            else:
                state, chunk = self._engine.steps(state, steps, self._halt)
            self.state, self._finish_B = state, chunk.finish
            left_B -= [len(tokens) for tokens in chunk.tokens]
            yield self._without_stop_ids(chunk)
            steps *= 2

    def _without_stop_ids(self, chunk: Chunk) -> tuple[list[list[int]], list[list[float]]]:
        """The requests' tokens and log-probabilities."""
        tokens, logprobs = chunk.tokens[: len(self._requests)], chunk.logprobs[: len(self._requests)]
        for request, new, new_logprobs in zip(self._requests, tokens, logprobs, strict=True):
            if new and new[-1] in request.stop_ids:
                del new[-1], new_logprobs[-1]
        self.emitted += tokens[0]
        return tokens, logprobs


def cache_size(llama: LoadedLlama, longest: int, max_new_tokens: int) -> int:
    """Slots of the cache for one call: `max_seq_len` where it was given, else what fits, up to the model's context."""
    if llama.max_seq_len is not None:
        return llama.max_seq_len
    return min(bucket(longest + max_new_tokens), llama.config.max_seq_len)
