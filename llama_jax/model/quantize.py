"""A model whose layers' matrices are quantized: which weights become `ops.quantized.NF4`, and of what shapes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ConfigError
from llama_jax.config.params import Place, place_of
from llama_jax.config.quantization import BLOCK, SCALES, check_quantize, scale_rows
from llama_jax.model.llama import Llama
from llama_jax.ops.quantized import NF4
from llama_jax.ops.weights import is_leaf, leaf_of, name_of
from llama_jax.sharding import axes_of
from llama_jax.typing import PyTree

log = logging.getLogger("llama_jax")


def quantized(model: Llama, form: Callable[[Place], str | None]) -> Llama:
    """Returns an abstract model with weights in a quantized form; its mesh must be in use.

    Embedding, head and norms stay as they are: they are few, and their errors cost the most.

    Args:
      model: abstract.
      form: of a matrix of the layers, a name of `config.quantization.Quantize`; None leaves it as it is.

    Raises:
      ConfigError: a matrix cannot be cut into blocks.
      ValueError: there is no such form.
    """

    def change(path, w):
        place = place_of(name_of(path), model.config.layers)
        if place.layers is None or place.spec.kind != "matrix" or (name := form(place)) is None:
            return w
        check_quantize(name)
        return _abstract(w, place, name, model.dtype)

    return jax.tree_util.tree_map_with_path(change, model, is_leaf=is_leaf)


def _abstract(w: PyTree, place: Place, name: str, dtype: str) -> NF4:
    inner, outer = len(place.spec.stored[1]), len(place.spec.stored[0])
    leaf, lead = leaf_of(w), int(place.stacked)
    axis = lead + inner - 1
    if leaf.shape[axis] % BLOCK:
        raise ConfigError(
            f"{place.spec.ours} has {leaf.shape[axis]} inputs in a row, and {name} stores blocks of {BLOCK}: this model"
            " cannot be quantized so"
        )
    mesh = jax.sharding.get_abstract_mesh()
    spec = [*leaf.spec, *(None for _ in range(len(leaf.shape) - len(leaf.spec)))]
    blocks = [*leaf.shape]
    blocks[axis] //= BLOCK
    ways = math.prod(mesh.shape[used] for used in axes_of(spec[axis]))
    if blocks[axis] % ways:
        spec[axis] = None  # a block is on one device
        log.warning(
            "each device holds all inputs of %s, whose %d blocks of %d do not divide by %d",
            place.spec.ours, blocks[axis], BLOCK, ways,
        )  # fmt: skip
    of_output = blocks[:lead], blocks[axis + 1 :]
    splits = spec[:lead], spec[axis + 1 :]
    double = name == "nf4"

    def part(shape: list[int], dtype: type, split: list) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=jax.NamedSharding(mesh, jax.P(*split)))

    rows = scale_rows(math.prod(leaf.shape[lead : axis + 1]))
    parts: tuple[PyTree, ...] = (
        part([*blocks[: axis + 1], BLOCK // 2, *of_output[1]], jnp.uint8, [*spec[: axis + 1], None, *splits[1]]),
        part(blocks, jnp.uint8 if double else jnp.float32, spec),
        part([*of_output[0], rows, *of_output[1]], jnp.float32, [*splits[0], None, *splits[1]]) if double else None,
        part(of_output[0], jnp.float32, splits[0]) if double else None,
        part([*of_output[0], len(SCALES)], jnp.float32, [*splits[0], None]) if double else None,
    )
    codes, absmax, scales, offset, table = parts
    return NF4(codes, absmax, scales, offset, table, np.dtype(dtype), inner, outer)
