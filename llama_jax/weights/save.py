"""`convert` and `save`: a checkpoint in another format, exact, verified, in bounded memory, whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from llama_jax.config import ConfigError
from llama_jax.files import sync
from llama_jax.progress import SMALL, progress
from llama_jax.text.differences import differences
from llama_jax.typing import PyTree
from llama_jax.weights import params
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.compare import compare_parameter
from llama_jax.weights.formats import FORMATS
from llama_jax.weights.formats.base import Options, parse_bytes
from llama_jax.weights.merge import MergeInto, difference, merged
from llama_jax.weights.open import open_checkpoint
from llama_jax.weights.params import Format
from llama_jax.weights.peft import open_adapter
from llama_jax.weights.replace import check_replaceable, replacing
from llama_jax.weights.source import CheckpointError, Tensor

if TYPE_CHECKING:
    from llama_jax.loaded import LoadedLlama


TARGETS: tuple[Format, ...] = get_args(Format)


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion.

    Attributes:
      path: what was written.
      format: of it.
      dtype: of most of its weights, before quantization.
      quantize: the quantization of a GGUF file's matrices, or None.
      nbytes: of all its files.
      write_seconds: reading, converting and writing, until the bytes are on the disk.
      verify_seconds: reading it again and comparing it with the source.
      warnings: sentences on what was left out, and on other programs that read the result differently.
    """

    path: str
    format: str
    dtype: str
    quantize: str | None
    nbytes: int
    write_seconds: float
    verify_seconds: float
    warnings: list[str]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Format,
    dtype: str | None = None,
    shards: int = 1,
    max_shard_size: int | str = "5GB",
    quantize: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    adapter: str | Path | None = None,
    merge_into: MergeInto = "seen",
) -> ConversionReport:
    """Converts a checkpoint tensor by tensor; without JAX, except to "native".

    Args:
      source: whatever `load` takes.
      destination: a new folder, or a new file for "gguf". It appears when it is whole and verified.
      to: "hf", "meta", "gguf" or "native".
      dtype: "float32", "bfloat16" or "float16"; None keeps what is stored (float32 for quantized sources).
      shards: files of a Meta folder, one a tensor-parallel rank.
      max_shard_size: most bytes of one safetensors file, unless one tensor is larger: a number, or such as "500MB".
      quantize: "q8_0" or "q4_0" for the matrices of a GGUF file.
      overwrite: whether a checkpoint at `destination` is replaced.
      verify: whether the result is read again and compared with the source, bit for bit.
      adapter: the folder of a LoRA adapter that is added to the weights; where the source is one, its base is read.
      merge_into: what an adapter is added to, where its run quantized the base: "seen" is that quantized base, as the
        adapter was trained; "original" the base as it is stored, and a warning says how far the two are apart.

    Raises:
      CheckpointError: the source cannot be read, or the result differs from it.
      ConfigError: the format cannot hold this model, or not in so many shards.
      OSError: the destination exists or cannot be written.
      ValueError: an argument is wrong.
    """
    options = Options(dtype, shards, parse_bytes(max_shard_size), quantize)
    _check_options(to, options)
    check_replaceable(Path(os.path.expanduser(destination)), overwrite=overwrite)  # before anything is fetched
    source, saved = open_adapter(source, adapter)
    checkpoint, warnings = open_checkpoint(source), []
    if saved:
        if merge_into not in get_args(MergeInto):
            raise ValueError(f"merge_into must be one of {', '.join(get_args(MergeInto))}, got {merge_into!r}")
        if saved.quantize and merge_into == "original" and (apart := difference(checkpoint, saved)):
            warnings.append(
                f"the adapter was trained on this model in {saved.quantize}, and is merged into the original: their"
                f" matrices are {apart:.1%} apart (root mean square), so this is another model than the one trained"
            )
        checkpoint = merged(checkpoint, saved, into=merge_into)
    report = export(checkpoint, destination, to=to, options=options, overwrite=overwrite, verify=verify)
    return dataclasses.replace(report, warnings=[*warnings, *report.warnings])


def save(
    llama: LoadedLlama, path: str | Path, *, format: Format, overwrite: bool = False, **options: Any
) -> ConversionReport:
    """Writes a loaded model, its weights as they are on the devices.

    Args:
      llama: of `load`.
      path: a new folder, or a new file for "gguf".
      format: "hf", "meta", "gguf" or "native".
      overwrite: whether a checkpoint at `path` is replaced.
      **options: `dtype`, `shards`, `max_shard_size`, `quantize`, as for `convert`.

    Raises:
      as `convert`.
    """
    if "max_shard_size" in options:
        options["max_shard_size"] = parse_bytes(options["max_shard_size"])
    return export(_of_loaded(llama), path, to=format, options=Options(**options), overwrite=overwrite)


def export(
    checkpoint: Checkpoint,
    destination: str | Path,
    *,
    to: Format,
    options: Options,
    overwrite: bool = False,
    verify: bool = True,
) -> ConversionReport:
    """Writes an opened checkpoint. Arguments and errors as `convert`."""
    _check_options(to, options)
    destination = Path(os.path.expanduser(destination))
    if destination.resolve() in checkpoint.path.resolve().parents:
        raise FileExistsError(f"{destination}: holds the source, {checkpoint.path}; give another destination")
    with _naming_errors(checkpoint, destination, to):
        return _export(checkpoint, destination, to, options, overwrite=overwrite, verify=verify)


def _export(
    checkpoint: Checkpoint, destination: Path, to: Format, options: Options, *, overwrite: bool, verify: bool
) -> ConversionReport:
    format = FORMATS[to]
    total = format.nbytes(checkpoint, options)
    with replacing(destination, overwrite=overwrite) as partial:
        free = shutil.disk_usage(partial.parent).free
        if free < total:
            raise OSError(f"{destination}: needs {total / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: make room")
        start = time.perf_counter()
        with progress("Converting", total, least=SMALL) as advance:
            warnings = [f"left out: {text}" for text in checkpoint.left_out]
            warnings += format.write(partial, checkpoint, options, advance)
            files = [p for p in partial.rglob("*") if p.is_file()] if partial.is_dir() else [partial]
            sync(files)
        written = time.perf_counter()
        if verify:
            with progress("Verifying", total, least=SMALL) as advance:
                warnings += _verify(checkpoint, partial, options, advance)
        verified = time.perf_counter()
        nbytes = sum(file.stat().st_size for file in files)
    return ConversionReport(
        str(destination), to, options.dtype or str(checkpoint.dtype), options.quantize, nbytes,
        written - start, verified - written, warnings,
    )  # fmt: skip


def _check_options(to: str, options: Options) -> None:
    if to not in TARGETS:
        raise ValueError(f"unknown format {to!r}: choose one of {', '.join(TARGETS)}")
    if options.quantize and to != "gguf":
        raise ValueError(f"--quantize {options.quantize} is for GGUF files: use --to gguf, or leave it out")
    if options.shards != 1 and to != "meta":
        raise ValueError("--shards is for Meta folders: use --to meta, or --max-shard-size for Hugging Face folders")


@contextlib.contextmanager
def _naming_errors(checkpoint: Checkpoint, destination: Path, to: str) -> Iterator[None]:
    """Turns errors of writing into messages that name source, target and remedy.

    Raises:
      CheckpointError: with the original error as its cause.
    """
    try:
        yield
    except (CheckpointError, ConfigError, OSError, MemoryError):
        raise  # they name all that
    except Exception as error:
        if isinstance(error, ValueError) and str(checkpoint.path) in str(error):
            raise
        found = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        others = " or ".join(other for other in TARGETS if other not in (to, checkpoint.format))
        raise CheckpointError(
            f"{checkpoint.path}: cannot be written as {to} to {destination} ({found}); nothing was kept there: choose"
            f" another format ({others}), or mend the file that this names"
        ) from error


def _verify(source: Checkpoint, path: Path, options: Options, advance: Callable[[int], None]) -> list[str]:
    """Opens the result as `load` does, and compares it with the source.

    Returns:
      Sentences on where the tokenizer differs.

    Raises:
      CheckpointError: something differs.
    """
    result = open_checkpoint(path)
    format = FORMATS[result.format]
    if result.config != source.config:
        raise ConfigError(f"this format cannot hold {source.config}: it would be read as {result.config}")
    for row, layer, tensor in _written(result):
        stored = result.tensor(row, layer) if tensor is None else tensor

        def expected(piece: np.ndarray, row: params.ParamSpec = row, stored: Tensor = stored) -> np.ndarray:
            return format.stored(piece, row, options, stored.name).astype(stored.dtype, copy=False)

        difference = compare_parameter(source, result, row, layer, expected=expected, tensor=tensor)
        if not difference.same_bits:
            raise CheckpointError(
                f"{stored.name} was not written as it should be (off by up to {difference.max_abs:g}): the disk or this"
                " program is at fault; nothing was kept"
            )
        advance(stored.nbytes)
    return [f"the tokenizer is not the same: {text}" for text in differences(source.tokenizer, result.tokenizer)]


def _written(result: Checkpoint) -> Iterator[tuple[params.ParamSpec, int | None, Tensor | None]]:
    for row, layer in params.parameters(result.config):
        yield row, layer, None
    if result.config.tie_embeddings and (head := result.tensors.get(params.head_name(result.format))):
        yield params.TABLE[0], None, head


def _of_loaded(llama: LoadedLlama) -> Checkpoint:
    """Returns the arrays of a model as a checkpoint in our format."""
    import jax

    from llama_jax.ops.weights import is_leaf, leaf_of, name_of

    if llama.adapters:
        raise ValueError(
            f"a model with several adapters ({', '.join(llama.adapters)}) is no one model: load it with the one that is"
            " to be saved"
        )

    tensors: dict[str, Tensor] = {}
    dense = jax.jit(lambda value: leaf_of(value).dense())
    leaves = jax.tree_util.tree_flatten_with_path(llama.model, is_leaf=is_leaf)[0]
    for path, value in leaves:
        leaf, place = leaf_of(value), params.place_of(name_of(path), llama.config.layers)
        if not all(array.is_fully_addressable for array in jax.tree.leaves(value)):
            raise ValueError("this model is spread over several processes: convert the checkpoint it was loaded from")
        row, stacked, dtype = place.spec, place.stacked, np.dtype(leaf.dtype)
        for n, i in enumerate([None] if place.layers is None else place.layers if stacked else place.layers[:1]):
            shape = leaf.shape[1:] if stacked else leaf.shape
            nbytes = math.prod(shape) * dtype.itemsize

            def read(
                index: tuple[slice, ...], value: PyTree = value, first: Any = (n,) if stacked else ()
            ) -> np.ndarray:
                with jax.set_mesh(llama.mesh):
                    array = dense(value)
                return np.asarray(array[(*first, *index)] if first else array)[() if first else index]

            stored = row.name("native", i)
            tensors[stored] = Tensor(stored, shape, dtype, nbytes, read)
    origin = llama.checkpoint
    name = origin.path if origin else Path("llama")
    files, generation = (origin.tokenizer_files, origin.generation) if origin else (dict, {})
    left_out = origin.left_out if origin else ()
    return Checkpoint(name, "native", llama.config, tensors, llama.tokenizer, files, generation, left_out)
