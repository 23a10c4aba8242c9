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

from llama_jax.weights import foreign, params, verdict
from llama_jax.weights.safetensors import read_safetensors
from llama_jax.weights.source import (
    DOWNLOAD_AGAIN,
    CheckpointError,
    Tensor,
    exists,
    link_to_nothing,
    listing,
    system_errors,
)
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
# Files with such endings that hold no weights, or not these: of a trainer, of an adapter, Meta's second copy.
OTHER_FILES = re.compile(
    r"(adapter_model|optimizer|scheduler|scaler|training_args|trainer_state|rng_state|random_states|consolidated"
    r"|model\.ckpt|.*_optim_states|openvino_).*"
)
TORCH_ENDINGS = (".bin", ".pth", ".pt")


@dataclasses.dataclass(frozen=True)
class HFFolder:
    """An open Hugging Face checkpoint.

    Attributes:
      path: the folder.
      config: the content of config.json.
      tensors: name -> tensor, over all files of the folder; shapes are [out, in].
      notes: where the files disagree, and what was taken, in sentences.
      left_out: what is there and was not taken, in sentences.
      absent: tensors that the index names and that are nowhere -> the file that it names.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    absent: dict[str, str] = dataclasses.field(default_factory=dict)


def read_hf(folder: str | Path, *, strict: bool = True) -> HFFolder:
    """Opens a Hugging Face folder. Tensor data is read later, by `Tensor.read`.

    Args:
      folder: holds config.json and model.safetensors, or files named by model.safetensors.index.json, or else
        any *.safetensors files, which are then read together; where it has none, pytorch_model.bin likewise.
      strict: whether a tensor that two files hold, or that is not where the index says, is an error. If not, what does
        no harm is taken, and `notes`, `left_out` and `absent` say so.

    Raises:
      CheckpointError: a file is missing, damaged, cut short or in a format that is not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = read_json(folder / "config.json", "a Hugging Face folder describes its model there")
    present = listing(folder)
    kind = _kind(present)
    listed = _listed_tensors(folder, kind, present)
    left_out = ["an adapter beside the weights, which is not merged into them"] * ("adapter_config.json" in present)
    gone = {file for file in set(listed.values()) if file not in present}
    needed = sorted(gone if strict else {file for name, file in listed.items() if file in gone and _is_parameter(name)})
    if needed:
        raise CheckpointError(f"{folder}: lacks {', '.join(needed)}, named in {kind.index}; fetch the missing files")
    tensors: dict[str, Tensor] = {}
    home: dict[str, str] = {}
    for file in sorted(set(listed.values()) - gone) or _unlisted_files(folder, kind, present):
        for name, tensor in kind.read(folder / file).items():
            if name in tensors:
                if strict:
                    raise CheckpointError(f"{folder}: {name!r} is in {home[name]} and in {file}; keep one of the two")
                left_out.append(_second_copy(folder, name, (tensors[name], home[name]), (tensor, file), listed))
                if listed.get(name) != file:
                    continue
            tensors[name], home[name] = tensor, file
    wrong = {name: file for name, file in listed.items() if home.get(name) != file}
    if wrong and strict:
        name, file = next(iter(wrong.items()))
        raise CheckpointError(f"{folder / file}: lacks {name!r}, which {kind.index} says is in it; fetch both again")
    absent = {name: file for name, file in wrong.items() if name not in home}
    moved = [name for name in wrong if name in home]
    notes = [f"{kind.index} is wrong about the file of {verdict.counted(moved)}"] if moved else []
    if nowhere := [name for name in absent if not _is_parameter(name) or name == params.head_name("hf")]:
        left_out.append(f"entries of {kind.index} that no file has: {verdict.counted(nowhere)}")
    tensors, said = verdict.unwrapped(tensors, "hf")
    return HFFolder(folder, config, tensors, (*notes, *said), tuple(dict.fromkeys(left_out)), absent)


def _second_copy(
    folder: Path, name: str, first: tuple[Tensor, str], second: tuple[Tensor, str], listed: dict[str, str]
) -> str:
    """What to say of a tensor that two files hold.

    Raises:
      CheckpointError: they are not the same, and no index says which one is meant.
    """
    (one, file), (other, other_file) = first, second
    dropped = file if listed.get(name) == other_file else other_file
    if verdict.same_tensor(one, other):
        return f"a second copy, with the same numbers, of tensors in {dropped}"
    if listed.get(name) in (file, other_file):
        return f"another {name!r} in {dropped}, where the index does not look for it"
    raise CheckpointError(
        f"{folder}: {name!r} is in {file} and in {other_file}, with other numbers, and no index says which is meant:"
        " keep the files of one checkpoint"
    )


def _is_parameter(name: str) -> bool:
    """Whether a Llama has a parameter of that name."""
    return re.sub(r"\.\d+\.", ".{}.", name, count=1) in {row.hf for row in params.TABLE}


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """Reads a JSON object; `purpose` says, where the file is missing, what it is for.

    Raises:
      CheckpointError: no such file, or not a JSON object.
    """
    if not exists(path):
        if answer := link_to_nothing(path):
            raise CheckpointError(f"{path}: no such file{answer}")
        raise CheckpointError(f"{path}: no such file; {purpose}: put it there, or give the folder that holds it")
    with system_errors(path):
        data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); {_why_no_json(data, error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object, but a {type(content).__name__}: put the right file there")
    return content


def _why_no_json(data: bytes, error: Exception) -> str:
    """What such a file is told: damage is shown where it ends too early, or holds bytes that no text has."""
    if answer := foreign.begins(data[:64]):
        return answer
    early = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip())
    if early or b"\0" in data or isinstance(error, UnicodeDecodeError):
        return DOWNLOAD_AGAIN
    return "correct it there"


def has_weights(present: list[str]) -> bool:
    """Whether a folder with such files holds weights in Hugging Face's spelling."""
    indexed = SAFETENSORS.index in present or TORCH.index in present
    return indexed or any(name.endswith((".safetensors", *TORCH_ENDINGS)) for name in _weight_files(present))


def _weight_files(present: list[str]) -> list[str]:
    return [name for name in present if not OTHER_FILES.fullmatch(name) and not name.startswith(".")]


def _kind(present: list[str]) -> _Kind:
    """safetensors, unless there are only torch's files (a folder may have both: the same weights)."""
    files = _weight_files(present)
    if SAFETENSORS.index in present or any(name.endswith(".safetensors") for name in files):
        return SAFETENSORS
    return TORCH if TORCH.index in present or any(name.endswith(TORCH_ENDINGS) for name in files) else SAFETENSORS


def _listed_tensors(folder: Path, kind: _Kind, present: list[str]) -> dict[str, str]:
    """The index's map, tensor name -> file name; empty where there is no index or no need for one."""
    path = folder / kind.index
    if kind.single in present or kind.index not in present:
        return {}
    listed = read_json(path, "").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path}: has no weight_map: it is not the index of these weights; remove or replace it")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: {name!r} is in {file!r}, which is not a file name: correct it")
    return listed


def _unlisted_files(folder: Path, kind: _Kind, present: list[str]) -> list[str]:
    """Names of the weight files of a folder without an index."""
    if kind.single in present:
        return [kind.single]
    named = [name for name in _weight_files(present) if name.endswith(kind.suffix)]
    others = _weight_files(present) if kind is TORCH else [] if "adapter_config.json" in present else present
    files = named or [name for name in others if name.endswith(TORCH_ENDINGS if kind is TORCH else kind.suffix)]
    for file in files:
        if part := re.fullmatch(rf"(.*)-\d+-of-(\d+)\{kind.suffix}", file):
            stem, total = part[1], part[2]
            pattern = rf"{re.escape(stem)}-\d+-of-{total}\{kind.suffix}"
            found = sum(re.fullmatch(pattern, name) is not None for name in present)
            if found != int(total):
                raise CheckpointError(f"{folder}: has {found} of the {int(total)} parts of {stem}; fetch the others")
    if not files:
        answer = foreign.folder(folder, configured=True)
        raise CheckpointError(
            f"{folder}: has no {kind.suffix} file; "
            + (answer or "it describes a model without its weights: fetch them too, or give the folder that has them")
        )
    return files
