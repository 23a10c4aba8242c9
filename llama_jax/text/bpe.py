"""Byte-pair encoding: Meta's Llama 3 file, Hugging Face's `tokenizer.json`."""

from __future__ import annotations

import base64
import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

from llama_jax.text.added import from_library, library_tokens, merge_added
from llama_jax.text.base import BaseTokenizer, valid
from llama_jax.text.facts import AddedToken, Facts
from llama_jax.text.pre_tokenizers import LLAMA3_REGEX
from llama_jax.typing import Foreign

# GPT-2's printable stand-ins for bytes: itself where Latin-1 prints it, else 256 and up.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
CHAR_TO_BYTE = {byte: byte for byte in _PRINTABLE} | {256 + i: byte for i, byte in enumerate(_HIDDEN)}
BYTE_TO_CHAR = {byte: char for char, byte in CHAR_TO_BYTE.items()}


class BPETokenizer(BaseTokenizer):
    """A model of the `tokenizers` library with what surrounds it."""

    def __init__(
        self,
        backend: Foreign,
        facts: Facts,
        *,
        added: Mapping[int, Foreign],
        byte_level: bool,
        drops_space: bool,
        add_bos: bool,
    ):
        """Wraps a model.

        Args:
          backend: A `tokenizers.Tokenizer`: its model, normalizer and pre-tokenizer are used.
          facts: what the files beside it say.
          added: id to the library's `AddedToken`. `added.py` tells which are control tokens; the others (runs of
            spaces, say) are text with an id of their own.
          byte_level: tokens are spelt with GPT-2's stand-ins for bytes, not with `▁` and `<0x0A>`.
          drops_space: decoding removes one leading space.
          add_bos: the tokenizer puts BOS before a plain prompt.
        """
        # An id without a text is free: the library gives added tokens consecutive ids, the files may not.
        tokens = merge_added(
            from_library(added),
            facts,
            backend.get_vocab_size(),
            find=backend.token_to_id,
            is_free=lambda i: backend.id_to_token(i) is None,
        )
        unk, self._own_size = getattr(backend.model, "unk_token", None), backend.get_vocab_size()
        super().__init__(
            max([backend.get_vocab_size(), *(i + 1 for i in tokens)]),
            tokens,
            facts,
            add_bos=add_bos,
            unk=None if unk is None else backend.token_to_id(unk),
            find=backend.token_to_id,
        )
        listed = library_tokens(self.added_tokens, special=lambda token: token.id in self._control_ids)
        # Three views of one model: control tokens recognised, text only, text that does not start the whole.
        self._control_view = _view(backend, listed, text_only=False)
        self._text_view = _view(backend, listed, text_only=True)
        self._inner_view = _view(backend, listed, text_only=True, prefix=False)
        indices = {token.id: self._text_view.token_to_id(token.content) for token in self.added_tokens}
        self._moved = {index: i for i, index in indices.items() if i is not None and index != i}
        if facts.add_prefix_space is False and not byte_level:
            self._text_view, self._control_view = (
                self._inner_view,
                _view(backend, listed, text_only=False, prefix=False),
            )
            drops_space = False
        # A "normalized" token is found and shown as the normalizer makes it, with the prefix of a text.
        self._added = {i: self._text_view.id_to_token(index) for i, index in indices.items()}
        self.drops_space = drops_space
        self._byte_level = byte_level
        # Metaspace's scheme "first" gives the prefix to the start of the whole text alone.
        self._prefix_each = b'"prepend_scheme":"first"' not in _state(backend.pre_tokenizer)
        # The library looks for "normalized" tokens once Prepend has done its work.
        if b'"Prepend"' in _state(backend.normalizer):
            self._no_prefix_after = frozenset(i for i, token in tokens.items() if token.normalized)

    def split_control(self, text: str) -> list[str | int]:
        """Splits text at its control tokens: ordinary text as strings, control tokens as ids."""
        text, parts, end = valid(text), [], 0
        # The library's own matching: it honours lstrip, rstrip, single_word and normalized.
        encoding = self._control_view.encode(text, add_special_tokens=False)
        for token, (start, stop) in zip(self._ids(encoding), encoding.offsets, strict=True):
            if text[start:stop].replace("▁", " ").strip() in self._spellings and token in self._control_ids:
                parts += [text[end:start], token]
                end = stop
        return [part for part in (*parts, text[end:]) if part != ""]

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that one id adds to the text: none for a special token."""
        self._check_id(token)
        if token in self._hidden:
            return b""
        piece = self._added.get(token)
        if piece is None:
            piece = "" if token >= self._own_size else self._text_view.id_to_token(token) or ""
            if self._byte_level:
                try:
                    return piece.translate(CHAR_TO_BYTE).encode("latin-1")
                except UnicodeEncodeError:  # not in GPT-2's alphabet, so it stands for itself
                    return piece.encode()
            if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
                return bytes.fromhex(byte[1])
        return piece.encode() if self._byte_level else piece.replace("▁", " ").encode()

    def _with_control(self, text: str) -> list[int]:
        return self._ids(self._control_view.encode(text, add_special_tokens=False))

    def _ordinary(self, text: str, *, prefix: bool) -> list[int]:
        return self._without_control(text, prefix=prefix)  # the views find the words themselves

    def _plain(self, text: str, *, prefix: bool) -> list[int]:
        return self._ids((self._text_view if prefix else self._inner_view).encode(text, add_special_tokens=False))

    def _ids(self, encoding: Foreign) -> list[int]:
        ids: list[int] = encoding.ids
        return [self._moved.get(i, i) for i in ids] if self._moved else ids


class TiktokenTokenizer(BaseTokenizer):
    """Meta's `tokenizer.model` of Llama 3: 128,000 ranks and 256 control tokens."""

    def __init__(self, data: bytes, facts: Facts, *, source: str):
        """Loads the ranks.

        Args:
          data: the bytes of the file: lines of base64 token and rank.
          facts: what the files beside it say.
          source: where the bytes come from, for error messages.
        """
        import tiktoken

        ranks = read_ranks(data, source)
        names, size = llama3_control_tokens(), len(ranks) + 256
        special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"} | dict(facts.special_tokens)
        facts = dataclasses.replace(facts, special_tokens=special)
        # The first name of an id is its name in 3.1.
        own = {i: AddedToken(name, i, special=True, normalized=False) for name, i in reversed(names.items())}
        of_id = {i for token in facts.added_tokens if (i := token.id) is not None}

        def find(text: str) -> int | None:
            return names[text] if text in names and names[text] not in of_id else ranks.get(text.encode())

        added = merge_added(own.values(), facts, size, find=find, is_free=lambda i: i >= len(ranks))
        kept = {name: i for name, i in names.items() if added[i] == own[i]}
        size = max(size, *(i + 1 for i in added))
        super().__init__(size, added, facts, add_bos=True, unk=None, find=find, aliases=kept)
        self._encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_REGEX, mergeable_ranks=ranks, special_tokens={})
        self._texts = {token.id: token.content for token in self.added_tokens}

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that one id adds to the text: none for a special token."""
        self._check_id(token)
        if token in self._hidden:
            return b""
        piece = self._texts.get(token)
        if piece is not None or token >= 128_256:
            return (piece or "").encode()
        return self._encoding.decode_single_token_bytes(token)

    def _plain(self, text: str, *, prefix: bool) -> list[int]:
        return [i for chunk in _chunks(text) for i in self._encoding.encode_ordinary(chunk)]


def read_ranks(data: bytes, source: str) -> dict[bytes, int]:
    """Reads the 128,000 ranks of Llama 3's tiktoken file; `source` names it in error messages."""
    try:
        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ValueError(f"{source} is a damaged tiktoken file: get it again ({error})") from error
    if len(ranks) != 128_000 or set(ranks.values()) != set(range(128_000)):
        raise ValueError(f"{source} has {len(ranks)} ranks: Llama 3's tiktoken file has 128000; get it again")
    return ranks


def llama3_control_tokens() -> dict[str, int]:
    """Names of ids 128000 to 128255: the 3.1 list, and names of other releases that do not clash."""
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    names += [
        "finetune_right_pad_id",
        "reserved_special_token_2",
        "start_header_id",
        "end_header_id",
        "eom_id",
    ]
    names += ["eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248))]
    tokens = {f"<|{name}|>": 128_000 + i for i, name in enumerate(names)}
    others = {"<|step_id|>": 128_005, "<|image|>": 128_011}  # llama-models
    others |= {f"<|reserved_special_token_{i}|>": 128_005 + i for i in range(248, 251)}  # Llama 3.0
    return tokens | others


def load_tokenizer_json(data: bytes, facts: Facts, *, source: str) -> BPETokenizer:
    """Loads a `tokenizer.json` whose decoder is byte-level or SentencePiece-like.

    Args:
      data: the bytes of the file.
      facts: what the files beside it say.
      source: where the bytes come from, for error messages.
    """
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{source} is not a readable tokenizer.json: get it again ({error})") from error
    backend.no_padding()  # the file keeps what it was last used with
    backend.no_truncation()
    decoder = _state(backend.decoder)
    byte_level = b'"ByteLevel"' in decoder
    if not byte_level and b'"ByteFallback"' not in decoder and b'"Metaspace"' not in decoder:
        raise ValueError(f"{source} has decoder {decoder.decode()}: a Llama's is ByteLevel, ByteFallback or Metaspace")
    strips = b'"Strip"' in decoder or (b'"Metaspace"' in decoder and b'"prepend_scheme":"never"' not in decoder)
    facts, add_bos = _first_token(backend, facts, source)
    return BPETokenizer(
        backend,
        facts,
        added=backend.get_added_tokens_decoder(),
        byte_level=byte_level,
        drops_space=strips and not byte_level,
        add_bos=add_bos,
    )


def _first_token(backend: Foreign, facts: Facts, source: str) -> tuple[Facts, bool]:
    """Returns the facts with the BOS that a tokenizer.json has, and whether it puts it before a text."""
    bos = backend.token_to_id(facts.special_tokens.get("bos_token", ""))
    bos = facts.bos_id if bos is None else bos
    unk = getattr(backend.model, "unk_token", None)
    first = backend.encode("a").ids[:1]
    if first == backend.encode("a", add_special_tokens=False).ids[:1]:
        first = []
    if bos is None or (unk is not None and bos == backend.token_to_id(unk)):
        found = next(iter(first), backend.token_to_id("<s>") if bos is not None else None)
        if bos is not None and found is not None and found != bos:
            warnings.warn(
                f"config.json or generation_config.json says that id {bos} begins a text; it is {unk!r} in {source},"
                f" which has {backend.id_to_token(found)!r} for it: {source} is right",
                stacklevel=4,
            )
        bos = bos if found is None else found
        facts = dataclasses.replace(facts, bos_id=bos)
    return facts, bos is not None and first == [bos]


def byte_level_backend(model: Foreign, regexes: Sequence[str], added: Sequence[Foreign]) -> Foreign:
    """Puts a byte-level pre-tokenizer and decoder round a `tokenizers` model.

    Args:
      model: A `tokenizers.models.BPE`, spelt with GPT-2's stand-ins for bytes.
      regexes: they split text one after the other.
      added: `AddedToken`s, in the order of their ids.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_tokens(list(added))
    return backend


def _view(backend: Foreign, added: Sequence[Foreign], *, text_only: bool, prefix: bool = True) -> Foreign:
    """Shares the backend's model under its own added tokens, with or without the prefix of a text's start."""
    from tokenizers import Tokenizer

    view = Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer"):
        if (component := getattr(backend, name)) is not None:
            setattr(view, name, component if prefix else _without_prefix(component))
    view.add_tokens(list(added))
    view.encode_special_tokens = text_only
    return view


def _without_prefix(component: Foreign) -> Foreign:
    before = _state(component)
    state = re.sub(rb'"prepend_scheme":"\w+"', b'"prepend_scheme":"never"', before)
    state = re.sub(rb'"prepend":"[^"]*"', b'"prepend":""', state)
    state = state.replace(b'"add_prefix_space":true', b'"add_prefix_space":false')
    if state == before:  # the library cannot copy every component
        return component
    bare = copy.deepcopy(component)
    bare.__setstate__(state)
    return bare


def _state(component: Foreign) -> bytes:
    return b"" if component is None else component.__getstate__()


def _chunks(text: str) -> Iterator[str]:
    """Cuts text as Meta does: tiktoken fails on a million characters, and long runs make it slow."""
    for start in range(0, len(text), 400_000):
        part, begin = text[start : start + 400_000], 0
        for run in re.finditer(r"\s+|\S+", part) if len(part) > 25_000 else ():
            for cut in range(run.start() + 25_000, run.end(), 25_000):
                yield part[begin:cut]
                begin = cut
        yield part[begin:]
