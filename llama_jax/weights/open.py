"""Opens a checkpoint of any format: what it is, without reading its weights."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from llama_jax import presets
from llama_jax.config import ConfigError, ModelConfig
from llama_jax.weights import hub, names
from llama_jax.weights.gguf import read_gguf
from llama_jax.weights.hf import read_hf, read_json
from llama_jax.weights.meta import read_meta
from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError, Tensor

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
    """

    path: Path
    format: names.Format
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    tokenizer_files: Callable[[], dict[str, bytes]] = dict
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def tensor(self, row: names.Row, layer: int | None) -> Tensor:
        """The tensor that holds a parameter."""
        return self.tensors[row.name(self.format, layer)]

    def dtype_of(self, row: names.Row, layer: int | None) -> np.dtype:
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
        for row, layer in names.parameters(self.config):
            tensor = self.tensor(row, layer)
            nbytes[tensor.dtype] = nbytes.get(tensor.dtype, 0) + tensor.nbytes
        return max(nbytes, key=lambda dtype: nbytes[dtype])


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Opens a checkpoint of any format that is read, fetching it if need be; reads no weights.

    Args:
      name: a built-in name, a path or a hub id, as for `load`.

    Raises:
      CheckpointError: no such checkpoint, or not one that can be read.
      ConfigError: its configuration is not supported.
    """
    path = _newest_of_run(hub.resolve(str(name)))
    try:
        checkpoint = _reader(path)(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: a value in its configuration or tokenizer files has the wrong type"
            f" ({type(error).__name__}: {error}); {DOWNLOAD_AGAIN}"
        ) from error
    except ValueError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error
    names.check(checkpoint.tensors, checkpoint.config, checkpoint.format, path)
    tokenizer = checkpoint.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > checkpoint.config.vocab_size:
        log.warning(
            "%s: the tokenizer has %d tokens, the model only %d: texts with the last ones will be refused",
            path, tokenizer.vocab_size, checkpoint.config.vocab_size,
        )  # fmt: skip
    return checkpoint


def _newest_of_run(path: Path) -> Path:
    """The newest checkpoint, where `path` is the folder of a training run; else `path`."""
    folders = [path / "checkpoints", path]
    for folder in folders if path.is_dir() and not (path / "params").exists() else ():
        steps = [int(step.name) for step in folder.glob("[0-9]*") if (step / "params" / "_METADATA").exists()]
        if steps:
            return folder / str(max(steps))
    return path


def _reader(path: Path) -> Callable[[Path], Checkpoint]:
    if path.is_file():
        if path.suffix in (".safetensors", ".pth", ".bin", ".json"):
            raise CheckpointError(f"{path}: a part of a checkpoint: give the folder that holds it, {path.parent}")
        return _open_gguf
    if (path / "params" / "_METADATA").exists():
        return _open_native
    if (path / "params.json").exists() and not (path / "config.json").exists():
        return _open_meta
    if not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
        if len(files) > 1 and "-00001-of-" not in files[0].name:
            raise CheckpointError(f"{path}: has {len(files)} GGUF files: give one of them")
        return lambda path: _open_gguf(files[0])
    return _open_hf


def _open_gguf(path: Path) -> Checkpoint:
    from llama_jax.text.export import hf_files_from_gguf
    from llama_jax.text.tokenizer import tokenizer_from_gguf

    file = read_gguf(path)
    divisors = file.tensors.get("rope_freqs.weight")
    config = presets.from_gguf_metadata(
        file.metadata,
        tie_embeddings="output.weight" not in file.tensors,
        rope_divisors=None if divisors is None else divisors.read().tolist(),
    )
    tokenizer = tokenizer_from_gguf(file.metadata)
    return Checkpoint(
        path, "gguf", config, file.tensors, tokenizer,
        lambda: hf_files_from_gguf(file.metadata) if tokenizer else {},
    )  # fmt: skip


def _open_hf(path: Path) -> Checkpoint:
    folder = read_hf(path)
    return _folder(path, "hf", presets.from_hf_config(folder.config), folder.tensors)


def _open_meta(path: Path) -> Checkpoint:
    folder = read_meta(path)
    return _folder(path, "meta", folder.config, folder.tensors)


def _open_native(path: Path) -> Checkpoint:
    from llama_jax.weights.native import read_native

    config = presets.from_hf_config(read_json(path / "config.json", "a native checkpoint describes its model there"))
    return _folder(path, "native", config, read_native(path, config))


def _folder(path: Path, format: names.Format, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint whose tokenizer lies beside its weights."""
    from llama_jax.text.export import hf_files, read_files
    from llama_jax.text.tokenizer import load_tokenizer

    generation = path / "generation_config.json"
    return Checkpoint(
        path, format, config, tensors, load_tokenizer(path), lambda: hf_files(read_files(path)),
        read_json(generation, "") if generation.exists() else {},
    )  # fmt: skip
