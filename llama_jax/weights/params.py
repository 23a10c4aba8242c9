"""Reading and writing tensors by the table of parameters (`config.params`, whose names are here too)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.config.params import (
    EMBED,
    HEAD,
    INTERLEAVED,
    NO_PARAMETERS,
    TABLE,
    Format,
    ParamSpec,
    StoredTensor,
    embed_name,
    expected,
    head_name,
    parameters,
    period_of,
    place_of,
    sizes,
    stacked_name,
    stored_shape,
    stored_tensors,
)  # fmt: skip
from llama_jax.weights.source import CheckpointError, Index, Tensor

__all__ = [
    "EMBED",
    "FLOATS",
    "HEAD",
    "INTERLEAVED",
    "NO_PARAMETERS",
    "TABLE",
    "Format",
    "ParamSpec",
    "StoredTensor",
    "check",
    "embed_name",
    "expected",
    "head_name",
    "parameters",
    "part_of",
    "period_of",
    "pieces",
    "place_of",
    "read",
    "sizes",
    "stacked_name",
    "stored_shape",
    "stored_tensors",
    "to_stored",
]  # fmt: skip

FLOATS = ("float64", "float32", "bfloat16", "float16")
STRIP = 32  # columns: a cache line of 2-byte numbers
PIECE = 1 << 24  # bytes that a conversion holds at a time: larger is no faster


def part_of(tensor: Tensor, spec: ParamSpec, config: ModelConfig, format: Format) -> Tensor:
    """The parameter's part of a stored tensor that holds several: a tensor of its own, read from that one."""
    source = spec.source(format)
    shape = stored_shape(spec, config, format)
    if source is None or tensor.shape == shape:
        return tensor
    size = sizes(config)
    first = sum(math.prod(size[letter] for letter in group) for group in source.before)

    def reader(index: Index) -> np.ndarray:
        rows, *rest = index or (slice(None),)
        inside = range(shape[0])[rows]
        return tensor.read((slice(first + inside.start, first + inside.stop), *rest))

    nbytes = tensor.nbytes * shape[0] // tensor.shape[0]
    return dataclasses.replace(tensor, shape=shape, nbytes=nbytes, reader=reader, blocks=None)


def read(tensor: Tensor, spec: ParamSpec, config: ModelConfig, format: Format, index: Sequence[slice]) -> np.ndarray:
    """Reads one device's part of one parameter, and only the bytes that it needs.

    Args:
      tensor: as stored.
      spec: what it is.
      config: its sizes.
      format: decides whether heads are permuted.
      index: slices without steps over *our* dimensions, as a sharding gives them.

    Returns:
      That part, in our orientation and the stored dtype; perhaps a view of the file.
    """
    size = sizes(config)
    part = {axis: range(size[axis])[s] for axis, s in zip(spec.axes, index, strict=True)}
    # Ranges of the stored dimensions: whole runs, several where an inner dimension is split (groups over `tensor_q`).
    groups = spec.groups(format)
    runs = [_runs([(part[axis], size[axis]) for axis in group]) for group in groups]
    if all(len(r) == 1 for r in runs):
        stored = tensor.read(tuple(r[0] for r in runs))
    else:
        rows = [
            np.concatenate([tensor.read((first, *rest)) for rest in itertools.product(*runs[1:])], axis=-1)
            for first in runs[0]
        ]
        stored = np.concatenate(rows, axis=0)
    if spec.rope and format in INTERLEAVED:  # rows of a head: pairs -> halves
        H, D = config.head_dim, stored.shape[-1]
        assert len(part["H"]) == H, "no sharding may split head_dim"
        stored = stored.reshape(-1, H // 2, 2, D).swapaxes(1, 2).reshape(-1, D)
    if "".join(groups) != spec.axes:  # the two stored dimensions are transposed
        stored = _contiguous(stored.T)
    return stored.reshape([len(part[axis]) for axis in spec.axes])


def _contiguous(x: np.ndarray) -> np.ndarray:
    """A C-contiguous copy of a transposed matrix, in strips that stay in the cache: three times as fast as NumPy's."""
    bits = x.view(f"u{x.dtype.itemsize}")  # NumPy copies bfloat16 element by element
    out = np.empty(x.shape, bits.dtype)
    for start in range(0, x.shape[1], STRIP):
        strip = slice(start, start + STRIP)
        out[:, strip] = bits[:, strip]
    return out.view(x.dtype)


def _runs(dimensions: list[tuple[range, int]]) -> list[slice]:
    """The contiguous slices of a merged dimension that a part of each of its dimensions covers, in order."""
    (first, _), *inner = dimensions
    width = int(np.prod([size for _, size in inner]))
    if all(len(part) == size for part, size in inner):
        return [slice(first.start * width, first.stop * width)]
    below = _runs(inner)
    return [slice(i * width + run.start, i * width + run.stop) for i in first for run in below]


def check(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    format: Format,
    path: object,
    explain: Callable[[], str] = lambda: "",
) -> None:
    """Compares a checkpoint's tensors with what its configuration asks for.

    Args:
      tensors: stored name -> tensor.
      config: what they should be.
      format: whose names they have.
      path: for messages.
      explain: says, once something is wrong, what the files are instead and what to do; "" where it cannot tell.

    Raises:
      CheckpointError: a tensor is missing, has another shape, or is none that a Llama has (such as a bias).
    """

    def refuse(problem: str, remedy: str) -> NoReturn:
        raise CheckpointError(f"{path}: {problem}; {explain() or remedy}")

    if config.num_layers > len(tensors):  # before a table of that many names is made
        refuse(
            f"the configuration names {config.num_layers} layers, but the files hold {len(tensors)} tensors",
            "weights and configuration do not belong together",
        )
    names = expected(config, format)
    missing = [name for name in names if name not in tensors]
    if missing:
        refuse(
            f"{len(missing)} of {len(names)} tensors are missing, first {missing[0]!r}",
            f"the files hold {len(tensors)} others, such as {next(iter(tensors), None)!r}: give a folder whose weights"
            " and configuration belong together",
        )
    for name, shape in names.items():
        if tensors[name].shape != shape:
            refuse(
                f"tensor {name!r} has shape {list(tensors[name].shape)}, but the configuration asks for {list(shape)}",
                "weights and configuration do not belong together",
            )
        if tensors[name].dtype.name not in FLOATS:
            refuse(
                f"tensor {name!r} holds {tensors[name].dtype} numbers, whose scale is not known",
                "this quantization is not supported, use another file of this model",
            )
    tied = {head_name(format)} if config.tie_embeddings else set()
    extra = [name for name in tensors if name not in names and name not in tied and not NO_PARAMETERS.fullmatch(name)]
    if extra:
        refuse(
            f"{len(extra)} tensors that a Llama does not have, first {extra[0]!r}",
            "leaving them out would give wrong results, so this model is not supported",
        )


def to_stored(ours: np.ndarray, spec: ParamSpec, config: ModelConfig, format: Format) -> np.ndarray:
    """The inverse of `read`: one whole parameter as a format stores it, perhaps as a view."""
    letters = "".join(spec.groups(format))
    stored = ours.transpose([spec.axes.index(axis) for axis in letters])
    if spec.rope and format in INTERLEAVED:
        *heads, H, D = stored.shape
        stored = stored.reshape(*heads, 2, H // 2, D).swapaxes(-3, -2)
    return stored.reshape(stored_shape(spec, config, format))


def pieces(
    tensor: Tensor, spec: ParamSpec, config: ModelConfig, source: Format, target: Format, columns: slice, rows: range
) -> Iterator[np.ndarray]:
    """One parameter in another format, piece by piece: whole rows of the stored matrix, about `PIECE` bytes each.

    Args:
      tensor: as stored in `source`.
      spec: what it is.
      config: its sizes.
      source: the format it comes from.
      target: "hf", "meta" or "gguf".
      columns: which columns of the stored matrix, as a tensor-parallel shard takes them.
      rows: which rows, in whole heads where heads are permuted.

    Yields:
      Arrays of the stored dtype, [rows, columns] or [rows], that follow each other.
    """
    H = config.head_dim
    unit = H if spec.rope else 1
    if source == "native":  # our dimensions are in another order: one parameter is read whole
        whole = to_stored(tensor.read(), spec, config, "hf")
        source, read = "hf", lambda index: _contiguous(whole[index]) if whole.ndim == 2 else whole[index]
    else:
        read = tensor.read
    width = math.prod(stored_shape(spec, config, target)[1:]) * tensor.dtype.itemsize
    step = unit * max(1, PIECE // (width * unit))
    permuted = spec.rope and (source in INTERLEAVED) != (target in INTERLEAVED)
    for start in range(rows.start, rows.stop, step):
        index = (slice(start, min(start + step, rows.stop)), columns)
        piece = read(index[: len(spec.stored)])
        if permuted:
            pairs = (H // 2, 2) if source in INTERLEAVED else (2, H // 2)
            piece = piece.reshape(-1, *pairs, piece.shape[-1]).swapaxes(1, 2).reshape(piece.shape)
        yield piece
