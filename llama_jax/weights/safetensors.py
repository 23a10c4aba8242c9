"""safetensors files: tensors that are views of the mapped file, and a writer that makes them piece by piece.

A file is a 64-bit header length, a JSON header (name -> dtype, shape, first and last byte), and the data, without gaps.
The library of that name reads whole tensors; ours reads the pages that a sharding needs, and writes tensors
that never exist as a whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.typing import JsonObject
from llama_jax.weights import foreign
from llama_jax.weights.sink import Entry, write_pieces
from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError, Tensor, map_file, plain_tensor

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# Read so that the diagnosis can name them; no Llama has such weights.
OTHER_DTYPES = {
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "C64": np.dtype("<c8"),
    "F8_E8M0": np.dtype("u1"),
}
FAULTY = "the program that wrote it was at fault, or the file is damaged: take another file of this model"
MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit


class _Entry(NamedTuple):
    """One tensor's entry in a header; `first` and `last` bound its bytes, from the start of the data."""

    first: int
    last: int
    dtype: np.dtype
    shape: list[int]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Opens a file; `Tensor.read` reads its data later.

    Raises:
      CheckpointError: damaged, cut short, with overlapping tensors, or with a dtype that is not supported.
    """
    data = map_file(path)
    length = int.from_bytes(data[:8].tobytes(), "little")
    start = 8 + length
    if start > len(data) or length > MAX_HEADER:
        if data[8:9].tobytes() != b"{" and (other := foreign.answer(data[:64].tobytes())):
            raise CheckpointError(f"{path}: {other}")
        raise _damaged(path, f"a header of {length} bytes is announced, in a file of {len(data)}")
    try:
        header = json.loads(data[8:start].tobytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)

    entries = {name: _check_entry(path, name, entry) for name, entry in header.items()}
    size = start + max((entry.last for entry in entries.values()), default=0)
    if size != len(data):
        raise _damaged(path, f"{size} bytes are expected, and the file has {len(data)}")
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][:2]):
        if entry.first != end:
            raise _damaged(path, f"{name!r} begins at byte {entry.first} of the data, where {end} is expected", FAULTY)
        end = entry.last
        stored = data[start + entry.first : start + entry.last].view(entry.dtype)
        try:
            tensors[name] = plain_tensor(name, stored.reshape(entry.shape))
        except (ValueError, OverflowError) as error:
            raise _damaged(path, f"{name!r} has the impossible shape {entry.shape}", FAULTY) from error
    return tensors


def _check_entry(path: Path, name: str, entry: Any) -> _Entry:
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            raise _damaged(path, f"the entry of {name!r} lacks dtype, shape or data_offsets", FAULTY)
    dtype = DTYPES.get(kind) or OTHER_DTYPES.get(kind)
    if dtype is None:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"{path}: {name!r} is stored as {kind}; supported are {known}: use another file")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise _damaged(path, f"{name!r} has the impossible shape {shape}", FAULTY)
    if first < 0 or last - first != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"{name!r}, {kind} of shape {shape}, cannot be stored at bytes {first} to {last}", FAULTY)
    return _Entry(first, last, dtype, shape)


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    if len(result := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return result


def _damaged(path: Path, problem: str, remedy: str = DOWNLOAD_AGAIN) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}; {remedy}")


def write_safetensors(
    path: Path, entries: Sequence[Entry], advance: Callable[[int], None], *, metadata: Mapping[str, str]
) -> None:
    """Writes a file, tensor by tensor.

    Args:
      path: of a new file.
      entries: what it shall hold, in this order.
      advance: called with the number of bytes just written.
      metadata: goes into the header; transformers wants {"format": "pt"}.
    """
    names = {dtype: kind for kind, dtype in DTYPES.items()}
    header: JsonObject = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        first, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": names[entry.dtype], "shape": list(entry.shape), "data_offsets": [first, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the data is aligned
    with path.open("xb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in entries:
            write_pieces(file, entry, advance)
