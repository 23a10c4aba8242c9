"""A checkpoint with an adapter in its weights, tensor by tensor: it is written in any format, in bounded memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from llama_jax.config.adapter import ALL_LINEAR
from llama_jax.text.export import hf_files, with_named_ids
from llama_jax.text.open import read_files
from llama_jax.weights import params
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.peft import SavedAdapter, own_tokenizer
from llama_jax.weights.quantized import as_quantized
from llama_jax.weights.source import Index, Tensor

MergeInto = Literal["seen", "original"]


def merged(checkpoint: Checkpoint, saved: SavedAdapter, *, into: MergeInto = "seen") -> Checkpoint:
    """Returns the checkpoint with an adapter in its weights: W + s B A in float32, rounded once to the dtype of W.

    Where the adapter's folder has a tokenizer, it is that of the result: it has the chat template that the adapter was
    trained with.

    Args:
      checkpoint: the base; of stored blocks the numbers that they stand for.
      saved: the adapter.
      into: "seen" is the base as the adapter saw it, quantized where its run quantized it; "original" the base as it is
        stored, which is another model.

    Raises:
      CheckpointError: the adapter is not of this model.
      ConfigError: it targets what the model does not have.
    """
    saved.check(checkpoint.config)
    if saved.quantize and into == "seen":
        checkpoint = as_quantized(checkpoint, saved.quantize)
    tensors = dict(checkpoint.tensors)
    for module, (spec, layer) in saved.adapter.modules(checkpoint.config).items():
        name = spec.name(checkpoint.format, layer)
        tensors[name] = _merged(checkpoint, saved, module, spec, tensors[name])
    tokenizer = own_tokenizer(saved, checkpoint.config)
    if tokenizer is None:
        return dataclasses.replace(checkpoint, tensors=tensors)
    files = hf_files(with_named_ids(read_files(saved.path), tokenizer))
    return dataclasses.replace(checkpoint, tensors=tensors, tokenizer=tokenizer, tokenizer_files=lambda: files)


def difference(checkpoint: Checkpoint, saved: SavedAdapter) -> float:
    """Returns how far the layers' matrices are from those that an adapter saw: the difference's root mean square, as a
    share of theirs; 0 where its run did not quantize them."""
    if not saved.quantize:
        return 0.0
    seen, squares = as_quantized(checkpoint, saved.quantize), np.zeros(2)
    for spec, layer in params.parameters(checkpoint.config):
        if layer is not None and spec.kind == "matrix":
            one, other = (c.tensor(spec, layer).read().astype(np.float32) for c in (checkpoint, seen))
            squares += np.square(one - other).sum(dtype=np.float64), np.square(one).sum(dtype=np.float64)
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0


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
