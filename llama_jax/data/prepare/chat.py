"""Conversations to tokens, with a mask of what is learned: the documents of a corpus for supervised fine-tuning."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from llama_jax.data.manifest import ENDS, LOSS_MASK, PAIR, POSITION, REJECTED
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
      pairs: whether a row has two answers; its tokens are then both, one after the other, each after the prompt.
    """

    form: str | None = None
    max_tokens: int | None = None
    pairs: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """The mask, and of pairs which answer a token is of."""
        return {LOSS_MASK: "uint8"} | ({PAIR: "int32"} if self.pairs else {})

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
            kept, found = row, self._encoded(row)
            while self.max_tokens is not None and len(found.ids) > self.max_tokens:
                shorter = None if row.plain else _without_first_turn(kept)
                if shorter is None:
                    return None
                kept, found = shorter, self._encoded(shorter)
        except ChatError as error:
            raise ValueError(f"{document.source}: {error}") from error
        facts["cut"] += kept is not row
        facts[row.shape] += 1
        return found

    def _encoded(self, row: Conversation) -> Encoded:
        if row.other is None:
            ids, mask = self._one(row)
            return Encoded(np.array(ids, self.dtype), {LOSS_MASK: np.array(mask, np.uint8)})
        sides = [self._one(row), self._one(dataclasses.replace(row, messages=row.other, learned=row.other_learned))]
        prompt = self._prompt(row)
        if not prompt:
            raise ChatError("its prompt has no token: a model needs one to answer")
        if any(ids[: len(prompt)] != prompt for ids, _ in sides):
            raise ChatError(
                "the prompts of its two answers are other tokens: the template writes them so that they cannot be"
                " compared; give the prompt by itself"
            )
        pair = [
            position << POSITION | ENDS * (learned and _ends(mask, position)) | REJECTED * side
            for side, (_, mask) in enumerate(sides) for position, learned in enumerate(mask)
        ]  # fmt: skip
        ids, mask = ([x for side in sides for x in side[i]] for i in (0, 1))
        return Encoded(np.array(ids, self.dtype), {LOSS_MASK: np.array(mask, np.uint8), PAIR: np.array(pair, np.int32)})

    def _prompt(self, row: Conversation) -> list[int]:
        """The tokens before the answers of a pair."""
        if row.plain:
            return self.tokenizer.encode(row.messages[0]["content"], bos=self.bos)
        return self.chat_format.prompt(row.messages[: row.asked], tools=row.tools or None)

    def _one(self, row: Conversation) -> tuple[list[int], list[bool]]:
        return self._plain(row) if row.plain else self._chat(row.messages, row)

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
        return {**super().__getstate__(), "form": self.form, "max_tokens": self.max_tokens, "pairs": self.pairs}


def _ends(mask: Sequence[bool], position: int) -> bool:
    """Whether an answer's last token is there: the one that ends it."""
    return position + 1 == len(mask) or not mask[position + 1]


def _without_first_turn(row: Conversation) -> Conversation | None:
    """The row without what comes between the system message and the second user message; None without an answer."""
    roles = [message["role"] for message in row.messages]
    first = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
    end = len(roles) if row.other is None else row.asked  # of a pair's prompt alone
    second = next((i for i in range(first + 1, end) if roles[i] == "user"), len(roles))
    if not any(row.learned[second:]):
        return None
    other = {} if row.other is None else {
        "other": [*row.other[:first], *row.other[second:]], "asked": row.asked - (second - first),
        "other_learned": [*row.other_learned[:first], *row.other_learned[second:]],
    }  # fmt: skip
    return dataclasses.replace(
        row,
        messages=[*row.messages[:first], *row.messages[second:]],
        learned=[*row.learned[:first], *row.learned[second:]],
        **other,
    )
