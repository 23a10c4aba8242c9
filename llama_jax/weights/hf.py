"""Reads Hugging Face folders: `config.json` beside weights in safetensors files, one or many.

A safetensors file is a 64-bit header length, a JSON header (name -> dtype, shape, first and last byte), and the
data, without gaps. With many files, `model.safetensors.index.json` says which tensor is in which.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError, MappedTensor, Tensor, map_file

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
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONVERT = (
    "convert them once, where torch is installed: python -c 'from transformers import AutoModelForCausalLM as M; "
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
            raise CheckpointError(f"{path}: places {name!r} in {file!r}, which is not a file name; {DOWNLOAD_AGAIN}")
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
        numbered = re.fullmatch(r"(.*-)\d+(-of-(\d+)\.safetensors)", file)
        if numbered and (found := len([other for other in files if other.endswith(numbered[2])])) != int(numbered[3]):
            raise CheckpointError(f"{folder}: has {found} of the {int(numbered[3])} files {numbered[1]}*{numbered[2]}; fetch the others")
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


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    def damaged(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: {problem}; {DOWNLOAD_AGAIN}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(pairs)) < len(pairs):
            raise damaged("its header names something twice")
        return result

    data = map_file(path)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > len(data) - 8:
        raise damaged(f"not a safetensors file, or cut short: a header of {length} bytes in {len(data)}")
    try:
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    header.pop("__metadata__", None)

    entries = {name: _entry(entry) for name, entry in header.items()}
    data = data[8 + length :]
    ...
