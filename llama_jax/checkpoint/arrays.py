"""Trees of arrays on disk.

Arrays are saved as they are sharded, each process its own part. One that is stacked over layers is cut into
chunks of one layer, so that a layer can be read alone, without its neighbours, onto any mesh. Only layers of less than
`SMALL` bytes, such as norms, share chunks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from llama_jax.checkpoint.paths import plain
from llama_jax.libc import return_large_blocks
from llama_jax.typing import Foreign, JsonObject

CHUNK = 1 << 26  # bytes: what a read of a few rows costs at most
FILE = 1 << 28  # bytes of one data file, which is in memory until it is whole (Orbax's default: 2 GiB)
SMALL = 1 << 20  # bytes of a layer that is not worth a chunk of its own


class DamagedError(ValueError):
    """A saved tree that cannot be read."""


@dataclasses.dataclass(frozen=True)
class SavedArray:
    """One array of a saved tree.

    Attributes:
      shape: of the whole array.
      dtype: of the stored numbers.
      read: reads the part that an index (integers and slices) selects, and the chunks that hold it.
      missing_chunks: counts the chunks that are not in the index of what is stored; reads none of them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice | int, ...]], np.ndarray] = dataclasses.field(repr=False)
    missing_chunks: Callable[[], int] = dataclasses.field(repr=False, default=lambda: 0)


def save_arrays(path: Path, arrays: Mapping[str, jax.Array], *, stacked: Callable[[str], bool]) -> None:
    """Saves arrays by name; returns when they are on disk and have been opened again. All processes call it.

    Args:
      path: of a new folder.
      arrays: name -> array; names may hold dots.
      stacked: whether the array of a name is stacked over layers, along its first axis.

    Raises:
      DamagedError: what was saved cannot be opened.
    """
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(handler(arrays)) as checkpointer:
        checkpointer.save(plain(path), args=save_request(arrays, stacked))
    check_saved(path, {name: (x.shape, np.dtype(x.dtype)) for name, x in arrays.items()})


def check_saved(path: Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Opens what was saved: all arrays must be there, of these shapes and dtypes, and all of their chunks.

    Reads descriptions and indices, no array.

    Args:
      path: the folder.
      arrays: name -> shape and dtype.

    Raises:
      DamagedError: something is missing; says what.
    """
    found = open_arrays(path)
    if names := sorted(found.keys() ^ arrays.keys()):
        raise DamagedError(f"{path}: {names[0]!r} is {'missing' if names[0] in arrays else 'there, and was not saved'}")
    for name, (shape, dtype) in arrays.items():
        if (found[name].shape, found[name].dtype) != (tuple(shape), dtype):
            raise DamagedError(
                f"{path}: {name!r} is {found[name].dtype}{list(found[name].shape)} after it was saved as"
                f" {dtype}{list(shape)}"
            )
        if missing := found[name].missing_chunks():
            raise DamagedError(f"{path}: {missing} chunks of {name!r} are missing")


def handler(arrays: Mapping[str, jax.Array]) -> Foreign:
    """An Orbax handler that holds as little in flight as Orbax allows: one copy of the largest array.

    What it copies is memory beyond the arrays.
    """
    import orbax.checkpoint as ocp

    return_large_blocks()
    most = max(_local_bytes(x) * len(x.addressable_shards) for x in arrays.values())
    # (Orbax multiplies the number by 10**9; a fraction does.) Weights do not compress: zstd saves bf16 a fifth, and
    # costs more time than the disk saves.
    options: JsonObject = {"save_concurrent_gb": (most + 1) / 10**9, "use_compression": False}
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, **options)


def save_request(arrays: Mapping[str, jax.Array], stacked: Callable[[str], bool]) -> Foreign:
    """What Orbax is to save, and in which chunks."""
    import orbax.checkpoint as ocp

    def chunks(name: str, x: jax.Array) -> ocp.SaveArgs:
        if not stacked(name) or (layer := _local_bytes(x) // len(x)) < SMALL:
            return ocp.SaveArgs(chunk_byte_size=CHUNK)
        return ocp.SaveArgs(chunk_byte_size=min(CHUNK, layer), shard_axes=(0,))

    save_args = {name: chunks(name, x) for name, x in arrays.items()}
    return ocp.args.PyTreeSave(dict(arrays), save_args=save_args, ocdbt_target_data_file_size=FILE)


def _local_bytes(x: jax.Array) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def open_arrays(path: Path) -> dict[str, SavedArray]:
    """Opens what `save_arrays` or a training run saved; reads no array.

    Raises:
      DamagedError: not such a folder, or a damaged one.
    """
    import orbax.checkpoint as ocp
    import tensorstore
    from etils import epath

    try:
        place = plain(path)
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(place)).tree
        store = {"driver": "ocdbt", "base": place.as_uri()}
        # Nothing is gained from holding what was read: each part is read once.
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
        opened = {
            name: tensorstore.open(
                {"driver": "zarr3", "kvstore": store | {"path": f"{name}/"}, "fill_missing_data_reads": False},
                open=True,
                read=True,
                context=context,
            )
            for name in tree
        }
        arrays = {name: future.result() for name, future in opened.items()}
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise DamagedError(f"{path}: not a checkpoint that Orbax can read ({type(error).__name__}: {error})") from error

    def reader(name: str) -> Callable[[tuple[slice | int, ...]], np.ndarray]:
        def read(index: tuple[slice | int, ...]) -> np.ndarray:
            try:
                return arrays[name][index].read().result()
            except Exception as error:  # a chunk that is cut short or gone
                raise DamagedError(f"{path}: {name!r} cannot be read ({error})") from error

        return read

    return {
        name: SavedArray(
            tuple(x.shape), np.dtype(x.dtype.numpy_dtype), reader(name), functools.partial(_missing_chunks, x)
        )
        for name, x in arrays.items()
    }


def _missing_chunks(array: Foreign) -> int:
    """Chunks of a tensorstore array that have no key in its store (Orbax stores those of zeros too)."""
    sizes = array.chunk_layout.write_chunk.shape or ()  # None of a scalar
    expected = math.prod(-(-n // size) for n, size in zip(array.shape, sizes, strict=True))
    keys = array.kvstore.list().result()
    return expected - sum(not key.endswith(b".json") for key in keys)
