"""`generate` and `logits`: from prompts to completions, on any mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llama_jax import distributed
from llama_jax.caches import KVCache, num_slots
from llama_jax.infer.decode import (
    CHUNK,
    FINISH_REASONS,
    NO_TOKEN,
    RUNNING,
    DecodeState,
    programs_of,
    with_model,  # noqa: F401 (for the training loop)
)
from llama_jax.infer.sampling import Sampling
from llama_jax.sharding import pad_batch, whole_sequences
from llama_jax.text.stream import StopStrings, StreamDecoder

if TYPE_CHECKING:
    from llama_jax.loaded import LoadedLlama

MIN_BUCKET = 16  # a shorter prompt compiles nothing smaller
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
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    logprobs: bool = False,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Continues each prompt. Of several processes, all call this alike, and all get the result.

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
      seed: see `Sampling`.
      stop: texts that end a completion; they are not part of it.
      logprobs: whether to return each token's log-probability.
      on_tokens: called with the number of new tokens after each chunk, for a display of progress.

    Returns:
      One Completion for each prompt, in order.

    Raises:
      ValueError: an argument is wrong, a prompt is empty, or one does not fit into the cache.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of prompts, not one string: write [prompt]")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts:
        return []
    ids = [encode_prompt(llama, prompt, where=f"prompt {i}") for i, prompt in enumerate(prompts)]
    stops = [stop] if isinstance(stop, str) else list(stop)
    rows = [RowText(llama, stops, goes_on=isinstance(prompt, (str, ContinuedText))) for prompt in prompts]
    with jax.set_mesh(llama.mesh):
        stop_ids = llama.tokenizer.stop_ids if llama.tokenizer else ()
        run = Generation(
            llama, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids,
            first_chunk=STOP_CHUNK if stops else CHUNK,
        )  # fmt: skip
        for tokens, token_logprobs in run:
            for i, row in enumerate(rows):
                row.push(tokens[i], token_logprobs[i])
                if row.stopped:
                    run.halt(i)
            if on_tokens:
                on_tokens(sum(map(len, tokens)))
    return [row.completion(reason, logprobs) for row, reason in zip(rows, run.finish_reasons(), strict=False)]


def logits(llama: LoadedLlama, tokens: Any) -> jax.Array:
    """Logits of the next token at every position.

    Args:
      llama: of `load`.
      tokens: int [B, T] ids.

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
        on_device = distributed.put(padded_BT, llama.model.rules.sharding(("batch", "seq"), padded_BT.shape))
        logits_BTV = programs_of(llama).forward(on_device)
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
    """Text of one row as its tokens arrive; it may go on from the text of a prompt."""

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
      ids: the prompts, or what follows the tokens that `cache` holds.
      max_new_tokens: most tokens for each row.
      sampling: how they are chosen.
      stop_ids: tokens that end a row.
      cache: of an earlier run, donated; then `ids` is one row, which starts at slot `start`.
      start: see `cache`.
      size: slots of a new cache; None fits them to the prompts.
      history: for the repetition penalty: tokens before `ids`.
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
        ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: Iterable[int],
        cache: KVCache | None = None,
        start: int = 0,
        size: int | None = None,
        history: Sequence[int] = (),
        first_chunk: int = CHUNK,
    ):
        self._llama, self._programs = llama, programs_of(llama)
        self._ids, self._cache, self._start, self._history = ids, cache, start, history
        self._max_new, self._sampling, self._first_chunk = min(max_new_tokens, 2**31 - 1), sampling, first_chunk
        self._stop_ids = np.asarray(sorted(set(stop_ids)) or [NO_TOKEN], np.int32)
        self._halt = np.zeros(pad_batch(len(ids)), bool)
        longest = start + max(map(len, ids))
        if cache is not None:
            size = num_slots(cache)
        self.size = size or cache_size(llama, longest, max_new_tokens)
        if longest > self.size:
            raise ValueError(
                f"the prompt has {longest} tokens, but the cache has {self.size} slots: shorten the prompt"
                + (" or raise max_seq_len" if self.size < llama.config.max_seq_len else "")
            )
        self.state: DecodeState | None = None
        self._finish_B = np.full(len(self._halt), RUNNING, np.int32)
        self.emitted: list[int] = []

    def halt(self, row: int) -> None:
        """Ends a row before the next chunk."""
        self._halt[row] = True

    def finish_reasons(self) -> list[str]:
        """Why each row ended; after the last chunk."""
        return [FINISH_REASONS.get(int(code), "stop") for code in self._finish_B[: len(self._ids)]]

    def __iter__(self) -> Iterator[tuple[list[list[int]], list[list[float]]]]:
        values = self._sampling.values()
        self.state = self._prefill(values)
        steps, rest = self._first_chunk, self._max_new
        while rest > 0 and (~self._halt & (self._finish_B == RUNNING)).any():
            steps = max(1, min(steps, CHUNK, rest - 1))
            state, self.state = self.state, None
            args = state, self._on_rows(self._halt)
            if rest == 1:
                outcome = self._programs.sample_last(*args, self._stop_ids, values)
            else:
                outcome = self._programs.decode(*args, steps, self._stop_ids, values)
            self.state, tokens_BC, logprobs_BC, finish_B = outcome
            self._finish_B = np.asarray(finish_B)
            yield self._rows(np.asarray(tokens_BC), np.asarray(logprobs_BC))
            rest -= steps
            steps *= 2

    def _prefill(self, values):
        rows, T = len(self._halt), bucket(max(map(len, self._ids)))
        for length in (T, self.size):
            whole_sequences(length, self._llama.mesh.shape["context"])
        tokens_BT, length_B = np.zeros((rows, T), np.int32), np.zeros(rows, np.int32)
        for i, row in enumerate(self._ids):
            tokens_BT[i, : len(row)], length_B[i] = row, len(row)
        seen = None
        if "repetition_penalty" in values:
            seen = np.zeros((rows, self._llama.config.vocab_size), bool)
            for i, row in enumerate(self._ids):
                seen[i, [*self._history, *row]] = True
        return self._programs.prefill(
            self._on_rows(tokens_BT, "seq"),
            self._on_rows(np.full(rows, self._start, np.int32)),
            self._on_rows(length_B),
            self._on_rows(np.full(rows, self._max_new, np.int32)),
            np.uint32(self._sampling.seed),
            None if seen is None else self._on_rows(seen, "sampled"),
            self._cache,
            size=self.size,
            span=min(self.size, bucket(self._start + max(map(len, self._ids)))),
        )

    def _on_rows(self, x: np.ndarray, *axes: str) -> jax.Array:
        return distributed.put(x, self._llama.model.rules.sharding(("batch", *axes), x.shape))

    def _rows(self, tokens_BC: np.ndarray, logprobs_BC: np.ndarray):
        live = range(len(self._ids))
        self.emitted += tokens_BC[0][tokens_BC[0] != NO_TOKEN].tolist()
        kept = [tokens_BC[i] != NO_TOKEN for i in live]
        if any(np.isnan(logprobs_BC[i][kept[i]]).any() for i in live):
            raise ValueError("the model computed NaN: its weights are damaged, or float16 overflowed; try float32")
        return [tokens_BC[i][kept[i]].tolist() for i in live], [logprobs_BC[i][kept[i]].tolist() for i in live]


def bucket(length: int) -> int:
    """The next power of two: prompts of all lengths share a few compiled programs."""
    return max(MIN_BUCKET, 1 << (length - 1).bit_length())


def cache_size(llama: LoadedLlama, longest: int, max_new_tokens: int) -> int:
    """Slots of the cache for one call: `max_seq_len` where it was given, else what fits, up to the model's context."""
    if llama.max_seq_len is not None:
        return llama.max_seq_len
    return min(bucket(longest + max_new_tokens), llama.config.max_seq_len)
