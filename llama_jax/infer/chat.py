"""Conversations: `chat`, `chat_stream` and `Conversation`, which keeps its cache between turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from llama_jax.caches import KVCache, grow, num_slots
from llama_jax.infer.engine import Request
from llama_jax.infer.generate import Completion, Generation, RowText
from llama_jax.infer.sampling import Sampling
from llama_jax.typing import Fields

if TYPE_CHECKING:
    from llama_jax.loaded import LoadedLlama

FIRST_CACHE = 4096  # slots of a conversation's first cache; it doubles when they are used up
STREAM_CHUNK = 1  # tokens in the first chunk of a stream, which then doubles

Message = Fields


def chat(llama: LoadedLlama, messages: Sequence[Message], **options: Any) -> Completion:
    """Answers a conversation.

    Args:
      llama: of `load`.
      messages: `{"role": "system" | "user" | "assistant" | "tool", "content": str}`, in order, the last one the user's.
      **options: of `Conversation`.

    Returns:
      The answer.
    """
    conversation = Conversation(llama, messages[:-1], **options)
    for _ in conversation.stream(messages[-1:]):
        pass
    assert conversation.completion is not None
    return conversation.completion


def chat_stream(llama: LoadedLlama, messages: Sequence[Message], **options: Any) -> Iterator[str]:
    """As `chat`, in pieces as they come; they join to the same text."""
    return Conversation(llama, messages[:-1], **options).stream(messages[-1:])


class Conversation:
    """A conversation whose cache lives on: a turn prefills only what the cache does not hold yet.

    Args:
      llama: of `load`.
      messages: what was said before, such as a system message.
      max_new_tokens: most tokens of an answer.
      stop: texts that end an answer.
      adapter: as for `generate`.
      **sampling: fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, seed.

    Attributes:
      messages: all that was said, answers included.
      completion: the last answer; None before the first.
    """

    def __init__(
        self,
        llama: LoadedLlama,
        messages: Sequence[Message] = (),
        *,
        max_new_tokens: int = 512,
        stop: str | Sequence[str] = (),
        adapter: str | None = None,
        **sampling: Any,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self._llama, self._format = llama, llama.chat_format
        self._max_new_tokens, self._sampling = max_new_tokens, Sampling(**sampling)
        self._adapter = llama.adapter_number(adapter)
        self._stops = [stop] if isinstance(stop, str) else list(stop)
        self.messages: list[Message] = list(messages)
        self.completion: Completion | None = None
        self._cache: KVCache | None = None
        self._cached: list[int] = []  # the ids whose keys and values the cache holds
        self._streaming = False

    def ask(self, text: str) -> Iterator[str]:
        """Says something as the user; yields the answer in pieces."""
        return self.stream([{"role": "user", "content": text}])

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """Adds messages and yields the answer in pieces.

        If the caller stops early (or Ctrl-C does), what was said so far counts as the answer. If the messages do not
        fit or are not valid, they are not added. One answer at a time: read a stream to its end or `close()` it before
        the next one begins.

        Raises:
          ValueError: they do not fit into the cache (both numbers are given), or the chat format refuses them.
          RuntimeError: an earlier answer is still open; it is not disturbed.
        """
        if self._streaming:
            raise RuntimeError("the last answer of this conversation is still open: read it to its end or close() it")
        if not messages:
            raise ValueError("a conversation needs at least one message, such as {'role': 'user', 'content': 'Hi'}")
        said = [*self.messages, *messages]
        ids = self._format.prompt(said)
        row = RowText(self._llama, self._stops)
        with jax.set_mesh(self._llama.mesh):
            run = self._run(ids)
        self.messages, self._streaming = said, True
        reason = "stop"
        try:
            # The mesh is entered for each step, not around the yields: the caller's own code runs between them.
            chunks = iter(run)
            while True:
                with jax.set_mesh(self._llama.mesh):
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                (tokens,), (logprobs,) = chunk
                text = row.push(tokens, logprobs)
                if row.stopped:
                    run.halt(0)
                if text:
                    yield text
            reason = run.finish_reasons()[0]
            if tail := row.finish():
                yield tail
        finally:
            self._streaming = False
            if run.state is not None:
                self._cache = run.state.cache
                self._cached = [*ids, *run.emitted[:-1]]  # the last token may not be written
            self.completion = row.completion(reason, logprobs=False)
            self.messages = [*said, {"role": "assistant", "content": self.completion.text}]

    def _run(self, ids: list[int]) -> Generation:
        """The run of a turn: it prefills what the cache does not hold yet."""
        limit = self._llama.max_seq_len or self._llama.config.max_seq_len
        size = num_slots(self._cache) if self._cache else min(FIRST_CACHE, limit)
        while size < min(limit, len(ids) + self._max_new_tokens):
            size = min(2 * size, limit)
        if len(ids) > size:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, but the cache has {size} slots: start a new one"
                + (" or raise max_seq_len" if size < self._llama.config.max_seq_len else "")
            )
        start = 0
        if self._cache is not None:
            while start < min(len(ids) - 1, len(self._cached)) and ids[start] == self._cached[start]:
                start += 1
            if size > num_slots(self._cache):
                self._cache = grow(self._cache, self._llama.model.rules, size)
        cache, self._cache, self._cached = self._cache, None, []  # donated: not ours until the run gives it back
        request = Request(
            ids[start:],
            self._max_new_tokens,
            self._sampling,
            {*self._format.stop_ids, *self._llama.require_tokenizer().stop_ids},
            held=ids[:start],
            adapter=self._adapter,
        )
        return Generation(self._llama, [request], cache=cache, size=size, first_chunk=STREAM_CHUNK)
