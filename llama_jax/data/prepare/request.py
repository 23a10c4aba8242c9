"""What a corpus is to be made from and how, and its division into shards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llama_jax.data.manifest import FORMATS, tokenizer_sha256
from llama_jax.data.prepare.chat import chat_id
from llama_jax.data.prepare.documents import InvalidUtf8, Reading
from llama_jax.data.prepare.pieces import Format, InputSlice, cut_pieces, find_pieces, group_pieces
from llama_jax.data.prepare.shards import Task
from llama_jax.data.prepare.system import exists, naming
from llama_jax.data.prepare.train_tokenizer import SAMPLE_BYTES
from llama_jax.data.prepare.walk import Notes
from llama_jax.text.base import VOCABULARY_FILES
from llama_jax.text.open import read_files
from llama_jax.typing import JsonObject

log = logging.getLogger("llama_jax")

SHARDS = 256  # about as many, unless that makes them smaller or larger than these:
SMALLEST_SHARD, LARGEST_SHARD = 1 << 22, 1 << 30  # bytes of input


@dataclasses.dataclass(frozen=True)
class Request:
    """What a corpus is made from, and how.

    Attributes:
      pieces: of the input.
      shard_bytes: about how much input makes a shard.
      reading: how documents are read.
      tokenizer: folder or vocabulary file of the tokenizer; None trains one.
      vocab_size: of the tokenizer to train.
      sample_bytes: about how much text to train it on.
      bos: whether BOS begins each document; None as the tokenizer says.
      chat_format: of conversations; None takes the tokenizer's own.
      max_tokens: of a conversation; None cuts none.
    """

    pieces: Sequence[InputSlice]
    shard_bytes: int
    reading: Reading = dataclasses.field(default_factory=Reading)
    tokenizer: Path | None = None
    vocab_size: int | None = None
    sample_bytes: int = SAMPLE_BYTES
    bos: bool | None = None
    chat_format: str | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError(
                "give either a tokenizer or the size of a vocabulary to train (--tokenizer, --train-tokenizer)"
            )
        if self.reading.conversations and self.tokenizer is None:
            raise ValueError("conversations need the tokenizer of the model that learns from them: give --tokenizer")
        if not self.reading.conversations and (self.chat_format is not None or self.max_tokens is not None):
            raise ValueError("a chat format and max_tokens are for conversations: give --chat too")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, got {self.max_tokens}")
        if self.vocab_size is not None and (stream := next((piece for piece in self.pieces if piece.stream), None)):
            raise ValueError(
                f"{stream.given}: can be read only once, and a vocabulary is trained before: write it to a file first,"
                " or give --tokenizer"
            )

    def options(self, tokenizer: object) -> JsonObject:
        """Returns by name what else the corpus depends on; `tokenizer` is what `tokenizer_id` gives."""
        reading = dataclasses.asdict(self.reading)
        conversations, pairs = reading.pop("conversations"), reading.pop("pairs")
        chat = {"chat_format": self.chat_format, "max_tokens": self.max_tokens, "conversations": True}
        chat |= {"pairs": True} if pairs else {}
        options = {"tokenizer": tokenizer, **reading, "bos": self.bos, "shard_bytes": self.shard_bytes}
        return {**options, **(chat if conversations else {})}

    def fingerprint(self, *more: object, times: bool = True) -> str:
        """Hashes all that the corpus depends on; of the input, names, sizes and, with `times`, the last change's."""
        pieces = [
            [
                piece.kind,
                piece.name,
                piece.start,
                piece.stop,
                piece.version if times or piece.alone else piece.version[0],
            ]
            for piece in self.pieces
        ]
        field, invalid_utf8, conversations, pairs = dataclasses.astuple(self.reading)
        chat = [["pairs" if pairs else "chat", self.chat_format, self.max_tokens]] if conversations else []
        return _hash(FORMATS[0], pieces, self.shard_bytes, [field, invalid_utf8], self.bos, *chat, *more)


def make_request(
    inputs: Iterable[str | Path],
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    sample_bytes: int = SAMPLE_BYTES,
    field: str = "text",
    format: Format = "auto",
    glob: str = "*",
    invalid_utf8: InvalidUtf8 = "error",
    shard_bytes: int | None = None,
    bos: bool | None = None,
    out: str | Path | None = None,
    conversations: bool = False,
    pairs: bool = False,
    chat_format: str | None = None,
    max_tokens: int | None = None,
) -> Request:
    """Looks at the input, without reading it; what is left out is logged, a line for each reason.

    Args:
      inputs: files, folders and `hf:` datasets, as `documents.find_pieces` takes.
      tokenizer: a folder with a tokenizer, such as a checkpoint, or its `tokenizer.json` or `tokenizer.model`.
      vocab_size: instead of a tokenizer: train one of this size on the input.
      sample_bytes: about how much of the input it is trained on.
      field: which field of JSON lines, Parquet files and datasets holds the text.
      format: of the files; `auto` goes by their names.
      glob: which files of a folder.
      invalid_utf8: what to do with a document that is not valid UTF-8: error, skip or replace.
      shard_bytes: about how much input makes a shard; None makes some 256 shards of 4 MiB to 1 GiB.
      bos: whether BOS begins each document; None as the tokenizer says.
      out: the folder that the corpus will be in, so that it is left out where it is in a folder of the input.
      conversations: whether rows are conversations, see `shapes`.
      pairs: whether these have two answers, of which one is preferred.
      chat_format: of conversations, as `load` takes it; None takes the tokenizer's own.
      max_tokens: of a conversation: a longer one loses its first turns, or is left out; None cuts none.

    Raises:
      FileNotFoundError: an input is not there.
      PermissionError: an input may not be read.
      ValueError: an input's type is unknown, or options contradict each other.
    """
    notes = Notes()
    pieces = find_pieces(inputs, format=format, glob=glob, out=out, notes=notes)
    for line in notes.lines():
        log.warning(line)
    if shard_bytes is None:
        shard_bytes = min(max(sum(piece.nbytes for piece in pieces) // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    if shard_bytes < 1:
        raise ValueError(f"a shard needs at least one byte of input, got {shard_bytes}")
    return Request(
        cut_pieces(pieces, shard_bytes),
        shard_bytes,
        Reading(field, invalid_utf8, conversations, pairs),
        None if tokenizer is None else Path(os.path.expanduser(tokenizer)),
        vocab_size,
        sample_bytes,
        bos,
        chat_format,
        max_tokens,
    )


def make_tasks(request: Request, encoder: str) -> list[Task]:
    """Divides a request into shards; `encoder_id` is part of their fingerprints."""
    groups = group_pieces(list(request.pieces), request.shard_bytes)
    tasks = []
    for i, group in enumerate(groups):
        part, more = dataclasses.replace(request, pieces=group), (encoder, i, len(groups))
        name = f"{i:05d}-of-{len(groups):05d}"
        tasks.append(Task(name, group, part.fingerprint(*more), part.fingerprint(*more, times=False)))
    return tasks


def tokenizer_id(request: Request) -> object:
    """What decides which tokenizer a request gets: its SHA-256, or how one is trained."""
    if request.tokenizer is None:
        return [request.vocab_size, request.sample_bytes]
    return encoder_id(read_tokenizer(request.tokenizer), request)


def encoder_id(files: Mapping[str, bytes], request: Request) -> str:
    """What decides how a tokenizer's files encode documents: its SHA-256, and of conversations how it writes them."""
    sha256 = tokenizer_sha256(files)[1]
    if request.reading.conversations:
        return f"{sha256} {chat_id(files, request.chat_format)}"
    return sha256


def read_tokenizer(path: Path) -> dict[str, bytes]:
    """Reads the files of a tokenizer.

    Args:
      path: a folder, or the vocabulary's file in one; or what else `load` takes.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: there is no such checkpoint.
    """
    if path.suffix == ".gguf" or not exists(path):
        from llama_jax.weights.open import open_checkpoint

        return dict(open_checkpoint(str(path)).tokenizer_files())
    with naming(path):
        files = read_files(path if path.is_dir() else path.parent)
        if path.is_file():  # whatever its name, and of two vocabularies in a folder this one
            name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
            files = {other: data for other, data in files.items() if other not in VOCABULARY_FILES}
            files[name] = path.read_bytes()
    if not any(name in files for name in VOCABULARY_FILES):
        raise FileNotFoundError(
            f"{path}: has no tokenizer.json or tokenizer.model: give a checkpoint's folder or such a file, or train one"
            " with --train-tokenizer"
        )
    return files


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode("utf-8", "surrogatepass")).hexdigest()
