"""Opens a checkpoint of any format: what it is, without reading its weights."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from llama_jax.config import ConfigError, ModelConfig, presets
from llama_jax.weights import diagnose, foreign, hub, params, verdict
from llama_jax.weights.formats.gguf import read_gguf
from llama_jax.weights.formats.hf import has_weights, read_hf, read_json
from llama_jax.weights.formats.meta import read_meta
from llama_jax.weights.source import CheckpointError, Tensor, exists, listing, system_errors

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

log = logging.getLogger("llama_jax")

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: what it says, before any weight is read.

    Attributes:
      path: the folder or file.
      format: whose names and layout its tensors have.
      config: the architecture.
      tensors: stored name -> tensor.
      tokenizer: None where the checkpoint has none.
      tokenizer_files: makes the tokenizer's files as Hugging Face spells them, name -> content; empty without one.
      generation: the content of generation_config.json, or {}.
      left_out: what the files hold and no result depends on, and keys that were ignored, in sentences.
    """

    path: Path
    format: params.Format
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    tokenizer_files: Callable[[], dict[str, bytes]] = dict
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def tensor(self, row: params.ParamSpec, layer: int | None) -> Tensor:
        """The tensor of a parameter, which may be a part of a stored one."""
        return params.part_of(self.tensors[row.name(self.format, layer)], row, self.config, self.format)

    def dtype_of(self, row: params.ParamSpec, layer: int | None) -> np.dtype:
        """What a parameter is to be stored in by a format that keeps dtypes.

        GGUF keeps vectors in float32 whatever the matrices are in: they go back to the matrices' dtype where that loses
        nothing, so that a model that went through GGUF is again what it was.

        Raises:
          CheckpointError: none of `DTYPES`.
        """
        tensor = self.tensor(row, layer)
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{self.path}: {tensor.name!r} holds {tensor.dtype} numbers: say what to make of them, with dtype"
                f" {', '.join(DTYPES)}"
            )
        if self.format == "gguf" and len(tensor.shape) == 1 and tensor.dtype != self.dtype:
            values = tensor.read()
            if np.array_equal(values.astype(self.dtype).astype(values.dtype), values):
                return self.dtype
        return tensor.dtype

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """Of most of the weights, as read."""
        nbytes: dict[np.dtype, int] = {}
        for row, layer in params.parameters(self.config):
            tensor = self.tensor(row, layer)
            nbytes[tensor.dtype] = nbytes.get(tensor.dtype, 0) + tensor.nbytes
        return max(nbytes, key=lambda dtype: nbytes[dtype])


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Opens a checkpoint of any format that is read, fetching it if need be.

    Reads no weights, but for the head and the embedding table of a tied model that stores both (see `verdict.settle`).

    Args:
      name: a built-in name, a path or a hub id, as for `load`.

    Raises:
      CheckpointError: no such checkpoint, or not one that can be read.
      ConfigError: its configuration is not supported.
    """
    with system_errors(name):
        path = _inner(hub.resolve(str(name)))
        checkpoint = _open(path)
    tokenizer = checkpoint.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > checkpoint.config.vocab_size:
        log.warning(
            "%s: the tokenizer has %d tokens, the model only %d: texts with the last ones will be refused",
            path, tokenizer.vocab_size, checkpoint.config.vocab_size,
        )  # fmt: skip
    return checkpoint


def _open(path: Path) -> Checkpoint:
    """Opens what is there; every error that is no error of the system comes out in words that name it."""
    try:
        return _reader(path)(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the tokenizer libraries raise plain ones
        raise CheckpointError(
            f"{path}: a value in its configuration or tokenizer files has the wrong type"
            f" ({type(error).__name__}: {error}): compare them with those of a model of the same kind"
        ) from error


def _inner(path: Path) -> Path:
    """The newest checkpoint of a training run's folder, the snapshot of a cached repository; else `path`."""
    if not path.is_dir() or "params" in (present := listing(path)):
        return path
    if "snapshots" in present and "config.json" not in present:
        return foreign.snapshot(path)
    for folder in (path / "checkpoints", path):
        steps = [name for name in listing(folder) if name.isdecimal()] if exists(folder) else []
        if saved := [int(name) for name in steps if exists(folder / name / "params" / "_METADATA")]:
            return folder / str(max(saved))
    return path


def _reader(path: Path) -> Callable[[Path], Checkpoint]:
    """What opens a file or folder.

    Raises:
      CheckpointError: it is no checkpoint; says what it is.
    """
    if not path.is_dir():
        foreign.check_file(path)
        return _open_gguf
    present = listing(path)
    if exists(path / "params" / "_METADATA"):
        return _open_native
    ranks = any(re.fullmatch(r"consolidated.*\.pth", name) for name in present)
    if "params.json" in present and ("config.json" not in present or (ranks and not has_weights(present))):
        return _open_meta
    if "config.json" in present and has_weights(present):
        return _open_hf
    files = [name for name in present if name.endswith(".gguf")]
    models = [name for name in files if not re.search("mmproj|imatrix", name)] or files
    if len(models) == 1 or (models and "-00001-of-" in models[0]):
        return lambda folder: _open_gguf(folder / models[0])
    if models:
        raise CheckpointError(f"{path}: has {len(models)} GGUF files: give one of them")
    if "config.json" not in present and (answer := foreign.folder(path)):
        raise CheckpointError(f"{path}: {answer}")
    return _open_hf


def _open_gguf(path: Path) -> Checkpoint:
    from llama_jax.text.export import hf_files_from_gguf
    from llama_jax.text.tokenizer import tokenizer_from_gguf

    file = read_gguf(path)
    if answer := diagnose.gguf(file.metadata, file.tensors):
        raise CheckpointError(f"{path}: {answer}")
    divisors = file.tensors.get("rope_freqs.weight")
    config = presets.from_gguf_metadata(
        file.metadata,
        tie_embeddings="output.weight" not in file.tensors,
        rope_divisors=None if divisors is None else divisors.read().tolist(),
    )
    settled = verdict.settle(path, "gguf", config, file.tensors, said=file.metadata)
    tokenizer = tokenizer_from_gguf(file.metadata)
    return Checkpoint(
        path, "gguf", settled.config, settled.tensors, tokenizer,
        lambda: hf_files_from_gguf(file.metadata) if tokenizer else {}, left_out=settled.left_out,
    )  # fmt: skip


def _open_hf(path: Path) -> Checkpoint:
    folder = read_hf(path, strict=False)
    diagnose.check_config(folder.config)
    config = presets.from_hf_config(folder.config)
    settled = verdict.settle(
        path, "hf", config, folder.tensors,
        said=folder.config, notes=folder.notes, left_out=folder.left_out, absent=folder.absent,
    )  # fmt: skip
    return _folder(path, "hf", settled)


def _open_meta(path: Path) -> Checkpoint:
    folder = read_meta(path)
    settled = verdict.settle(path, "meta", folder.config, folder.tensors, said=folder.params, notes=folder.notes)
    return _folder(path, "meta", settled)


def _open_native(path: Path) -> Checkpoint:
    from llama_jax.weights.formats.native import read_native

    said = read_json(path / "config.json", "a native checkpoint describes its model there")
    config = presets.from_hf_config(said)
    return _folder(path, "native", verdict.settle(path, "native", config, read_native(path, config), said=said))


def _folder(path: Path, format: params.Format, settled: verdict.Settled) -> Checkpoint:
    """A checkpoint whose tokenizer lies beside its weights."""
    from llama_jax.text.export import hf_files, read_files, with_named_ids
    from llama_jax.text.tokenizer import load_tokenizer

    generation, tokenizer = path / "generation_config.json", load_tokenizer(path)
    return Checkpoint(
        path, format, settled.config, settled.tensors, tokenizer,
        lambda: hf_files(with_named_ids(read_files(path), tokenizer)),
        read_json(generation, "") if exists(generation) else {}, settled.left_out,
    )  # fmt: skip
