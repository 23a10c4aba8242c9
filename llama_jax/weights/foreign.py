"""Names folders and files that are not a checkpoint, with the remedy.

Two tables, tried from top to bottom: names in a folder, and the first bytes of a file. docs/checkpoints.md lists the
answer to each kind.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.weights.source import CheckpointError, exists, listing, system_errors

# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


class FolderSign(NamedTuple):
    """How a kind of folder is known.

    Attributes:
      what: a name for it; {first} is the first name that matches.
      remedy: what to do.
      names: a regular expression for the whole name of something in it.
    """

    what: str
    remedy: str
    names: str


# x.gguf.part1of2, x.gguf-split-a, x.gguf.partaa, x.gguf.00, x.gguf.aa
PART = re.compile(
    r"(?P<whole>.+\.(gguf|safetensors|bin|pth|ggml))"
    r"[.-]((?:part|split)?[-_.]?\d+[-_.]?of[-_.]?\d+|(?:part|split)[-_.]?(\d+|[a-z]{2})|(?:part|split)[-_.][a-z]{1,3}"
    r"|\d{2,5}|(?!gz|xz|lz|br)[a-z]{2})"
)
# fmt: off
FOLDERS = (
    FolderSign("the root of a repository in the Hub's cache", "give the folder of one of its snapshots", r"snapshots"),
    FolderSign("shards of DeepSpeed ZeRO ({first})",
               "run `python zero_to_fp32.py . OUTPUT` in it, put config.json beside the result, and give that folder",
               r"zero_to_fp32\.py|global_step\d+|.*zero_pp_rank.*|.*_optim_states\.pt"),
    FolderSign("a distributed checkpoint of PyTorch (FSDP, {first})",
               "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin` joins it",
               r".*\.distcp|pytorch_model_fsdp_\d+|\.metadata"),
    FolderSign("ranks of Megatron or DeepSpeed ({first})",
               "convert it with Megatron's own checkpoint converter to Hugging Face's format", r"mp_rank_\d+.*"),
    FolderSign("parts of a file that `split` cut ({first})", "join them with `cat`, in order, and give the whole",
               PART.pattern),
    FolderSign("a trainer's output folder", "give one of its checkpoints, such as {path}/{last}", r"checkpoint-\d+"),
    FolderSign("a model for ONNX ({first})", "take the checkpoint in safetensors that it was exported from",
               r".*\.onnx(_data)?"),
    FolderSign("weights for TensorFlow or Keras ({first})", "take the checkpoint in safetensors",
               r"tf_model.*\.h5|saved_model\.pb|.*\.keras|.*\.h5|.*\.tflite|.*\.ckpt\.(index|data-.*)"),
    FolderSign("weights for Flax ({first})", "take the checkpoint in safetensors", r".*\.msgpack(\.index\.json)?"),
    FolderSign("a model for Core ML ({first})", "take the checkpoint in safetensors",
               r".*\.ml(package|model|modelc)"),
    FolderSign("an engine of TensorRT ({first})", "take the checkpoint that it was built from",
               r".*\.engine|.*\.plan"),
    FolderSign("a model for OpenVINO ({first})", "take the checkpoint that it was exported from",
               r"openvino_.*\.(xml|bin)"),
    FolderSign("a llamafile ({first})", "take the .gguf file that is packed into it (`unzip` lists it)",
               r".*\.llamafile"),
    FolderSign("an older file of llama.cpp ({first})", "take a .gguf file of this model", r".*ggml.*\.bin"),
    FolderSign("a packed archive ({first})", "unpack it, and give the folder", r".*\.(zip|tar|tgz|tar\.\w+|7z|rar)"),
    FolderSign("the weights of a PEFT adapter ({first}) without its adapter_config.json",
               "load its base model with peft, add the adapter, save `model.merge_and_unload()`, and give that folder",
               r"adapter_model\.(safetensors|bin)"),
    FolderSign("weights without a config.json ({first})", "put the model's own config.json beside them",
               r"(model|pytorch_model).*\.(safetensors|bin)|.*\.safetensors"),
    FolderSign("Meta's weights without params.json ({first})", "put the model's own params.json beside them",
               r"consolidated.*\.(pth|safetensors)"),
    FolderSign("a trainer's state without its model ({first})", "give the folder that holds the model's weights",
               r"optimizer\.(pt|bin)|scheduler\.pt|trainer_state\.json|training_args\.bin|rng_state.*\.pth"),
    FolderSign("a tokenizer without a model ({first})", "give the folder that holds the weights too",
               r"tokenizer\.(json|model)|tokenizer_config\.json"),
)
# fmt: on


def folder(path: Path, *, configured: bool = False) -> str:
    """Returns what a folder without a checkpoint is, and the remedy; "" where nothing is known.

    Args:
      path: the folder.
      configured: whether it has a config.json, and only weights are missing.
    """
    present = sorted(listing(path), key=lambda name: (name.startswith("."), name))
    if "adapter_config.json" in present:
        return _adapter(path / "adapter_config.json")
    for sign in FOLDERS:
        found = [
            name for name in sorted(present, key=lambda name: (name[0] == ".", name)) if re.fullmatch(sign.names, name)
        ]
        if found and not (configured and sign.what.startswith(("a tokenizer", "weights without a config"))):
            last = max(found, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
            return f"{sign.what}: {sign.remedy}".format(first=found[0], last=last, path=path)
    return _inside(path, present)


def _adapter(path: Path) -> str:
    """Returns what kind of adapter a folder holds, and the remedy."""
    said: Any = {}
    with system_errors(path), contextlib.suppress(ValueError):
        said = json.loads(path.read_bytes())
    said = said if isinstance(said, dict) else {}
    kind = str(said.get("peft_type", "LORA"))
    name = "a DoRA adapter" if said.get("use_dora") else {"LORA": "a LoRA adapter"}.get(kind, f"an adapter ({kind})")
    base = said.get("base_model_name_or_path") or "its base model"
    if re.search(r"PROMPT|PREFIX|P_TUNING", kind):
        return f"an adapter of {base} ({kind}), which cannot be merged into weights: this library does not compute it"
    return (
        f"{name} of {base}, without that model's weights: load {base} with peft, add the adapter, and save"
        " `model.merge_and_unload()`; then give that folder"
    )


def _inside(path: Path, present: list[str]) -> str:
    """Names the checkpoints in a folder's folders."""
    signs = ("config.json", "params.json", "params", "snapshots")
    folders = [name for name in present if (path / name).is_dir()]
    inside = [name for name in folders if any(exists(path / name / sign) for sign in signs)]
    if not inside:
        held = [
            name for name in folders for file in listing(path / name) if re.search(r"\.(safetensors|bin|pth)$", file)
        ]
        return f"its weights may be those in {path / held[0]}: put config.json beside them" if held else ""
    few = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
    return f"a folder of checkpoints ({few}): give one of them, such as {path / inside[0]}"


def snapshot(path: Path) -> Path:
    """Returns the snapshot of a repository in the Hub's cache: that of `refs/main`, or the only one.

    Raises:
      CheckpointError: there are several, or none.
    """
    known = [name for name in listing(path / "snapshots") if not name.startswith(".")]
    main = path / "refs" / "main"
    if exists(main):
        with system_errors(main):
            name = main.read_text(errors="replace").strip()
        if name in known:
            return path / "snapshots" / name
    if len(known) == 1:
        return path / "snapshots" / known[0]
    few = ", ".join(known[:3])
    raise CheckpointError(
        f"{path}: the root of a repository in the Hub's cache, with {len(known)} snapshots"
        + (f" ({few}) and no refs/main: give one of them, {path / 'snapshots' / known[0]}" if known else ": empty")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

TAKE_GGUF = "take a .gguf file of this model, or convert the original with llama.cpp's convert_hf_to_gguf.py"
# First bytes, a name for such a file, the remedy.
# fmt: off
MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"tjgg", "an older file of llama.cpp (GGJT), which nothing current reads", TAKE_GGUF),
    (b"fmgg", "an older file of llama.cpp (GGMF), which nothing current reads", TAKE_GGUF),
    (b"lmgg", "an older file of llama.cpp (GGML), which nothing current reads", TAKE_GGUF),
    (b"algg", "an adapter of an older llama.cpp (GGLA)", "take the merged model as a .gguf file"),
    (b"MZqFpD", "a llamafile", "take the .gguf file that is packed into it (`unzip` lists it)"),
    (b"<!DOCTYPE", "a web page: a login or error page was saved in place of the file",
     "log in (`hf auth login`) and fetch the file itself, from its /resolve/ address"),
    (b"<html", "a web page: a login or error page was saved in place of the file",
     "log in (`hf auth login`) and fetch the file itself, from its /resolve/ address"),
    (b"<?xml", "an answer of a storage server, not the file (access denied, or no such object)",
     "check the address and your rights, and fetch the file itself"),
    (b"\x89HDF", "a file of HDF5, as TensorFlow and Keras write it", "take the checkpoint in safetensors"),
    (b"\x93NUMPY", "an array of NumPy", "take the checkpoint in safetensors"),
    (b"\x1f\x8b", "a packed file (gzip)", "unpack it with `gunzip` or `tar xzf`, and give what is in it"),
    (b"BZh", "a packed file (bzip2)", "unpack it with `bunzip2` or `tar xjf`, and give what is in it"),
    (b"\xfd7zXZ", "a packed file (xz)", "unpack it with `unxz` or `tar xJf`, and give what is in it"),
    (b"\x28\xb5\x2f\xfd", "a packed file (zstd)", "unpack it with `unzstd`, and give what is in it"),
    (b"7z\xbc\xaf", "a packed file (7z)", "unpack it with `7z x`, and give what is in it"),
    (b"Rar!", "a packed file (rar)", "unpack it with `unrar x`, and give what is in it"),
)
# Endings of files that this library does not read.
ENDINGS = {
    **dict.fromkeys((".part", ".crdownload", ".incomplete", ".aria2", ".download"),
                    ("an unfinished download, as its name says", "let the download end, or start it again")),
    ".onnx": ("a model for ONNX", "take the checkpoint in safetensors that it was exported from"),
    ".llamafile": ("a llamafile", "take the .gguf file that is packed into it (`unzip` lists it)"),
    ".msgpack": ("weights for Flax", "take the checkpoint in safetensors"),
    ".tflite": ("a model for TensorFlow Lite", "take the checkpoint in safetensors"),
    ".engine": ("an engine of TensorRT", "take the checkpoint that it was built from"),
    ".mlmodel": ("a model for Core ML", "take the checkpoint in safetensors"),
    ".distcp": ("a part of a distributed checkpoint of PyTorch", "`python -m torch.distributed.checkpoint.format_utils"
                " dcp_to_torch FOLDER pytorch_model.bin` joins it"),
}
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".json", ".ckpt", ".model", ".index")
# fmt: on


def first_bytes(path: Path, count: int = 64) -> bytes:
    """Returns the first bytes of a file.

    Raises:
      UnreadableError: it may not be read.
    """
    with system_errors(path), path.open("rb") as file:
        return file.read(count)


def begins(data: bytes) -> str:
    """Returns what a file with such first bytes is, and the remedy; "" where nothing is known."""
    text = data.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, what, remedy in MAGIC:
        if data.startswith(magic) or (magic[:1] == b"<" and text[: len(magic)].lower() == magic.lower()):
            return f"{what}: {remedy}"
    return ""


def answer(data: bytes) -> str:
    """Returns what a file with a misleading name is, by its first bytes; "" where nothing is known."""
    for start, what, ending in ((b"PK\3\4", "torch's", "pytorch_model.bin"), (b"GGUF", "a GGUF", "model.gguf")):
        if data.startswith(start):
            return f"its name says otherwise, but it is {what} file: name it like {ending}"
    if data[8:10] == b'{"':
        return "its name says otherwise, but it is a safetensors file: name it like model.safetensors"
    start = data[:40].lstrip()
    if len(start) >= 16 and all(32 <= byte < 127 or byte in b"\r\n\t" for byte in start) and not begins(data):
        return f"it is text, {start.decode().splitlines()[0]!r}, in place of the file that its name says: fetch that"
    return begins(data)


def check_file(path: Path) -> None:
    """Refuses a file that is not a GGUF file.

    Raises:
      CheckpointError: names its kind and the remedy.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file, nor a folder (a pipe or device); give a file or a folder")
    if part := PART.fullmatch(path.name):
        whole = part["whole"]
        raise CheckpointError(
            f"{path}: one of the parts that `split` cut {whole} into: join them in order, `cat {_parts(path, whole)} >"
            f" {whole}`, and give {whole}"
        )
    data = first_bytes(path)
    if data.startswith((b"GGUF", b"FUGG", b"version https://git-lfs.")):
        return
    if answer := begins(data) or ": ".join(ENDINGS.get(path.suffix, ())):
        raise CheckpointError(f"{path}: {answer}")
    if path.suffix in WEIGHTS or data[8:9] == b"{" or data.startswith(b"PK\3\4"):
        raise CheckpointError(f"{path}: a part of a checkpoint: give the folder that holds it, {path.parent}")


def _parts(path: Path, whole: str) -> str:
    """Returns a shell pattern for the parts of a file: `x.gguf.part*`."""
    return whole + re.sub(
        r"(\d+[-_.]?of[-_.]?\d+|\d+|(?<=[-_.])[a-z]{1,3}|(?<=part)[a-z]{2})$", "*", path.name[len(whole) :]
    )
