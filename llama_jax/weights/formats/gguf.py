"""llama.cpp's format: one file (or parts of one) with metadata, tokenizer and tensors, perhaps quantized."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from llama_jax.config import ConfigError
from llama_jax.config.gguf import from_gguf_metadata, rope_divisors, to_gguf_metadata
from llama_jax.typing import JsonObject
from llama_jax.weights import diagnose, params, verdict
from llama_jax.weights.checkpoint import DTYPES, Checkpoint
from llama_jax.weights.dequantize import BLOCK_FORMATS, dequantize
from llama_jax.weights.formats import base
from llama_jax.weights.gguf_file import PLAIN_DTYPES, read_gguf, stored_layout
from llama_jax.weights.sink import Entry, write_pieces
from llama_jax.weights.source import CheckpointError, cast

if TYPE_CHECKING:
    import gguf

_KINDS = {dtype: kind for kind, dtype in PLAIN_DTYPES.items() if dtype in DTYPES.values()}


class _GGUF(base.FormatObject):
    """llama.cpp's format."""

    name = "gguf"

    def find(self, folder: Path, present: list[str]) -> Path | None:
        """Returns the one model in a folder, or the first part of it."""
        files = [name for name in present if name.endswith(".gguf")]
        models = [name for name in files if not re.search("mmproj|imatrix", name)] or files
        if len(models) > 1 and "-00001-of-" not in models[0]:
            raise CheckpointError(f"{folder}: has {len(models)} GGUF files: give one of them")
        return folder / models[0] if models else None

    def open(self, path: Path) -> Checkpoint:
        from llama_jax.text.export import hf_files_from_gguf
        from llama_jax.text.open import tokenizer_from_gguf

        file = read_gguf(path)
        if answer := diagnose.gguf(file.metadata, file.tensors):
            raise CheckpointError(f"{path}: {answer}")
        divisors = file.tensors.get("rope_freqs.weight")
        config = from_gguf_metadata(
            file.metadata,
            tie_embeddings="output.weight" not in file.tensors,
            rope_divisors=None if divisors is None else divisors.read().tolist(),
        )
        settled = verdict.settle(path, "gguf", config, file.tensors, said=file.metadata)
        tokenizer = tokenizer_from_gguf(file.metadata)
        return Checkpoint(
            path, "gguf", settled.config, settled.tensors, tokenizer,
            lambda: hf_files_from_gguf(file.metadata) if tokenizer else {}, left_out=settled.left_out,
        )  # fmt: skip

    def nbytes(self, checkpoint: Checkpoint, options: base.Options) -> int:
        return sum(content.nbytes for content in _contents(checkpoint, options))

    def stored(self, piece: np.ndarray, row: params.ParamSpec, options: base.Options, name: str) -> np.ndarray:
        piece = super().stored(piece, row, options, name)
        if not options.quantize or len(row.stored) == 1:
            return piece
        kind = options.quantize.upper()
        blocks = encode(piece, kind, name)
        return dequantize(blocks.reshape(*blocks.shape[:-1], -1, BLOCK_FORMATS[kind].nbytes), kind)

    def write(self, path: Path, checkpoint: Checkpoint, options: base.Options, advance: base.Advance) -> list[str]:
        """Writes a file with the gguf package; returns what llama.cpp would do differently."""
        import gguf

        contents = _contents(checkpoint, options)
        writer = gguf.GGUFWriter(path, "llama")
        tokenizer, warnings = _tokenizer(checkpoint)
        metadata = to_gguf_metadata(checkpoint.config) | _general(checkpoint, options) | tokenizer
        for key, value in metadata.items():
            if key != "general.architecture":  # the package writes it
                writer.add_key_value(key, value, *_value_types(value))
        try:
            for content in contents:
                shape, kind = content.entry.shape, gguf.GGMLQuantizationType[content.kind]
                writer.add_tensor_info(content.entry.name, shape, np.dtype(np.float32), content.nbytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for content in contents:
                content.advance = advance
                writer.write_tensor_data(content)  # pyright: ignore[reportArgumentType]
        finally:
            writer.close()
        return warnings


GGUF = _GGUF()


class _Content:
    """Stands for an array in `GGUFWriter.write_tensor_data`, which asks for its size and calls `tofile`."""

    def __init__(self, entry: Entry, kind: str):
        self.entry, self.kind = entry, kind
        dtype, shape = stored_layout(kind, entry.shape)
        self.nbytes = int(np.prod(shape)) * dtype.itemsize
        self.advance: base.Advance = lambda done: None

    def tofile(self, file: IO[bytes]) -> None:
        stored = Entry(self.entry.name, (self.nbytes,), np.dtype(np.uint8), self._pieces)
        write_pieces(file, stored, self.advance)

    def _pieces(self) -> Iterator[np.ndarray]:
        for piece in self.entry.pieces():
            yield encode(piece, self.kind, self.entry.name)


def _contents(checkpoint: Checkpoint, options: base.Options) -> list[_Content]:
    """Returns every tensor of a file, in order: vectors are always F32.

    Raises:
      ConfigError: rows of a matrix do not divide into blocks of a quantization.
    """
    config, kind = checkpoint.config, options.quantize.upper() if options.quantize else None
    rows = (config.embed_dim, config.mlp_dim, config.num_heads * config.head_dim)
    if kind and any(row % BLOCK_FORMATS[kind].elements for row in rows):
        block = BLOCK_FORMATS[kind].elements
        raise ConfigError(f"--quantize {options.quantize} needs rows that divide into blocks of {block}")
    contents = []
    if divisors := rope_divisors(config):
        values = np.array(divisors, np.float32)
        contents.append(_Content(Entry("rope_freqs.weight", values.shape, values.dtype, lambda: iter([values])), "F32"))
    for tensor, entry in base.tensor_entries(checkpoint, "gguf", options):
        contents.append(_Content(entry, "F32" if len(tensor.shape) == 1 else kind or _KINDS[entry.dtype]))
    return contents


def encode(piece: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Returns rows of numbers as a GGML type stores them.

    Raises:
      CheckpointError: a number that the type cannot hold.
    """
    if kind in PLAIN_DTYPES:
        return cast(piece, PLAIN_DTYPES[kind], name)
    import gguf

    piece = piece.astype(np.float32)
    # The scale of a block is float16: beyond its range, one number spoils the whole block.
    if not (np.abs(piece) <= 65504 * BLOCK_FORMATS[kind].largest).all():
        raise CheckpointError(f"{name}: holds numbers that {kind} cannot: leave --quantize out")
    return gguf.quants.quantize(piece, gguf.GGMLQuantizationType[kind])


def _tokenizer(checkpoint: Checkpoint) -> tuple[JsonObject, list[str]]:
    """Returns the tokenizer's metadata, and what is lost in them."""
    from llama_jax.text.export import gguf_metadata, gguf_warnings

    files, warnings = base.tokenizer_files(checkpoint)
    stops = checkpoint.tokenizer.stop_ids if checkpoint.tokenizer else ()
    try:
        metadata = gguf_metadata(files, checkpoint.config.vocab_size, stops) if files else {}
    except ValueError as error:
        warnings = [f"the tokenizer was left out, the file holds only weights: {error}"]
        return {"tokenizer.ggml.model": "none"}, warnings
    return metadata, [*warnings, *gguf_warnings(metadata)]


def _general(checkpoint: Checkpoint, options: base.Options) -> JsonObject:
    import gguf

    kind = _KINDS[DTYPES[options.dtype] if options.dtype else checkpoint.dtype]
    file_type = f"MOSTLY_{(options.quantize or kind).upper()}"
    return {
        "general.name": checkpoint.path.stem if checkpoint.path.is_file() else checkpoint.path.name,
        "general.file_type": int(gguf.LlamaFileType["ALL_F32" if file_type == "MOSTLY_F32" else file_type]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _value_types(value: object) -> tuple[gguf.GGUFValueType, ...]:
    """Returns the type of a metadata value, and of an array's elements."""
    from gguf import GGUFValueType as Type

    match value:
        case bytes():
            return Type.ARRAY, Type.UINT8
        case [first, *_]:
            inner, *_ = _value_types(first)
            return Type.ARRAY, Type.INT32 if inner == Type.UINT32 else inner
    kinds = ((bool, Type.BOOL), (int, Type.UINT32), (float, Type.FLOAT32), (str, Type.STRING))
    return (next(kind for cls, kind in kinds if isinstance(value, cls)),)
