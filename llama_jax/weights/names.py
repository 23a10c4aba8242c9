"""One table of every parameter: our name and shape, and its name and shape in each checkpoint format.

Checkpoints store matrices as torch does, [out, in]. Meta's and GGUF's files keep the rows of wq and wk in interleaved
RoPE order (2i, 2i + 1 are a pair), Hugging Face's and ours in half-split order (i, i + H / 2): the one permutation.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.weights.source import CheckpointError, Tensor

Format = Literal["hf", "meta", "gguf"]
INTERLEAVED: tuple[Format, ...] = ("meta", "gguf")


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter (of each layer, where names have `{}`).

    Attributes:
      ours: path in `model.Llama`, blocks by number.
      axes: dimension letters of our array.
      stored: dimension letters of the stored tensor, one group a stored dimension: ("KGH", "D") is [K * G * H, D].
      hf: name in Hugging Face's files.
      meta: name in Meta's.
      gguf: name in GGUF.
      rope: whether the heads' rows are permuted between half-split and interleaved.
    """

    ours: str
    axes: str
    stored: tuple[str, ...]
    hf: str
    meta: str
    gguf: str
    rope: bool = False

    def name(self, format: Format, layer: int | None = None) -> str:
        """The name in a format, of one layer where the parameter has layers."""
        return getattr(self, format).format(layer)


def _layer(ours: str, axes: str, stored: tuple[str, ...], hf: str, meta: str, gguf: str, rope: bool = False) -> Row:
    return Row(
        f"blocks.{{}}.{ours}", axes, stored, f"model.layers.{{}}.{hf}.weight", f"layers.{{}}.{meta}.weight",
        f"blk.{{}}.{gguf}.weight", rope,
    )  # fmt: skip


# fmt: off
TABLE = (
    Row("embed", "VD", ("V", "D"), "model.embed_tokens.weight", "tok_embeddings.weight", "token_embd.weight"),
    _layer("attn_norm", "D",     ("D",),       "input_layernorm",          "attention_norm",  "attn_norm"),
    _layer("attn.wq",   "DKGH",  ("KGH", "D"), "self_attn.q_proj",         "attention.wq",    "attn_q", rope=True),
    _layer("attn.wk",   "DKH",   ("KH", "D"),  "self_attn.k_proj",         "attention.wk",    "attn_k", rope=True),
    _layer("attn.wv",   "DKH",   ("KH", "D"),  "self_attn.v_proj",         "attention.wv",    "attn_v"),
    _layer("attn.wo",   "KGHD",  ("D", "KGH"), "self_attn.o_proj",         "attention.wo",    "attn_output"),
    _layer("mlp_norm",  "D",     ("D",),       "post_attention_layernorm", "ffn_norm",        "ffn_norm"),
    _layer("mlp.w_gate", "DF",   ("F", "D"),   "mlp.gate_proj",            "feed_forward.w1", "ffn_gate"),
    _layer("mlp.w_up",  "DF",    ("F", "D"),   "mlp.up_proj",              "feed_forward.w3", "ffn_up"),
    _layer("mlp.w_down", "FD",   ("D", "F"),   "mlp.down_proj",            "feed_forward.w2", "ffn_down"),
    Row("final_norm", "D", ("D",), "model.norm.weight", "norm.weight", "output_norm.weight"),
    Row("lm_head", "DV", ("V", "D"), "lm_head.weight", "output.weight", "output.weight"),
)
# fmt: on

# Tensors of real files that are no parameters: RoPE tables, which the configuration gives.
NO_PARAMETERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs|rope_freqs\.weight)")


def row_of(path: str) -> tuple[Row, int | None]:
    """The row of a path in our model ("blocks.3.attn.wq", "blocks.attn.wq" if stacked), and its layer."""
    layer = re.match(r"blocks\.(\d+)\.", path)
    pattern = re.sub(r"^blocks\.(\d+\.)?", "blocks.{}.", path)
    return next(row for row in TABLE if row.ours == pattern), int(layer[1]) if layer else None


def sizes(config: ModelConfig) -> dict[str, int]:
    """Dimension letter -> size."""
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "K": config.num_kv_heads,
        "G": config.num_groups,
        "H": config.head_dim,
    }


def stored_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """The shape that every checkpoint format gives the parameter."""
    size = sizes(config)
    return tuple(int(np.prod([size[axis] for axis in group])) for group in row.stored)


def expected(config: ModelConfig, format: Format) -> dict[str, tuple[int, ...]]:
    """Every stored name of a model and its stored shape."""
    names = {}
    for row in TABLE:
        if row.ours == "lm_head" and config.tie_embeddings:
            continue
        layers = range(config.num_layers) if "{}" in row.ours else (None,)
        names |= {row.name(format, layer): stored_shape(row, config) for layer in layers}
    return names


def read(tensor: Tensor, row: Row, config: ModelConfig, format: Format, index: Sequence[slice]) -> np.ndarray:
    """Reads one device's part of one parameter, and only the bytes that it needs.

    Args:
      tensor: as stored.
      row: what it is.
      config: its sizes.
      format: decides whether heads are permuted.
      index: slices without steps over *our* dimensions, as a sharding gives them.

    Returns:
      That part, in our orientation and the stored dtype; perhaps a view with strides.
    """
    size = sizes(config)
    part = {axis: range(size[axis])[s] for axis, s in zip(row.axes, index, strict=True)}
    # Ranges of the stored dimensions: whole runs, several where an inner dimension is split (groups over `tensor_q`).
    runs = [_runs([(part[axis], size[axis]) for axis in group]) for group in row.stored]
    if all(len(r) == 1 for r in runs):
        stored = tensor.read(tuple(r[0] for r in runs))
    else:
        rows = [
            np.concatenate([tensor.read((first, *rest)) for rest in itertools.product(*runs[1:])], axis=-1)
            for first in runs[0]
        ]
        stored = np.concatenate(rows, axis=0)
    letters = "".join(row.stored)
    shape = [len(part[axis]) for axis in letters]
    if row.rope and format in INTERLEAVED:  # [..., H, D] in pairs -> [..., H / 2, 2, D] -> halves
        *heads, H, D = shape
        stored = stored.reshape(*heads, H // 2, 2, D).swapaxes(-3, -2)
    return stored.reshape(shape).transpose([letters.index(axis) for axis in row.axes])


def _runs(dimensions: list[tuple[range, int]]) -> list[slice]:
    """The contiguous slices of a merged dimension that a part of each of its dimensions covers, in order."""
    (first, _), *inner = dimensions
    width = int(np.prod([size for _, size in inner]))
    if all(len(part) == size for part, size in inner):
        return [slice(first.start * width, first.stop * width)]
    below = _runs(inner)
    return [slice(i * width + run.start, i * width + run.stop) for i in first for run in below]


def check(tensors: dict[str, Tensor], config: ModelConfig, format: Format, path: object) -> None:
    """Compares a checkpoint's tensors with what its configuration asks for.

    Raises:
      CheckpointError: a tensor is missing, has another shape, or is none that a Llama has (such as a bias).
    """
    if config.num_layers > len(tensors):  # before a table of that many names is made
        raise CheckpointError(
            f"{path}: the configuration names {config.num_layers} layers, but the files hold {len(tensors)} tensors;"
            " weights and configuration do not belong together"
        )
    names = expected(config, format)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} tensors are missing, first {missing[0]!r}; the download may be"
            " incomplete, or the configuration may name more layers than the files hold"
        )
    for name, shape in names.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(tensors[name].shape)}, but the configuration asks for"
                f" {list(shape)}; weights and configuration do not belong together"
            )
        if tensors[name].dtype.kind in "biu":
            raise CheckpointError(
                f"{path}: tensor {name!r} holds {tensors[name].dtype} numbers, whose scale is not known: this"
                " quantization is not supported, use another file of this model"
            )
    tied = {row.name(format) for row in TABLE if row.ours == "lm_head"} if config.tie_embeddings else set()
    extra = [name for name in tensors if name not in names and name not in tied and not NO_PARAMETERS.fullmatch(name)]
    if extra:
        raise CheckpointError(
            f"{path}: {len(extra)} tensors that a Llama does not have, first {extra[0]!r}: leaving them out would give"
            " wrong results, so this model is not supported"
        )


def to_stored(ours: np.ndarray, row: Row, config: ModelConfig, format: Format) -> np.ndarray:
    """The inverse of `read`: one whole parameter as a format stores it, perhaps as a view."""
    letters = "".join(row.stored)
    stored = ours.transpose([row.axes.index(axis) for axis in letters])
    if row.rope and format in INTERLEAVED:
        *heads, H, D = stored.shape
        stored = stored.reshape(*heads, 2, H // 2, D).swapaxes(-3, -2)
    return stored.reshape(stored_shape(row, config))
