"""Where arrays lie: the device mesh, and the rules from logical axes (what a dimension means) to mesh axes.

Users write `fsdp=2,tensor=4`. The mesh splits `tensor` in two, because tensor parallelism may exceed the number of kv
heads (Llama 3 70B has 8, a v5e-16 slice has 16 chips): `tensor_kv` = gcd(tensor, K) shards kv heads, `tensor_q` the
groups of query heads that share one; MLP and vocabulary are split over both.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import ModelConfig

log = logging.getLogger("llama_jax")

MESH_AXES = ("data", "fsdp", "tensor_kv", "tensor_q")
USER_AXES = ("data", "fsdp", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `"fsdp=2,tensor=4"` into `{"fsdp": 2, "tensor": 4}`.

    Raises:
      ValueError: an unknown axis, an axis named twice, or a size that is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (word.strip() for word in part.partition("="))
        if name == "context":
            raise ValueError("mesh: context parallelism is not implemented yet; use data, fsdp and tensor")
        if name not in USER_AXES:
            raise ValueError(f"mesh: unknown axis {name!r} in {text!r}; axes are {', '.join(USER_AXES)}")
        if name in sizes:
            raise ValueError(f"mesh: axis {name!r} is given twice in {text!r}")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh: {name} needs a positive integer, got {size!r} (write for example fsdp=2,tensor=4)")
        sizes[name] = int(size)
    return sizes


def make_mesh(
    config: ModelConfig, *, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """The mesh of axes `MESH_AXES` for one model, in Explicit sharding mode.

    Args:
      config: the model; its kv heads decide how `tensor` is split.
      data: replicas of the model, each with its share of the batch.
      fsdp: the batch is split, and the weights too; each weight is gathered when it is used.
      tensor: heads, MLP and vocabulary are split.
      devices: as many as data * fsdp * tensor; default: the first ones of `jax.devices()`.

    Raises:
      ValueError: there are fewer devices than the mesh needs.
    """
    needed = data * fsdp * tensor
    devices = list(jax.devices() if devices is None else devices)
    if needed > len(devices):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} needs {needed} devices, but there are {len(devices)}"
            f" ({devices[0].platform}). On a CPU, JAX_NUM_CPU_DEVICES={needed} simulates that many"
        )
    kv = math.gcd(tensor, config.num_kv_heads)
    shape = (data, fsdp, kv, tensor // kv)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES), devices=devices[:needed])


def default_mesh(config: ModelConfig) -> Mesh:
    """For inference: all devices on `tensor`, which shortens every step and needs no batch."""
    return make_mesh(config, tensor=len(jax.devices()))


def mesh_of(config: ModelConfig, text: str | None) -> Mesh:
    """The mesh that `"fsdp=2,tensor=4"` means for a model; None is the default mesh."""
    if text is None:
        return default_mesh(config)
    sizes = parse_mesh(text)
    return make_mesh(config, **{axis: sizes.get(axis, 1) for axis in USER_AXES})  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of each logical axis; None is not split. Another strategy is another instance."""

    # Weights.
    vocab: str | tuple[str, ...] | None = ("tensor_kv", "tensor_q")  # the two largest matrices of a small model
    embed: str | tuple[str, ...] | None = "fsdp"  # every matrix has it once, so FSDP reaches them all
    kv_heads: str | tuple[str, ...] | None = "tensor_kv"  # attention needs no communication between heads
    groups: str | tuple[str, ...] | None = "tensor_q"  # tensor parallelism beyond the kv heads
    head_dim: str | tuple[str, ...] | None = None  # RoPE pairs its two halves
    mlp: str | tuple[str, ...] | None = ("tensor_kv", "tensor_q")  # column then row parallel: one reduction an MLP
    norm: str | tuple[str, ...] | None = None  # a few kilobytes, read by every device
    layers: str | tuple[str, ...] | None = None  # scanned one after the other
    # Activations and cache.
    batch: str | tuple[str, ...] | None = ("data", "fsdp")  # each data and fsdp shard computes its own sequences
    seq: str | tuple[str, ...] | None = None  # context parallelism would go here
    act_embed: str | tuple[str, ...] | None = None  # the residual stream is whole on each device
    cache_seq: str | tuple[str, ...] | None = None  # written at per-row positions

    def spec(self, axes: Sequence[str], shape: Sequence[int]) -> P:
        """The PartitionSpec of an array on the mesh in use (`jax.set_mesh`).

        A dimension that its mesh axes do not divide stays whole (SmolLM2's 3 kv heads on two devices).

        Args:
          axes: logical names, one a dimension.
          shape: sizes, one a dimension.

        Raises:
          ValueError: a mesh axis would be used twice, or no mesh is set.
        """
        sizes = jax.sharding.get_abstract_mesh().shape
        if not sizes:
            raise ValueError("no mesh is in use: wrap the call in `with jax.set_mesh(llama.mesh):`")
        spec, used = [], set()
        for axis, size in zip(axes, shape, strict=True):
            # An axis of one device splits nothing: naming it would only keep dimensions from being merged.
            mesh_axes = tuple(name for name in self._mesh_axes(axis) if sizes[name] > 1)
            if size % math.prod(sizes[name] for name in mesh_axes):
                mesh_axes = ()
            if used & set(mesh_axes):
                raise ValueError(
                    f"axes {tuple(axes)} use mesh axis {sorted(used & set(mesh_axes))} twice: mend the rules"
                )
            used |= set(mesh_axes)
            spec.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
        return P(*spec)

    def sharding(self, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
        """As `spec`, on the mesh in use."""
        return NamedSharding(jax.sharding.get_mesh(), self.spec(axes, shape))

    def _mesh_axes(self, axis: str) -> tuple[str, ...]:
        mesh_axes = getattr(self, axis)
        return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()

    def undivided(self, config: ModelConfig) -> list[str]:
        """Which of the model's dimensions stay whole on the mesh in use because they do not divide, in words."""
        sizes = jax.sharding.get_abstract_mesh().shape
        dimensions = {
            "vocab": config.vocab_size,
            "embed": config.embed_dim,
            "kv_heads": config.num_kv_heads,
            "groups": config.num_groups,
            "mlp": config.mlp_dim,
        }
        words = []
        for axis, size in dimensions.items():
            ways = math.prod(sizes[name] for name in self._mesh_axes(axis))
            if size % ways:
                words.append(f"{axis} ({size}) does not divide by {ways}")
        return words


def pad_batch(batch: int) -> int:
    """The number of rows, dead ones included, that the mesh in use divides."""
    sizes = jax.sharding.get_abstract_mesh().shape
    ways = sizes["data"] * sizes["fsdp"]
    return -(-batch // ways) * ways
