"""Tokenizers behind one interface: text to ids and back, control tokens apart from text.

The Llama family has three vocabularies: SentencePiece (`spm.py`: LLaMA 1 and 2, Code Llama), Meta's tiktoken
file (`bpe.py`: Llama 3) and Hugging Face's `tokenizer.json` (`bpe.py`: any). A GGUF file holds the first or
the last.

A *control token* is an id that steers the model and is not text (`<s>`, `<|eot_id|>`). Text never becomes one
unless the caller asks for it with `control=True`, and decoded text does not show those that are special. Other
added tokens are words (`added.py`): found in text before the vocabulary splits the rest, and shown.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from llama_jax.text.added import STOP_TOKENS, Splitter, is_hidden, is_marker
from llama_jax.text.added import is_control_like as is_control_like
from llama_jax.text.facts import AddedToken as AddedToken
from llama_jax.text.facts import Facts
from llama_jax.text.stream import StreamDecoder

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")  # the first that exists is used
# A tokenizer's files in Hugging Face's spelling, and Meta's tokenizer.model.
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)


class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int
    bos_id: int | None
    stop_ids: tuple[int, ...]  # ids that end generation
    add_bos: bool  # does the checkpoint's own tokenizer put BOS before a plain prompt?
    control_tokens: Mapping[str, int]
    added_tokens: tuple[AddedToken, ...]  # in the order of their ids
    special_tokens: Mapping[str, str]  # bos_token, eos_token, ... as a chat template sees them
    chat_template: str | None
    tool_template: str | None  # used instead of chat_template when there are tools, where a checkpoint ships two
    chat_templates: Mapping[str, str]  # all of them, by name
    drops_space: bool  # SentencePiece encodes " Hi" for "Hi": one leading space of the whole text is not text

    def encode(self, text: str, *, bos: bool = False, control: bool = False) -> list[int]:
        """Encodes text; control strings in it become ids only with `control=True`."""
        ...

    def split_control(self, text: str) -> list[str | int]:
        """Splits text at its control tokens: ordinary text as strings, control tokens as ids."""
        ...

    def encode_parts(self, parts: Sequence[str | int], *, continues: bool = False) -> list[int]:
        """Encodes consecutive parts of one text: strings are ordinary text, integers are ids. With `continues` the
        first string continues a text, so that it does not get the prefix that the start of a text gets."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; special tokens are invisible and malformed UTF-8 becomes U+FFFD."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that one id adds to the text: none for a special token."""
        ...

    def infill_prompt(self, prefix: str, suffix: str, *, suffix_first: bool = False) -> list[int]:
        """Returns the ids of Code Llama's prompt for the text between `prefix` and `suffix`."""
        ...


class BaseTokenizer:
    """What the three vocabularies share; each supplies `_plain` and `token_bytes`."""

    drops_space = False
    _prefix_each = True  # does text after a control token get the prefix that the start of a text gets?
    _no_prefix_after: frozenset[int] = frozenset()  # but not after these control tokens

    def __init__(
        self,
        size: int,
        added: Mapping[int, AddedToken],
        facts: Facts,
        *,
        add_bos: bool,
        unk: int | None,
        find: Callable[[str], int | None],
        aliases: Mapping[str, int] | None = None,
    ):
        """Sorts the added tokens into what may be typed and what is shown.

        Args:
          size: number of ids.
          added: id to added token.
          facts: what the files beside the vocabulary say.
          add_bos: the tokenizer puts BOS before a plain prompt, where the files are silent.
          unk: id of the unknown token.
          find: returns the id of an ordinary token, None where there is none of that text.
          aliases: other names of control tokens.
        """
        special = facts.special_tokens
        control = {token.content: i for i, token in sorted(added.items()) if is_marker(token, facts)}
        control |= {name: i for name, i in (aliases or {}).items() if name not in control}
        self.vocab_size = size
        self.added_tokens = tuple(added[i] for i in sorted(added))
        self.control_tokens: Mapping[str, int] = control
        self.special_tokens: Mapping[str, str] = special
        self.chat_template, self.tool_template = facts.chat_template, facts.tool_template
        self.chat_templates: Mapping[str, str] = facts.templates

        def named(key: str) -> int | None:
            name = special.get(key, "")
            return control.get(name, find(name) if name else None)

        bos, eos = named("bos_token"), named("eos_token")
        self.bos_id = facts.bos_id if bos is None else bos
        self.add_bos = (add_bos if facts.add_bos is None else facts.add_bos) and self.bos_id is not None
        stops = {control[name] for name in STOP_TOKENS if name in control} | {*facts.eos_ids}
        self.stop_ids = tuple(sorted(stops if eos is None else stops | {eos}))
        # Unknown text may give the unknown token, which steers nothing; a single character cannot be typed otherwise.
        self._never_text = frozenset(i for name, i in control.items() if len(name) > 1) - {unk}
        self._hidden = frozenset(i for i, token in added.items() if is_hidden(token, facts))
        self._spellings = spellings(control)
        self._control_regex = any_of(self._spellings)

    def encode(self, text: str, *, bos: bool = False, control: bool = False) -> list[int]:
        """Encodes text; control strings in it become ids only with `control=True`."""
        if bos and self.bos_id is None:
            raise ValueError("this tokenizer has no BOS token: encode with bos=False")
        ids = self._with_control(valid(text)) if control else self.encode_parts([text])
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def split_control(self, text: str) -> list[str | int]:
        """Splits text at its control tokens: ordinary text as strings, control tokens as ids."""
        parts: list[str | int] = [""]
        for piece, token in self._all_added.split(valid(text)):
            if token in self._control_ids:
                parts += [token, ""]
            else:
                parts[-1] = f"{parts[-1]}{piece}"
        return [part for part in parts if part != ""]

    def encode_parts(self, parts: Sequence[str | int], *, continues: bool = False) -> list[int]:
        """Encodes consecutive parts of one text: strings are ordinary text, integers are ids."""
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                prefix = not continues if i == 0 else self._prefix_each and parts[i - 1] not in self._no_prefix_after
                ids += self._ordinary(valid(part), prefix=prefix)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; special tokens are invisible and malformed UTF-8 becomes U+FFFD."""
        stream = StreamDecoder(self)
        return stream.push(ids) + stream.finish()

    def infill_prompt(self, prefix: str, suffix: str, *, suffix_first: bool = False) -> list[int]:
        """Builds Code Llama's prompt for the text between `prefix` and `suffix`.

        Args:
          prefix: text before the gap.
          suffix: text after the gap; it gets no leading space of SentencePiece's.
          suffix_first: the SPM order (suffix, prefix, middle) for the default PSM.
        """
        names = ["▁<PRE>", "▁<SUF>", "▁<MID>"]
        if self.bos_id is None or any(name not in self.control_tokens for name in names):
            raise ValueError("this vocabulary has no infill tokens (▁<PRE>, ▁<SUF>, ▁<MID>): use Code Llama 7B or 13B")
        pre, suf, mid = (self.control_tokens[name] for name in names)
        head = self._ordinary(valid(prefix), prefix=True) if prefix else []
        tail = self._ordinary(valid(suffix), prefix=False) if suffix else []
        if suffix_first:
            return [self.bos_id, pre, suf, *tail, mid, *head]
        return [self.bos_id, pre, *head, suf, *tail, mid]

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that one id adds to the text: none for a special token."""
        raise NotImplementedError

    def _plain(self, text: str, *, prefix: bool) -> list[int]:
        """Encodes text as the library does, with or without the prefix that the start of a text gets."""
        raise NotImplementedError

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.control_tokens.values())

    @functools.cached_property
    def _all_added(self) -> Splitter:
        flags = {token.id: token for token in self.added_tokens}
        plain = AddedToken("", normalized=False)
        control = [replace(flags.get(i, plain), content=text, id=i) for text, i in self._spellings.items()]
        return Splitter([*control, *self._words])

    @functools.cached_property
    def _words(self) -> list[AddedToken]:
        """The added tokens that are found in ordinary text."""
        return [token for token in self.added_tokens if token.id not in self._control_ids]

    @functools.cached_property
    def _word_splitter(self) -> Splitter:
        return Splitter(self._words)

    def _with_control(self, text: str) -> list[int]:
        return self.encode_parts(self.split_control(text))

    def _ordinary(self, text: str, *, prefix: bool) -> list[int]:
        """Encodes text to ids that are not control tokens: what is between the words that it contains."""
        ids: list[int] = []
        for piece, word in self._word_splitter.split(text):
            if word is None:
                ids += self._without_control(piece, prefix=prefix)
            else:
                ids, prefix = [*ids, word], self._prefix_each
        return ids

    def _without_control(self, text: str, *, prefix: bool) -> list[int]:
        """Encodes text to ids that are not control tokens, even if the vocabulary has one as a plain piece."""
        ids = self._plain(text, prefix=prefix)
        if self._never_text.isdisjoint(ids):
            return ids
        # No piece crosses a cut after the first character of every control string, overlapping ones included.
        cuts = [match.start() + 1 for match in re.finditer(f"(?={self._control_regex.pattern})", text)]
        first, *rest = (text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]))
        ids = self._plain(first, prefix=prefix)
        for piece in rest:
            ids += self._plain(piece, prefix=False)
        if clash := self._never_text.intersection(ids):
            raise ValueError(f"the vocabulary spells control token {min(clash)} as ordinary text: {text[:60]!r}")
        return ids

    def _check_id(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the tokenizer's vocabulary of {self.vocab_size}")


def spellings(control: Mapping[str, int]) -> dict[str, int]:
    """Maps every way to type a control token to its id: `▁<PRE>` is also reached by " <PRE>" and "<PRE>"."""
    typed = {text.lstrip("▁"): token for text, token in control.items()}
    spaced = {text.replace("▁", " "): token for text, token in control.items()}
    return {text: token for text, token in (typed | spaced | dict(control)).items() if text}


def any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Compiles a pattern that matches any of the strings, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or r"(?!)")


def valid(text: str) -> str:
    """Replaces lone surrogates, which no encoding of text can hold, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
