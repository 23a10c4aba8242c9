"""The bytes of a file, a pipe or an object far away, decompressed by what they begin with."""

from __future__ import annotations

import bz2
import contextlib
import functools
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from llama_jax.data.prepare.signatures import HEAD, packing
from llama_jax.data.prepare.system import naming
from llama_jax.typing import Foreign

STDIN = "-"
STDIN_NAMES = (STDIN, "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
NESTED = 3  # a .gz in a .gz happens
FED = 1 << 13  # bytes: what they can become fits into memory


@contextlib.contextmanager
def open_binary(path: str, *, whole: bool = True) -> Iterator[IO[bytes]]:
    """Opens a file, and decompresses it if its bytes say that it is compressed.

    Args:
      path: a file, `-` for standard input, or a URL that Apache Beam opens.
      whole: False where only a part of the file is wanted, which a compressed one does not have.

    Raises:
      OSError: as the system says, with the file's name.
      ValueError: a part of a compressed file is wanted, or a package is missing.
    """
    with naming(path), contextlib.ExitStack() as stack:
        file: Foreign = stack.enter_context(open_stored(path))
        for _ in range(NESTED):
            head, file = peek(file)
            if (kind := packing(head)) is None:
                break
            if not whole:
                raise ValueError(f"{path}: is compressed by {kind}, which its name does not say: give it its suffix")
            file = stack.enter_context(_unpacked(kind, file, path))
        yield file


def open_stored(path: str) -> Foreign:
    """Opens a file as it is stored."""
    if "://" in path:
        return beam_files().open(path, compression_type="uncompressed")
    if path in STDIN_NAMES:
        return open(0, "rb", closefd=False)
    return open(path, "rb")


def peek(file: Foreign) -> tuple[bytes, Foreign]:
    """Returns the first bytes of a file, and the file from its beginning."""
    if file.seekable():
        at = file.tell()
        head = file.read(HEAD)
        file.seek(at)
        return head, file
    head = file.read(HEAD)
    return head, io.BufferedReader(_Joined(head, file), 1 << 20)


def is_damage(error: Exception) -> bool:
    """Tells whether an error comes from the content of a compressed or Parquet file."""
    if isinstance(error, (EOFError, zlib.error, lzma.LZMAError)):
        return True
    if type(error) is OSError and error.errno is None:
        return True
    return type(error).__module__.partition(".")[0] in ("zstd", "zstandard", "compression", "_zstd", "pyarrow")


def beam_files() -> Foreign:
    """Apache Beam's access to files anywhere."""
    try:
        from apache_beam.io.filesystems import FileSystems  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("paths such as gs://... need Apache Beam: pip install 'llama_jax[beam]'") from error
    return FileSystems


def _unpacked(kind: str, file: Foreign, path: str) -> io.BufferedReader:
    new = {
        "gzip": lambda: functools.partial(zlib.decompressobj, 16 + zlib.MAX_WBITS),
        "bz2": lambda: bz2.BZ2Decompressor,
        "xz": lambda: lzma.LZMADecompressor,
        "lzma": lambda: lzma.LZMADecompressor,
        "zstd": lambda: _zstd(path),
    }[kind]()
    return io.BufferedReader(_Unpacked(file, new, padding=b"\0" if kind in ("gzip", "xz") else b""), 1 << 20)


def _zstd(path: str) -> Callable[[], Foreign]:
    try:
        import zstandard  # pyright: ignore[reportMissingImports]

        return lambda: zstandard.ZstdDecompressor().decompressobj()
    except ImportError:
        try:
            from compression import zstd  # pyright: ignore[reportMissingImports]  # Python 3.14
        except ImportError as error:
            raise ValueError(f"{path}: needs the package zstandard: pip install zstandard") from error
        return zstd.ZstdDecompressor


class _Joined(io.RawIOBase):
    """Some bytes that were read already, and then the rest of their file."""

    def __init__(self, head: bytes, file: Foreign):
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._head[: len(buffer)] or self._file.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


class _Unpacked(io.RawIOBase):
    """Compressed streams, one after the other; one that breaks off or is followed by other bytes is an error."""

    def __init__(self, file: Foreign, new: Callable[[], Foreign], *, padding: bytes = b""):
        self._file, self._new, self._padding = file, new, padding
        self._decoder: Foreign = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            data = self._file.read(FED)
            if self._decoder is not None and self._decoder.eof:
                data = self._decoder.unused_data + data
                while self._padding and data and not data.strip(self._padding):
                    data = self._file.read(FED)
                data = data.lstrip(self._padding) if self._padding else data
                self._decoder = None
                if not data:
                    return 0
            if not data:
                if self._decoder is not None:
                    raise EOFError("compressed file ended before the end of its stream")
                return 0
            if self._decoder is None:
                self._decoder = self._new()
            self._ready = memoryview(self._decoder.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
