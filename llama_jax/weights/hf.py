"""Reads Hugging Face folders: `config.json` beside weights in safetensors files or torch's older `.bin` files.

With many files, an index (`model.safetensors.index.json`) says which tensor is in which.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.weights.safetensors import read_safetensors
from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError, Tensor
from llama_jax.weights.torch_file import read_torch_file


class _Kind(NamedTuple):
    """How a folder spells one kind of weight file."""

    single: str
    suffix: str
    read: Callable[[Path], dict[str, Tensor]]

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"


SAFETENSORS = _Kind("model.safetensors", ".safetensors", read_safetensors)
TORCH = _Kind("pytorch_model.bin", ".bin", read_torch_file)


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
    """Opens a Hugging Face folder. Tensor data is read later, by `Tensor.read`.

    Args:
      folder: holds config.json and model.safetensors, or files named by model.safetensors.index.json, or else
        any *.safetensors files, which are then read together; where it has none, pytorch_model.bin likewise.

    Raises:
      CheckpointError: a file is missing, damaged, cut short or in a format that is not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = read_json(folder / "config.json", "a Hugging Face folder describes its model there")
    kind = _kind(folder)
    listed = _listed_tensors(folder, kind)
    tensors: dict[str, Tensor] = {}
    home: dict[str, str] = {}
    for file in sorted(set(listed.values())) or _unlisted_files(folder, kind):
        for name, tensor in kind.read(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: {name!r} is in {home[name]} and in {file}; remove the wrong file")
            tensors[name], home[name] = tensor, file
    for name, file in listed.items():
        if home.get(name) != file:
            raise CheckpointError(
                f"{folder / file}: lacks {name!r}, which {kind.index} says is in it; fetch both again"
            )
    return HFFolder(folder, config, tensors)


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """Reads a JSON object; `purpose` says, where the file is missing, what it is for.

    Raises:
      CheckpointError: no such file, or not a JSON object.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; {purpose}: fetch it, or give another folder")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); {DOWNLOAD_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object; {DOWNLOAD_AGAIN}")
    return content


def _kind(folder: Path) -> _Kind:
    """safetensors, unless there are only torch's files (a folder may have both: the same weights)."""
    new = any(folder.glob("*.safetensors")) or (folder / SAFETENSORS.index).exists()
    old = any(folder.glob("pytorch_model*.bin")) or (folder / TORCH.index).exists()
    return TORCH if old and not new else SAFETENSORS


def _listed_tensors(folder: Path, kind: _Kind) -> dict[str, str]:
    """The index's map, tensor name -> file name; empty where there is no index or no need for one."""
    path = folder / kind.index
    if (folder / kind.single).exists() or not path.exists():
        return {}
    listed = read_json(path, "").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path}: has no weight_map; {DOWNLOAD_AGAIN}")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: {name!r} is in {file!r}, which is not a file name; {DOWNLOAD_AGAIN}")
    missing = sorted(file for file in set(listed.values()) if not (folder / file).exists())
    if missing:
        raise CheckpointError(f"{folder}: lacks {', '.join(missing)}, named in {kind.index}; fetch the missing files")
    return listed


def _unlisted_files(folder: Path, kind: _Kind) -> list[str]:
    """Names of the weight files of a folder without an index."""
    if (folder / kind.single).exists():
        return [kind.single]
    files = sorted(path.name for path in folder.glob(f"*{kind.suffix}"))
    for file in files:
        if part := re.fullmatch(rf"(.*)-\d+-of-(\d+)\{kind.suffix}", file):
            stem, total = part[1], part[2]
            found = len(list(folder.glob(f"{stem}-*-of-{total}{kind.suffix}")))
            if found != int(total):
                raise CheckpointError(f"{folder}: has {found} of the {int(total)} parts of {stem}; fetch the others")
    if not files:
        raise CheckpointError(f"{folder}: has no {kind.suffix} file; {DOWNLOAD_AGAIN}")
    return files
