"""Tiny random models, the same weights on every mesh and in both layouts of blocks."""

from __future__ import annotations

import zlib

import jax
import numpy as np

from llama_jax import sharding
from llama_jax.config import ModelConfig
from llama_jax.loaded import LoadedLlama
from llama_jax.model import Llama
from llama_jax.ops.weights import name_of

STD = 0.2  # sharp: the logits of two tokens differ by whole units, the attention weights by factors


def random_llama(
    config: ModelConfig, *, mesh: str = "tensor=1", stacked: bool = False, max_seq_len: int | None = None
) -> LoadedLlama:
    """A model without a tokenizer; each parameter is drawn from a stream named after it."""
    devices = sharding.make_mesh(config, **sharding.parse_mesh(mesh))
    with jax.set_mesh(devices):
        model = Llama(config, dtype="float32", param_dtype="float32", stacked=stacked, rngs=None)
    paths, treedef = jax.tree_util.tree_flatten_with_path(model)
    arrays = []
    for path, leaf in paths:
        name = name_of(path)
        if stacked and name.startswith("blocks."):
            inner = name.removeprefix("blocks.")
            array = np.stack([_draw(f"blocks.{i}.{inner}", leaf.shape[1:]) for i in range(config.num_layers)])
        else:
            array = _draw(name, leaf.shape)
        arrays.append(jax.device_put(array, jax.NamedSharding(devices, leaf.sharding.spec)))
    return LoadedLlama(config, jax.tree_util.tree_unflatten(treedef, arrays), None, devices, max_seq_len)


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("norm"):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    return (STD * random.standard_normal(shape)).astype(np.float32)


def random_ids(length: int, *, vocab_size: int = 256, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, vocab_size, length).tolist()
