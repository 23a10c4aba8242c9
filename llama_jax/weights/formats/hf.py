"""Hugging Face's format: a folder with `config.json` beside weights in safetensors files or torch's older `.bin` files.

With many files, an index (`model.safetensors.index.json`) says which tensor is in which.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llama_jax.config.hf import from_hf_config, to_hf_config
from llama_jax.typing import JsonObject
from llama_jax.weights import bitsandbytes, diagnose, foreign, params, verdict
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.formats import base
from llama_jax.weights.safetensors import read_safetensors, write_safetensors
from llama_jax.weights.sink import Entry
from llama_jax.weights.source import CheckpointError, Tensor, listing
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


class _HuggingFace(base.FormatObject):
    """transformers' format: a folder with config.json, safetensors files (or torch's), the tokenizer."""

    name = "hf"

    def find(self, folder: Path, present: list[str]) -> Path | None:
        """Returns a folder with a config.json and weights."""
        return folder if "config.json" in present and has_weights(present) else None

    def open(self, path: Path) -> Checkpoint:
        folder = read_hf(path)
        if bitsandbytes.is_nf4(folder.config):
            folder.tensors = bitsandbytes.joined(folder.tensors, path)
            folder.config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
        diagnose.check_config(folder.config)
        config = from_hf_config(folder.config)
        settled = verdict.settle(
            path, "hf", config, folder.tensors,
            said=folder.config, notes=folder.notes, left_out=folder.left_out, absent=folder.absent,
        )  # fmt: skip
        return base.folder_checkpoint(path, "hf", settled)

    def write(self, path: Path, checkpoint: Checkpoint, options: base.Options, advance: base.Advance) -> list[str]:
        """Writes a folder, with an index where there are several files; returns what transformers does otherwise."""
        path.mkdir()
        files: list[list[Entry]] = [[]]
        for _, entry in base.tensor_entries(checkpoint, "hf", options):
            if files[-1] and sum(e.nbytes for e in files[-1]) + entry.nbytes > options.max_shard_size:
                files.append([])
            files[-1].append(entry)
        home = {}
        for i, entries in enumerate(files, start=1):
            file = SAFETENSORS.single if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
            write_safetensors(path / file, entries, advance, metadata={"format": "pt"})
            home |= {entry.name: file for entry in entries}
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(e.nbytes for file in files for e in file)}, "weight_map": home}
            base.write_files(path, {SAFETENSORS.index: base.to_json(SAFETENSORS.index, index)})
        return write_texts(path, checkpoint, options)


HF = _HuggingFace()


# ---------------------------------------------------------------------------------------------------------------------
# Files beside the weights
# ---------------------------------------------------------------------------------------------------------------------


def hf_texts(checkpoint: Checkpoint, dtype: str) -> dict[str, bytes]:
    """Returns the files beside weights of that dtype in a Hugging Face folder, or in ours: name -> content."""
    ids = _special_ids(checkpoint)
    config = base.to_json("config.json", to_hf_config(checkpoint.config, dtype=dtype) | ids)
    generation = base.to_json("generation_config.json", dict(checkpoint.generation) or ids)
    return {"config.json": config, "generation_config.json": generation, **checkpoint.tokenizer_files()}


def write_texts(folder: Path, checkpoint: Checkpoint, options: base.Options) -> list[str]:
    """Writes `hf_texts`, and returns what transformers would do differently with the tokenizer."""
    from llama_jax.text.export import hf_warnings

    files, warnings = base.tokenizer_files(checkpoint)
    checkpoint = dataclasses.replace(checkpoint, tokenizer_files=lambda: files)
    base.write_files(folder, hf_texts(checkpoint, options.dtype or str(checkpoint.dtype)))
    return [*warnings, *hf_warnings(files)]


def _special_ids(checkpoint: Checkpoint) -> JsonObject:
    """Returns bos_token_id and eos_token_id: those of the checkpoint, else those of its tokenizer."""
    tokenizer, said = checkpoint.tokenizer, checkpoint.generation
    bos = said.get("bos_token_id", tokenizer.bos_id if tokenizer else None)
    stops = list(tokenizer.stop_ids) if tokenizer else []
    eos = said.get("eos_token_id", stops[0] if len(stops) == 1 else stops or None)
    return {"bos_token_id": bos, "eos_token_id": eos}


# ---------------------------------------------------------------------------------------------------------------------
# Reading a folder
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class HFFolder:
    """An open Hugging Face checkpoint.

    Attributes:
      path: the folder.
      config: the content of config.json.
      tensors: name -> tensor, over all files of the folder; shapes are [out, in].
      notes: where the files disagree, and what was taken, in sentences.
      left_out: what is there and was not taken, in sentences.
      absent: tensors that the index names and that no file has -> the file that it names.
    """

    path: Path
    config: JsonObject
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)


def read_hf(path: str | Path) -> HFFolder:
    """Opens a Hugging Face folder. Tensor data is read later, by `Tensor.read`.

    Args:
      path: holds config.json and model.safetensors, or files named by model.safetensors.index.json, or else any
        *.safetensors files, which are then read together; where it has none, pytorch_model.bin likewise.

    Returns:
      The folder. A tensor that two files hold, or that is not where the index says, is named in `notes`, `left_out` and
      `absent` where it does no harm.

    Raises:
      CheckpointError: a file is missing, damaged, cut short or in a format that is not supported, or two files hold one
        tensor with different numbers.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    folder = HFFolder(path, base.read_json(path / "config.json", "a Hugging Face folder describes its model there"))
    present = listing(path)
    kind = _kind(present)
    listed = _listed_tensors(path, kind, present)
    if "adapter_config.json" in present:
        folder.left_out.append("an adapter beside the weights, which is not merged into them")
    missing = {file for file in listed.values() if file not in present}
    if needed := sorted({file for name, file in listed.items() if file in missing and _is_parameter(name)}):
        raise CheckpointError(f"{path}: lacks {', '.join(needed)}, named in {kind.index}; fetch the missing files")
    files = sorted(set(listed.values()) - missing) or _unlisted_files(path, kind, present)
    home = _read_files(folder, kind, files, listed)
    _compare_with_index(folder, kind, home, listed)
    folder.tensors, said = verdict.unwrapped(folder.tensors, "hf")
    folder.notes += said
    folder.left_out = list(dict.fromkeys(folder.left_out))
    return folder


def _read_files(folder: HFFolder, kind: _Kind, files: list[str], listed: dict[str, str]) -> dict[str, str]:
    """Adds the tensors of all files to the folder; returns name -> the file that each was taken from."""
    home: dict[str, str] = {}
    for file in files:
        for name, tensor in kind.read(folder.path / file).items():
            if name in home:
                first = (folder.tensors[name], home[name])
                folder.left_out.append(_second_copy(folder.path, name, first, (tensor, file), listed))
                if listed.get(name) != file:
                    continue
            folder.tensors[name], home[name] = tensor, file
    return home


def _compare_with_index(folder: HFFolder, kind: _Kind, home: dict[str, str], listed: dict[str, str]) -> None:
    """Notes where the index names another file than a tensor's own, or a tensor that no file has."""
    wrong = {name: file for name, file in listed.items() if home.get(name) != file}
    folder.absent = {name: file for name, file in wrong.items() if name not in home}
    if moved := [name for name in wrong if name in home]:
        folder.notes.append(f"{kind.index} is wrong about the file of {verdict.counted(moved)}")
    if nowhere := [name for name in folder.absent if not _is_parameter(name) or name == params.head_name("hf")]:
        folder.left_out.append(f"entries of {kind.index} that no file has: {verdict.counted(nowhere)}")


def _second_copy(
    folder: Path, name: str, first: tuple[Tensor, str], second: tuple[Tensor, str], listed: dict[str, str]
) -> str:
    """Returns a sentence about a tensor that two files hold.

    Raises:
      CheckpointError: they differ, and no index says which one is meant.
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
    """Returns whether a Llama has a parameter of that name."""
    return re.sub(r"\.\d+\.", ".{}.", name, count=1) in {row.hf for row in params.TABLE}


def has_weights(present: list[str]) -> bool:
    """Returns whether a folder with such files holds weights in Hugging Face's spelling."""
    indexed = SAFETENSORS.index in present or TORCH.index in present
    return indexed or any(name.endswith((".safetensors", *TORCH_ENDINGS)) for name in _weight_files(present))


def _weight_files(present: list[str]) -> list[str]:
    return [name for name in present if not OTHER_FILES.fullmatch(name) and not name.startswith(".")]


def _kind(present: list[str]) -> _Kind:
    """Returns safetensors, unless there are only torch's files (a folder may have both: the same weights)."""
    files = _weight_files(present)
    if SAFETENSORS.index in present or any(name.endswith(".safetensors") for name in files):
        return SAFETENSORS
    return TORCH if TORCH.index in present or any(name.endswith(TORCH_ENDINGS) for name in files) else SAFETENSORS


def _listed_tensors(folder: Path, kind: _Kind, present: list[str]) -> dict[str, str]:
    """Returns the index's map, tensor name -> file name; empty without an index, or where one file has all."""
    path = folder / kind.index
    if kind.single in present or kind.index not in present:
        return {}
    listed = base.read_json(path, "").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path}: has no weight_map: it is not the index of these weights; remove or replace it")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: {name!r} is in {file!r}, which is not a file name: correct it")
    return listed


def _unlisted_files(folder: Path, kind: _Kind, present: list[str]) -> list[str]:
    """Returns the names of the weight files of a folder without an index."""
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
