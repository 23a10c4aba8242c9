"""torch's files (`.pth`, `.bin`), read and written without torch, and without running code in them.

Such a file is a zip archive whose members are stored, not compressed: `*/data.pkl` describes a dictionary of tensors,
and `*/data/N` is storage N, plain numbers that any number of tensors may be views of. `unpickle` reads the former.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.weights import foreign
from llama_jax.weights.sink import Entry, write_pieces
from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError, Tensor, map_file, plain_tensor
from llama_jax.weights.unpickle import DTYPES as DTYPES
from llama_jax.weights.unpickle import MAX_PICKLE as MAX_PICKLE
from llama_jax.weights.unpickle import STORAGES, Call, unpickle

# Entries that hold the model where a file holds more, as DeepSpeed ("module"), Lightning ("state_dict") and others do.
CONTAINERS = ("model", "state_dict", "module", "model_state_dict", "model_state", "network", "weights")
DEPTH = 8  # of dictionaries inside each other

MAX_DIRECTORY = 4_000_000  # bytes; the 405B model's has 100 KB
SAVE_AGAIN = "load it with torch.load(..., weights_only=True) and torch.save it again, with torch 1.6 or later"


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Opens what `torch.save` wrote: a dictionary of tensors, alone or as an entry of another, such as "model".

    Args:
      path: the file.

    Returns:
      Name -> tensor, in the order of the file, by the strides that it states; `Tensor.read` gives views of the mapped
      file. Entries that are not tensors are left out, and so is a trainer's state beside the model.

    Raises:
      CheckpointError: not such a file, damaged, cut short, of an unsupported kind, or with code in it.
    """
    data = map_file(path)
    members, crc = _read_zip(path, data)
    if members.get("byteorder", np.empty(0, np.uint8)).tobytes() == b"big":
        raise CheckpointError(
            f"{path}: its numbers are big-endian; load it on such a machine and save it as safetensors"
        )
    content = _model_in(unpickle(path, members, crc))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no dictionary of tensors; save the model's state_dict()")
    if {"state", "param_groups"} <= content.keys():
        raise CheckpointError(f"{path}: the state of an optimizer, not of a model; give the model's own file")
    return {name: plain_tensor(name, array) for name, array in _arrays(content)}


def _model_in(content: Any) -> Any:
    """Returns the dictionary of the model, where a trainer saved it among others."""
    for _ in range(DEPTH):
        found = [key for key in CONTAINERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
        if not found:
            break
        content = content[found[0]]
    return content


def _arrays(content: dict[Any, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and array of each tensor; of dictionaries inside each other only where there is none at the top."""
    waiting, seen = [("", content)], {id(content)}  # each once: a hostile file holds one under many names
    while waiting:
        prefix, inner = waiting.pop(0)
        items = {f"{prefix}{name}": value for name, value in inner.items() if isinstance(name, str)}
        found = [(name, value) for name, value in items.items() if isinstance(value, np.ndarray)]
        yield from found
        if found and not prefix:
            return
        for name, value in items.items():
            if isinstance(value, dict) and id(value) not in seen and name.count(".") < DEPTH:
                seen.add(id(value))
                waiting.append((f"{name}.", value))


# ---------------------------------------------------------------------------------------------------------------------
# The zip archive
# ---------------------------------------------------------------------------------------------------------------------

_LOCAL = struct.Struct("<4s5H3I2H")  # signature, version, flags, method, time, date, crc, sizes, lengths
_CENTRAL = struct.Struct("<4s6H3I5H2I")


class _Directory(io.FileIO):
    """The file as `zipfile` sees it: no part that it asks for is large."""

    def read(self, size: int | None = -1, /) -> bytes | Any:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory has {size} bytes, more than {MAX_DIRECTORY}")
        return super().read(size)


def _read_zip(path: Path, data: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Returns the archive's members, without their common folder, name -> uint8 view of `data`; and data.pkl's CRC."""
    infos, end = _directory(path, data)
    members: dict[str, np.ndarray] = {}
    before = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        start = _content_start(path, data, info, before, end)
        before = start + info.file_size
        if info.filename in members:
            raise _misplaced(path, info)
        members[info.filename] = data[start:before]
    roots = [match[1] for name in members if (match := re.fullmatch(r"([^/]*/|)data\.pkl", name))]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: a zip archive without data.pkl, not a torch file; give a .pth or .bin file")
    crc = next(info.CRC for info in infos if info.filename == f"{roots[0]}data.pkl")
    return {name.removeprefix(roots[0]): member for name, member in members.items() if name.startswith(roots[0])}, crc


def _directory(path: Path, data: np.ndarray) -> tuple[list[zipfile.ZipInfo], int]:
    """Returns what the archive says of its members, and where they end."""
    if data[:4].tobytes() != b"PK\3\4":
        if data[:1].tobytes() == b"\x80" or data[257:262].tobytes() == b"ustar":
            raise CheckpointError(f"{path}: a torch file of the old format, from before version 1.6; {SAVE_AGAIN}")
        raise CheckpointError(f"{path}: not a torch file; {foreign.answer(data[:64].tobytes()) or DOWNLOAD_AGAIN}")
    try:
        with _Directory(path) as file, zipfile.ZipFile(file) as archive:
            return archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, OSError, struct.error) as error:
        raise _damaged(path, f"its zip directory cannot be read ({error})") from error


def _content_start(path: Path, data: np.ndarray, info: zipfile.ZipInfo, before: int, end: int) -> int:
    """Returns where a member's content begins, behind its own header; all of it is between `before` and `end`."""
    name, start = f"member {info.filename[:100]!r}", info.header_offset
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise CheckpointError(f"{path}: {name} is compressed or encrypted, which torch never does; {SAVE_AGAIN}")
    if start < before or start + _LOCAL.size > end:
        raise _damaged(path, f"{name} is said to begin at byte {start}, which cannot be")
    signature, *_, name_length, extra_length = _LOCAL.unpack(data[start : start + _LOCAL.size].tobytes())
    start += _LOCAL.size + name_length + extra_length
    if signature != b"PK\3\4" or start + info.file_size > end:
        raise _misplaced(path, info)
    return start


def _misplaced(path: Path, info: zipfile.ZipInfo) -> CheckpointError:
    name = f"member {info.filename[:100]!r} of {info.file_size} bytes"
    return _damaged(path, f"{name} is not where its directory says")


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}; {DOWNLOAD_AGAIN}")


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------

ROOT = "archive/"  # any name does
ALIGNMENT = 64  # bytes; torch's own
_ZIP64 = 45  # the version of zip that a reader needs
_1980 = (0, 0x21)  # the first time and day that zip can say, so that the same weights give the same file


def write_torch_file(path: Path, entries: Sequence[Entry], advance: Callable[[int], None]) -> None:
    """Writes a dictionary of tensors that `torch.load(path, weights_only=True)` reads, with `mmap=True` too.

    Every tensor has its own storage, aligned to 64 bytes. All sizes are written in their 64-bit form, however small:
    members may be of any size, and there is one way to write them.

    Args:
      path: of a new file.
      entries: its content, in this order; of the dtypes of `STORAGES`.
      advance: called with the number of bytes just written.
    """
    with _ZipWriter(io.FileIO(path, "xb")) as file:
        file.add("data.pkl", _pickled(entries))
        file.add("byteorder", b"little")
        for key, entry in enumerate(entries):
            with file.member(f"data/{key}", entry.nbytes):
                write_pieces(file, entry, advance)
        file.add("version", b"3\n")
        file.finish()


def _pickled(entries: Sequence[Entry]) -> bytes:
    """Returns torch's pickle of a dictionary of contiguous tensors."""

    def value(x: object) -> bytes:  # of plain Python, without the marks at both ends of a pickle
        return pickle.dumps(x, protocol=2)[2:-1]

    def name(x: str) -> bytes:
        return b"c" + x.replace(" ", "\n").encode() + b"\n"

    storages = {dtype: storage for storage, dtype in STORAGES.items()}
    empty_dict = name(Call.DICT) + b")R"
    parts = [b"\x80\2", empty_dict, b"("]
    for key, entry in enumerate(entries):
        storage = b"(" + value("storage") + name(storages[entry.dtype])
        storage += value(str(key)) + value("cpu") + value(math.prod(entry.shape)) + b"tQ"
        strides = tuple(math.prod(entry.shape[axis + 1 :]) for axis in range(len(entry.shape)))
        arguments = storage + value(0) + value(entry.shape) + value(strides) + value(False) + empty_dict
        parts += [value(entry.name), name(Call.TENSOR), b"(", arguments, b"tR"]
    return b"".join([*parts, b"u."])


class _ZipWriter(io.BufferedWriter):
    """A zip archive that is being written; keeps the CRC-32 of its content.

    `zipfile` aligns nothing, and copies what it writes.
    """

    crc = 0

    def __init__(self, raw: io.FileIO):
        super().__init__(raw)
        self.directory: list[bytes] = []

    def write(self, buffer: Any, /) -> int:
        self.crc = zlib.crc32(buffer, self.crc)
        return super().write(buffer)

    def add(self, name: str, content: bytes) -> None:
        with self.member(name, len(content)):
            self.write(content)

    @contextlib.contextmanager
    def member(self, name: str, size: int) -> Iterator[None]:
        """Writes a member's header before and its checksum after the block, which writes `size` bytes."""
        encoded, start = (ROOT + name).encode(), self.tell()
        sizes = struct.pack("<2H2Q", 1, 16, size, size)
        content = start + _LOCAL.size + len(encoded) + len(sizes) + 4
        padding = -content % ALIGNMENT
        common = (_ZIP64, 0, 0, *_1980)
        full = (0xFFFFFFFF, 0xFFFFFFFF)  # look into the 64-bit fields

        def header(crc: int) -> bytes:
            return _LOCAL.pack(b"PK\3\4", *common, crc, *full, len(encoded), len(sizes) + 4 + padding)

        self.write(header(0) + encoded + sizes + struct.pack("<2sH", b"FB", padding) + bytes(padding))
        self.crc = 0
        yield
        crc = self.crc
        self.seek(start)
        self.write(header(crc))
        self.seek(content + padding + size)
        fields = struct.pack("<2H3Q", 1, 24, size, size, start)
        entry = (b"PK\1\2", _ZIP64, *common, crc, *full, len(encoded), len(fields), 0, 0, 0, 0, 0xFFFFFFFF)
        self.directory.append(_CENTRAL.pack(*entry) + encoded + fields)

    def finish(self) -> None:
        """Writes the directory, and the records that end the archive."""
        start, count, directory = self.tell(), len(self.directory), b"".join(self.directory)
        self.write(directory)
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, _ZIP64, _ZIP64, 0, 0, count, count, len(directory), start)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1)
        full = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        self.write(end + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *full, 0))
