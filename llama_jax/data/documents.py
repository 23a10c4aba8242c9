"""Documents out of text files, JSON lines, Parquet files and Hugging Face datasets, piece by piece.

A *piece* is what one reader reads on its own: a file, a range of a large one, or a shard of a dataset. Pieces are found
without reading them, and the documents of all pieces, in order, are the corpus.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

Format = Literal["auto", "text", "jsonl", "parquet"]
InvalidUtf8 = Literal["error", "skip", "replace"]

SUFFIXES = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".zst")
LARGEST_DOCUMENT = 1 << 28  # bytes; SentencePiece needs some 60 times as much memory
TEXT_REMEDY = "give --format text to read such files as text, one document each, or --glob to choose among a folder's"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and where it came from: a path, `path:line`, `path@byte` in a file that was cut, or `name#row`."""

    text: str
    source: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one reader reads.

    Attributes:
        kind: text, jsonl, parquet or hf.
        path: Of the file; hf: the dataset, as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.
        name: What the sources of its documents begin with.
        start: jsonl: byte at or after which its first line starts; parquet: first row group; hf: which shard.
        stop: The end of what `start` counts, exclusive; None reads to the end. hf: how many shards there are.
        nbytes: About what has to be read, for progress and for balance; 0 where nobody knows.
        version: Size and time of the last change of the file, so that a change shows.
    """

    kind: str
    path: str
    name: str
    start: int = 0
    stop: int | None = None
    nbytes: int = 0
    version: tuple[int, int] = (0, 0)


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


def find_pieces(
    inputs: Iterable[str | Path], *, format: Format = "auto", glob: str = "*", cut_bytes: int = 1 << 62
) -> list[Piece]:
    """Finds the pieces of the input.

    Args:
        inputs: Files, folders (all files below them, in the order of their names), and datasets as `hf:NAME`,
            `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`. With Apache Beam also `gs://...`.
        format: Of the files; `auto` goes by the names: .txt, .jsonl, .parquet and so on, or with .gz or .zst after it.
        glob: Which files of a folder, by their names.
        cut_bytes: JSON lines and Parquet files larger than this are cut into pieces of about this size.

    Raises:
        FileNotFoundError: A file is not there, or a folder has none.
        ValueError: The type of a file is unknown.
    """
    pieces: list[Piece] = []
    for item in map(str, inputs):
        if item.startswith("hf:"):
            pieces += _dataset_pieces(item.removeprefix("hf:"))
            continue
        for path, version in _files(item, glob):
            kind = _kind(path, format)
            pieces += _cut(Piece(kind, path, path, nbytes=version[0], version=version), cut_bytes)
    if not pieces:
        raise ValueError("there is no input: give text, JSON lines or Parquet files, folders, or hf:NAME:SPLIT")
    return pieces


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
    if piece.kind != "hf" and _version(piece.path) != piece.version:
        raise ValueError(f"{piece.path}: has changed since the preparation began: run it again")
    read = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_parquet, "hf": _read_dataset}[piece.kind]
    try:
        yield from read(piece, reading, skipped)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{piece.path}: is damaged or truncated ({error}): get it again") from error


def _files(item: str, glob: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields path and version of the files that an input means."""
    if "://" in item:
        yield from _remote_files(item, glob)
        return
    path = os.path.expanduser(item)
    if os.path.isdir(path):
        found = False
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(fnmatch.filter(names, glob)):
                if not name.startswith("."):
                    found = True
                    yield os.path.join(folder, name), _version(os.path.join(folder, name))
        if not found:
            raise FileNotFoundError(f"{item}: has no file that --glob {glob!r} matches: check the path")
    elif os.path.exists(path):
        yield path, _version(path)
    else:
        raise FileNotFoundError(f"{item}: no such file or folder: check the path (a dataset is hf:NAME:SPLIT)")


def _remote_files(item: str, glob: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The same by Apache Beam, for gs://, s3:// and so on: a file, a pattern, or a folder with / at its end."""
    pattern = f"{item}**" if item.endswith("/") else item
    files = sorted(_beam_files().match([pattern])[0].metadata_list, key=lambda file: file.path)
    files = [file for file in files if not item.endswith("/") or fnmatch.fnmatch(file.path.rpartition("/")[2], glob)]
    if not files:
        raise FileNotFoundError(f"{item}: no such file: check the path (a folder ends with /)")
    for file in files:
        yield file.path, (file.size_in_bytes, int(file.last_updated_in_seconds * 1e9))


def _beam_files() -> Any:
    try:
        from apache_beam.io.filesystems import FileSystems
    except ImportError as error:
        raise ValueError("paths such as gs://... need Apache Beam: pip install 'llama_jax[beam]'") from error
    return FileSystems


def _version(path: str) -> tuple[int, int]:
    if "://" in path:
        ((_, version),) = _remote_files(path, "*")
        return version
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _kind(path: str, format: Format) -> str:
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    kind = SUFFIXES.get(suffix) if format == "auto" else format
    if kind is None:
        raise ValueError(f"{path}: its type is unknown ({', '.join(SUFFIXES)} are known): {TEXT_REMEDY}")
    if kind not in SUFFIXES.values():
        raise ValueError(f"format must be auto, {', '.join(sorted(set(SUFFIXES.values())))}, got {format!r}")
    return kind


def _cut(piece: Piece, cut_bytes: int) -> list[Piece]:
    """Cuts a large file where its kind allows it: JSON lines by bytes, Parquet by row groups."""
    if piece.nbytes <= cut_bytes or piece.kind == "text" or piece.path.lower().endswith(COMPRESSED):
        return [piece]
    units = piece.nbytes if piece.kind == "jsonl" else _parquet(piece).num_row_groups
    count = min(-(-piece.nbytes // cut_bytes), max(1, units))
    starts = [units * i // count for i in range(count + 1)]
    return [
        dataclasses.replace(piece, start=start, stop=stop, nbytes=piece.nbytes * (i + 1) // count - piece.nbytes * i // count)
        for i, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True))
    ]  # fmt: skip


def _open(path: str) -> IO[bytes]:
    """Opens a file, and decompresses it by its name."""
    raw: Any = _beam_files().open(path, compression_type="uncompressed") if "://" in path else open(path, "rb")
    if path.lower().endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)  # type: ignore[arg-type]
    if path.lower().endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{path}: needs the package zstandard: pip install zstandard") from error
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=True)
        return io.BufferedReader(reader, 1 << 20)  # type: ignore[arg-type]
    return raw


def _read_text(piece: Piece, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    with _open(piece.path) as file:
        data = file.read(LARGEST_DOCUMENT + 1)
    if (text := _decode(data, lambda: piece.path, reading, skipped)) is not None:
        yield Document(text, piece.name)


def _read_lines(piece: Piece, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    is_cut = piece.stop is not None
    with _open(piece.path) as file:
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
    with _open(path) as file:
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
        f"{where()}: is not valid UTF-8 ({why}): correct it, or give --invalid-utf8 skip to leave such documents out, or"
        " --invalid-utf8 replace to put U+FFFD for what is wrong"
    )


def _parquet(piece: Piece) -> Any:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{piece.path}: needs the package pyarrow: pip install 'llama_jax[data]'") from error
    try:
        return ParquetFile(_open(piece.path))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{piece.path}: is not a Parquet file, or is truncated ({error}): get it again") from error


def _read_parquet(piece: Piece, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    import pyarrow as pa

    file = _parquet(piece)
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
                f"{piece.path}: its field {reading.field!r} is {column.type}, not a text: name another with --field; it has"
                f" {_list(names)}"
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


def _dataset(spec: str) -> Any:
    """Opens a Hugging Face dataset for streaming: NAME, NAME:SPLIT or NAME:CONFIG:SPLIT."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"hf:{spec}: needs the package datasets: pip install datasets") from error
    name, *rest = spec.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) > 1 else None
    return datasets.load_dataset(name, config, split=split, streaming=True)


def _dataset_pieces(spec: str) -> list[Piece]:
    shards = _dataset(spec).num_shards
    return [Piece("hf", spec, f"hf:{spec}", start=i, stop=shards) for i in range(shards)]


def _read_dataset(piece: Piece, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    shard = _dataset(piece.path).shard(num_shards=piece.stop, index=piece.start)
    name = piece.name if piece.stop == 1 else f"{piece.name}[{piece.start}/{piece.stop}]"
    for row, record in enumerate(shard):
        where = f"{name}#{row}"
        text = _valid(
            _text(record, lambda where=where: where, reading.field), lambda where=where: where, reading, skipped
        )
        if text is not None:
            yield Document(text, where)


def group_pieces(pieces: list[Piece], nbytes: int) -> list[tuple[Piece, ...]]:
    """Groups consecutive pieces, each group of at least `nbytes` where there is as much; unknown sizes stay alone."""
    ends: list[int] = []
    total = 0
    for i, piece in enumerate(pieces, 1):
        total += piece.nbytes
        if total >= nbytes or piece.kind == "hf":
            ends.append(i)
            total = 0
    if not ends or ends[-1] != len(pieces):
        ends.append(len(pieces))
    return [tuple(pieces[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
