"""What the spellings of a tokenizer share: its parts, and the check that ids stay the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from llama_jax.text.base import Tokenizer
from llama_jax.text.facts import AddedToken as Added
from llama_jax.text.open import read_files as read_files  # of the folder that a tokenizer comes from
from llama_jax.text.samples import sample_texts as sample_texts
from llama_jax.typing import JsonObject


@contextlib.contextmanager
def refuses_wrong_types(source: str) -> Iterator[None]:
    """Turns errors of values of a wrong type into a ValueError that names their source."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        problem = f"a value in {source} has the wrong type ({type(error).__name__}: {error})"
        raise ValueError(f"{problem}: download the checkpoint again") from error


class InexactError(ValueError):
    """A format cannot say what a tokenizer does."""


def templates_of(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the chat templates by name."""
    named = {"default": tokenizer.chat_template, "tool_use": tokenizer.tool_template, **tokenizer.chat_templates}
    return {name: text for name, text in named.items() if text is not None}


def added_of(tokenizer: Tokenizer) -> dict[int, Added]:
    """Returns the tokenizer's added tokens by id."""
    return {token.id: token for token in tokenizer.added_tokens if token.id is not None}


def to_json(value: Any) -> bytes:
    """Returns a value as the content of a JSON file."""
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def state_of(tokenizer_json: bytes) -> JsonObject:
    """Parses a `tokenizer.json` of any age as the library of today would write it."""
    from tokenizers import Tokenizer

    state = json.loads(Tokenizer.from_buffer(tokenizer_json).to_str())
    if (kind := state["model"]["type"]) != "BPE":
        raise ValueError(f"tokenizer.json has a model of type {kind}: a Llama's is BPE; use another checkpoint")
    return state


def check_same_ids(tokenizer: Tokenizer, converted: Tokenizer | None, form: str) -> None:
    """Raises InexactError where a tokenizer in another spelling gives other ids."""
    # Hugging Face's newer form of Llama 2's tokenizer adds no space to a text that starts with one: none here does.
    # What formats cannot say of added words, such as the spaces that some take, `differences` tells.
    words = [token.content for token in tokenizer.added_tokens if token.content]
    for text in (f"a{text}" for text in sample_texts()):
        # How a control token is spelt when it is text differs, and matters to no one.
        if tokenizer.split_control(text) != [text] or any(word in text for word in words):
            continue
        if converted is None or converted.encode(text) != tokenizer.encode(text):
            raise InexactError(
                f"as {form} this tokenizer would give other ids for some texts, first {text!r}: the format cannot say"
                " what it does; convert to hf or meta, which keep its files"
            )
