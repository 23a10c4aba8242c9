"""Reading weights into quantized leaves: layer after layer on the host, so that no device holds one in full."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.config.params import Place, place_of
from llama_jax.config.quantization import BLOCK, SCALE_BLOCK, scale_rows
from llama_jax.weights import params
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.nf4 import Blocks, quantize
from llama_jax.weights.source import CheckpointError, Index, Tensor, common_dtype

if TYPE_CHECKING:
    from llama_jax.ops.quantized import NF4

log = logging.getLogger("llama_jax")

FIELDS = ("codes", "absmax", "scales", "offset", "table")


def form_of(checkpoint: Checkpoint, name: str | None) -> Callable[[Place], str | None]:
    """Returns the quantized form that each weight is read into, for `model.quantize.quantized`.

    A checkpoint that is stored in NF4 keeps its own numbers: what its layers all have so stays so, and the rest is read
    as it is.

    Args:
      checkpoint: what is read.
      name: of `config.quantization.Quantize`; None expands everything.
    """
    stored = any(tensor.blocks for tensor in checkpoint.tensors.values())

    def form(place: Place) -> str | None:
        if name is None or not stored:
            return name
        layers = (place.layers or ()) if place.stacked else (place.layers or ())[:1]
        tensors = [checkpoint.tensor(place.spec, layer) for layer in layers]
        kinds = {tensor.blocks and ("nf4" if tensor.doubly else "nf4-single") for tensor in tensors}
        if len(kinds) > 1:
            log.warning("%s is expanded in all its layers, as they are not all stored alike", place.spec.ours)
        return kinds.pop() if len(kinds) == 1 else None

    return form


def as_quantized(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Returns the checkpoint with the numbers that are left of its layers' matrices where they are quantized.

    Args:
      checkpoint: those of its matrices that are stored in NF4 stay as they are.
      name: of `config.quantization.Quantize`.
    """
    config, format = checkpoint.config, checkpoint.format
    newest: dict[str, np.ndarray] = {}  # one matrix, of which several parts are read in turn

    def change(spec: params.ParamSpec, layer: int | None, tensor: Tensor) -> Tensor:
        def reader(index: Index) -> np.ndarray:
            if tensor.name not in newest:
                newest.clear()
                ours = _dense(_matrix(checkpoint, spec, layer), name, spec, config).astype(tensor.dtype)
                newest[tensor.name] = ours if format == "native" else params.to_stored(ours, spec, config, format)
            return newest[tensor.name][index]

        return dataclasses.replace(tensor, reader=reader)

    tensors = dict(checkpoint.tensors)
    if not any(tensor.blocks for tensor in tensors.values()):
        for spec, layer in params.parameters(config):
            if layer is not None and spec.kind == "matrix":
                stored = spec.name(format, layer)
                tensors[stored] = change(spec, layer, tensors[stored])
    return dataclasses.replace(checkpoint, tensors=tensors)


def _matrix(checkpoint: Checkpoint, spec: params.ParamSpec, layer: int | None) -> np.ndarray:
    """One layer's matrix, [out, in], its rows in the order of our own dimensions."""
    outer, inner = _sizes(spec, checkpoint.config)
    tensor = checkpoint.tensor(spec, layer)
    whole = [slice(0, n) for n in (*inner, *outer)]
    ours = params.read(tensor, spec, checkpoint.config, checkpoint.format, whole)
    matrix = ours.reshape(math.prod(inner), math.prod(outer)).T
    if not np.isfinite(matrix).all():
        raise CheckpointError(
            f"{checkpoint.path}: {tensor.name}: holds numbers that are not finite: it cannot be quantized"
        )
    return matrix


def _dense(matrix: np.ndarray, name: str, spec: params.ParamSpec, config: ModelConfig) -> np.ndarray:
    """What is left of a matrix, in our own dimensions."""
    outer, inner = _sizes(spec, config)
    return quantize(matrix, double=name == "nf4").dense().T.reshape(*inner, *outer)


def _sizes(spec: params.ParamSpec, config: ModelConfig) -> tuple[list[int], list[int]]:
    """Of the dimensions that a product leaves, and of those that it contracts."""
    size = params.sizes(config)
    outer, inner = ([size[letter] for letter in group] for group in spec.stored)
    return outer, inner


class QuantizedParameter:
    """One quantized weight of the model: where it is stored, and which parts of it the devices of this process hold.

    Each process reads the whole of it: the magnitudes of double quantization are relative to their mean.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, like: NF4):
        self._checkpoint, self._like = checkpoint, like
        self._place = place_of(name, checkpoint.config.layers)
        layers: Sequence[int | None] = self._place.layers or [None]
        self._layers = layers if self._place.stacked else layers[:1]

    def bytes_to_read(self) -> int:
        """Bytes of the file."""
        return sum(self._checkpoint.tensor(self._place.spec, layer).nbytes for layer in self._layers)

    def read(self, dtype: str | None, advance: Callable[[int], None]) -> NF4:
        """Reads it, quantizes what is not stored so, and puts it on the devices.

        Args:
          dtype: of the model: the weight stands for numbers of this or of its stored dtype, whichever is narrower.
          advance: called with the bytes that were read.
        """
        import jax

        from llama_jax.ops.quantized import NF4

        like, stacked = self._like, self._place.stacked
        tensors = [self._checkpoint.tensor(self._place.spec, layer) for layer in self._layers]
        stored = common_dtype(tensor.dtype for tensor in tensors)
        number = stored if stored.itemsize < like.number.itemsize else like.number
        parts = {name: part for name in FIELDS if (part := getattr(like, name)) is not None}
        held: dict[str, dict[tuple, tuple[Index, np.ndarray]]] = {}
        for name, part in parts.items():
            indices = part.sharding.addressable_devices_indices_map(part.shape).values()
            held[name] = {_key(index): (index, np.empty(_shape(part.shape, index), part.dtype)) for index in indices}
        for i, (layer, tensor) in enumerate(zip(self._layers, tensors, strict=True)):
            arrays = self._arrays(tensor.blocks() if tensor.blocks else self._quantized(layer))
            for name, own in held.items():
                for index, out in own.values():
                    if stacked:
                        out[i] = arrays[name][index[1:]]
                    else:
                        out[...] = arrays[name][index]
            advance(tensor.nbytes)

        def put(name: str) -> jax.Array:
            part, own = parts[name], held[name]
            return jax.make_array_from_callback(
                part.shape, part.sharding, lambda index: own[_key(index or ())][1], dtype=part.dtype
            )

        made = {name: put(name) if name in parts else None for name in FIELDS}
        return NF4(**made, number=number, inner=like.inner, outer=like.outer)  # pyright: ignore[reportArgumentType]

    def _quantized(self, layer: int | None) -> Blocks:
        return quantize(_matrix(self._checkpoint, self._place.spec, layer), double=self._like.scales is not None)

    def _arrays(self, blocks: Blocks) -> dict[str, np.ndarray]:
        """One layer's arrays in the order of `ops.quantized.NF4`."""
        outer, inner = _sizes(self._place.spec, self._checkpoint.config)
        rows, columns = blocks.shape
        per_output = columns // BLOCK
        first = [*inner[:-1], inner[-1] // BLOCK]
        high_low = np.stack([blocks.codes >> 4, blocks.codes & 15], axis=-1).reshape(rows, per_output, 2, BLOCK // 2)
        codes = (high_low[:, :, 0] << 4 | high_low[:, :, 1]).reshape(rows, -1)
        found = {
            "codes": codes.T.reshape(*first, BLOCK // 2, *outer),
            "absmax": blocks.absmax.T.reshape(*first, *outer),
        }  # fmt: skip
        if blocks.scales is not None and blocks.offset is not None:
            own = np.arange(rows) * per_output // SCALE_BLOCK + np.arange(scale_rows(columns))[:, None]
            found["scales"] = blocks.scales[np.minimum(own, len(blocks.scales) - 1)].reshape(-1, *outer)
            found["offset"], found["table"] = np.asarray(blocks.offset), blocks.table
        return found


def _shape(whole: tuple[int, ...], index: Index) -> list[int]:
    return [len(range(n)[s]) for n, s in zip(whole, index, strict=True)]


def _key(index: Index) -> tuple:
    return tuple((s.start, s.stop) for s in index)
