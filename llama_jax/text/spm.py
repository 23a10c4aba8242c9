"""SentencePiece vocabularies: LLaMA 1, Llama 2, Code Llama, and GGUF files of kind `llama`."""

from __future__ import annotations

import dataclasses
import enum
import struct
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from llama_jax.text.added import is_control_like, merge_added
from llama_jax.text.base import BaseTokenizer
from llama_jax.text.facts import AddedToken, Facts
from llama_jax.typing import Foreign

# Token types: GGUF's numbers are SentencePiece's own.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """One token of a SentencePiece model."""

    text: str
    score: float
    kind: int


class SentencePieceTokenizer(BaseTokenizer):
    """A serialized SentencePiece model.

    Text after a control token gets SentencePiece's leading space again, as in Meta's code and llama.cpp.
    Where the checkpoint says `legacy: false`, only the start of the whole text gets it, and where it says
    `add_prefix_space: false`, none does.
    """

    def __init__(self, model: bytes, facts: Facts, *, source: str):
        """Loads a model.

        Args:
          model: the bytes of a `tokenizer.model`.
          facts: what the files beside it say.
          source: where the bytes come from, for error messages.
        """
        from sentencepiece import SentencePieceProcessor

        def with_prefix(prefix: bool) -> Foreign:
            # Concatenated protobuf messages merge: this adds normalizer_spec { add_dummy_prefix: ... }.
            return SentencePieceProcessor(model_proto=model + _field(3, _field(3, int(prefix))))

        try:
            sp: Foreign = SentencePieceProcessor(model_proto=model)
            self._bare: Foreign = with_prefix(False)
        except RuntimeError as error:
            raise ValueError(
                f"{source} is neither a SentencePiece model nor a tiktoken file: get it again ({error})"
            ) from error
        self._sp, size = sp, sp.vocab_size()
        ids = {sp.id_to_piece(i): i for i in range(size)}
        named = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
        special = {name: sp.id_to_piece(i) for name, i in named.items() if i >= 0}
        eos_ids = _plausible_ends(facts.eos_ids, sp, source)
        facts = dataclasses.replace(facts, special_tokens=special | dict(facts.special_tokens), eos_ids=eos_ids)
        own = [
            AddedToken(piece, i, special=True, normalized=False)
            for piece, i in ids.items()
            if sp.is_control(i) or is_control_like(piece)
        ]

        def is_free(i: int) -> bool:
            return i >= size or read_pieces(model)[i].kind in (CONTROL, USER_DEFINED, UNUSED)

        added = merge_added(own, facts, size, find=ids.get, is_free=is_free)
        size = max([size, *(i + 1 for i in added)])
        super().__init__(size, added, facts, add_bos=True, unk=sp.unk_id(), find=ids.get)
        self._texts = {token.id: token.content for token in self.added_tokens}
        if facts.add_prefix_space is not None:
            self._sp = with_prefix(facts.add_prefix_space)
        self.drops_space = self._sp.normalize("a").startswith("▁")
        self._prefix_each = facts.legacy

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that one id adds to the text: none for a special token."""
        self._check_id(token)
        if token in self._never_text and token in self._hidden:
            return b""
        if token < self._sp.vocab_size() and self._sp.is_unknown(token):
            return " ⁇ ".encode()
        piece = self._texts.get(token)
        if piece is None:
            if token >= self._sp.vocab_size():
                return b""
            piece = self._sp.id_to_piece(token)
            if self._sp.is_byte(token):
                return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def _plain(self, text: str, *, prefix: bool) -> list[int]:
        return (self._sp if prefix else self._bare).encode(text)


def _plausible_ends(eos_ids: tuple[int, ...], sp: Foreign, source: str) -> tuple[int, ...]:
    """Returns the ids that end a text, without the model's BOS where a file took it for the end."""
    wrong = sp.bos_id()
    if wrong not in eos_ids or wrong == sp.eos_id() or sp.eos_id() < 0 or sp.eos_id() in eos_ids:
        return eos_ids
    warnings.warn(
        f"config.json or generation_config.json says that id {wrong} ends a text; {source} says that it begins one"
        f" ({sp.id_to_piece(wrong)!r}) and that {sp.eos_id()} ({sp.id_to_piece(sp.eos_id())!r}) ends it: {source} is"
        " right, as for the first conversions of LLaMA",
        stacklevel=4,
    )
    return tuple(i for i in eos_ids if i != wrong)


class ModelType(enum.IntEnum):
    """SentencePiece's numbers for what encodes."""

    UNIGRAM = 1
    BPE = 2


class Spec(NamedTuple):
    """What a SentencePiece model does besides its pieces.

    Attributes:
      kind: a `ModelType`, or the number of another one.
      add_prefix: a text is encoded with a space before it.
      remove_spaces: spaces at the ends of a text, and all but one of a run, are removed before.
      charsmap: the library's compiled normalization; empty is the identity.
    """

    kind: int = ModelType.BPE
    add_prefix: bool = True
    remove_spaces: bool = False
    charsmap: bytes = b""


def write_model(pieces: Iterable[Piece], spec: Spec) -> bytes:
    """Writes a serialized SentencePiece model."""
    pieces = list(pieces)
    vocabulary = b"".join(
        _field(1, _field(1, piece.text) + _field(2, piece.score) + _field(3, piece.kind)) for piece in pieces
    )
    # model_type; byte_fallback, which the library refuses unless all 256 byte pieces are there.
    trainer = _field(3, int(spec.kind)) + _field(35, int(any(piece.kind == BYTE for piece in pieces)))
    # precompiled_charsmap, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces.
    name = _field(1, "user_defined") + _field(2, spec.charsmap) if spec.charsmap else _field(1, "identity")
    normalizer = name + _field(3, int(spec.add_prefix)) + _field(4, int(spec.remove_spaces)) + _field(5, 1)
    return vocabulary + _field(2, trainer) + _field(3, normalizer)


def read_spec(model: bytes) -> Spec:
    """Reads what a serialized SentencePiece model that the library has accepted does besides its pieces."""
    merged: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in _fields(model):
        if number in merged:
            merged[number] |= dict(_fields(value))
    trainer, normalizer = merged[2], merged[3]
    prefix, spaces = (bool(normalizer.get(number, 1)) for number in (3, 4))
    return Spec(trainer.get(3, ModelType.UNIGRAM), prefix, spaces, normalizer.get(2, b""))


def read_pieces(model: bytes) -> list[Piece]:
    """Reads the vocabulary of a serialized SentencePiece model that the library has accepted."""
    messages = (dict(_fields(value)) for number, value in _fields(model) if number == 1)
    return [Piece(fields[1].decode(), fields.get(2, 0.0), fields.get(3, NORMAL)) for fields in messages]


def _field(number: int, value: bytes | str | float | int) -> bytes:
    """One field in protobuf's wire format: an int as varint, a float as fixed32, the rest with its length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields number and value of the fields of a protobuf message; the inverse of `_field`."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        if key & 7 == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        size, at = _read_varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        value, at = data[at : at + size], at + size
        yield key >> 3, struct.unpack("<f", value)[0] if key & 7 == 5 else value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns a varint and where it ends."""
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
