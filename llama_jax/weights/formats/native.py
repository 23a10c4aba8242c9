"""Our own format: `config.json` and the tokenizer as in Hugging Face's folders, the parameters as training holds them.

`params/` is an Orbax checkpoint of the stacked parameters in our names and shapes: `blocks.attn.wq`, [L, D, K, G, H].
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.arrays import DamagedError, SavedArray, open_arrays
from llama_jax.config import ModelConfig
from llama_jax.weights import params
from llama_jax.weights.foreign import first_bytes
from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError, Index, Tensor, listing

PARAMS = "params"


def is_stacked(name: str) -> bool:
    """Whether the array of that name has a layer axis."""
    return name.startswith("blocks.")


def read_native(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Opens the parameters: one tensor for each layer, which reads that layer alone.

    Raises:
      CheckpointError: damaged, or a parameter has not the shape that `config` asks for.
    """
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
