"""Reads Hugging Face folders: `config.json` beside weights in safetensors files, one or many.

A safetensors file is a 64-bit header length, a JSON header (name -> dtype, shape, first and last byte), and
the data, without gaps. With many files, `model.safetensors.index.json` says which tensor is in which.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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
MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONVERT = (
    "convert it where torch is: python -c 'from transformers import AutoModelForCausalLM as M; "
    'M.from_pretrained("FOLDER").save_pretrained("NEW_FOLDER")\''
)


@dataclasses.dataclass(frozen=True)
class HFFolder:
    """An open Hugging Face checkpoint.

    Attributes:
      path: the folder.
      config: the content of config.json.
      tensors: name -> tensor, over all files of the folder; shapes are [out, in].
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_hf(folder: str | Path) -> HFFolder:
    """Opens a Hugging Face folder with safetensors weights. Tensor data is read later, by `Tensor.read`.

    Args:
      folder: holds config.json and model.safetensors, or files named by model.safetensors.index.json, or else
        any *.safetensors files, which are then read together.

    Raises:
      CheckpointError: a file is missing, damaged, cut short or in a format that is not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = _read_json(folder / "config.json", "a Hugging Face folder describes its model there")
    listed = _listed_tensors(folder)
    tensors: dict[str, Tensor] = {}
    home: dict[str, str] = {}
    for file in sorted(set(listed.values())) or _unlisted_files(folder):
        for name, tensor in _read_safetensors(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: {name!r} is in {home[name]} and in {file}; remove the wrong file")
            tensors[name], home[name] = tensor, file
    for name, file in listed.items():
        if home.get(name) != file:
            raise CheckpointError(f"{folder / file}: lacks {name!r}, which {INDEX} says is in it; fetch both again")
    return HFFolder(folder, config, tensors)


def _listed_tensors(folder: Path) -> dict[str, str]:
    """The index's map, tensor name -> file name; empty where there is no index or no need for one."""
    path = folder / INDEX
    if (folder / SINGLE).exists() or not path.exists():
        return {}
    listed = _read_json(path, "").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path}: has no weight_map; {DOWNLOAD_AGAIN}")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: {name!r} is in {file!r}, which is not a file name; {DOWNLOAD_AGAIN}")
    missing = sorted(file for file in set(listed.values()) if not (folder / file).exists())
    if missing:
        raise CheckpointError(f"{folder}: lacks {', '.join(missing)}, named in {INDEX}; fetch the missing files")
    return listed


def _unlisted_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a folder without an index."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    for file in files:
        if part := re.fullmatch(r"(.*)-\d+-of-(\d+)\.safetensors", file):
            stem, total = part[1], part[2]
            found = len(list(folder.glob(f"{stem}-*-of-{total}.safetensors")))
            if found != int(total):
                raise CheckpointError(f"{folder}: has {found} of the {int(total)} parts of {stem}; fetch the others")
    if not files and any(folder.glob("*.bin")):
        raise CheckpointError(f"{folder}: its weights are pickled (.bin), which a later version will read; {CONVERT}")
    if not files:
        raise CheckpointError(f"{folder}: has no .safetensors file; {DOWNLOAD_AGAIN}")
    return files


def _read_json(path: Path, purpose: str) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; {purpose}: fetch it, or give another folder")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); {DOWNLOAD_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object; {DOWNLOAD_AGAIN}")
    return content


class _Entry(NamedTuple):
    """One tensor's entry in a header; `first` and `last` bound its bytes, from the start of the data."""

    first: int
    last: int
    dtype: np.dtype
    shape: list[int]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    data = map_file(path)
    length = int.from_bytes(data[:8].tobytes(), "little")
    start = 8 + length
    if start > len(data) or length > MAX_HEADER:
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
            raise _damaged(path, f"{name!r} begins at byte {entry.first} of the data, where {end} is expected")
        end = entry.last
        stored = data[start + entry.first : start + entry.last].view(entry.dtype)
        try:
            tensors[name] = plain_tensor(name, stored.reshape(entry.shape))
        except (ValueError, OverflowError) as error:
            raise _damaged(path, f"{name!r} has the impossible shape {entry.shape}") from error
    return tensors


def _check_entry(path: Path, name: str, entry: Any) -> _Entry:
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            raise _damaged(path, f"the entry of {name!r} lacks dtype, shape or data_offsets")
    if kind not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"{path}: {name!r} is stored as {kind}; supported are {known}: use another file")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise _damaged(path, f"{name!r} has the impossible shape {shape}")
    if first < 0 or last - first != math.prod(shape) * DTYPES[kind].itemsize:
        raise _damaged(path, f"{name!r}, {kind} of shape {shape}, cannot lie at bytes {first} to {last}")
    return _Entry(first, last, DTYPES[kind], shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(result := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return result


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}; {DOWNLOAD_AGAIN}")
