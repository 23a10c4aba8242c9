"""Tokenises documents and writes them as one shard: the unit of parallel work and of resuming."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

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
from llama_jax.typing import JsonObject

# Tokens that end a document, the first that the vocabulary has; an instruct model's own EOS ends a turn instead.
END_OF_DOCUMENT = ("</s>", "<|end_of_text|>", "<|endoftext|>")
ROOM = "and run the same again, the finished shards are kept; or prepare it in another folder"  # on a full disk


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

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """Of the stored ids: the smallest that holds the vocabulary."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

    def __call__(self, text: str) -> np.ndarray:
        """Encodes a document: [BOS] text EOS."""
        return np.array([*self.tokenizer.encode(text, bos=self.bos), self.eos_id], self.dtype)

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

    `documents` has how many each piece gave, `digests` what `inputs.digest` says of each.
    """

    shard: Shard
    skipped: Mapping[str, int]
    fingerprint: str
    lasting: str = ""
    documents: Sequence[int] = ()
    digests: Sequence[str | None] = ()

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
          ValueError: A document cannot be read.
        """
        unfinished = self.folder / UNFINISHED
        names = shard_files(task.name)
        try:
            skipped: Counter[str] = Counter()
            given = [0] * len(task.pieces)
            documents = read_task(task, self.reading, skipped, advance, given)
            count, tokens, nbytes, content = write_shard(unfinished / task.name, documents, self.encoder)
            record_bytes = (unfinished / names[0]).stat().st_size
            shard = Shard(task.name, count, tokens, nbytes, record_bytes, content)
            digests = [digest(piece) for piece in task.pieces]
            for piece in task.pieces:
                check_unchanged(piece)
            done = Done(shard, dict(sorted(skipped.items())), task.fingerprint, task.lasting, given, digests)
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


def write_shard(path: Path, documents: Iterator[Document], encoder: Encoder) -> tuple[int, int, int, str]:
    """Writes the three files of a shard.

    Args:
      path: of the files, without the suffix.
      documents: what to write.
      encoder: documents to ids.

    Returns:
      Number of documents, of tokens, of bytes of text, and the content, see `manifest.Shard`.
    """
    module = array_record()
    records, index, sources = shard_files(path.name)
    count = tokens = nbytes = 0
    content = ""
    writer = module.ArrayRecordWriter(str(path.with_name(records)), "group_size:1")  # one document is read at a time
    try:
        with (
            open(path.with_name(index), "wb") as index_file,
            open(path.with_name(sources), "w", encoding="utf-8", newline="\n") as sources_file,
        ):
            for document in documents:
                ids, size = encoder(document.text), len(document.text.encode())
                writer.write(ids.tobytes())
                entry = np.array([len(ids), size], INDEX_DTYPE).tobytes()
                index_file.write(entry)
                content = content_of_both(content, content_of(entry + ids.tobytes()), 1)
                sources_file.write(_one_line(document.source) + "\n")
                count, tokens, nbytes = count + 1, tokens + len(ids), nbytes + size
    finally:
        writer.close()
    reader = module.ArrayRecordReader(str(path.with_name(records)))
    if reader.num_records() != count:
        raise OSError(f"{path.with_name(records)}: only {reader.num_records()} of {count} documents came to the disk")
    return count, tokens, nbytes, content


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
