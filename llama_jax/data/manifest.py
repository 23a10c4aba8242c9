"""The manifest of a prepared corpus, and the names of its files.

    manifest.json                  what the corpus is; written last, so that a folder with it is complete
    00000-of-00004.array_record    one record a document: its token ids, little endian
    00000-of-00004.index           uint32 [documents, 2], little endian: tokens and bytes of each document
    00000-of-00004.sources         one line a document: where it came from
    00000-of-00004.loss_mask.array_record    a column (format 2): one record a document, one number for each token
    inputs.json                    what it was prepared from (`data.inputs`); training does not need it
    tokenizer.model, ...           the tokenizer's files

Documents are numbered through all shards, in the order of the input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from llama_jax.data.prepare.system import exists, naming
from llama_jax.text.base import TOKENIZER_FILES, VOCABULARY_FILES
from llama_jax.typing import Foreign, JsonObject

FORMATS = (1, 2)  # without and with columns: what has none is written as ever
MANIFEST = "manifest.json"
INPUTS = "inputs.json"
LOSS_MASK = "loss_mask"  # a column: 1 for a token that is learned, of conversations
# Of pairs of answers, a document with one after the other, each after the prompt: of each token twice two bits, whether
# it is of the rejected answer and whether it ends one, and above them its position in prompt and answer.
PAIR = "pair"
REJECTED, ENDS, POSITION = 1, 2, 2  # bits, and the number of bits below the position
UNFINISHED = "unfinished"  # a folder in the corpus's own while it is being prepared
INDEX_DTYPE = np.dtype("<u4")
AGAIN = "prepare the corpus again, into a new folder"


def content_of(record: bytes) -> str:
    """Returns the hash of one document's record, in hexadecimal."""
    return hashlib.sha256(record).hexdigest()


def content_of_both(first: str, second: str, documents: int) -> str:
    """Returns the hash of two runs of documents, one after the other.

    A polynomial over the prime 2^255 - 19: the hashes of documents are its coefficients, so that their order counts
    and where they are cut does not.

    Args:
      first: hash of the first run, in hexadecimal; empty for none.
      second: hash of the second one.
      documents: how many there are in the second one.
    """
    if not second:
        return first
    prime, base = 2**255 - 19, 0x9E3779B97F4A7C15F39CC0605CEDC835  # the golden ratio's digits
    return f"{(int(first or '0', 16) * pow(base, documents, prime) + int(second, 16)) % prime:064x}"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a corpus.

    Attributes:
      name: of its files, without the suffix.
      documents: number of records.
      tokens: of all documents, BOS and EOS included.
      bytes: UTF-8 of all texts.
      record_bytes: size of the `.array_record` file; a truncated one shows.
      content: hash of all documents' tokens in order, see `content_of_both`; empty in corpora of earlier versions.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    record_bytes: int
    content: str = ""


@dataclasses.dataclass(frozen=True)
class TokenColumn:
    """What a corpus has of each token beside its id.

    Attributes:
      name: such as `loss_mask`, in the names of its files.
      dtype: of its numbers: uint8, int32 or float32.
      record_bytes: size of each shard's file.
      content: hash of all documents' numbers in order, see `content_of_both`.
    """

    name: str
    dtype: str
    record_bytes: tuple[int, ...]
    content: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a corpus is.

    Attributes:
      vocab_size: of the tokenizer; every id is below it.
      bos: whether each document begins with the tokenizer's BOS.
      eos_id: the id that ends each document.
      tokenizer_file: name of the vocabulary's file in the corpus.
      tokenizer_sha256: of that file, in hexadecimal.
      token_dtype: of the records, `uint16` or `uint32`.
      documents: number of them.
      tokens: of all documents, BOS and EOS included.
      bytes: UTF-8 of all texts.
      shards: in the order of the documents.
      skipped: what was left out, such as `{"empty": 3}` documents.
      reference: bits per byte that something else needs for the texts, by its name.
      fingerprint: of the input and the options that it was prepared from.
      barren: the inputs, as they were given, that gave no document.
      columns: what there is of each token beside its id.
      facts: of conversations: rows of each shape, and how many were cut.
    """

    vocab_size: int
    bos: bool
    eos_id: int
    tokenizer_file: str
    tokenizer_sha256: str
    token_dtype: str
    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    reference: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    barren: tuple[str, ...] = ()
    columns: tuple[TokenColumn, ...] = ()
    facts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def content(self) -> str:
        """Hash of all documents' tokens in order, however they are cut into shards; empty in earlier versions."""
        if not all(shard.content for shard in self.shards if shard.documents):
            return ""
        content = ""
        for shard in self.shards:
            content = content_of_both(content, shard.content, shard.documents)
        for column in self.columns:
            content = hashlib.sha256(f"{content} {column.name} {column.content}".encode()).hexdigest()
        return content

    def to_json(self) -> str:
        """Writes the manifest as JSON."""
        values = dataclasses.asdict(self)
        barren, columns, facts = values.pop("barren"), values.pop("columns"), values.pop("facts")
        more = {"columns": columns, "facts": facts} if columns else {}
        return json.dumps({**values, "format": FORMATS[bool(columns)], "barren": barren, **more}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Manifest:
        """Reads a manifest.

        Args:
          text: JSON.
          source: where it comes from, for error messages.

        Raises:
          ValueError: it is none, is of another format, or its counts do not match.
        """
        try:
            values: JsonObject = json.loads(text)
            version = values.pop("format", None)
            if version not in FORMATS:
                raise ValueError(f"format {version!r}, this llama_jax reads formats {' and '.join(map(str, FORMATS))}")
            shards, barren, columns = (tuple(values.get(name, ())) for name in ("shards", "barren", "columns"))
            parts = {
                "shards": tuple(Shard(**shard) for shard in shards), "barren": barren,
                "columns": tuple(TokenColumn(**{**x, "record_bytes": tuple(x["record_bytes"])}) for x in columns),
            }  # fmt: skip
            manifest = cls(**{**values, **parts})
            for field in ("documents", "tokens", "bytes"):
                total = sum(getattr(shard, field) for shard in manifest.shards)
                if total != getattr(manifest, field):
                    raise ValueError(f"{getattr(manifest, field)} {field}, but the shards have {total}")
            if manifest.token_dtype not in ("uint16", "uint32"):
                raise ValueError(f"token_dtype {manifest.token_dtype!r}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{source}: is not the manifest of a corpus ({error}): {AGAIN}") from error
        return manifest


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of a corpus, and checks no other file; raises as `open_corpus`."""
    try:
        with naming(path / MANIFEST):
            return Manifest.from_json((path / MANIFEST).read_bytes(), str(path / MANIFEST))
    except (FileNotFoundError, NotADirectoryError) as error:
        if not exists(path):
            raise FileNotFoundError(f"{path}: no such corpus; make it with scripts/prepare_data.py") from error
        if (path / UNFINISHED).is_dir():
            raise ValueError(
                f"{path}: its preparation did not finish: run scripts/prepare_data.py again as before, it resumes"
            ) from error
        raise ValueError(f"{path}: has no {MANIFEST}: give a folder that scripts/prepare_data.py wrote") from error


def tokenizer_sha256(files: Mapping[str, bytes]) -> tuple[str, str]:
    """Returns name and SHA-256 of the vocabulary among a tokenizer's files (`text.open.read_files`)."""
    name = next((name for name in VOCABULARY_FILES if name in files), None)
    if name is None:
        raise ValueError(
            f"there is no vocabulary among {sorted(files)}: one of {', '.join(VOCABULARY_FILES)} is needed"
        )
    return name, hashlib.sha256(files[name]).hexdigest()


def shard_files(name: str, columns: Iterable[str] = ()) -> list[str]:
    """Names the files of a shard, those of its columns last."""
    suffixes = ["array_record", "index", "sources", *(f"{column}.array_record" for column in columns)]
    return [f"{name}.{suffix}" for suffix in suffixes]


def is_corpus_file(name: str) -> bool:
    """Tells whether a file's name is one that a corpus has."""
    shard, *suffixes = name.split(".")
    numbers = shard.split("-of-")
    is_shard = len(numbers) == 2 and all(number.isdecimal() for number in numbers)
    is_column = len(suffixes) == 2 and suffixes[0].isidentifier() and suffixes[1] == "array_record"
    return name in (MANIFEST, INPUTS, UNFINISHED, *TOKENIZER_FILES) or (
        is_shard and (name in shard_files(shard) or is_column)
    )


def array_record() -> Foreign:
    """ArrayRecord's module with the reader and the writer."""
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise ValueError(
            f"prepared corpora need the package array_record ({error}): pip install 'llama_jax[data]'"
        ) from error
    return array_record_module
