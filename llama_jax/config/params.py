"""One table of every parameter: what it is, our name and shape, and its name and shape in each checkpoint format.

Other formats store matrices as torch does, [out, in]. Meta's and GGUF's files keep the rows of wq and wk in interleaved
RoPE order (2i, 2i + 1 are a pair), Hugging Face's and ours in half-split order (i, i + H / 2): the one permutation.
"native" is our own format: our names, our shapes, our order.

The model makes its parameters from this table, and estimate, optimizer, stacking and formats read it. It is here, with
the standard library alone, because all of them may import it; reading and writing tensors by it is `weights.params`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from llama_jax.config.model import ModelConfig

Format = Literal["hf", "meta", "gguf", "native"]
Kind = Literal["matrix", "norm", "table", "gate", "bias", "expert"]
INTERLEAVED: tuple[Format, ...] = ("meta", "gguf")
DECAYED: tuple[Kind, ...] = ("matrix", "table", "expert")  # the optimizer's weight decay: no norms, gates and biases

# What each dimension letter means to the sharding rules.
AXES = {"V": "vocab", "D": "embed", "F": "mlp", "K": "kv_heads", "G": "groups", "H": "head_dim"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a format stores a parameter.

    Attributes:
      name: of the tensor, with `{}` for the layer.
      before: dimension letters of what the tensor holds before the parameter along its first dimension, one group a
        parameter: of a tensor [2F, D] with gate and up, up has ("F",).
    """

    name: str
    before: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter (of each layer that has it, where names have `{}`).

    Attributes:
      ours: path in `model.Llama`, blocks by number.
      axes: dimension letters of our array.
      stored: dimension letters of the parameter in the other formats, one group a dimension: ("KGH", "D") is
        [K * G * H, D].
      hf: where Hugging Face's files have it; None where the format has no place for it.
      meta: likewise Meta's.
      gguf: likewise GGUF.
      rope: whether the heads' rows are permuted between half-split and interleaved.
      kind: what the optimizer, the initial values and narrow gradients go by.
      logical: what each dimension means to the sharding rules; default: by `AXES`, of a norm "norm".
      layers: the kinds of layers that have it (`ModelConfig.layers`); none outside the layers.
    """

    ours: str
    axes: str
    stored: tuple[str, ...]
    hf: str | Source | None
    meta: str | Source | None
    gguf: str | Source | None
    rope: bool = False
    kind: Kind = "matrix"
    logical: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    @property
    def logical_axes(self) -> tuple[str, ...]:
        """What each dimension means to the sharding rules."""
        return self.logical or (("norm",) if self.kind == "norm" else tuple(AXES[letter] for letter in self.axes))

    @property
    def in_layers(self) -> bool:
        """Whether layers have it, each its own."""
        return bool(self.layers)

    def source(self, format: Format) -> Source | None:
        """Where a format stores it; None where it has no place for it."""
        found = self.ours if format == "native" else getattr(self, format)
        return Source(found) if isinstance(found, str) else found

    def name(self, format: Format, layer: int | None = None) -> str:
        """The name of the tensor that holds it, of one layer where it is in layers.

        Raises:
          KeyError: the format has no place for it.
        """
        source = self.source(format)
        if source is None:
            raise KeyError(f"{self.ours}: {format} has no place for it")
        return source.name.format(layer)

    def groups(self, format: Format) -> tuple[str, ...]:
        """Dimension letters of the parameter in a format, one group a dimension."""
        return tuple(self.axes) if format == "native" else self.stored

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Of our array, of one layer."""
        size = sizes(config)
        return tuple(size[letter] for letter in self.axes)


def _layer(
    ours: str, axes: str, stored: tuple[str, ...], hf: str, meta: str, gguf: str, rope: bool = False,
    kind: Kind = "matrix",
) -> ParamSpec:  # fmt: skip
    return ParamSpec(
        f"blocks.{{}}.{ours}", axes, stored, f"model.layers.{{}}.{hf}.weight", f"layers.{{}}.{meta}.weight",
        f"blk.{{}}.{gguf}.weight", rope, kind, layers=("plain",),
    )  # fmt: skip


# fmt: off
EMBED = ParamSpec("embed", "VD", ("V", "D"), "model.embed_tokens.weight", "tok_embeddings.weight", "token_embd.weight",
                  kind="table")
FINAL_NORM = ParamSpec("final_norm", "D", ("D",), "model.norm.weight", "norm.weight", "output_norm.weight", kind="norm")
HEAD = ParamSpec("lm_head", "DV", ("V", "D"), "lm_head.weight", "output.weight", "output.weight")
TABLE: tuple[ParamSpec, ...] = (
    EMBED,
    _layer("attn_norm", "D",     ("D",),       "input_layernorm",          "attention_norm",  "attn_norm", kind="norm"),
    _layer("attn.wq",   "DKGH",  ("KGH", "D"), "self_attn.q_proj",         "attention.wq",    "attn_q", rope=True),
    _layer("attn.wk",   "DKH",   ("KH", "D"),  "self_attn.k_proj",         "attention.wk",    "attn_k", rope=True),
    _layer("attn.wv",   "DKH",   ("KH", "D"),  "self_attn.v_proj",         "attention.wv",    "attn_v"),
    _layer("attn.wo",   "KGHD",  ("D", "KGH"), "self_attn.o_proj",         "attention.wo",    "attn_output"),
    _layer("mlp_norm",  "D",     ("D",),       "post_attention_layernorm", "ffn_norm",        "ffn_norm", kind="norm"),
    _layer("mlp.w_gate", "DF",   ("F", "D"),   "mlp.gate_proj",            "feed_forward.w1", "ffn_gate"),
    _layer("mlp.w_up",  "DF",    ("F", "D"),   "mlp.up_proj",              "feed_forward.w3", "ffn_up"),
    _layer("mlp.w_down", "FD",   ("D", "F"),   "mlp.down_proj",            "feed_forward.w2", "ffn_down"),
    FINAL_NORM,
    HEAD,
)
# fmt: on

# Tensors found in real checkpoints that are not parameters: RoPE tables, which we compute from the configuration.
NO_PARAMETERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs|rope_freqs\.weight)")

_OTHERS: list[ParamSpec] = []


def register(specs: Sequence[ParamSpec]) -> None:
    """Adds the parameters of a kind of layers; those that it shares with the plain one are added with their new
    `layers`, and stand for it alone."""
    _OTHERS.extend(specs)
    specs_of.cache_clear()


@functools.lru_cache
def specs_of(kind: str | None) -> dict[str, ParamSpec]:
    """The parameters of one kind of layers, by the path within a block; None: those outside the layers.

    Raises:
      KeyError: an unknown kind.
    """
    if kind is None:
        return {spec.ours: spec for spec in TABLE if not spec.in_layers}
    found = {spec.ours.removeprefix("blocks.{}."): spec for spec in (*TABLE, *_OTHERS) if kind in spec.layers}
    if not found:
        raise KeyError(f"no parameters are known of layers of kind {kind!r}")
    return found


@dataclasses.dataclass(frozen=True)
class Place:
    """What an array of a model is.

    Attributes:
      spec: the parameter.
      layers: whose parameter it is; None outside the layers.
      stacked: whether these are stacked along a first dimension.
      part: which of the arrays of a leaf that has several, such as "scale"; "" for the whole.
    """

    spec: ParamSpec
    layers: range | None
    stacked: bool
    part: str = ""


_PATH = re.compile(r"blocks\.(?:(?P<layer>\d+)\.|period\.(?P<place>\d+)\.)?(?P<inner>.*)")


def place_of(path: str, layers: Sequence[str]) -> Place:
    """What the array of a path in our model is.

    Args:
      path: "embed"; "blocks.3.attn.wq", of one layer; "blocks.attn.wq", of all layers stacked;
        "blocks.period.1.attn.wq", stacked, of the second place in each period of several layers; or one of these and
        the name of a part of the leaf, such as "blocks.attn.wq.scale".
      layers: the kinds of the model's layers.

    Raises:
      KeyError: no parameter has this path.
    """
    found = _PATH.fullmatch(path)
    if found is None:
        known, inner, which, stacked = specs_of(None), path, None, False
    else:
        first, stacked = int(found["layer"] or found["place"] or 0), found["layer"] is None
        step = len(period_of(layers)) if stacked else len(layers)
        known, inner, which = specs_of(layers[first]), found["inner"], range(first, len(layers), step)
    for name, spec in known.items():
        if inner == name or inner.startswith(f"{name}."):
            return Place(spec, which, stacked, inner[len(name) + 1 :])
    raise KeyError(f"no parameter has the path {path}")


def period_of(layers: Sequence[str]) -> tuple[str, ...]:
    """The smallest group of kinds that the layers repeat."""
    size = next(
        n for n in range(1, len(layers) + 1)
        if len(layers) % n == 0 and all(kind == layers[i % n] for i, kind in enumerate(layers))
    )  # fmt: skip
    return tuple(layers[:size])


def group_size(layers: int) -> int:
    """Layers, or periods of them, in a group of two-level recomputation: the divisor whose two sums of inputs are
    least."""
    return min((n for n in range(1, layers + 1) if layers % n == 0), key=lambda n: n + layers // n)


def stacked_name(spec: ParamSpec, place: int = 0, period: int = 1) -> str:
    """The name of a parameter of all layers in one `place` of their period: "blocks.attn.wq"."""
    return spec.ours.replace("{}.", "" if period == 1 else f"period.{place}.")


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


def stored_shape(spec: ParamSpec, config: ModelConfig, format: Format) -> tuple[int, ...]:
    """The shape that a format gives the parameter, which may be a part of a tensor."""
    size = sizes(config)
    return tuple(math.prod(size[axis] for axis in group) for group in spec.groups(format))


def parameters(config: ModelConfig) -> Iterator[tuple[ParamSpec, int | None]]:
    """Every parameter of a model, in the order of its computation: its spec and its layer."""
    yield EMBED, None
    for layer, kind in enumerate(config.layers):
        yield from ((spec, layer) for spec in specs_of(kind).values())
    yield FINAL_NORM, None
    if not config.tie_embeddings:
        yield HEAD, None


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a format, and the parameters that it holds, in order along its first dimension.

    Attributes:
      name: as stored.
      shape: as stored.
      parts: specs with their layers.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[ParamSpec, int | None], ...]


def stored_tensors(config: ModelConfig, format: Format) -> list[StoredTensor]:
    """Every tensor that a format stores of a model, in the order of its computation."""
    found: dict[str, list[tuple[ParamSpec, int | None]]] = {}
    for spec, layer in parameters(config):
        if spec.source(format) is not None:
            found.setdefault(spec.name(format, layer), []).append((spec, layer))
    tensors = []
    for name, parts in found.items():
        parts.sort(key=lambda part: len(part[0].source(format).before))  # pyright: ignore[reportOptionalMemberAccess]
        shapes = [stored_shape(spec, config, format) for spec, _ in parts]
        shape = (sum(first for first, *_ in shapes), *shapes[0][1:])
        tensors.append(StoredTensor(name, shape, tuple(parts)))
    return tensors


def expected(config: ModelConfig, format: Format) -> dict[str, tuple[int, ...]]:
    """Every stored name of a model and its stored shape."""
    return {tensor.name: tensor.shape for tensor in stored_tensors(config, format)}


def embed_name(format: Format) -> str:
    """The stored name of the embedding table."""
    return EMBED.name(format)


def head_name(format: Format) -> str:
    """The stored name of the output head."""
    return HEAD.name(format)
