"""The weights of a model on one device of a mesh: their sizes, and the bytes of those that do not train. No JAX."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from typing import TYPE_CHECKING

from llama_jax.config import ConfigError, ModelConfig
from llama_jax.config.params import AXES as MEANING
from llama_jax.config.params import HEAD, sizes, specs_of
from llama_jax.config.quantization import BLOCK, quantized_bytes

if TYPE_CHECKING:
    from llama_jax.costs.estimate import Workload

# Mesh axes of what each dimension of a weight means. As in `sharding.ShardingRules`, in words that need no JAX.
_SPLIT = {
    "vocab": ("tensor_kv", "tensor_q"), "embed": ("fsdp", "context"), "kv_heads": ("tensor_kv",),
    "groups": ("tensor_q",), "head_dim": (), "mlp": ("tensor_kv", "tensor_q"), "norm": ("fsdp", "context"), "rank": (),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter of a model.

    Attributes:
      shape: of one layer's.
      axes: what its dimensions mean.
      layers: how many layers have it; 0 outside the layers.
      is_matrix: whether the step multiplies with it: no norm.
      inner: of a matrix, how many dimensions a product contracts, the first ones.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    layers: int
    is_matrix: bool
    inner: int = 0


@functools.lru_cache(maxsize=32)
def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Every parameter, by the table of `config.params`."""
    kinds = collections.Counter(config.layers)
    outside = [spec for spec in specs_of(None).values() if spec is not HEAD or not config.tie_embeddings]
    inside = [(spec, number) for kind, number in kinds.items() for spec in specs_of(kind).values()]
    return tuple(
        Weight(
            spec.shape(config),
            spec.logical_axes,
            number,
            spec.kind in ("matrix", "table", "expert"),
            len(spec.stored[1]) if spec.kind == "matrix" else 0,
        )
        for spec, number in [(spec, 0) for spec in outside] + inside
    )


def shard(job: Workload, shape: tuple[int, ...], axes: tuple[str, ...], *, gathered: bool = False) -> int:
    """Elements of a weight on one device; `gathered` over fsdp and context."""
    ways, sides = job.ways, []
    for size, axis in zip(shape, axes, strict=True):
        names = [name for name in _SPLIT[axis] if not (gathered and name in ("fsdp", "context"))]
        split = math.prod(ways[name] for name in names)
        sides.append(size // split if size % split == 0 else size)
    return math.prod(sides)


def block_bytes(job: Workload) -> int:
    """Bytes of the layers' matrices on one device, where they are kept in bfloat16 or quantized."""
    found = 0
    for weight in weights(job.config):
        if not weight.layers or not weight.is_matrix:
            continue
        if not job.quantize or not weight.inner:
            found += 2 * weight.layers * shard(job, weight.shape, weight.axes)
            continue
        blocks = list(weight.shape)
        if blocks[weight.inner - 1] % BLOCK:
            raise ConfigError(
                f"a matrix has {blocks[weight.inner - 1]} inputs in a row, and {job.quantize} stores blocks of {BLOCK}:"
                " this model cannot be quantized so"
            )
        blocks[weight.inner - 1] //= BLOCK  # a block is on one device
        numbers = BLOCK * shard(job, tuple(blocks), weight.axes)
        outputs = shard(job, weight.shape[weight.inner :], weight.axes[weight.inner :])
        inputs = math.prod(weight.shape[: weight.inner])
        found += weight.layers * quantized_bytes(job.quantize, inputs, numbers=numbers, outputs=outputs)
    return found


def factors(job: Workload) -> tuple[int, int]:
    """Elements of an adapter's factors on one device, and of its gates: of the largest rank in every layer."""
    if job.adapter is None:
        return 0, 0
    size, found, gates = sizes(job.config), 0, 0
    modules = job.adapter.modules(job.config)
    rank = max(job.adapter.rank_of(name) for name in modules)
    for spec in {spec.ours: spec for spec, _ in modules.values()}.values():
        layers = sum(kind in spec.layers for kind in job.config.layers)
        outer, inner = spec.stored
        for letters in (inner, outer):
            shape = (*(size[letter] for letter in letters), rank)
            found += layers * shard(job, shape, (*(MEANING[letter] for letter in letters), "rank"))
        gates += layers * rank
    return found, gates
