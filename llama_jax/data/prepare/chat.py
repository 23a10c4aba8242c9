"""Conversations to tokens, with a mask of what is learned: the documents of a corpus for supervised fine-tuning."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from llama_jax.data.manifest import LOSS_MASK
from llama_jax.data.prepare.documents import Document
from llama_jax.data.prepare.shapes import Conversation
from llama_jax.data.prepare.shards import Encoded, Encoder, load_from_files
from llama_jax.text.answers import NO_ANSWER, answers
from llama_jax.text.chat import ChatError, ChatFormat, chat_format
from llama_jax.typing import JsonObject


def chat_id(files: Mapping[str, bytes], form: str | None) -> str:
    """Tells how a tokenizer writes conversations: a hash of its templates, its special tokens and the format's name."""
    tokenizer = load_from_files(files)
    facts = [
        form, tokenizer.chat_template, tokenizer.tool_template, dict(tokenizer.chat_templates),
        dict(tokenizer.special_tokens), list(tokenizer.stop_ids),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class ChatEncoder(Encoder):
    """Rows of conversations to token ids and their mask.

    Attributes:
      form: name of the chat format; None takes the tokenizer's own.
      max_tokens: of a row; a longer one loses its first turns, whole and after the system message; None cuts nothing.
    """

    form: str | None = None
    max_tokens: int | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The mask."""
        return {LOSS_MASK: "uint8"}

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """The chat format."""
        return chat_format(self.tokenizer, self.form)

    def __call__(self, document: Document, facts: Counter[str]) -> Encoded | None:
        """Encodes a row; None where it is too long, and no whole turns can be left out.

        Raises:
          ValueError: the format cannot hold it.
        """
        row = Conversation.from_json(document.text)
        try:
            ids, mask = self._plain(row) if row.plain else self._chat(row.messages, row)
            kept = row
            while self.max_tokens is not None and len(ids) > self.max_tokens:
                shorter = None if row.plain else _without_first_turn(kept)
                if shorter is None:
                    return None
                kept = shorter
                ids, mask = self._chat(kept.messages, kept)
        except ChatError as error:
            raise ValueError(f"{document.source}: {error}") from error
        facts["cut"] += kept is not row
        facts[row.shape] += 1
        return Encoded(np.array(ids, self.dtype), {LOSS_MASK: np.array(mask, np.uint8)})

    def _chat(self, messages: Sequence[JsonObject], row: Conversation) -> tuple[list[int], list[bool]]:
        ids, owners = answers(
            self.chat_format, self.tokenizer, messages, tools=row.tools or None, learned=list(row.learned)
        )
        return ids, [owner != NO_ANSWER for owner in owners]

    def _plain(self, row: Conversation) -> tuple[list[int], list[bool]]:
        """A prompt and its completion as they are, and the token that ends a document."""
        prompt, completion = (message["content"] for message in row.messages)
        before = self.tokenizer.encode(prompt, bos=self.bos)
        after = [*self.tokenizer.encode_parts([completion], continues=bool(prompt)), self.eos_id]
        return [*before, *after], [False] * len(before) + [True] * len(after)

    def __getstate__(self) -> JsonObject:
        return {**super().__getstate__(), "form": self.form, "max_tokens": self.max_tokens}


def _without_first_turn(row: Conversation) -> Conversation | None:
    """The row without what comes between the system message and the second user message; None without an answer."""
    roles = [message["role"] for message in row.messages]
    first = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
    second = next((i for i in range(first + 1, len(roles)) if roles[i] == "user"), len(roles))
    if not any(row.learned[second:]):
        return None
    return dataclasses.replace(
        row,
        messages=[*row.messages[:first], *row.messages[second:]],
        learned=[*row.learned[:first], *row.learned[second:]],
    )
