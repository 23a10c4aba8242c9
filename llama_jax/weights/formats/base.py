"""What the formats share: the protocol, the options of writing, and the files beside the weights."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_jax.config import ConfigError
from llama_jax.typing import Fields, JsonObject
from llama_jax.weights import foreign, params
from llama_jax.weights.checkpoint import DTYPES, Checkpoint
from llama_jax.weights.dequantize import QUANTIZATIONS
from llama_jax.weights.sink import Entry
from llama_jax.weights.source import (
    DOWNLOAD_AGAIN,
    CheckpointError,
    cast,
    common_dtype,
    exists,
    link_to_nothing,
    system_errors,
)
from llama_jax.weights.verdict import Settled

Advance = Callable[[int], None]


def parse_bytes(size: int | str) -> int:
    """Returns the bytes of "500MB" or "5GB", in powers of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", str(size).strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"--max-shard-size needs a size such as 500MB or 5GB, got {size!r}")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


@dataclasses.dataclass(frozen=True)
class Options:
    """How a checkpoint is written.

    Attributes:
      dtype: a key of `DTYPES`; None keeps what is stored.
      shards: files of a Meta folder, one a tensor-parallel rank.
      max_shard_size: most bytes of one safetensors file, unless a single tensor is larger.
      quantize: one of `QUANTIZATIONS`, for the matrices of a GGUF file; None does not quantize.
    """

    dtype: str | None = None
    shards: int = 1
    max_shard_size: int = 5 * 10**9
    quantize: str | None = None

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {self.quantize!r}")
        for name in ("shards", "max_shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class FormatObject(Protocol):
    """One format of checkpoints: how it is found, opened and written. `formats.FORMATS` holds one of each.

    Attributes:
      name: what `params.TABLE` calls it.
    """

    name: params.Format

    def find(self, folder: Path, present: list[str]) -> Path | None:
        """Returns what `open` takes, where a folder is of this format; else None.

        Args:
          folder: an existing one.
          present: the names in it, sorted.

        Raises:
          CheckpointError: it is of this format, and not one checkpoint.
        """
        ...

    def open(self, path: Path) -> Checkpoint:
        """Opens a checkpoint, without reading weights.

        Raises:
          CheckpointError: it cannot be read.
          ConfigError: its configuration is not supported.
        """
        ...

    def write(self, path: Path, checkpoint: Checkpoint, options: Options, advance: Advance) -> list[str]:
        """Writes a checkpoint of any format, piece by piece, and returns what is lost in this one, in sentences.

        Args:
          path: of a new folder or file.
          checkpoint: what to write.
          options: how.
          advance: called with the number of bytes just written.

        Raises:
          CheckpointError: a value cannot be stored.
          ConfigError: the format cannot hold this model, or not with these options.
        """
        ...

    def nbytes(self, checkpoint: Checkpoint, options: Options) -> int:
        """Returns the bytes of weights that `write` makes."""
        return sum(entry.nbytes for _, entry in tensor_entries(checkpoint, self.name, options))

    def stored(self, piece: np.ndarray, row: params.ParamSpec, options: Options, name: str) -> np.ndarray:
        """Returns what a written file gives back for rows of a parameter: other numbers where it quantizes."""
        del row
        return cast(piece, DTYPES[options.dtype], name) if options.dtype else piece


def tensor_entries(
    checkpoint: Checkpoint, target: params.Format, options: Options
) -> Iterator[tuple[params.StoredTensor, Entry]]:
    """Yields every tensor that a format stores of a model, of one parameter or of several one after the other.

    Raises:
      ConfigError: the format has no place for a parameter.
    """
    if lost := [row.ours for row, _ in params.parameters(checkpoint.config) if row.source(target) is None]:
        raise ConfigError(f"{target} has no place for {lost[0]}: write the model as native")
    for tensor in params.stored_tensors(checkpoint.config, target):
        parts = [parameter_entry(checkpoint, row, layer, target, options) for row, layer in tensor.parts]
        if len(parts) == 1:
            yield tensor, parts[0]
            continue
        dtype = common_dtype(part.dtype for part in parts)

        def pieces(parts: Sequence[Entry] = parts, dtype: np.dtype = dtype) -> Iterator[np.ndarray]:
            for part in parts:
                yield from (cast(piece, dtype, part.name) for piece in part.pieces())

        yield tensor, Entry(tensor.name, tensor.shape, dtype, pieces)


def parameter_entry(
    checkpoint: Checkpoint,
    row: params.ParamSpec,
    layer: int | None,
    target: params.Format,
    options: Options,
    *,
    part: tuple[int, int, int] = (0, 0, 1),
) -> Entry:
    """Returns a parameter to be written; of `part` (axis, rank, ranks), only that rank's share along that axis."""
    name = row.name(target, layer)
    dtype = DTYPES[options.dtype] if options.dtype else checkpoint.dtype_of(row, layer)
    shape = params.stored_shape(row, checkpoint.config, target)
    axis, rank, ranks = part
    ranges = [range(size) for size in shape]
    share = shape[axis] // ranks
    ranges[axis] = range(rank * share, (rank + 1) * share)

    def pieces() -> Iterator[np.ndarray]:
        for piece in params.pieces(
            checkpoint.tensor(row, layer), row, checkpoint.config, checkpoint.format, target,
            slice(ranges[-1].start, ranges[-1].stop), ranges[0],
        ):  # fmt: skip
            yield np.ascontiguousarray(cast(piece, dtype, name))

    return Entry(name, tuple(map(len, ranges)), dtype, pieces)


# ---------------------------------------------------------------------------------------------------------------------
# Files beside the weights
# ---------------------------------------------------------------------------------------------------------------------


def folder_checkpoint(path: Path, format: params.Format, settled: Settled) -> Checkpoint:
    """Returns a checkpoint whose tokenizer is stored beside its weights."""
    from llama_jax.text.export import hf_files, with_named_ids
    from llama_jax.text.open import load_tokenizer, read_files

    generation, tokenizer = path / "generation_config.json", load_tokenizer(path)
    return Checkpoint(
        path, format, settled.config, settled.tensors, tokenizer,
        lambda: hf_files(with_named_ids(read_files(path), tokenizer)),
        read_json(generation, "") if exists(generation) else {}, settled.left_out,
    )  # fmt: skip


def read_json(path: Path, purpose: str) -> JsonObject:
    """Reads a JSON object; `purpose` says, where the file is missing, what it is for.

    Raises:
      CheckpointError: no such file, or not a JSON object.
    """
    if not exists(path):
        if answer := link_to_nothing(path):
            raise CheckpointError(f"{path}: no such file{answer}")
        raise CheckpointError(f"{path}: no such file; {purpose}: put it there, or give the folder that holds it")
    with system_errors(path):
        data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); {_why_no_json(data, error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object, but a {type(content).__name__}: put the right file there")
    return content


def _why_no_json(data: bytes, error: Exception) -> str:
    """Returns the remedy; damage shows where the file ends too early, or holds bytes that no text has."""
    if answer := foreign.begins(data[:64]):
        return answer
    early = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip())
    if early or b"\0" in data or isinstance(error, UnicodeDecodeError):
        return DOWNLOAD_AGAIN
    return "correct it there"


def to_json(name: str, content: Fields) -> bytes:
    """Returns the content of a JSON file.

    Raises:
      CheckpointError: a value is NaN or a lone surrogate.
    """
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise CheckpointError(f"{name}: the source has a value there that JSON cannot hold ({error})") from error


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files by their names."""
    for name, content in files.items():
        (folder / name).write_bytes(content)


def tokenizer_files(checkpoint: Checkpoint) -> tuple[dict[str, bytes], list[str]]:
    """Returns the tokenizer's files as Hugging Face spells them, and warnings.

    Where the tokenizer has no such spelling, there are no files, and a warning: weights need no tokenizer.
    """
    try:
        files = checkpoint.tokenizer_files()
    except ValueError as error:
        return {}, [f"the tokenizer was left out, there are only weights: {error}"]
    own = checkpoint.tokenizer is None or checkpoint.tokenizer.chat_template or checkpoint.tokenizer.chat_templates
    if own or not json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template"):
        return files, []
    guess = "the source has no chat template: it got the one of the generation that its vocabulary belongs to"
    return files, [f"{guess}, which a base model was not trained on"]
