"""A checkpoint with an adapter in its weights, tensor by tensor: it is written in any format, in bounded memory."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from llama_jax.config.adapter import ALL_LINEAR
from llama_jax.text.export import hf_files, with_named_ids
from llama_jax.text.open import read_files
from llama_jax.weights import params
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.peft import SavedAdapter, own_tokenizer
from llama_jax.weights.source import Index, Tensor


def merged(checkpoint: Checkpoint, saved: SavedAdapter) -> Checkpoint:
    """Returns the checkpoint with an adapter in its weights: W + s B A in float32, rounded once to the dtype of W.

    The base is what is stored: of quantized tensors their own numbers, as the adapter saw them. Where the adapter's
    folder has a tokenizer, it is that of the result: it has the chat template that the adapter was trained with.

    Raises:
      CheckpointError: the adapter is not of this model.
      ConfigError: it targets what the model does not have.
    """
    saved.check(checkpoint.config)
    tensors = dict(checkpoint.tensors)
    for module, (spec, layer) in saved.adapter.modules(checkpoint.config).items():
        name = spec.name(checkpoint.format, layer)
        tensors[name] = _merged(checkpoint, saved, module, spec, tensors[name])
    tokenizer = own_tokenizer(saved, checkpoint.config)
    if tokenizer is None:
        return dataclasses.replace(checkpoint, tensors=tensors)
    files = hf_files(with_named_ids(read_files(saved.path), tokenizer))
    return dataclasses.replace(checkpoint, tensors=tensors, tokenizer=tokenizer, tokenizer_files=lambda: files)


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x @ y, each element summed in one order whatever part is computed: a BLAS takes another for another shape."""
    found = np.zeros((x.shape[0], y.shape[1]), np.float32)
    for k in range(x.shape[1]):
        found += x[:, k, None] * y[k]
    return found


def _merged(checkpoint: Checkpoint, saved: SavedAdapter, module: str, spec: params.ParamSpec, tensor: Tensor) -> Tensor:
    """One tensor; the format has a tensor of its own for every matrix of a layer."""
    config, format = checkpoint.config, checkpoint.format
    assert tensor.shape == params.stored_shape(spec, config, format), f"{tensor.name} holds more than {ALL_LINEAR}"
    size = params.sizes(config)
    inner = [size[letter] for letter in spec.stored[1]]

    def factors() -> tuple[np.ndarray, np.ndarray]:
        a, b = saved.factor(module, "A"), saved.factor(module, "B")  # [r, in], [out, r] in Hugging Face's order
        if spec.rope and format in params.INTERLEAVED:
            heads = b.reshape(-1, 2, config.head_dim // 2, b.shape[1]).swapaxes(1, 2)
            b = heads.reshape(b.shape)
        return a, b * np.float32(saved.adapter.scale_of(module))

    def reader(index: Index) -> np.ndarray:
        base, (a, b) = tensor.read(index), factors()
        if format != "native":
            rows, columns = (*index, slice(None), slice(None))[:2]
            update = _product(b[rows], a[:, columns])
        else:  # our own order: [*in, *out]
            whole = _product(a.T, b.T).reshape(*inner, *(size[letter] for letter in spec.stored[0]))
            update = whole.reshape(tensor.shape)[index]
        return (base.astype(np.float32) + update).astype(base.dtype)

    nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    return Tensor(tensor.name, tensor.shape, tensor.dtype, nbytes, reader)
