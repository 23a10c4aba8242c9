"""Reads GGUF, the file format of llama.cpp: metadata, and tensors that are dequantized as they are read.

A checkpoint may be split in files of which each has some of the tensors, and the first one the metadata.

Layout, little-endian: "GGUF", version, tensor count, metadata count, metadata (key, type, value), tensor
descriptions (name, dimensions innermost first, type, offset), padding, data. Every count, length and offset
is checked against the size of the file before anything of that size is made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.typing import JsonObject
from llama_jax.weights.dequantize import BLOCK_FORMATS, dequantize
from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError, Index, Tensor, exists, map_file, plain_tensor

# By ggml_type; 4, 5, 31 to 33 and 36 to 38 were formats that llama.cpp has removed.
TYPE_NAMES = {
    **dict(enumerate(["F32", "F16", "Q4_0", "Q4_1"])),
    **dict(enumerate(["Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"], start=6)),
    **dict(enumerate(["IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"], start=16)),
    **dict(enumerate(["I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"], start=24)),
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
PLAIN_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
}
SUPPORTED = ", ".join([*PLAIN_DTYPES, *BLOCK_FORMATS])
MAX_DIMS = 4  # GGML_MAX_DIMS

# Metadata value types: numbers by their dtype, and three others.
NUMBER_DTYPES = {
    **dict(enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4"])),
    **dict(enumerate(["<u8", "<i8", "<f8"], start=10)),
}
BOOL, STRING, ARRAY = 7, 8, 9

FAULTY = "its converter was at fault, or the file is damaged: use another conversion of this model"
OTHER_FILE = "use another conversion of this model"
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
ONE_SPLIT = "put the parts of one model side by side, under the names that they were made with"
REQUANTIZE = "use another file of this model, or convert it: `llama-quantize --allow-requantize IN OUT Q8_0`"


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file.

    Attributes:
      path: the file.
      metadata: key -> str, int, float or bool; arrays are list[str], or 1-D and of the stored dtype.
      tensors: name -> tensor, in the order of the file; shapes are [out, in].
    """

    path: Path
    metadata: JsonObject
    tensors: dict[str, Tensor]


def read_gguf(path: str | Path) -> GGUFFile:
    """Opens a GGUF file, version 2 or 3, little-endian. `Tensor.read` reads its data later.

    Args:
      path: the file, or any part of a split checkpoint, whose parts are side by side.

    Returns:
      Metadata and tensors. Quantized tensors read as float32, bit for bit what llama.cpp computes.

    Raises:
      CheckpointError: not such a file, damaged, cut short, a part is missing, or a tensor has an unsupported format.
    """
    path = Path(path)
    file = _read_file(path)
    count = file.metadata.get("split.count", 1)
    return file if count in (0, 1) else _join_parts(path, count)  # llama.cpp writes 0 when it merges


def _read_file(path: Path) -> GGUFFile:
    data = map_file(path)
    header = _Header(path, data)
    if data[:4].tobytes() != b"GGUF":
        raise header.error("not a GGUF file: it does not begin with the bytes GGUF", "give a .gguf file")
    header.take(4)
    _check_version(header)
    num_tensors, num_values = header.number("<u8"), header.number("<u8")
    metadata = _read_metadata(header, num_values)
    tensors = _read_tensors(header, num_tensors, metadata.get("general.alignment", 32), data)
    return GGUFFile(path, metadata, tensors)


def _join_parts(path: Path, count: int) -> GGUFFile:
    """Reads all parts of a split checkpoint as one file."""
    name = PART_NAME.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise CheckpointError(
            f"{path}: one of the {count} parts of a split checkpoint, whose names end in -00001-of-{count:05}.gguf;"
            " give it its name back"
        )
    paths = [path.with_name(f"{name[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in paths if not exists(part)]
    if missing:
        raise CheckpointError(f"{path.parent}: lacks {len(missing)} of {count} parts, first {missing[0]}; fetch them")
    parts = [_read_file(part) for part in paths]
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        if part.metadata.get("split.no") != i or part.metadata.get("split.count") != count:
            raise CheckpointError(f"{part.path}: does not say that it is part {i + 1} of {count}; {ONE_SPLIT}")
        if clash := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{part.path}: {min(clash)!r} is in another part too; {ONE_SPLIT}")
        tensors |= part.tensors
    expected = parts[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(f"{path}: the parts hold {len(tensors)} tensors, {expected} expected; {ONE_SPLIT}")
    return GGUFFile(paths[0], parts[0].metadata, tensors)


class _Header:
    """Takes the fields of a header in order; none may reach past the end of the file."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path = path
        self.data = data.data
        self.position = 0

    def error(self, problem: str, remedy: str = DOWNLOAD_AGAIN) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}; {remedy}")

    def cut_off(self, position: int) -> CheckpointError:
        return self.error(f"its header continues at byte {position}, but the file ends at {len(self.data)}")

    def take(self, nbytes: int) -> int:
        """Moves past `nbytes` bytes and returns where they start."""
        start = self.position
        if nbytes > len(self.data) - start:
            raise self.cut_off(start)
        self.position += nbytes
        return start

    def numbers(self, count: int, dtype: str) -> np.ndarray:
        start = self.take(count * np.dtype(dtype).itemsize)
        return np.frombuffer(self.data, dtype, count, start).copy()

    def number(self, dtype: str) -> int:
        return self.numbers(1, dtype).item()

    def strings(self, count: int) -> list[str]:
        """Strings, each a 64-bit length and UTF-8. A vocabulary has 10^5 and more: one loop without calls."""
        data, position, end = self.data, self.position, len(self.data)
        if count * 8 > end - position:
            raise self.cut_off(position)
        length_at = struct.Struct("<Q").unpack_from
        result = []
        try:
            for _ in range(count):
                start = position + 8
                stop = start + length_at(data, position)[0]
                if stop > end:
                    raise self.cut_off(position)
                result.append(str(data[start:stop], "utf-8"))
                position = stop
        except struct.error as error:
            raise self.cut_off(position) from error
        except UnicodeDecodeError as error:
            raise self.error(f"the string at byte {position} is not UTF-8", FAULTY) from error
        self.position = position
        return result

    def string(self) -> str:
        return self.strings(1)[0]


def _check_version(header: _Header) -> None:
    version = header.number("<u4")
    if version & 0xFFFF == 0:
        raise header.error("a big-endian GGUF file", "convert it with llama.cpp's gguf_convert_endian.py")
    if version not in (2, 3):
        raise header.error(f"GGUF version {version}; versions 2 and 3 are supported", OTHER_FILE)


def _read_metadata(header: _Header, count: int) -> JsonObject:
    metadata: JsonObject = {}
    for _ in range(count):  # a false count meets the end of the file
        key = header.string()
        if key in metadata:
            raise header.error(f"metadata {key!r} is there twice", FAULTY)
        kind = header.number("<u4")
        if kind == ARRAY:
            kind, length = header.number("<u4"), header.number("<u8")
            metadata[key] = _read_values(header, key, kind, length)
        else:
            value = _read_values(header, key, kind, 1)[0]
            metadata[key] = value if kind == STRING else value.item()
    return metadata


def _read_values(header: _Header, key: str, kind: int, count: int) -> Any:
    if kind == STRING:
        return header.strings(count)
    if kind == BOOL:
        values = header.numbers(count, "u1")
        if values.max(initial=0) > 1:
            raise header.error(f"metadata {key!r} holds a truth value other than 0 and 1", FAULTY)
        return values.astype(bool)
    if kind in NUMBER_DTYPES:
        return header.numbers(count, NUMBER_DTYPES[kind])
    if kind == ARRAY:
        raise header.error(f"metadata {key!r} is an array of arrays, which no Llama needs", OTHER_FILE)
    raise header.error(f"metadata {key!r} has the unknown value type {kind}", FAULTY)


class _Place(NamedTuple):
    """Where a tensor's bytes are stored, from the start of the data, and in which layout.

    The shape is that of the numbers, or uint8 [..., blocks in a row, bytes in a block].
    """

    offset: int
    kind: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def _read_tensors(header: _Header, count: int, alignment: Any, data: np.ndarray) -> dict[str, Tensor]:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise header.error(f"general.alignment is {alignment!r}, not a power of two", FAULTY)
    places: dict[str, _Place] = {}
    for _ in range(count):
        name = header.string()
        if name in places:
            raise header.error(f"tensor {name!r} is there twice", FAULTY)
        places[name] = _read_place(header, name)

    start = -(-header.position // alignment) * alignment
    _check_places(header, places, alignment, start)
    tensors: dict[str, Tensor] = {}
    for name, place in places.items():
        stored = data[start + place.offset : start + place.end].view(place.dtype).reshape(place.shape)
        make = plain_tensor if place.kind in PLAIN_DTYPES else functools.partial(_quantized_tensor, place.kind)
        tensors[name] = make(name, stored)
    return tensors


def _read_place(header: _Header, name: str) -> _Place:
    num_dims = header.number("<u4")
    if num_dims > MAX_DIMS:
        raise header.error(f"tensor {name!r} has {num_dims} dimensions, where {MAX_DIMS} are possible", FAULTY)
    shape = tuple(header.numbers(num_dims, "<u8").tolist()[::-1])
    number, offset = header.number("<u4"), header.number("<u8")
    if 0 in shape:
        raise header.error(f"tensor {name!r} has the impossible shape {shape}", FAULTY)
    kind = TYPE_NAMES.get(number, f"type {number}, which is unknown")
    if kind not in PLAIN_DTYPES and kind not in BLOCK_FORMATS:
        raise header.error(f"tensor {name!r} is stored as {kind}; supported are {SUPPORTED}", REQUANTIZE)
    if kind in BLOCK_FORMATS and (not shape or shape[-1] % BLOCK_FORMATS[kind].elements):
        blocks = f"in blocks of {BLOCK_FORMATS[kind].elements}"
        raise header.error(f"tensor {name!r} of shape {shape} cannot be {kind}, {blocks}", FAULTY)
    return _Place(offset, kind, *stored_layout(kind, shape))


def stored_layout(kind: str, shape: tuple[int, ...]) -> tuple[np.dtype, tuple[int, ...]]:
    """Returns how a GGML type stores numbers of that shape: dtype and shape, uint8 [..., blocks, bytes] for blocks."""
    if kind in PLAIN_DTYPES:
        return PLAIN_DTYPES[kind], shape
    block = BLOCK_FORMATS[kind]
    return np.dtype(np.uint8), (*shape[:-1], shape[-1] // block.elements, block.nbytes)


def _check_places(header: _Header, places: dict[str, _Place], alignment: int, start: int) -> None:
    end, before = 0, ""
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        if place.offset % alignment:
            raise header.error(f"tensor {name!r} is at {place.offset}, which is not aligned to {alignment}", FAULTY)
        if place.offset < end:
            raise header.error(f"tensors {before!r} and {name!r} overlap", FAULTY)
        end, before = place.end, name
        if start + end > len(header.data):
            size = len(header.data)
            raise header.error(f"tensor {name!r} needs a file of {start + end} bytes, and this one has {size}")


def _quantized_tensor(kind: str, name: str, blocks: np.ndarray) -> Tensor:
    """Returns a tensor stored as blocks: uint8 [..., blocks in a row, bytes in a block], a view of the file."""
    elements = BLOCK_FORMATS[kind].elements
    *leading, row_blocks, _ = blocks.shape
    shape = (*leading, row_blocks * elements)

    def read(index: Index) -> np.ndarray:
        if len(index) < len(shape):
            return dequantize(blocks[index], kind)
        rows, columns = index[:-1], range(shape[-1])[index[-1]]
        if not columns:
            return np.empty((*blocks[rows].shape[:-2], 0), np.float32)
        first, last = (column // elements for column in sorted((columns[0], columns[-1])))
        values = dequantize(blocks[(*rows, slice(first, last + 1))], kind)
        start, stop = columns.start - first * elements, columns.stop - first * elements
        return values[..., start : stop if stop >= 0 else None : columns.step]

    return Tensor(name, shape, np.dtype(np.float32), blocks.nbytes, read)
