"""An opened checkpoint of any format, and the dtypes that a model may have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.typing import Fields
from llama_jax.weights import params
from llama_jax.weights.source import CheckpointError, Tensor

if TYPE_CHECKING:
    from llama_jax.text.base import Tokenizer

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, before any weight is read.

    Attributes:
      path: the folder or file.
      format: of its tensors' names and layout.
      config: the architecture.
      tensors: stored name -> tensor.
      tokenizer: None where the checkpoint has none.
      tokenizer_files: makes the tokenizer's files as Hugging Face spells them, name -> content; empty without one.
      generation: the content of generation_config.json, or {}.
      left_out: sentences on tensors that no result depends on, and on keys that were ignored.
    """

    path: Path
    format: params.Format
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    tokenizer_files: Callable[[], dict[str, bytes]] = dict
    generation: Fields = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def tensor(self, row: params.ParamSpec, layer: int | None) -> Tensor:
        """Returns the tensor of a parameter, which may be a part of a stored one."""
        return params.part_of(self.tensors[row.name(self.format, layer)], row, self.config, self.format)

    def dtype_of(self, row: params.ParamSpec, layer: int | None) -> np.dtype:
        """Returns the dtype of a parameter in a format that keeps dtypes.

        GGUF keeps vectors in float32, whatever the matrices are in. Where it loses nothing they return to the matrices'
        dtype, so that a model that went through GGUF is unchanged.

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
        """The dtype of most of the weights, as read."""
        nbytes: dict[np.dtype, int] = {}
        for row, layer in params.parameters(self.config):
            tensor = self.tensor(row, layer)
            nbytes[tensor.dtype] = nbytes.get(tensor.dtype, 0) + tensor.nbytes
        return max(nbytes, key=lambda dtype: nbytes[dtype])
