"""Where the text is: files, ranges of large ones, and shards of Hugging Face datasets, found without reading them.

A *piece* is what one reader reads on its own. The documents of all pieces, in order, are the corpus.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from llama_jax.data.prepare.signatures import foreign, is_lines, is_parquet, packing, page
from llama_jax.data.prepare.streams import STDIN_NAMES, beam_files, is_damage, open_binary, open_stored, peek
from llama_jax.data.prepare.system import naming, told
from llama_jax.data.prepare.walk import EMPTY, NOT_PACKED, RENAMED, TWICE, Notes, Walk, is_stream
from llama_jax.typing import Foreign

Format = Literal["auto", "text", "jsonl", "parquet"]

SUFFIXES = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".bgz", ".gzip", ".bz2", ".xz", ".lzma", ".zst", ".zstd")
TEXT_REMEDY = "give --format text to read such files as text, one document each, or --glob to choose among a folder's"
TABLES = {".csv": "comma", ".tsv": "tab"}
AGAIN = "get it again"


@dataclasses.dataclass(frozen=True)
class InputSlice:
    """What one reader reads.

    Attributes:
      kind: text, jsonl, parquet or hf.
      path: of the file, or `-` for standard input; hf: the dataset, as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.
      name: what the sources of its documents begin with.
      start: jsonl: byte at or after which its first line starts; parquet: first row group; hf: which shard.
      stop: the end of what `start` counts, exclusive; None reads to the end. hf: how many shards there are.
      nbytes: about what has to be read, for progress and for balance; 0 where nobody knows.
      version: size and time of the last change of the file, so that a change shows.
      packed: whether the file is compressed, so that it cannot be cut.
      stream: whether it is a pipe, which can be read only once.
      given: the input that it belongs to, as it was given.
    """

    kind: str
    path: str
    name: str
    start: int = 0
    stop: int | None = None
    nbytes: int = 0
    version: tuple[int, int] = (0, 0)
    packed: bool = False
    stream: bool = False
    given: str = ""

    @property
    def alone(self) -> bool:
        """Whether nobody knows its size before it is read, so that it makes a shard of its own."""
        return self.kind == "hf" or self.stream


def find_pieces(
    inputs: Iterable[str | Path],
    *,
    format: Format = "auto",
    glob: str = "*",
    out: str | Path | None = None,
    notes: Notes | None = None,
) -> list[InputSlice]:
    """Finds the pieces of the input: files, and shards of datasets.

    Args:
      inputs: files, folders (all files below them, in the order of their names, through symbolic links), `-` or a
        pipe, and datasets as `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`. With Apache Beam also
        `gs://...`. A file that is given twice is read once.
      format: of the files; `auto` goes by the names: .txt, .jsonl, .parquet and so on, or with .gz, .bz2, .xz or
        .zst after it. How a file is compressed, and whether it is Parquet, its bytes decide.
      glob: which files of a folder, by their names.
      out: the folder of the corpus: it is left out where it is in a folder of the input.
      notes: where to say what is left out, and what is read as something else than its name says.

    Raises:
      FileNotFoundError: a file is not there, or a folder has none.
      PermissionError: a file or folder may not be read.
      ValueError: the type of a file is unknown.
    """
    notes = Notes() if notes is None else notes
    walk, pieces, streams, seen = Walk(glob, out, notes), [], set(), set()
    for item in map(str, inputs):
        if item.startswith("hf:") or "://" in item:
            if item in seen:
                notes.add(TWICE, item)
                continue
            seen.add(item)
        if item.startswith("hf:"):
            pieces += [dataclasses.replace(piece, given=item) for piece in _dataset_pieces(item.removeprefix("hf:"))]
        elif "://" in item:
            for path, version in _remote_files(item, glob):
                kind = _kind(path, format)
                packed = path.lower().endswith(COMPRESSED)
                pieces.append(
                    InputSlice(kind, path, path, nbytes=version[0], version=version, packed=packed, given=item)
                )
        elif is_stream(item):
            real = "-" if item in STDIN_NAMES else os.path.realpath(os.path.expanduser(item))
            if real in streams:
                raise ValueError(f"{item}: is given twice, and can be read only once: give it once")
            streams.add(real)
            pieces.append(_stream(item, format))
        else:
            for path, status in walk.files(item):
                kind, packed = _judge(path, status.st_size, format, notes)
                version = (status.st_size, status.st_mtime_ns)
                pieces.append(
                    InputSlice(kind, path, path, nbytes=version[0], version=version, packed=packed, given=item)
                )
    if not pieces:
        raise ValueError(
            "there is no input: give text, JSON lines or Parquet files, folders, or hf:NAME:SPLIT, and then the corpus"
        )
    return pieces


def cut_pieces(pieces: Iterable[InputSlice], nbytes: int) -> list[InputSlice]:
    """Cuts larger pieces into some of about `nbytes` bytes: JSON lines by bytes, Parquet by row groups, others not."""
    cut: list[InputSlice] = []
    for piece in pieces:
        size = piece.nbytes
        if size <= nbytes or piece.kind not in ("jsonl", "parquet") or piece.packed:
            cut.append(piece)
            continue
        units = size if piece.kind == "jsonl" else _row_groups(piece)
        count = min(-(-size // nbytes), max(1, units))
        for i in range(count):
            start, stop = units * i // count, units * (i + 1) // count
            share = size * (i + 1) // count - size * i // count
            cut.append(dataclasses.replace(piece, start=start, stop=stop, nbytes=share))
    return cut


def group_pieces(pieces: Sequence[InputSlice], nbytes: int) -> list[tuple[InputSlice, ...]]:
    """Groups consecutive pieces, at least `nbytes` bytes in each but the last; datasets' and pipes stay alone."""
    groups: list[list[InputSlice]] = []
    total = nbytes
    for piece in pieces:
        if total >= nbytes or piece.alone:
            groups.append([])
            total = 0
        groups[-1].append(piece)
        total += nbytes if piece.alone else piece.nbytes
    return [tuple(group) for group in groups]


def _remote_files(item: str, glob: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The same by Apache Beam, for gs://, s3:// and so on: a file, a pattern, or a folder with / at its end."""
    pattern = f"{item}**" if item.endswith("/") else item
    files = sorted(beam_files().match([pattern])[0].metadata_list, key=lambda file: file.path)
    files = [file for file in files if not item.endswith("/") or fnmatch.fnmatch(file.path.rpartition("/")[2], glob)]
    if not files:
        raise FileNotFoundError(f"{item}: no such file: check the path (a folder ends with /)")
    for file in files:
        yield file.path, _remote_version(file)


def _remote_version(file: Foreign) -> tuple[int, int]:
    return file.size_in_bytes, int(file.last_updated_in_seconds * 1e9)


def file_version(path: str) -> tuple[int, int]:
    """Returns size in bytes and time of the last change in nanoseconds."""
    if "://" in path:
        return _remote_version(beam_files().get_filesystem(path).metadata(path))
    with naming(path):
        stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _kind(path: str, format: Format) -> str:
    """Returns text, jsonl or parquet: the format, or what the name says where that is `auto`."""
    kind = _named(path) if format == "auto" else format
    if kind is None:
        suffix = os.path.splitext(path.lower())[1]
        table = (
            f", and a table of {TABLES[suffix]}s is not read: write it as JSON lines; or" if suffix in TABLES else ":"
        )
        raise ValueError(f"{path}: its type is unknown ({', '.join(SUFFIXES)} are known){table} {TEXT_REMEDY}")
    if kind not in SUFFIXES.values():
        raise ValueError(f"format must be auto, {', '.join(sorted(set(SUFFIXES.values())))}, got {format!r}")
    return kind


def _named(path: str) -> str | None:
    """Returns the kind that a name says."""
    stem, suffix = os.path.splitext(path.lower())
    return SUFFIXES.get(os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix)


def _judge(path: str, size: int, format: Format, notes: Notes) -> tuple[str, bool]:
    """Returns the kind of a file and whether it is compressed: its bytes decide where they can, else its name."""
    with naming(path), open_stored(path) as file:
        head, _ = peek(file)
        file.seek(max(0, size - 4))
        parquet = is_parquet(head) and file.read(4) == head[:4]
    packed = packing(head) is not None
    if format == "auto":
        named = _named(path)
        if parquet != (named == "parquet") and (parquet or is_lines(head)):
            notes.add(RENAMED, path)
            return "parquet" if parquet else "jsonl", False
        if named is None and (what := _inside(path)) is not None:
            raise ValueError(f"{path}: {what}")
    kind = _kind(path, format)
    if not size and kind != "text":  # an empty text is a document that is counted
        notes.add(EMPTY, path)
    if size and not packed and path.lower().endswith(COMPRESSED) and not parquet:
        _check_plain(path, kind, readable=format == "text" or (kind == "jsonl" and is_lines(head)))
        notes.add(NOT_PACKED, path)
    return kind, packed


def _check_plain(path: str, kind: str, *, readable: bool) -> None:
    """Raises ValueError for a file that its name calls compressed, and is neither that nor `readable` as it is."""
    if not readable:
        remedy = f"give --format text to read it as it is, or {AGAIN}" if kind == "text" else AGAIN
        raise ValueError(f"{path}: is damaged or truncated, or was never compressed: its first bytes say so: {remedy}")


def _inside(path: str) -> str | None:
    """Returns what a file is that is not text, after decompression; None where it may be text or is damaged."""
    try:
        with open_binary(path) as file:
            return foreign(peek(file)[0])
    except Exception as error:
        if is_damage(error):
            return None
        raise


def _stream(item: str, format: Format) -> InputSlice:
    """Returns the piece for a pipe; its version is the time, as nothing tells whether its content is the same."""
    if format == "auto":
        raise ValueError(f"{item}: has no name that says what it holds: give --format jsonl or --format text")
    if _kind(item, format) == "parquet":
        raise ValueError(f"{item}: is a pipe, and Parquet is read from its end: write it to a file first")
    path = os.path.expanduser(item)
    return InputSlice(
        format, path, "stdin" if item == "-" else path, version=(0, time.time_ns()), stream=True, given=item
    )


def _row_groups(piece: InputSlice) -> int:
    with open_parquet(piece) as file:
        return file.num_row_groups


@contextlib.contextmanager
def open_parquet(piece: InputSlice) -> Iterator[Foreign]:
    """Opens a Parquet file: a `pyarrow.parquet.ParquetFile`."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{piece.path}: needs the package pyarrow: pip install 'llama_jax[data]'") from error
    with open_binary(piece.path, whole=piece.stop is None) as binary, contextlib.ExitStack() as stack:
        if not binary.seekable():  # it is compressed, and is read from its end
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(binary, unpacked, 1 << 20)
            unpacked.seek(0)
            binary = unpacked
        head, binary = peek(binary)
        if not head.startswith(b"PAR1") and (what := page(head) or foreign(head)) is not None:
            raise ValueError(f"{piece.path}: is not a Parquet file: it {what}")
        try:
            file = ParquetFile(binary)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{piece.path}: is not a Parquet file, or is truncated ({error}): {AGAIN}") from error
        yield file


def open_dataset(spec: str) -> Foreign:
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
    except PermissionError as error:
        raise told(error, f"hf:{spec}") from error
    except Exception as error:
        raise ValueError(
            f"hf:{spec}: cannot be opened ({error}): check its name, configuration and split, and the connection"
        ) from error


def _dataset_pieces(spec: str) -> list[InputSlice]:
    shards = open_dataset(spec).num_shards
    return [InputSlice("hf", spec, f"hf:{spec}", start=i, stop=shards) for i in range(shards)]
