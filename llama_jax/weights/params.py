"""One table of every parameter: our name and shape, and its name and shape in each checkpoint format.

Other formats store matrices as torch does, [out, in]. Meta's and GGUF's files keep the rows of wq and wk in interleaved
RoPE order (2i, 2i + 1 are a pair), Hugging Face's and ours in half-split order (i, i + H / 2): the one permutation.
"native" is our own format: our names, our shapes, our order.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NoReturn

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.weights.source import CheckpointError, Tensor

Format = Literal["hf", "meta", "gguf", "native"]
INTERLEAVED: tuple[Format, ...] = ("meta", "gguf")
FLOATS = ("float64", "float32", "bfloat16", "float16")
STRIP = 32  # columns: a cache line of 2-byte numbers
PIECE = 1 << 24  # bytes that a conversion holds at a time: larger is no faster


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter (of each layer, where names have `{}`).

    Attributes:
      ours: path in `model.Llama`, blocks by number.
      axes: dimension letters of our array.
      stored: dimension letters of the tensor in the other formats, one group a dimension: ("KGH", "D") is
        [K * G * H, D].
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
        return (self.ours if format == "native" else getattr(self, format)).format(layer)

    def groups(self, format: Format) -> tuple[str, ...]:
        """Dimension letters of the tensor in a format, one group a dimension."""
        return tuple(self.axes) if format == "native" else self.stored


def _layer(
    ours: str, axes: str, stored: tuple[str, ...], hf: str, meta: str, gguf: str, rope: bool = False
) -> ParamSpec:
    return ParamSpec(
        f"blocks.{{}}.{ours}", axes, stored, f"model.layers.{{}}.{hf}.weight", f"layers.{{}}.{meta}.weight",
        f"blk.{{}}.{gguf}.weight", rope,
    )  # fmt: skip


# fmt: off
TABLE = (
    ParamSpec("embed", "VD", ("V", "D"), "model.embed_tokens.weight", "tok_embeddings.weight", "token_embd.weight"),
    _layer("attn_norm", "D",     ("D",),       "input_layernorm",          "attention_norm",  "attn_norm"),
    _layer("attn.wq",   "DKGH",  ("KGH", "D"), "self_attn.q_proj",         "attention.wq",    "attn_q", rope=True),
    _layer("attn.wk",   "DKH",   ("KH", "D"),  "self_attn.k_proj",         "attention.wk",    "attn_k", rope=True),
    _layer("attn.wv",   "DKH",   ("KH", "D"),  "self_attn.v_proj",         "attention.wv",    "attn_v"),
    _layer("attn.wo",   "KGHD",  ("D", "KGH"), "self_attn.o_proj",         "attention.wo",    "attn_output"),
    _layer("mlp_norm",  "D",     ("D",),       "post_attention_layernorm", "ffn_norm",        "ffn_norm"),
    _layer("mlp.w_gate", "DF",   ("F", "D"),   "mlp.gate_proj",            "feed_forward.w1", "ffn_gate"),
    _layer("mlp.w_up",  "DF",    ("F", "D"),   "mlp.up_proj",              "feed_forward.w3", "ffn_up"),
    _layer("mlp.w_down", "FD",   ("D", "F"),   "mlp.down_proj",            "feed_forward.w2", "ffn_down"),
    ParamSpec("final_norm", "D", ("D",), "model.norm.weight", "norm.weight", "output_norm.weight"),
    ParamSpec("lm_head", "DV", ("V", "D"), "lm_head.weight", "output.weight", "output.weight"),
)
# fmt: on

# Tensors of real files that are no parameters: RoPE tables, which the configuration gives.
NO_PARAMETERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs|rope_freqs\.weight)")


def spec_of(path: str) -> tuple[ParamSpec, int | None]:
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


def stored_shape(row: ParamSpec, config: ModelConfig, format: Format) -> tuple[int, ...]:
    """The shape that a format gives the parameter."""
    size = sizes(config)
    return tuple(math.prod(size[axis] for axis in group) for group in row.groups(format))


def parameters(config: ModelConfig) -> Iterator[tuple[ParamSpec, int | None]]:
    """Every parameter of a model, in the order of its computation: its row and its layer."""
    rows = [row for row in TABLE if row.ours != "lm_head" or not config.tie_embeddings]
    before, after = ([row for row in rows if row.ours in names] for names in (("embed",), ("final_norm", "lm_head")))
    yield from ((row, None) for row in before)
    for layer in range(config.num_layers):
        yield from ((row, layer) for row in rows if "{}" in row.ours)
    yield from ((row, None) for row in after)


def expected(config: ModelConfig, format: Format) -> dict[str, tuple[int, ...]]:
    """Every stored name of a model and its stored shape."""
    return {row.name(format, layer): stored_shape(row, config, format) for row, layer in parameters(config)}


def read(tensor: Tensor, row: ParamSpec, config: ModelConfig, format: Format, index: Sequence[slice]) -> np.ndarray:
    """Reads one device's part of one parameter, and only the bytes that it needs.

    Args:
      tensor: as stored.
      row: what it is.
      config: its sizes.
      format: decides whether heads are permuted.
      index: slices without steps over *our* dimensions, as a sharding gives them.

    Returns:
      That part, in our orientation and the stored dtype; perhaps a view of the file.
    """
    size = sizes(config)
    part = {axis: range(size[axis])[s] for axis, s in zip(row.axes, index, strict=True)}
    # Ranges of the stored dimensions: whole runs, several where an inner dimension is split (groups over `tensor_q`).
    groups = row.groups(format)
    runs = [_runs([(part[axis], size[axis]) for axis in group]) for group in groups]
    if all(len(r) == 1 for r in runs):
        stored = tensor.read(tuple(r[0] for r in runs))
    else:
        rows = [
            np.concatenate([tensor.read((first, *rest)) for rest in itertools.product(*runs[1:])], axis=-1)
            for first in runs[0]
        ]
        stored = np.concatenate(rows, axis=0)
    if row.rope and format in INTERLEAVED:  # rows of a head: pairs -> halves
        H, D = config.head_dim, stored.shape[-1]
        assert len(part["H"]) == H, "no sharding may split head_dim"
        stored = stored.reshape(-1, H // 2, 2, D).swapaxes(1, 2).reshape(-1, D)
    if "".join(groups) != row.axes:  # the two stored dimensions lie the other way round
        stored = _contiguous(stored.T)
    return stored.reshape([len(part[axis]) for axis in row.axes])


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


def embed_name(format: Format) -> str:
    """The stored name of the embedding table."""
    return TABLE[0].name(format)


def head_name(format: Format) -> str:
    """The stored name of the output head."""
    return TABLE[-1].name(format)


def to_stored(ours: np.ndarray, row: ParamSpec, config: ModelConfig, format: Format) -> np.ndarray:
    """The inverse of `read`: one whole parameter as a format stores it, perhaps as a view."""
    letters = "".join(row.groups(format))
    stored = ours.transpose([row.axes.index(axis) for axis in letters])
    if row.rope and format in INTERLEAVED:
        *heads, H, D = stored.shape
        stored = stored.reshape(*heads, 2, H // 2, D).swapaxes(-3, -2)
    return stored.reshape(stored_shape(row, config, format))


def pieces(
    tensor: Tensor, row: ParamSpec, config: ModelConfig, source: Format, target: Format, columns: slice, rows: range
) -> Iterator[np.ndarray]:
    """One parameter in another format, piece by piece: whole rows of the stored matrix, about `PIECE` bytes each.

    Args:
      tensor: as stored in `source`.
      row: what it is.
      config: its sizes.
      source: the format it comes from.
      target: "hf", "meta" or "gguf".
      columns: which columns of the stored matrix, as a tensor-parallel shard takes them.
      rows: which rows, in whole heads where heads are permuted.

    Yields:
      Arrays of the stored dtype, [rows, columns] or [rows], that follow each other.
    """
    H = config.head_dim
    unit = H if row.rope else 1
    if source == "native":  # our dimensions lie in another order: one parameter is read whole
        whole = to_stored(tensor.read(), row, config, "hf")
        source, read = "hf", lambda index: _contiguous(whole[index]) if whole.ndim == 2 else whole[index]
    else:
        read = tensor.read
    width = math.prod(stored_shape(row, config, target)[1:]) * tensor.dtype.itemsize
    step = unit * max(1, PIECE // (width * unit))
    permuted = row.rope and (source in INTERLEAVED) != (target in INTERLEAVED)
    for start in range(rows.start, rows.stop, step):
        index = (slice(start, min(start + step, rows.stop)), columns)
        piece = read(index[: len(row.stored)])
        if permuted:
            pairs = (H // 2, 2) if source in INTERLEAVED else (2, H // 2)
            piece = piece.reshape(-1, *pairs, piece.shape[-1]).swapaxes(1, 2).reshape(piece.shape)
        yield piece
