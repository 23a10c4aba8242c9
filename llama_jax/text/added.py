"""The tokens that were added to a vocabulary: which ids they have, which may be typed and which are shown.

Three questions, answered apart. *Is it found in ordinary text?* Words are; what steers the model never is.
*Is it shown in decoded text?* What is not special is, as in transformers. *Does it end a text?* See `STOP_TOKENS`.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping

from llama_jax.text.facts import AddedToken, Facts
from llama_jax.typing import Foreign

# Control tokens that end a turn or a text, wherever a vocabulary has them.
STOP_TOKENS = (
    "</s>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<|eot|>",
    "<|eom|>",
    "<end_of_turn>",
    "<step>",
    "▁<EOT>",
)
# They begin a text or a turn. Fine-tunes declare them `special: false` at times; that makes them no words.
_START_TOKENS = (
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|im_start|>",
    "<|im_sep|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<start_of_turn>",
)
_TURN_TOKENS = frozenset((*STOP_TOKENS, *_START_TOKENS))
# Code Llama's files call these ordinary pieces; so do fine-tunes with the `<|...|>` markers they added.
_CONTROL_LIKE = re.compile(r"<[|｜].*[|｜]>|▁<(PRE|SUF|MID|EOT)>|<step>")
_ROLE = r"(system|sys|user|human|prompter|assistant|bot|gpt|ai|model|developer|inst|turn|im|message)"
_TURN_LIKE = re.compile(rf"\W+((start|begin|end|eos)_?(of_?)?)?{_ROLE}(_?(start|begin|end))?\W+", re.IGNORECASE)
# A token in brackets of some kind. Files name others, such as "!" for padding, which stay what they are: text.
_BRACKETED = re.compile(r"\W.*\W", re.DOTALL)


def is_control_like(token: str) -> bool:
    """Tells whether a token is a control token by its looks, whatever type its file gives it."""
    return _CONTROL_LIKE.fullmatch(token) is not None


def is_marker(token: AddedToken, facts: Facts) -> bool:
    """Tells whether a token steers the model, so that typed text must never become it.

    Args:
      token: an added token, with its id.
      facts: of its tokenizer. A token that separates turns in the chat template is a marker, whatever its flags.
    """
    text = token.content
    if token.special or text in _TURN_TOKENS or text in facts.special_tokens.values() or token.id in facts.eos_ids:
        return True
    if not (is_control_like(text) or _TURN_LIKE.fullmatch(text)):
        return False
    templates = (facts.chat_template, facts.tool_template, *facts.templates.values())
    return text.startswith("▁<") or any(text in template for template in templates if template)


def is_hidden(token: AddedToken, facts: Facts) -> bool:
    """Tells whether decoded text leaves a token out."""
    text = token.content
    return token.special or text in _TURN_TOKENS or text.startswith("▁<") or text in facts.special_tokens.values()


def merge_added(
    own: Iterable[AddedToken],
    facts: Facts,
    size: int,
    *,
    find: Callable[[str], int | None],
    is_free: Callable[[int], bool],
) -> dict[int, AddedToken]:
    """Merges the added tokens of a vocabulary with those of the files beside it.

    Args:
      own: the vocabulary's, with their ids.
      facts: what the files beside it say.
      size: one more than the vocabulary's highest id.
      find: returns the id of an ordinary token, None where there is none of that text.
      is_free: whether an id has no text of its own, or only that of a placeholder.

    Returns:
      Id to token. Ids are the vocabulary's own, else those that the files give, else the next ones, in
      transformers' order and as long as the model has rows for them.
    """
    merged = {token.id: token for token in own if token.id is not None}
    ids = {token.content: i for i, token in merged.items()}
    size = max([size, *(i + 1 for i in merged)])
    for token in facts.added_tokens:
        text, wanted = token.content, token.id
        i = ids.get(text)
        i = find(text) if i is None else i
        if i is None:
            i = wanted if wanted is not None and is_free(wanted) else size
            if i != wanted and not _gets(i, text, wanted, facts.rows):
                continue
        elif i in merged:
            known = merged[i]
            flags = token if facts.decoder_decides and wanted is not None else known
            token = dataclasses.replace(flags, special=known.special or token.special)
        elif wanted is None and not _BRACKETED.fullmatch(text):
            continue
        merged[i] = dataclasses.replace(token, id=i)
        ids[text], size = i, max(size, i + 1)
    return merged


def _gets(i: int, text: str, wanted: int | None, rows: int | None) -> bool:
    """Returns whether an added token gets the next id: where the model has a row for it; warns where it is another one
    than the files give."""
    if rows is None or i >= rows:
        return False
    if wanted is not None:
        warnings.warn(
            f"the tokenizer's files give id {wanted} to the added token {text!r}, but the vocabulary has"
            f" another token there: it gets the next free id, {i}, as in transformers",
            stacklevel=3,
        )
    return True


def library_tokens(tokens: Iterable[AddedToken], *, special: Callable[[AddedToken], bool]) -> list[Foreign]:
    """Returns the tokens as the `tokenizers` library has them.

    Args:
      tokens: the added tokens.
      special: which of them the library's switch `encode_special_tokens` leaves alone.
    """
    from tokenizers import AddedToken as LibraryToken

    return [
        LibraryToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=special(token),
        )
        for token in tokens
    ]


def from_library(tokens: Mapping[int, Foreign]) -> list[AddedToken]:
    """Returns the `tokenizers` library's added tokens as ours; `tokens` is id to token."""
    return [
        AddedToken(t.content, i, t.special, t.lstrip, t.rstrip, t.normalized, t.single_word) for i, t in tokens.items()
    ]


class Splitter:
    """Finds added tokens in text, as transformers does: it is the library's own search.

    Args:
      tokens: what to find; several may have one id.
    """

    def __init__(self, tokens: Iterable[AddedToken]):
        from tokenizers import Tokenizer, models

        tokens = [token for token in tokens if token.content]
        # Whatever is between two tokens is one unknown word of this vocabulary.
        self._search = Tokenizer(models.WordLevel({"\0": 0}, unk_token="\0"))  # pyright: ignore
        self._search.add_tokens(library_tokens(tokens, special=lambda _: False))
        found = ((self._search.token_to_id(token.content), token.id) for token in tokens)
        self._ids = {index: i for index, i in found if index is not None and i is not None}

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """Splits text at the tokens: pairs of a text and the id of the token that it is, if it is one."""
        if not self._ids or not text:
            return [(text, None)] if text else []
        encoding = self._search.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [(text[start:stop], self._ids.get(index)) for index, (start, stop) in spans]
