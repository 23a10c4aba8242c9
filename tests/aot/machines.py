"""Machines that are not there: their compilers run on any Linux host, and refuse what does not fit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from llama_jax import sharding
from llama_jax.config import ModelConfig
from llama_jax.costs.machines import machine
from llama_jax.infer import decode
from llama_jax.infer.decode import DecodeState
from llama_jax.model import Llama
from llama_jax.ops.attention import dot_product_attention
from llama_jax.plan import compiler
from llama_jax.train.losses import cross_entropy

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask Google's metadata server

DTYPES = ("pred", "s8", "u8", "bf16", "f16", "s32", "u32", "f32")


def tpu(topology: str, **options: Any) -> list[Any]:
    """Devices such as "v5e:4x4"; needs the `tpu` extra. One process at a time."""
    return topologies.get_topology_desc(topology, platform="tpu", **options).devices


def h100s() -> list[Any]:
    """Eight H100 in one machine; needs the `cuda` extra."""
    return compiler.devices(machine("8xh100"), say=print)


def compile_for(devices: list[Any], function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The compiled program; the mesh must be in use."""
    gpu = devices[0].platform != "tpu"
    # Autotuning would run candidates on the GPU.
    return jax.jit(function, **options).lower(*args).compile({"xla_gpu_autotune_level": 0} if gpu else None)


def mesh_of(config: ModelConfig, text: str, devices: list[Any]) -> jax.sharding.Mesh:
    return sharding.make_mesh(config, **sharding.parse_mesh(text), devices=devices)


def abstract(rules: sharding.ShardingRules, axes: tuple[str, ...], shape: tuple[int, ...], dtype: Any) -> Any:
    """An array without data, with the sharding of the rules on the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, rules.spec(axes, shape)))


def attention(B: int, T: int, K: int, G: int, H: int, *, packed: bool) -> tuple[Callable[..., Any], Any]:
    """The gradients of queries, keys and values through attention of the platform's choice, and abstract arguments."""
    rules = sharding.ShardingRules()
    cache = ("batch", "kv_heads", "cache_seq", "head_dim")
    args = [
        abstract(rules, axes, shape, dtype)
        for axes, shape, dtype in (
            (("batch", "seq", "kv_heads", "groups", "head_dim"), (B, T, K, G, H), jnp.bfloat16),
            (cache, (B, K, T, H), jnp.bfloat16),
            (cache, (B, K, T, H), jnp.bfloat16),
            (("batch", "seq"), (B, T), jnp.int32),
            (("batch", "seq"), (B, T), jnp.int32),
        )
    ]

    def loss(q, k, v, slots_BT, segments_BT):
        segments_BT = segments_BT if packed else None
        out = dot_product_attention(q, k, v, slots_BT=slots_BT, segment_ids_BT=segments_BT, ordered=True, scale=H**-0.5)
        return out.astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2)), args


def training(config: ModelConfig, B: int, T: int, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Loss and gradient of packed rows, float32 parameters and bfloat16 computation, and its abstract arguments."""
    model = Llama(config, dtype="bfloat16", param_dtype="float32", stacked=True, remat="full", rngs=None, **options)
    ids = abstract(model.rules, ("batch", "seq"), (B, T), jnp.int32)

    def loss(model, tokens_BT, positions_BT, segment_ids_BT, targets_BT, mask_BT):
        x_BTD, _ = model.hidden(tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT)
        return cross_entropy(model, x_BTD, targets_BT, mask_BT, z_weight=1e-4).mean

    return jax.value_and_grad(loss), (model, ids, ids, ids, ids, ids)


def decoding(config: ModelConfig, B: int, size: int, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`decode` with its cache donated as argument 1, and its abstract arguments."""
    model = Llama(config, dtype="bfloat16", param_dtype="bfloat16", rngs=None, **options)

    def rows(dtype):
        return abstract(model.rules, ("batch",), (B,), dtype)

    state = DecodeState(
        cache=jax.eval_shape(lambda: model.init_cache(B, size)),
        x_B1D=abstract(model.rules, ("batch", "seq", "act_embed"), (B, 1, config.embed_dim), model.dtype),
        position_B=rows(jnp.int32),
        remaining_B=rows(jnp.int32),
        finish_B=rows(jnp.int32),
        stop_BN=abstract(model.rules, ("batch", "sampled"), (B, 2), jnp.int32),
        sampling=None,
    )
    return decode.decode, (model, state, rows(jnp.bool_), jax.ShapeDtypeStruct((), jnp.int32))


def prefilling(config: ModelConfig, B: int, T: int, size: int, **options: Any) -> tuple[Callable[..., Any], Any]:
    """`prefill` of new prompts, and its abstract arguments."""
    model = Llama(config, dtype="bfloat16", param_dtype="bfloat16", rngs=None, **options)
    tokens = abstract(model.rules, ("batch", "seq"), (B, T), jnp.int32)
    row = abstract(model.rules, ("batch",), (B,), jnp.int32)

    stop_BN = abstract(model.rules, ("batch", "sampled"), (B, 2), jnp.int32)

    def prefill(model, *args):
        return decode.prefill(model, *args, None, size=size, span=T)

    return prefill, (model, tokens, row, row, row, stop_BN)


def gigabytes(compiled: Any) -> str:
    """Of each device."""
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return "arguments {:.2f}, outputs {:.2f}, temporaries {:.2f} GB a device".format(*(size / 1e9 for size in sizes))


def arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array in a compiled program."""
    found = re.findall(r"\b([a-z]+[0-9]*)\[([0-9,]+)\]", text)
    return {(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in found if dtype in DTYPES}
