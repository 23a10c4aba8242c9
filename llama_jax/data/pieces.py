"""Where the text is: files, ranges of large ones, and shards of Hugging Face datasets, found without reading them.

A *piece* is what one reader reads on its own. The documents of all pieces, in order, are the corpus.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import gzip
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

Format = Literal["auto", "text", "jsonl", "parquet"]

SUFFIXES = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".zst")
TEXT_REMEDY = "give --format text to read such files as text, one document each, or --glob to choose among a folder's"


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


def find_pieces(inputs: Iterable[str | Path], *, format: Format = "auto", glob: str = "*") -> list[Piece]:
    """Finds the pieces of the input: files, and shards of datasets.

    Args:
        inputs: Files, folders (all files below them, in the order of their names), and datasets as `hf:NAME`,
            `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`. With Apache Beam also `gs://...`.
        format: Of the files; `auto` goes by the names: .txt, .jsonl, .parquet and so on, or with .gz or .zst after it.
        glob: Which files of a folder, by their names.

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
            pieces.append(Piece(kind, path, path, nbytes=version[0], version=version))
    if not pieces:
        raise ValueError(
            "there is no input: give text, JSON lines or Parquet files, folders, or hf:NAME:SPLIT, and then the corpus"
        )
    return pieces


def cut_pieces(pieces: Iterable[Piece], nbytes: int) -> list[Piece]:
    """Cuts larger pieces into some of about `nbytes` bytes: JSON lines by bytes, Parquet by row groups, others not."""
    cut: list[Piece] = []
    for piece in pieces:
        size = piece.nbytes
        if size <= nbytes or piece.kind not in ("jsonl", "parquet") or piece.path.lower().endswith(COMPRESSED):
            cut.append(piece)
            continue
        units = size if piece.kind == "jsonl" else _row_groups(piece)
        count = min(-(-size // nbytes), max(1, units))
        for i in range(count):
            start, stop = units * i // count, units * (i + 1) // count
            share = size * (i + 1) // count - size * i // count
            cut.append(dataclasses.replace(piece, start=start, stop=stop, nbytes=share))
    return cut


def group_pieces(pieces: Sequence[Piece], nbytes: int) -> list[tuple[Piece, ...]]:
    """Groups consecutive pieces, at least `nbytes` bytes in each but the last; those of datasets stay alone."""
    groups: list[list[Piece]] = []
    total = nbytes
    for piece in pieces:
        if total >= nbytes or piece.kind == "hf":
            groups.append([])
            total = 0
        groups[-1].append(piece)
        total += nbytes if piece.kind == "hf" else piece.nbytes
    return [tuple(group) for group in groups]


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
                    yield os.path.join(folder, name), file_version(os.path.join(folder, name))
        if not found:
            raise FileNotFoundError(f"{item}: has no file that --glob {glob!r} matches: check the path")
    elif os.path.exists(path):
        yield path, file_version(path)
    else:
        raise FileNotFoundError(f"{item}: no such file or folder: check the path (a dataset is hf:NAME:SPLIT)")


def _remote_files(item: str, glob: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The same by Apache Beam, for gs://, s3:// and so on: a file, a pattern, or a folder with / at its end."""
    pattern = f"{item}**" if item.endswith("/") else item
    files = sorted(beam_files().match([pattern])[0].metadata_list, key=lambda file: file.path)
    files = [file for file in files if not item.endswith("/") or fnmatch.fnmatch(file.path.rpartition("/")[2], glob)]
    if not files:
        raise FileNotFoundError(f"{item}: no such file: check the path (a folder ends with /)")
    for file in files:
        yield file.path, _remote_version(file)


def _remote_version(file: Any) -> tuple[int, int]:
    return file.size_in_bytes, int(file.last_updated_in_seconds * 1e9)


def beam_files() -> Any:
    """Apache Beam's access to files anywhere."""
    try:
        from apache_beam.io.filesystems import FileSystems  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("paths such as gs://... need Apache Beam: pip install 'llama_jax[beam]'") from error
    return FileSystems


def file_version(path: str) -> tuple[int, int]:
    """Returns size in bytes and time of the last change in nanoseconds."""
    if "://" in path:
        return _remote_version(beam_files().get_filesystem(path).metadata(path))
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


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """Opens a file, and decompresses it by its name."""
    with contextlib.ExitStack() as stack:
        if "://" in path:
            file: Any = stack.enter_context(beam_files().open(path, compression_type="uncompressed"))
        else:
            file = stack.enter_context(open(path, "rb"))
        if path.lower().endswith(".gz"):
            file = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20))  # type: ignore[arg-type]
        if path.lower().endswith(".zst"):
            try:
                import zstandard  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise ValueError(f"{path}: needs the package zstandard: pip install zstandard") from error
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            file = stack.enter_context(io.BufferedReader(reader, 1 << 20))  # type: ignore[arg-type]
        yield file


def _row_groups(piece: Piece) -> int:
    with open_parquet(piece) as file:
        return file.num_row_groups


@contextlib.contextmanager
def open_parquet(piece: Piece) -> Iterator[Any]:
    """Opens a Parquet file: a `pyarrow.parquet.ParquetFile`."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{piece.path}: needs the package pyarrow: pip install 'llama_jax[data]'") from error
    with open_binary(piece.path) as binary:
        try:
            file = ParquetFile(binary)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{piece.path}: is not a Parquet file, or is truncated ({error}): get it again") from error
        yield file


def open_dataset(spec: str) -> Any:
    """Opens a Hugging Face dataset for streaming: NAME, NAME:SPLIT or NAME:CONFIG:SPLIT."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"hf:{spec}: needs the package datasets: pip install datasets") from error
    name, *rest = spec.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) > 1 else None
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        raise ValueError(
            f"hf:{spec}: cannot be opened ({error}): check its name, configuration and split, and the connection"
        ) from error


def _dataset_pieces(spec: str) -> list[Piece]:
    shards = open_dataset(spec).num_shards
    return [Piece("hf", spec, f"hf:{spec}", start=i, stop=shards) for i in range(shards)]
