"""Documents out of text files, JSON lines, Parquet files and Hugging Face datasets."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from llama_jax.data.pieces import Piece, file_version, open_binary, open_dataset, open_parquet

InvalidUtf8 = Literal["error", "skip", "replace"]

LARGEST_DOCUMENT = 1 << 27  # bytes; SentencePiece needs some 40 times as much memory


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and where it came from: a path, `path:line`, `path@byte` in a file that was cut, or `name#row`."""

    text: str
    source: str


@dataclasses.dataclass(frozen=True)
class Reading:
    """How documents are read.

    Attributes:
        field: Of JSON lines, Parquet files and datasets: the one that holds the text.
        invalid_utf8: What to do with a document that is not valid UTF-8: `error`, `skip` it, or `replace` the bad bytes
            by U+FFFD.
    """

    field: str = "text"
    invalid_utf8: InvalidUtf8 = "error"

    def __post_init__(self):
        if self.invalid_utf8 not in ("error", "skip", "replace"):
            raise ValueError(f"invalid_utf8 must be error, skip or replace, got {self.invalid_utf8!r}")


def read_piece(piece: Piece, reading: Reading, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Reads the documents of a piece, in order; empty ones too.

    Args:
        piece: One of `find_pieces`.
        reading: How.
        skipped: Counts what is left out: `invalid_utf8` documents.

    Raises:
        ValueError: A document cannot be read; the message says where it is and what to do.
    """
    skipped = Counter() if skipped is None else skipped
    if piece.kind != "hf" and file_version(piece.path) != piece.version:
        raise ValueError(f"{piece.path}: has changed since the preparation began: run it again")
    read = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_parquet, "hf": _read_dataset}[piece.kind]
    try:
        yield from read(piece, reading, skipped)
    except Exception as error:
        if piece.kind != "hf" and _is_damage(error):
            raise ValueError(f"{piece.path}: is damaged or truncated ({error}): get it again") from error
        raise


def _is_damage(error: Exception) -> bool:
    """Tells whether an error comes from the content of a compressed or Parquet file."""
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)) or (type(error) is OSError and error.errno is None):
        return True
    return type(error).__module__.partition(".")[0] in ("zstd", "zstandard", "pyarrow")


def _read_text(piece: Piece, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    with open_binary(piece.path) as file:
        data = file.read(LARGEST_DOCUMENT + 1)
    if (text := _decode(data, lambda: piece.path, reading, skipped)) is not None:
        yield Document(text, piece.name)


def _read_lines(piece: Piece, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    is_cut = piece.stop is not None
    with open_binary(piece.path) as file:
        at = piece.start
        if at:  # the line that runs over the boundary is the piece's before
            file.seek(at - 1)
            at += len(file.readline()) - 1
        number = 0
        while (piece.stop is None or at < piece.stop) and (line := file.readline(LARGEST_DOCUMENT + 1)):
            offset, at, number = at, at + len(line), number + 1

            def where(offset: int = offset, number: int = number) -> str:
                return f"{piece.path}:{_line_number(piece.path, offset) if is_cut else number}"

            if line.isspace():
                continue
            if (content := _decode(line, where, reading, skipped)) is None:
                continue
            text = _valid(_field(content, where, reading.field), where, reading, skipped)
            if text is not None:
                yield Document(text, f"{piece.name}@{offset}" if is_cut else f"{piece.name}:{number}")


def _line_number(path: str, offset: int) -> int:
    """The number of the line that starts at a byte, from 1."""
    with open_binary(path) as file:
        newlines = 0
        while offset and (block := file.read(min(1 << 24, offset))):
            newlines, offset = newlines + block.count(b"\n"), offset - len(block)
    return newlines + 1


def _field(line: str, where: Callable[[], str], field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where()}: is not JSON ({error}): a file of JSON lines has one object a line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where()}: holds a JSON {type(record).__name__}: a file of JSON lines has one object a line")
    return _text(record, where, field)


def _text(record: dict[str, Any], where: Callable[[], str], field: str) -> str:
    if field not in record:
        raise ValueError(f"{where()}: has no field {field!r}: name the text's with --field; it has {_list(record)}")
    if not isinstance(record[field], str):
        raise ValueError(
            f"{where()}: its field {field!r} is a {type(record[field]).__name__}, not a text: correct it, or name"
            f" another with --field; it has {_list(record)}"
        )
    return record[field]


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, list(names)[:20])) or "none"


def _decode(data: bytes, where: Callable[[], str], reading: Reading, skipped: Counter[str]) -> str | None:
    """Decodes a document; None leaves it out."""
    if len(data) > LARGEST_DOCUMENT:
        raise ValueError(
            f"{where()}: is one document of more than {LARGEST_DOCUMENT >> 20} MB: cut it into documents, such as the"
            " lines of a JSON lines file"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return _invalid(data.decode(errors="replace"), f"{error.reason} at byte {error.start}", where, reading, skipped)


def _valid(text: str, where: Callable[[], str], reading: Reading, skipped: Counter[str]) -> str | None:
    """Checks a text that JSON decoded: escapes such as \\ud800 have no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return _invalid(repaired, f"{error.reason} at character {error.start}", where, reading, skipped)
    return text


def _invalid(repaired: str, why: str, where: Callable[[], str], reading: Reading, skipped: Counter[str]) -> str | None:
    if reading.invalid_utf8 == "replace":
        return repaired
    if reading.invalid_utf8 == "skip":
        skipped["invalid_utf8"] += 1
        return None
    raise ValueError(
        f"{where()}: is not valid UTF-8 ({why}): correct it, or give --invalid-utf8 skip to leave such documents out,"
        " or --invalid-utf8 replace to put U+FFFD for what is wrong"
    )


def _read_parquet(piece: Piece, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    import pyarrow as pa

    with open_parquet(piece) as file:
        names = file.schema_arrow.names
        if reading.field not in names:
            raise ValueError(
                f"{piece.path}: has no field {reading.field!r}: name the text's with --field; it has {_list(names)}"
            )
        groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
        row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        for batch in file.iter_batches(1024, row_groups=groups, columns=[reading.field]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            try:
                values = column.cast(pa.large_binary()).to_pylist()
            except pa.ArrowException as error:
                raise ValueError(
                    f"{piece.path}: its field {reading.field!r} is {column.type}, not a text: name another with"
                    f" --field; it has {_list(names)}"
                ) from error
            for i, value in enumerate(values, row):
                where = f"{piece.name}#{i}"
                if value is None:
                    raise ValueError(
                        f"{where}: its field {reading.field!r} is null, not a text: correct it or leave it out"
                    )
                if (text := _decode(value, lambda where=where: where, reading, skipped)) is not None:
                    yield Document(text, where)
            row += len(values)


def _read_dataset(piece: Piece, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    source = piece.name if piece.stop == 1 else f"{piece.name}[{piece.start}/{piece.stop}]"
    rows = iter(open_dataset(piece.path).shard(num_shards=piece.stop, index=piece.start))
    for row in itertools.count():
        try:
            record = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise OSError(f"{source}#{row}: cannot be read ({error}): run it again, it resumes") from error
        where = f"{source}#{row}"
        text = _text(record, lambda where=where: where, reading.field)
        if (text := _valid(text, lambda where=where: where, reading, skipped)) is not None:
            yield Document(text, where)
