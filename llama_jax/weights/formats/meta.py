"""Meta's format: `params.json` beside `consolidated.NN.pth`, one file for each model-parallel rank.

Every rank holds a slice of each matrix; the slices are read as one tensor, and only those that are needed.
`checklist.chk` is not read: `md5sum -c checklist.chk` compares every byte of the folder with it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_jax.config import ConfigError, ModelConfig, RopeScaling
from llama_jax.config.meta import from_meta_params, meta_warnings, to_meta_extra, to_meta_params
from llama_jax.typing import JsonObject
from llama_jax.weights import params, verdict
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.formats import base
from llama_jax.weights.formats.hf import has_weights
from llama_jax.weights.params import NO_PARAMETERS, TABLE
from llama_jax.weights.source import CheckpointError, Index, Tensor, exists, listing
from llama_jax.weights.torch_file import read_torch_file, write_torch_file

EXTRA = "llama_jax.json"
EMBED, OUTPUT = "tok_embeddings.weight", "output.weight"
WK, WV, W1 = (f"layers.{{}}.{name}.weight" for name in ("attention.wk", "attention.wv", "feed_forward.w1"))
ROWS = {row.meta: row for row in TABLE}

Rank = dict[str, Tensor]  # name -> this rank's slice


class _Meta(base.FormatObject):
    """Meta's own format: params.json, consolidated.NN.pth, the tokenizer; llama_jax.json for the rest."""

    name = "meta"

    def find(self, folder: Path, present: list[str]) -> Path | None:
        """Returns a folder with params.json, unless config.json describes weights in it."""
        ranks = any(re.fullmatch(r"consolidated.*\.pth", name) for name in present)
        theirs = "config.json" not in present or (ranks and not has_weights(present))
        return folder if "params.json" in present and theirs else None

    def open(self, path: Path) -> Checkpoint:
        folder = read_meta(path)
        settled = verdict.settle(path, "meta", folder.config, folder.tensors, said=folder.params, notes=folder.notes)
        return base.folder_checkpoint(path, "meta", settled)

    def nbytes(self, checkpoint: Checkpoint, options: base.Options) -> int:
        """Returns the bytes of weights that `write` makes: a tied table is stored twice."""
        table = base.parameter_entry(checkpoint, TABLE[0], None, "meta", options).nbytes
        return super().nbytes(checkpoint, options) + table * checkpoint.config.tie_embeddings

    def write(self, path: Path, checkpoint: Checkpoint, options: base.Options, advance: base.Advance) -> list[str]:
        """Writes a folder with one file a rank; returns what Meta's own code would do differently.

        Raises:
          ConfigError: the model cannot be divided into so many shards.
        """
        from llama_jax.text.export import meta_files

        config, ranks = checkpoint.config, options.shards
        _check_divides(config, ranks)
        path.mkdir()
        for rank in range(ranks):
            entries = []
            for row, layer in params.parameters(config):
                axis = split_axis(row, config)
                part = (0, 0, 1) if axis is None else (axis, rank, ranks)
                entries.append(base.parameter_entry(checkpoint, row, layer, "meta", options, part=part))
            if config.tie_embeddings:  # Meta's code has no tied head: its files hold the matrix twice
                head = base.parameter_entry(checkpoint, TABLE[0], None, "meta", options, part=(0, rank, ranks))
                entries.append(dataclasses.replace(head, name=OUTPUT))
            write_torch_file(path / f"consolidated.{rank:02}.pth", entries, advance)
        said = {"params.json": to_meta_params(config), EXTRA: to_meta_extra(config)}
        said |= {"generation_config.json": checkpoint.generation}
        files, left_out = base.tokenizer_files(checkpoint)
        files, warnings = meta_files(files)
        base.write_files(path, {name: base.to_json(name, content) for name, content in said.items() if content} | files)
        return [*meta_warnings(config), *left_out, *(warnings if checkpoint.tokenizer else [])]


META = _Meta()


# ---------------------------------------------------------------------------------------------------------------------
# How ranks share a parameter
# ---------------------------------------------------------------------------------------------------------------------


def split_axis(row: params.ParamSpec, config: ModelConfig, shape: tuple[int, ...] | None = None) -> int | None:
    """Returns the stored axis of a parameter that ranks split; None where each holds all of it, as of the norms.

    Args:
      row: which parameter.
      config: of the model.
      shape: of a rank's slice of a file; None is what Meta wrote for models like this one.
    """
    if shape is not None and len(shape) != len(row.stored):
        return None  # params.check refuses it
    if row.meta != EMBED:
        return next((axis for axis, letters in enumerate(row.stored) if letters != "D"), None)
    if shape is None:
        return embed_axis(config)
    return 0 if shape[1] == config.embed_dim else 1


def embed_axis(config: ModelConfig) -> int:
    """Returns the axis of [V, D] that Meta's ranks split: D up to Code Llama, V from Llama 3 on."""
    return 1 if not isinstance(config.rope_scaling, RopeScaling) and config.rope_theta in (10_000, 1_000_000) else 0


def _check_divides(config: ModelConfig, ranks: int) -> None:
    """Raises ConfigError where ranks cannot share the model evenly."""
    sizes = {"num_kv_heads": config.num_kv_heads, "mlp_dim": config.mlp_dim, "vocab_size": config.vocab_size}
    if embed_axis(config) == 1:
        sizes["embed_dim"] = config.embed_dim
    if whole := [f"{name} ({size})" for name, size in sizes.items() if size % ranks]:
        fit = [n for n in (1, 2, 3, 4, 6, 8, 12, 16) if not any(size % n for size in sizes.values())]
        raise ConfigError(f"--shards {ranks} does not divide {' and '.join(whole)}: choose one of {fit}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a folder
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MetaFolder:
    """An open Meta checkpoint.

    Attributes:
      path: the folder.
      params: the content of params.json.
      extra: the content of llama_jax.json, which params.json cannot hold; {} without that file.
      config: the architecture that both and the tensors describe.
      tensors: name -> whole tensor, over all ranks; shapes are [out, in].
      notes: where the result differs from the files, in sentences.
    """

    path: Path
    params: JsonObject
    extra: JsonObject
    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_meta(folder: str | Path) -> MetaFolder:
    """Opens a Meta folder with any number of ranks. Tensor data is read later, by `Tensor.read`.

    Key and value heads that are stored twice, because there are more ranks than heads (405B on 16), are taken once. A
    model that Meta released as tied (3.2 1B and 3B) is tied if both its tables begin alike.

    Args:
      folder: holds params.json and consolidated.00.pth and so on, or consolidated.pth.

    Raises:
      CheckpointError: a file is missing, damaged or cut short, or the files do not belong together.
      ConfigError: params.json describes a model that is not supported.
    """
    folder = Path(folder)
    said = base.read_json(folder / "params.json", "a Meta folder describes its model there")
    extra = base.read_json(folder / EXTRA, "") if exists(folder / EXTRA) else {}
    config = from_meta_params(said, vocab_size=1, extra=extra)  # 1 stands for unknown
    files = _files(folder)
    opened = [verdict.unwrapped(read_torch_file(path), "meta") for path in files]
    ranks, notes = [rank for rank, _ in opened], opened[0][1]
    _check_ranks(files, ranks, config)
    tensors: dict[str, Tensor] = {}
    twice = _has_kv_heads_twice(ranks, config)
    if twice:
        config = config.replace(num_kv_heads=len(ranks) // 2)
    for name, first in ranks[0].items():
        if NO_PARAMETERS.fullmatch(name):
            continue
        slices = [rank[name] for rank in ranks]
        if twice and _pattern(name) in (WK, WV):
            slices = slices[::2]
        row = ROWS.get(_pattern(name))
        axis = split_axis(row, config, first.shape) if row else None
        tensors[name] = first if axis is None or len(slices) == 1 else _concatenate(slices, axis)
    embed, output = tensors.get(EMBED), tensors.get(OUTPUT)
    if embed and len(embed.shape) == 2:  # if not, names.check refuses it
        if config.vocab_size == 1:
            config = config.replace(vocab_size=embed.shape[0])
        guessed = "tie_embeddings" not in extra  # params.json cannot say it: the shape of 3.2 1B and 3B does
        if config.tie_embeddings and guessed and output and not _alike(embed, output):
            config = config.replace(tie_embeddings=False)
    return MetaFolder(folder, said, extra, config, tensors, tuple(notes))


def _files(folder: Path) -> list[Path]:
    """Returns the weight files in the order of their ranks."""
    numbers = {}
    present = listing(folder)
    for name in present:
        if match := re.fullmatch(r"consolidated\.(\d+)\.pth", name):
            numbers[int(match[1])] = folder / name
    if not numbers and "consolidated.pth" in present:
        return [folder / "consolidated.pth"]
    if not numbers and (others := [name for name in present if re.fullmatch(r"consolidated.*\.safetensors", name)]):
        raise CheckpointError(
            f"{folder}: {others[0]} beside params.json is Mistral's own format; take the weights in Hugging Face's"
        )
    for expected, number in enumerate(sorted(numbers) or [-1]):
        if number != expected:
            raise CheckpointError(f"{folder}: lacks consolidated.{expected:02}.pth; fetch the missing file")
    return [numbers[number] for number in sorted(numbers)]


def _check_ranks(files: list[Path], ranks: list[Rank], config: ModelConfig) -> None:
    """Checks that the files are of one model, that none is missing, and that they hold plain numbers."""
    for path, rank in zip(files, ranks, strict=True):
        for name in ranks[0].keys() | rank.keys():
            one, other = ranks[0].get(name), rank.get(name)
            if not one or not other or (one.shape, one.dtype) != (other.shape, other.dtype):
                raise CheckpointError(
                    f"{path}: {name!r} is not the same kind of tensor as in {files[0].name}: they do not belong"
                    " together; give a folder with the ranks of one model"
                )
    for name, tensor in ranks[0].items():
        if "float8" in tensor.dtype.name:
            raise CheckpointError(
                f"{files[0]}: {name!r} holds FP8 numbers, whose scales lie elsewhere: not supported; take the bfloat16"
                " version of this model (405B: the folder with -MP8 or -MP16 in its name)"
            )
    have = len(ranks)
    match ranks[0].get(W1.format(0)):
        case Tensor(shape=(rows, _)) if 0 < rows * have < config.mlp_dim:
            raise CheckpointError(
                f"{files[0].parent}: has {have} of {config.mlp_dim // rows} files, and lacks"
                f" consolidated.{have:02}.pth; fetch the missing files"
            )


def _has_kv_heads_twice(ranks: list[Rank], config: ModelConfig) -> bool:
    """Returns whether each rank has one key and value head, and two ranks after each other the same one.

    Where params.json counts them once, that is certain. Where it counts them twice, as the 405B's on 16 ranks does, the
    numbers of three layers decide.
    """
    one_each = ranks[0].get(WK.format(0))
    if len(ranks) % 2 or one_each is None or one_each.shape[:1] != (config.head_dim,):
        return False
    if config.num_kv_heads != len(ranks):
        return config.num_kv_heads * 2 == len(ranks)
    for layer in {0, config.num_layers // 2, config.num_layers - 1}:
        for name in (WK.format(layer), WV.format(layer)):
            heads = [rank[name].read() if name in rank else np.zeros(0) for rank in ranks]
            pairs = zip(heads[::2], heads[1::2], strict=True)
            if not all(one.any() and np.array_equal(one, other) for one, other in pairs):
                return False
    return True


def _alike(embed: Tensor, output: Tensor) -> bool:
    """Returns whether two tables agree in 256 of their rows; `verdict` compares all."""
    rows = (slice(None, None, max(1, embed.shape[0] // 256)),)
    return embed.shape == output.shape and np.array_equal(embed.read(rows), output.read(rows))


def _pattern(name: str) -> str:
    """Returns a name of the table: "layers.{}.ffn_norm.weight"."""
    return re.sub(r"^layers\.\d+\.", "layers.{}.", name)


def _concatenate(slices: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors of one shape as one, joined along an axis; a part that one of them holds is read as its view."""
    first, size = slices[0], slices[0].shape[axis]
    shape = (*first.shape[:axis], size * len(slices), *first.shape[axis + 1 :])

    def read(index: Index) -> np.ndarray:
        index += (slice(None),) * (len(shape) - len(index))
        before, after = index[:axis], index[axis + 1 :]
        wanted = range(shape[axis])[index[axis]]
        forward = wanted if wanted.step > 0 else wanted[::-1]
        parts = []
        for i, tensor in enumerate(slices):
            start = i * size
            here = (-(-max(edge - forward.start, 0) // forward.step) for edge in (start, start + size))
            if part := forward[slice(*here)]:  # of the wanted numbers, those of this slice
                cut = slice(part.start - start, part.stop - start, part.step)
                parts.append(tensor.read((*before, cut, *after)))
        if not parts:
            return first.read((*before, slice(0, 0), *after))
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
        return whole if wanted.step > 0 else np.flip(whole, axis)

    return Tensor(first.name, shape, first.dtype, sum(tensor.nbytes for tensor in slices), read)
