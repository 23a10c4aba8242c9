"""Our own format: `config.json` and the tokenizer as in Hugging Face's folders, the parameters as training holds them.

`params/` is an Orbax checkpoint of the stacked parameters in our names and shapes: `blocks.attn.wq`, [L, D, K, G, H].
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.config.hf import from_hf_config
from llama_jax.weights import params, verdict
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.foreign import first_bytes
from llama_jax.weights.formats import base
from llama_jax.weights.formats.hf import write_texts
from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError, Index, Tensor, exists, listing

if TYPE_CHECKING:
    from llama_jax.checkpoint.arrays import SavedArray

PARAMS = "params"


class _Native(base.FormatObject):
    """Our own format: a Hugging Face folder whose weights are an Orbax checkpoint of stacked parameters."""

    name = "native"

    def find(self, folder: Path, present: list[str]) -> Path | None:
        """Returns a folder whose `params/` Orbax has written."""
        del present
        return folder if exists(folder / PARAMS / "_METADATA") else None

    def open(self, path: Path) -> Checkpoint:
        said = base.read_json(path / "config.json", "a native checkpoint describes its model there")
        config = from_hf_config(said)
        settled = verdict.settle(path, "native", config, read_native(path, config), said=said)
        return base.folder_checkpoint(path, "native", settled)

    def write(self, path: Path, checkpoint: Checkpoint, options: base.Options, advance: base.Advance) -> list[str]:
        """Writes a folder. Orbax saves whole trees: the process holds all weights meanwhile."""
        import jax

        from llama_jax import sharding
        from llama_jax.checkpoint.arrays import save_arrays
        from llama_jax.ops.weights import name_of
        from llama_jax.weights.load import read_model

        path.mkdir()
        mesh = sharding.make_mesh(checkpoint.config, devices=jax.local_devices(backend="cpu"))
        model = read_model(checkpoint, mesh, dtype=options.dtype, stacked=True, advance=advance)
        paths, _ = jax.tree_util.tree_flatten_with_path(model)
        arrays = {name_of(place): leaf for place, leaf in paths}
        save_arrays(path / PARAMS, arrays, stacked=is_stacked)
        return write_texts(path, checkpoint, options)


NATIVE = _Native()


def is_stacked(name: str) -> bool:
    """Returns whether the array of that name has a layer axis."""
    return name.startswith("blocks.")


def read_native(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Opens the parameters: one tensor for each layer, which reads that layer alone.

    Raises:
      CheckpointError: damaged, or a parameter has another shape than `config` asks for.
    """
    from llama_jax.checkpoint.arrays import DamagedError, open_arrays

    _check_readable(folder / PARAMS)
    try:
        arrays = open_arrays(folder / PARAMS)
    except DamagedError as error:
        raise CheckpointError(f"{error}; {DOWNLOAD_AGAIN}") from error
    period = len(params.period_of(config.layers))
    tensors, unknown = {}, dict(arrays)
    for row, layer in params.parameters(config):
        stored = params.stacked_name(row, (layer or 0) % period, period)
        array = arrays.get(stored)
        if array is None:
            continue  # params.check says what is missing
        unknown.pop(stored, None)
        name = row.name("native", layer)
        if layer is None:
            tensors[name] = _tensor(name, array.shape, array, ())
        elif array.shape[:1] != (config.num_layers // period,):
            raise CheckpointError(
                f"{folder}: {stored!r} has shape {list(array.shape)}, but the configuration has"
                f" {config.num_layers} layers; weights and configuration do not belong together"
            )
        else:
            tensors[name] = _tensor(name, array.shape[1:], array, (layer // period,))
    return {name: _tensor(name, array.shape, array, ()) for name, array in unknown.items()} | tensors


def _tensor(name: str, shape: tuple[int, ...], array: SavedArray, first: tuple[int, ...]) -> Tensor:
    from llama_jax.checkpoint.arrays import DamagedError

    nbytes = math.prod(shape) * array.dtype.itemsize

    def read(index: Index) -> np.ndarray:
        try:
            return array.read((*first, *index))
        except DamagedError as error:
            raise CheckpointError(f"{error}; {DOWNLOAD_AGAIN}") from error

    return Tensor(name, shape, array.dtype, nbytes, read)


def _check_readable(folder: Path) -> None:
    """Raises what the system says of a file that may not be read: Orbax's words do not tell that from damage."""
    for name in listing(folder):
        path = folder / name
        if path.is_dir():
            _check_readable(path)
        elif not os.access(path, os.R_OK):
            first_bytes(path)
