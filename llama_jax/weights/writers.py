"""Writes a checkpoint in each format: Hugging Face, Meta, GGUF, native. Weights pass through piece by piece."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import ConfigError, presets
from llama_jax.weights import params
from llama_jax.weights.open import DTYPES, Checkpoint
from llama_jax.weights.safetensors import write_safetensors
from llama_jax.weights.sink import Entry, write_pieces
from llama_jax.weights.source import CheckpointError, cast
from llama_jax.weights.torch_file import write_torch_file

QUANTIZATIONS = {"q8_0": 127, "q4_0": 8}  # name -> largest integer that a block of 32 holds, times its scale
GGUF_TYPES = {DTYPES["float32"]: "F32", DTYPES["float16"]: "F16", DTYPES["bfloat16"]: "BF16"}

Advance = Callable[[int], None]


def parse_bytes(size: int | str) -> int:
    """Bytes of "500MB" or "5GB", in powers of 1000."""
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


def _entry(
    checkpoint: Checkpoint,
    row: params.ParamSpec,
    layer: int | None,
    target: params.Format,
    options: Options,
    *,
    part: tuple[int, int, int] = (0, 0, 1),
) -> Entry:
    """A parameter to be written; of `part` (axis, rank, ranks), only that rank's share along that axis."""
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


def write_hf(folder: Path, checkpoint: Checkpoint, options: Options, advance: Advance) -> list[str]:
    """A Hugging Face folder: config.json, generation_config.json, safetensors with an index, the tokenizer.

    Returns:
      What transformers would do differently, in words.
    """
    folder.mkdir()
    entries = [_entry(checkpoint, row, layer, "hf", options) for row, layer in params.parameters(checkpoint.config)]
    files: list[list[Entry]] = [[]]
    for entry in entries:
        if files[-1] and sum(e.nbytes for e in files[-1]) + entry.nbytes > options.max_shard_size:
            files.append([])
        files[-1].append(entry)
    home = {}
    for i, part in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        write_safetensors(folder / file, part, advance, metadata={"format": "pt"})
        home |= {entry.name: file for entry in part}
    if len(files) > 1:
        total = sum(entry.nbytes for entry in entries)
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": home})
    return _write_hf_texts(folder, checkpoint, options)


def hf_texts(checkpoint: Checkpoint, dtype: str) -> dict[str, bytes]:
    """What a Hugging Face folder, or one of ours, has besides weights of that dtype: file name to content."""
    ids = _special_ids(checkpoint)
    config = _json("config.json", presets.to_hf_config(checkpoint.config, dtype=dtype) | ids)
    generation = _json("generation_config.json", dict(checkpoint.generation) or ids)
    return {"config.json": config, "generation_config.json": generation, **checkpoint.tokenizer_files()}


def _write_hf_texts(folder: Path, checkpoint: Checkpoint, options: Options) -> list[str]:
    from llama_jax.text.export import hf_warnings

    files, warnings = _tokenizer_files(checkpoint)
    checkpoint = dataclasses.replace(checkpoint, tokenizer_files=lambda: files)
    _write_files(folder, hf_texts(checkpoint, options.dtype or str(checkpoint.dtype)))
    return [*warnings, *hf_warnings(files)]


def _tokenizer_files(checkpoint: Checkpoint) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's files; none, and a warning, where it has no such spelling: weights need no tokenizer."""
    try:
        files = checkpoint.tokenizer_files()
    except ValueError as error:
        return {}, [f"the tokenizer was left out, there are only weights: {error}"]
    own = checkpoint.tokenizer is None or checkpoint.tokenizer.chat_template or checkpoint.tokenizer.chat_templates
    if own or not json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template"):
        return files, []
    guess = "the source has no chat template: it got the one of the generation that its vocabulary belongs to"
    return files, [f"{guess}, which a base model was not trained on"]


def _special_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """bos_token_id and eos_token_id: what the checkpoint says, else what its tokenizer does."""
    tokenizer, said = checkpoint.tokenizer, checkpoint.generation
    bos = said.get("bos_token_id", tokenizer.bos_id if tokenizer else None)
    stops = list(tokenizer.stop_ids) if tokenizer else []
    eos = said.get("eos_token_id", stops[0] if len(stops) == 1 else stops or None)
    return {"bos_token_id": bos, "eos_token_id": eos}


# ---------------------------------------------------------------------------------------------------------------------

# Along which stored axis Meta's ranks share a parameter; the embedding's depends on the generation, norms are whole.
_META_AXES = {
    "attn.wq": 0, "attn.wk": 0, "attn.wv": 0, "attn.wo": 1,
    "mlp.w_gate": 0, "mlp.w_up": 0, "mlp.w_down": 1, "lm_head": 0,
}  # fmt: skip


def write_meta(folder: Path, checkpoint: Checkpoint, options: Options, advance: Advance) -> list[str]:
    """A Meta folder: params.json, consolidated.NN.pth, the tokenizer; llama_jax.json for what params.json cannot say.

    Returns:
      What Meta's own code would do differently, in words.

    Raises:
      ConfigError: the model cannot be divided into so many shards.
    """
    config, ranks = checkpoint.config, options.shards
    axes = _META_AXES | {"embed": presets.meta_embed_axis(config)}
    sizes = {"num_kv_heads": config.num_kv_heads, "mlp_dim": config.mlp_dim, "vocab_size": config.vocab_size}
    if axes["embed"] == 1:
        sizes["embed_dim"] = config.embed_dim
    if whole := [f"{name} ({size})" for name, size in sizes.items() if size % ranks]:
        fit = [n for n in (1, 2, 3, 4, 6, 8, 12, 16) if not any(size % n for size in sizes.values())]
        raise ConfigError(f"--shards {ranks} does not divide {' and '.join(whole)}: choose one of {fit}")
    folder.mkdir()
    for rank in range(ranks):
        entries = []
        for row, layer in params.parameters(config):
            axis = axes.get(row.ours.removeprefix("blocks.{}."))
            part = (0, 0, 1) if axis is None else (axis, rank, ranks)
            entries.append(_entry(checkpoint, row, layer, "meta", options, part=part))
        if config.tie_embeddings:  # Meta's code has no tied head: its files hold the matrix twice
            head = _entry(checkpoint, params.TABLE[0], None, "meta", options, part=(0, rank, ranks))
            entries.append(dataclasses.replace(head, name="output.weight"))
        write_torch_file(folder / f"consolidated.{rank:02}.pth", entries, advance)
    _write_json(folder / "params.json", presets.to_meta_params(config))
    if extra := presets.to_meta_extra(config):
        _write_json(folder / "llama_jax.json", extra)
    if checkpoint.generation:
        _write_json(folder / "generation_config.json", checkpoint.generation)
    from llama_jax.text.export import meta_files

    files, left_out = _tokenizer_files(checkpoint)
    files, warnings = meta_files(files)
    _write_files(folder, files)
    return [*presets.meta_warnings(config), *left_out, *(warnings if checkpoint.tokenizer else [])]


# ---------------------------------------------------------------------------------------------------------------------


def gguf_type(row: params.ParamSpec, dtype: np.dtype, options: Options) -> str:
    """GGML's name of what a parameter is stored in: vectors are always F32."""
    if len(row.stored) == 1:
        return "F32"
    return options.quantize.upper() if options.quantize else GGUF_TYPES[dtype]


def write_gguf(path: Path, checkpoint: Checkpoint, options: Options, advance: Advance) -> list[str]:
    """A GGUF file, by the gguf package.

    Returns:
      What llama.cpp would do differently, in words.

    Raises:
      ConfigError: rows of a matrix do not divide into blocks of a quantization.
    """
    import gguf

    config = checkpoint.config
    if options.quantize and (config.embed_dim % 32 or config.mlp_dim % 32 or config.num_heads * config.head_dim % 32):
        raise ConfigError(f"--quantize {options.quantize} needs rows that divide into blocks of 32")
    contents: list[_GGUFContent] = []
    if divisors := presets.rope_divisors(config):
        values = np.array(divisors, np.float32)
        contents.append(
            _GGUFContent(Entry("rope_freqs.weight", values.shape, values.dtype, lambda: iter([values])), "F32")
        )
    for row, layer in params.parameters(config):
        entry = _entry(checkpoint, row, layer, "gguf", options)
        contents.append(_GGUFContent(entry, gguf_type(row, entry.dtype, options)))
    writer = gguf.GGUFWriter(path, "llama")
    tokenizer, warnings = _gguf_tokenizer(checkpoint)
    metadata = presets.to_gguf_metadata(config) | _gguf_general(checkpoint, options) | tokenizer
    for key, value in metadata.items():
        if key != "general.architecture":  # the package writes it
            writer.add_key_value(key, value, *_gguf_kind(value, gguf.GGUFValueType))
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


def _gguf_tokenizer(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer's metadata, and what is lost in them, in words."""
    from llama_jax.text.export import gguf_metadata, gguf_warnings

    files, warnings = _tokenizer_files(checkpoint)
    stops = checkpoint.tokenizer.stop_ids if checkpoint.tokenizer else ()
    try:
        metadata = gguf_metadata(files, checkpoint.config.vocab_size, stops) if files else {}
    except ValueError as error:
        warnings = [f"the tokenizer was left out, the file holds only weights: {error}"]
        return {"tokenizer.ggml.model": "none"}, warnings
    return metadata, [*warnings, *gguf_warnings(metadata)]


class _GGUFContent:
    """Stands for an array in `GGUFWriter.write_tensor_data`, which asks for its size and calls `tofile`."""

    def __init__(self, entry: Entry, kind: str):
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self.entry, self.kind = entry, kind
        elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        self.nbytes = int(np.prod(entry.shape)) // elements * nbytes
        self.advance: Advance = lambda done: None

    def tofile(self, file: Any) -> None:
        stored = Entry(self.entry.name, (self.nbytes,), np.dtype(np.uint8), self._pieces)
        write_pieces(file, stored, self.advance)

    def _pieces(self) -> Iterator[np.ndarray]:
        for piece in self.entry.pieces():
            yield gguf_encode(piece, self.kind, self.entry.name)


def gguf_encode(piece: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Rows of numbers as a GGML type stores them.

    Raises:
      CheckpointError: a number that the type cannot hold.
    """
    dtype = next((dtype for dtype, other in GGUF_TYPES.items() if other == kind), None)
    if dtype is not None:
        return cast(piece, dtype, name)
    import gguf

    piece = piece.astype(np.float32)
    # The scale of a block is float16: beyond its range, one number spoils all 32.
    if not (np.abs(piece) <= 65504 * QUANTIZATIONS[kind.lower()]).all():
        raise CheckpointError(f"{name}: holds numbers that {kind} cannot: leave --quantize out")
    return gguf.quants.quantize(piece, gguf.GGMLQuantizationType[kind])


def _gguf_general(checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    import gguf

    dtype = DTYPES[options.dtype] if options.dtype else checkpoint.dtype
    kind = (
        f"MOSTLY_{options.quantize.upper()}"
        if options.quantize
        else {"F32": "ALL_F32"}.get(GGUF_TYPES[dtype], f"MOSTLY_{GGUF_TYPES[dtype]}")
    )
    return {
        "general.name": checkpoint.path.stem if checkpoint.path.is_file() else checkpoint.path.name,
        "general.file_type": int(gguf.LlamaFileType[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _gguf_kind(value: Any, types: Any) -> tuple[Any, ...]:
    """The type of a metadata value, and of an array's elements."""
    scalars = ((bool, types.BOOL), (int, types.UINT32), (float, types.FLOAT32), (str, types.STRING))
    if isinstance(value, bytes):
        return types.ARRAY, types.UINT8
    if isinstance(value, list):
        inner = _gguf_kind(value[0], types)[0]
        return types.ARRAY, types.INT32 if inner == types.UINT32 else inner
    return (next(kind for cls, kind in scalars if isinstance(value, cls)),)


# ---------------------------------------------------------------------------------------------------------------------


def write_native(folder: Path, checkpoint: Checkpoint, options: Options, advance: Advance) -> list[str]:
    """A native checkpoint. Orbax saves whole trees: the process holds all weights meanwhile.

    Returns:
      What transformers would do differently with its tokenizer, in words.
    """
    import jax

    from llama_jax import sharding
    from llama_jax.checkpoint.arrays import save_arrays
    from llama_jax.ops.weights import name_of
    from llama_jax.weights.formats.native import PARAMS, is_stacked
    from llama_jax.weights.load import read_model

    folder.mkdir()
    mesh = sharding.make_mesh(checkpoint.config, devices=jax.local_devices(backend="cpu"))
    model = read_model(checkpoint, mesh, dtype=options.dtype, stacked=True, advance=advance)
    paths, _ = jax.tree_util.tree_flatten_with_path(model)
    arrays = {name_of(path): leaf for path, leaf in paths}
    save_arrays(folder / PARAMS, arrays, stacked=is_stacked)
    return _write_hf_texts(folder, checkpoint, options)


# ---------------------------------------------------------------------------------------------------------------------


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_bytes(_json(path.name, content))


def _json(name: str, content: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError as error:  # NaN, a lone surrogate
        raise CheckpointError(f"{name}: the source has a value there that JSON cannot hold ({error})") from error


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
