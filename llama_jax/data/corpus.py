"""A prepared corpus, opened for random access: documents as token ids, their lengths, where they came from."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.manifest import AGAIN, INDEX_DTYPE, Shard, array_record, read_manifest
from llama_jax.data.manifest import Manifest as Manifest
from llama_jax.data.prepare.system import naming
from llama_jax.text.base import Tokenizer
from llama_jax.text.open import load_tokenizer
from llama_jax.typing import Fields, Foreign

TOKENS, BYTES = 0, 1  # columns of the index
READ_OPTIONS = "readahead_buffer_size:0"  # a read fetches its records only
OPEN_SHARDS = 512  # a process may often have 1024 files open


class Column:
    """One number a document, over all shards: an array that stays on disk.

    `column[ids]` takes an integer, a slice, or an integer array of any shape, and gives int64; `len(column)` is the
    number of documents. Nothing is copied but what is asked for.
    """

    def __init__(self, indices: Sequence[np.ndarray], column: int):
        """Joins shards.

        Args:
          indices: uint32 [documents of the shard, 2] each.
          column: TOKENS or BYTES.
        """
        self._columns = [index[:, column] for index in indices]
        self._starts = np.cumsum([0, *(len(index) for index in indices)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, ids: Any) -> Any:
        if isinstance(ids, slice):
            ids = np.arange(*ids.indices(len(self)))
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"documents are numbered 0 to {len(self) - 1}, asked for {ids.min()} to {ids.max()}")
        if len(self._columns) == 1:
            values = self._columns[0][ids].astype(np.int64)
        else:
            flat, values = ids.reshape(-1), np.empty(ids.size, np.int64)
            shards = np.searchsorted(self._starts, flat, side="right") - 1
            order = np.argsort(shards, kind="stable")
            bounds = np.searchsorted(shards[order], np.arange(len(self._columns) + 1))
            for shard in np.unique(shards):
                part = order[bounds[shard] : bounds[shard + 1]]
                values[part] = self._columns[shard][flat[part] - self._starts[shard]]
            values = values.reshape(ids.shape)
        return values if ids.ndim else int(values)

    def __iter__(self) -> Iterator[int]:
        return (int(value) for column in self._columns for value in column)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.int64, copy=False)


class Corpus:
    """A prepared corpus, opened for random access. Threads may share it; other processes get a copy by pickling.

    Attributes:
      path: its folder.
      manifest: what it is.
      lengths: tokens of each document, BOS and EOS included.
      nbytes: UTF-8 bytes of each document's text.
    """

    def __init__(self, path: Path, manifest: Manifest, indices: Sequence[np.ndarray]):
        """Opens nothing yet; use `open_corpus`, which checks the files."""
        self.path, self.manifest = path, manifest
        self.lengths, self.nbytes = Column(indices, TOKENS), Column(indices, BYTES)
        self._starts = list(itertools.accumulate((shard.documents for shard in manifest.shards), initial=0))
        self._dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
        self._readers: dict[tuple[int, str], Foreign] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.documents

    def __reduce__(self) -> tuple[Any, ...]:
        return open_corpus, (self.path,)

    def __repr__(self) -> str:
        return f"Corpus({str(self.path)!r}, documents={len(self)}, tokens={self.manifest.tokens})"

    @property
    def name(self) -> str:
        """The folder's name, for messages."""
        return self.path.name

    @property
    def columns(self) -> dict[str, np.dtype]:
        """What it has of each token beside its id: name -> dtype."""
        return {column.name: np.dtype(column.dtype) for column in self.manifest.columns}

    def read(self, ids: Sequence[int] | np.ndarray, column: str | None = None) -> list[np.ndarray]:
        """Reads documents.

        Args:
          ids: their numbers, in any order.
          column: which of `columns`; None reads the token ids.

        Returns:
          The token ids of each, int32 [tokens], or the column's numbers, one for each token.

        Raises:
          ValueError: a shard is damaged.
        """
        dtype = self._dtype if column is None else self.columns[column].newbyteorder("<")
        suffix = "array_record" if column is None else f"{column}.array_record"
        ids = np.asarray(ids, np.int64).reshape(-1)
        lengths = self.lengths[ids]
        documents: list[np.ndarray] = [np.empty(0, np.int32)] * len(ids)
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard).tolist()
            records = self._records(shard, suffix, [int(ids[place]) - self._starts[shard] for place in places])
            for place, record in zip(places, records, strict=True):
                if len(record) != lengths[place] * dtype.itemsize:
                    raise ValueError(
                        f"{self._file(shard, suffix)}: document {ids[place]} has {len(record)} bytes, the index"
                        f" says {lengths[place]} tokens of {dtype.name}: {AGAIN}"
                    )
                documents[place] = np.frombuffer(record, dtype).astype(np.int32 if column is None else dtype.name)
        return documents

    def source(self, document: int) -> str:
        """Returns where a document came from: a path, `path:line` or `name#row`. Reads a shard's list: for messages."""
        if not 0 <= document < len(self):
            raise IndexError(f"documents are numbered 0 to {len(self) - 1}, asked for {document}")
        shard = int(np.searchsorted(self._starts, document, side="right")) - 1
        line = document - self._starts[shard]
        path = self._file(shard, "sources")
        with naming(path), open(path, encoding="utf-8", newline="\n") as file:
            return next(itertools.islice(file, line, None), "").removesuffix("\n")

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that the corpus was prepared with."""
        tokenizer = load_tokenizer(self.path)
        if tokenizer is None:
            raise ValueError(f"{self.path}: has no {self.manifest.tokenizer_file} any more: {AGAIN}")
        return tokenizer

    def close(self) -> None:
        """Closes the shards; reading opens them again."""
        with self._lock:
            self._readers.clear()  # one that another thread reads from closes when that is done

    def _file(self, shard: int, suffix: str) -> Path:
        return self.path / f"{self.manifest.shards[shard].name}.{suffix}"

    def _records(self, shard: int, suffix: str, records: list[int]) -> Sequence[bytes]:
        try:
            return self._reader(shard, suffix).read(records)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{self._file(shard, suffix)}: is damaged ({error}): {AGAIN}") from error

    def _reader(self, shard: int, suffix: str) -> Foreign:
        with self._lock:
            if (shard, suffix) not in self._readers:
                file = self._file(shard, suffix)
                with naming(file), open(file, "rb"):  # the library takes a file that it may not read for an empty one
                    reader = array_record().ArrayRecordReader(str(file), READ_OPTIONS)
                expected = self.manifest.shards[shard].documents
                if reader.num_records() != expected:
                    raise ValueError(
                        f"{file}: has {reader.num_records()} documents, the manifest says {expected}: {AGAIN}"
                    )
                self._readers[shard, suffix] = reader
                if len(self._readers) > OPEN_SHARDS:
                    del self._readers[next(iter(self._readers))]
            return self._readers[shard, suffix]


def open_corpus(path: str | Path) -> Corpus:
    """Opens a prepared corpus.

    Args:
      path: its folder.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it is no corpus, is unfinished, or a file is missing or truncated.
    """
    path = Path(os.path.expanduser(path))
    manifest = read_manifest(path)
    indices = [_open_index(path, shard) for shard in manifest.shards]
    for column in manifest.columns:
        for shard, size in zip(manifest.shards, column.record_bytes, strict=True):
            _check_size(path / f"{shard.name}.{column.name}.array_record", size)
    return Corpus(path, manifest, indices)


def check_tokenizer(corpus: Corpus, *, sha256: str | None = None, vocab_size: int | None = None) -> None:
    """Checks that a corpus was prepared with the tokenizer of a model, or of another corpus.

    Args:
      corpus: the corpus.
      sha256: of the tokenizer's vocabulary file, as `tokenizer_sha256` gives; None leaves this unchecked.
      vocab_size: of the model, which may be padded above the tokenizer's; None leaves this unchecked.

    Raises:
      ValueError: it was not.
    """
    manifest = corpus.manifest
    if sha256 is not None and sha256 != manifest.tokenizer_sha256:
        raise ValueError(
            f"{corpus.path}: was prepared with another tokenizer (SHA-256 {manifest.tokenizer_sha256[:12]}..., here it"
            f" is {sha256[:12]}...): prepare it again with scripts/prepare_data.py --tokenizer"
        )
    if vocab_size is not None and vocab_size < manifest.vocab_size:
        raise ValueError(
            f"{corpus.path}: its tokenizer has {manifest.vocab_size} ids, the model has room for {vocab_size}: prepare"
            " the corpus with the model's tokenizer, or give the model a larger vocab_size"
        )


def changed_facts(before: Fields, now: Fields) -> str:
    """Says what tells a corpus from what it was; empty where its documents are the same, whenever it was prepared.

    Args:
      before: some attributes of its manifest: documents, tokens, tokenizer_sha256, fingerprint, and content, which
        earlier versions did not have.
      now: the same of the corpus that is there.
    """
    found = [f"{before[name]} {name}, now {now[name]}" for name in ("documents", "tokens") if before[name] != now[name]]
    if before["tokenizer_sha256"] != now["tokenizer_sha256"]:
        found.append("another tokenizer")
    key = "content" if before.get("content") and now.get("content") else "fingerprint"
    if not found and before[key] != now[key]:
        unknown = "is from other files (it or its record is of an earlier version, without a hash of the content)"
        found.append(f"as many documents and tokens, but {'other ones' if key == 'content' else unknown}")
    return ", ".join(found)


def _open_index(path: Path, shard: Shard) -> np.ndarray:
    """Maps the index of a shard into memory, uint32 [documents, 2], and checks the sizes of the shard's files."""
    sizes = {f"{shard.name}.index": shard.documents * 2 * INDEX_DTYPE.itemsize}
    sizes[f"{shard.name}.array_record"] = shard.record_bytes
    for name, expected in sizes.items():
        _check_size(path / name, expected)
    if not shard.documents:  # a memory map cannot be empty
        return np.empty((0, 2), INDEX_DTYPE)
    with naming(path / f"{shard.name}.index"):
        return np.memmap(path / f"{shard.name}.index", INDEX_DTYPE, mode="r", shape=(shard.documents, 2))


def _check_size(file: Path, expected: int) -> None:
    """Raises ValueError where a file is missing, or has not so many bytes."""
    try:
        with naming(file):
            size = file.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{file}: is missing: copy the whole folder again, or {AGAIN}") from error
    if size != expected:
        raise ValueError(
            f"{file}: has {size} bytes, not {expected}: it is truncated or another corpus's; copy the whole folder"
            f" again, or {AGAIN}"
        )
