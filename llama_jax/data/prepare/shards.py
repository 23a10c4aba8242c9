"""Tokenises documents and writes them as one shard: the unit of parallel work and of resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.data.manifest import (
    INDEX_DTYPE,
    UNFINISHED,
    Shard,
    array_record,
    content_of,
    content_of_both,
    shard_files,
)
from llama_jax.data.prepare.documents import Document, Reading, check_unchanged, read_piece
from llama_jax.data.prepare.inputs import digest
from llama_jax.data.prepare.pieces import InputSlice
from llama_jax.files import disk_full, is_full, sync, write_whole
from llama_jax.text.base import Tokenizer
from llama_jax.text.open import tokenizer_from_files
from llama_jax.typing import Foreign, JsonObject

# Tokens that end a document, the first that the vocabulary has; an instruct model's own EOS ends a turn instead.
END_OF_DOCUMENT = ("</s>", "<|end_of_text|>", "<|endoftext|>")
ROOM = "and run the same again, the finished shards are kept; or prepare it in another folder"  # on a full disk


class Encoded(NamedTuple):
    """A document as it is stored: ids, and columns by name."""

    ids: np.ndarray
    columns: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Documents to token ids.

    Attributes:
      files: the tokenizer's, by name.
      bos: whether BOS begins each document.
    """

    files: Mapping[str, bytes] = dataclasses.field(repr=False)
    bos: bool

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return load_from_files(self.files)

    @functools.cached_property
    def eos_id(self) -> int:
        """The id that ends each document."""
        return end_of_document(self.tokenizer)

    @property
    def columns(self) -> dict[str, str]:
        """What it gives beside the ids: column -> dtype."""
        return {}

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """Of the stored ids: the smallest that holds the vocabulary."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

    def __call__(self, document: Document, facts: Counter[str]) -> Encoded | None:
        """Encodes a document: [BOS] text EOS. `facts` counts what is worth saying; None leaves the document out."""
        return Encoded(np.array([*self.tokenizer.encode(document.text, bos=self.bos), self.eos_id], self.dtype), {})

    def __getstate__(self) -> JsonObject:
        return {"files": dict(self.files), "bos": self.bos}


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to write: its name, what it is made of, and a fingerprint of all that its content depends on.

    `lasting` is the same without the times of the files' last change.
    """

    name: str
    pieces: tuple[InputSlice, ...]
    fingerprint: str
    lasting: str = ""

    @property
    def nbytes(self) -> int:
        """About what has to be read."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished shard, what was left out of it, and the fingerprints of its task.

    `documents` has how many each piece gave, `digests` what `inputs.digest` says of each. `columns` has name, bytes and
    content of each column's file, `facts` what was counted, `left_out` the first documents that the encoder left out.
    """

    shard: Shard
    skipped: Mapping[str, int]
    fingerprint: str
    lasting: str = ""
    documents: Sequence[int] = ()
    digests: Sequence[str | None] = ()
    columns: Sequence[tuple[str, int, str]] = ()
    facts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    left_out: Sequence[str] = ()

    def to_json(self) -> str:
        """Writes it for the next run of an interrupted preparation."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Done:
        """Reads what `to_json` wrote; raises ValueError, TypeError or KeyError if it is anything else."""
        values = json.loads(text)
        return cls(**{**values, "shard": Shard(**values["shard"])})


@dataclasses.dataclass(frozen=True)
class ShardWork:
    """Writes shards into a folder: what a worker process does.

    Attributes:
      folder: of the corpus.
      encoder: documents to ids.
      reading: how documents are read.
    """

    folder: Path
    encoder: Encoder
    reading: Reading

    def __call__(self, task: Task, advance: Callable[[int], None]) -> Done:
        """Writes one shard: under other names first, and then a mark that it is finished.

        Args:
          task: which.
          advance: called with about how many bytes of input are just done.

        Raises:
          OSError: the disk is full, or as reading raises.
          ValueError: a document cannot be read.
        """
        unfinished = self.folder / UNFINISHED
        names = shard_files(task.name, self.encoder.columns)
        try:
            skipped: Counter[str] = Counter()
            given = [0] * len(task.pieces)
            documents = read_task(task, self.reading, skipped, advance, given)
            written = write_shard(unfinished / task.name, documents, self.encoder)
            if written.left_out:
                skipped["too_long"] += len(written.left_out)
            sizes = [(unfinished / name).stat().st_size for name in names]
            shard = Shard(task.name, written.documents, written.tokens, written.nbytes, sizes[0], written.content)
            columns = [
                (name, size, written.columns[name]) for name, size in zip(self.encoder.columns, sizes[3:], strict=True)
            ]
            digests = [digest(piece) for piece in task.pieces]
            for piece in task.pieces:
                check_unchanged(piece)
            done = Done(
                shard, dict(sorted(skipped.items())), task.fingerprint, task.lasting, given, digests, columns,
                dict(sorted(written.facts.items())), written.left_out[:5],
            )  # fmt: skip
            sync([unfinished / name for name in names])
            for name in names:
                (unfinished / name).rename(self.folder / name)
            sync([self.folder])
            write_whole(unfinished / f"{task.name}.json", done.to_json())
        except BaseException as error:
            for name in names:
                (unfinished / name).unlink(missing_ok=True)
            if isinstance(error, (OSError, RuntimeError)) and is_full(error):
                raise disk_full(self.folder, ROOM) from error
            raise
        return done


@dataclasses.dataclass
class Written:
    """What a shard holds.

    Attributes:
      documents: number of them.
      tokens: of all.
      nbytes: of text.
      content: see `manifest.Shard`.
      columns: name -> content.
      facts: what the encoder counted.
      left_out: where the documents are from that the encoder left out.
    """

    documents: int = 0
    tokens: int = 0
    nbytes: int = 0
    content: str = ""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    facts: Counter[str] = dataclasses.field(default_factory=Counter)
    left_out: list[str] = dataclasses.field(default_factory=list)


def write_shard(path: Path, documents: Iterator[Document], encoder: Encoder) -> Written:
    """Writes the files of a shard.

    Args:
      path: of the files, without the suffix.
      documents: what to write.
      encoder: documents to ids.
    """
    records, index, sources, *columns = (path.with_name(name) for name in shard_files(path.name, encoder.columns))
    written = Written(columns=dict.fromkeys(encoder.columns, ""))
    with (
        _writer(records) as writer,
        open(index, "wb") as index_file,
        open(sources, "w", encoding="utf-8", newline="\n") as sources_file,
        contextlib.ExitStack() as stack,
    ):
        others = {name: stack.enter_context(_writer(file)) for name, file in zip(encoder.columns, columns, strict=True)}
        for document in documents:
            encoded, size = encoder(document, written.facts), len(document.text.encode())
            if encoded is None:
                written.left_out.append(document.source)
                continue
            ids = encoded.ids
            writer.write(ids.tobytes())
            entry = np.array([len(ids), size], INDEX_DTYPE).tobytes()
            index_file.write(entry)
            written.content = content_of_both(written.content, content_of(entry + ids.tobytes()), 1)
            for name, other in others.items():
                record = encoded.columns[name].tobytes()
                other.write(record)
                written.columns[name] = content_of_both(written.columns[name], content_of(record), 1)
            sources_file.write(_one_line(document.source) + "\n")
            written.documents += 1
            written.tokens += len(ids)
            written.nbytes += size
    for file in (records, *columns):
        if (found := array_record().ArrayRecordReader(str(file)).num_records()) != written.documents:
            raise OSError(f"{file}: only {found} of {written.documents} documents came to the disk")
    return written


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Foreign]:
    writer = array_record().ArrayRecordWriter(str(path), "group_size:1")  # one document is read at a time
    try:
        yield writer
    finally:
        writer.close()


def read_task(
    task: Task, reading: Reading, skipped: Counter[str], advance: Callable[[int], None], given: list[int]
) -> Iterator[Document]:
    """Reads the documents of a task that are not empty.

    Args:
      task: which.
      reading: how.
      skipped: counts what is left out.
      advance: called with about how many bytes of input are just done.
      given: counts the documents of each piece.
    """
    for i, piece in enumerate(task.pieces):
        left = piece.nbytes
        for document in read_piece(piece, reading, skipped):
            done = len(document.text) if piece.alone else min(len(document.text), left)
            left -= done
            if document.text:
                given[i] += 1
                yield document
            else:
                skipped["empty"] += 1
            advance(done)
        advance(max(left, 0))


def load_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """Loads a tokenizer from its files; raises ValueError if there is none."""
    tokenizer = tokenizer_from_files(files)
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer.json or tokenizer.model among {sorted(files)}")
    return tokenizer


def end_of_document(tokenizer: Tokenizer) -> int:
    """Returns the id that ends a document; raises ValueError if the vocabulary has none."""
    names = (*END_OF_DOCUMENT, tokenizer.special_tokens.get("eos_token", ""))
    for name in names:
        if name in tokenizer.control_tokens:
            return tokenizer.control_tokens[name]
    raise ValueError(f"the tokenizer has no token that ends a document: none of {', '.join(names[:-1])}, no eos_token")


def _one_line(source: str) -> str:
    escaped = source.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return escaped.encode("utf-8", "backslashreplace").decode()  # file names may hold any bytes
