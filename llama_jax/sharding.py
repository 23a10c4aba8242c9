"""Where arrays are stored: the device mesh, and the rules from logical axes (what a dimension means) to mesh axes.

Users write `fsdp=2,tensor=4`. From the outside in, each axis with more traffic than the one before:

- `data`: replicas of the model, each with its rows; gradients are summed once a step. Between slices or nodes.
- `fsdp`: rows too, and each weight is in parts that are gathered when it is used.
- `context`: each sequence is in parts; attention gathers keys and values. For 128K tokens, in training and prefill.
- `tensor`: heads, MLP and vocabulary; two reductions a layer. The mesh splits it in two, because it may exceed the
  number of kv heads (Llama 3 70B has 8, a v5e-16 slice has 16 chips): `tensor_kv` = gcd(tensor, K) shards kv heads,
  `tensor_q` the groups of query heads that share one; MLP and vocabulary are split over both.

What does not divide, one rule for planning, training, loading and generating (README's meshes, decided here alone):

- A dimension of the weights (heads, MLP, vocabulary, embedding) stays whole on each device, and all of them say so in
  the words of `whole_weights`: the results are right, and SmolLM2's 3 kv heads do not forbid two devices.
- The batch and the length of a training step, of a prefill or of a cache that is planned: refused in the words of
  `undivided_batch`, by the planner and by training before its first step. Devices would compute the same, all of it.
- Generation pads the batch (`pad_batch`), and prompts to powers of two. A length that `context` does not divide all the
  same is computed whole on each device, and said once in the words of `whole_sequences`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import ModelConfig
from llama_jax.costs import machines, tuned
from llama_jax.typing import Foreign

log = logging.getLogger("llama_jax")

MESH_AXES = ("data", "fsdp", "context", "tensor_kv", "tensor_q")
USER_AXES = ("data", "fsdp", "context", "tensor")
TENSOR = ("tensor_kv", "tensor_q")
Axes = str | tuple[str, ...] | None

_WORDS = {"kv_heads": "the number of kv heads", "groups": "the number of query heads to a kv head"}

# How a program is shown fewer devices.
_FEWER = {"cpu": "JAX_NUM_CPU_DEVICES", "gpu": "CUDA_VISIBLE_DEVICES=0,1,...", "tpu": "TPU_VISIBLE_CHIPS=0,1,..."}


def axes_of(entry: Axes) -> tuple[str, ...]:
    """The mesh axes of one dimension, as a PartitionSpec or a rule has them: none, one or several."""
    return (entry,) if isinstance(entry, str) else entry or ()


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `"fsdp=2,tensor=4"` into `{"fsdp": 2, "tensor": 4}`.

    Raises:
      ValueError: an unknown axis, an axis named twice, or a size that is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in USER_AXES:
            raise ValueError(f"mesh: unknown axis {name!r} in {text!r}; axes are {', '.join(USER_AXES)}")
        if name in sizes:
            raise ValueError(f"mesh: axis {name!r} is given twice in {text!r}")
        if not (size.isascii() and size.isdecimal() and len(size) < 8) or int(size) < 1:
            raise ValueError(
                f"mesh: {name} needs a positive integer, got {size[:20]!r} (write for example fsdp=2,tensor=4)"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(
    config: ModelConfig,
    *,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Foreign] | None = None,
) -> Mesh:
    """The mesh of axes `MESH_AXES` for one model, in Explicit sharding mode.

    Devices that are linked closely become neighbours on the inner axes. Where they are in several slices, which only
    the data centre's network links, `data` goes over the slices and the rest stays within each.

    Args:
      config: the model; its kv heads decide how `tensor` is split.
      data: replicas of the model, each with its share of the batch.
      fsdp: the batch is split, and the weights too; each weight is gathered when it is used.
      context: sequences and the cache are split along their length, and the weights as by `fsdp`.
      tensor: heads, MLP and vocabulary are split.
      devices: as many as data * fsdp * context * tensor; default: the first ones of `jax.devices()`.

    Raises:
      ValueError: there are fewer devices than the mesh needs; several processes would not all have one in it; or `data`
        does not divide among the slices.
    """
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    needed, text = math.prod(sizes.values()), mesh_text(sizes)
    devices = list(jax.devices() if devices is None else devices)
    if needed > len(devices):
        raise ValueError(
            f"mesh {text} needs {needed} devices, but there are {_count(devices)}. {_more(needed, devices)}"
        )
    if needed < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ValueError(
            f"mesh {text} has {needed} devices, but there are {_count(devices)} on several processes, and each process"
            f" must take part: make the sizes multiply to {len(devices)}"
        )
    kv = math.gcd(tensor, config.num_kv_heads)
    shape = (data, fsdp, context, kv, tensor // kv)
    return Mesh(_arrange(devices[:needed], shape, text), MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def _arrange(devices: list[Foreign], shape: tuple[int, ...], text: str) -> Foreign:
    slices = num_slices(devices)
    split = devices[0].platform == "tpu"  # a logical axis may take part of a torus axis: tensor_kv=8 on 4x4
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
    data, *inner = shape
    if data % slices:
        raise ValueError(
            f"mesh {text}: the devices are in {slices} slices, which only `data` may span (the others would wait"
            f" for the slow network between them): make data a multiple of {slices}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inner), (slices, *(1 for _ in inner)), devices, allow_split_physical_axes=split
    )


def num_slices(devices: Sequence[Foreign]) -> int:
    """Slices of TPUs; on GPUs a node counts as a slice for JAX, but `fsdp` over nodes is usual."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"} or {0})


def mesh_text(sizes: Mapping[str, int], alone: str = "tensor=1") -> str:
    """Returns the inverse of `parse_mesh`, such as "fsdp=8,tensor=2"; of one device `alone`."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or alone


def _count(devices: Sequence[Foreign]) -> str:
    return f"{len(devices)} ({devices[0].platform})"


def _more(needed: int, devices: Sequence[Foreign]) -> str:
    if devices[0].platform == "cpu":
        return f"On a CPU, JAX_NUM_CPU_DEVICES={needed} simulates that many"
    return "Make the mesh smaller, or start the same command on more hosts (docs/cloud-tpu.md, docs/gpu.md)"


def default_mesh(config: ModelConfig) -> Mesh:
    """For inference: that of the tuned table; else all devices on `tensor`, which shortens every step and needs no
    batch, and slices on `data`."""
    devices = jax.devices()
    slices = num_slices(devices)
    here = machines.of_devices(devices[0].device_kind, len(devices), slices)
    if here and (row := tuned.find(config, here, "decode", None)):
        return make_mesh(config, **row.mesh)  # pyright: ignore[reportArgumentType]
    return make_mesh(config, data=slices, tensor=len(devices) // slices)


def mesh_of(config: ModelConfig, text: str | None) -> Mesh:
    """The mesh that `"fsdp=2,tensor=4"` means for a model on all devices; None is the default mesh.

    Raises:
      ValueError: as `parse_mesh` and `make_mesh`; or the sizes do not multiply to the number of devices.
    """
    if text is None:
        return default_mesh(config)
    sizes = parse_mesh(text)
    devices, product = jax.devices(), math.prod(sizes.values())
    if product < len(devices):
        times, rest = divmod(len(devices), product)
        example = "" if rest or "data" in sizes else f", for example {text},data={times}"
        fewer = _FEWER.get(devices[0].platform, "by its environment")
        raise ValueError(
            f"mesh {text} multiplies to {product}, but there are {_count(devices)} devices: make it {len(devices)}"
            f"{example}, or show this program fewer devices ({fewer})"
        )
    return make_mesh(config, **sizes)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of each logical axis, and why; None is not split. Another strategy is another instance."""

    # Weights.
    vocab: Axes = TENSOR  # the two largest matrices of a small model
    embed: Axes = ("fsdp", "context")  # every matrix has it once, so FSDP reaches them all
    kv_heads: Axes = "tensor_kv"  # attention needs no communication between heads
    groups: Axes = "tensor_q"  # tensor parallelism beyond the kv heads
    head_dim: Axes = None  # RoPE pairs its two halves
    mlp: Axes = TENSOR  # column then row parallel: one reduction an MLP
    norm: Axes = ("fsdp", "context")  # small, but of 70B on 64 chips Adam's and theirs would be 16 MB on each
    layers: Axes = None  # scanned one after the other
    # Activations and cache.
    batch: Axes = ("data", "fsdp")  # each data and fsdp shard computes its own sequences
    seq: Axes = "context"  # every position is computed alone, except in attention
    act_embed: Axes = None  # the residual stream is whole on each device: what tensor parallelism reduces to
    cache_seq: Axes = "context"  # decoding then reads a part of a long cache on each device
    sampled: Axes = None  # [B, V] of one position, and stop ids, while sampling: filters and draws sum over a row

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
            mesh_axes = tuple(name for name in axes_of(getattr(self, axis)) if sizes[name] > 1)
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

    def undivided(self, config: ModelConfig, sizes: Mapping[str, int] | None = None) -> list[str]:
        """Which of the model's dimensions stay whole because they do not divide, in words.

        Args:
          config: the model.
          sizes: of the mesh's axes; None is the mesh in use.
        """
        sizes = jax.sharding.get_abstract_mesh().shape if sizes is None else sizes
        dimensions = {
            "vocab": config.vocab_size,
            "embed": config.embed_dim,
            "kv_heads": config.num_kv_heads,
            "groups": config.num_groups,
            "mlp": config.mlp_dim,
        }
        words = []
        for axis, size in dimensions.items():
            ways = math.prod(sizes[name] for name in axes_of(getattr(self, axis)))
            if size % ways:
                words.append(f"{_WORDS.get(axis, axis)} ({size}) does not divide by {ways}")
        return words


def whole_weights(undivided: Sequence[str]) -> str:
    """Says what follows from `ShardingRules.undivided`; empty where that is."""
    if not undivided:
        return ""
    return f"each device holds and computes all of some weights, because {'; '.join(undivided)}"


def undivided_batch(sizes: Mapping[str, int], *, rows: int, seq_len: int, microbatches: int = 1) -> str:
    """Says why a step of training or prefill does not divide on a mesh; empty where it does.

    Args:
      sizes: of the axes data, fsdp and context; one that is not there is 1.
      rows: sequences of the whole step.
      seq_len: tokens of each.
      microbatches: parts that the step is computed in.
    """
    ways, context = sizes.get("data", 1) * sizes.get("fsdp", 1), sizes.get("context", 1)
    least = ways * microbatches
    if rows % microbatches:
        return f"a batch of {rows} sequences does not divide into {microbatches} microbatches"
    if rows % least:
        near = " or ".join(map(str, sorted({max(least, rows // least * least), -(-rows // least) * least})))
        parts = f" (in {microbatches} microbatches)" if microbatches > 1 else ""
        return (
            f"a microbatch of {rows // microbatches} sequences does not divide among {ways} devices (data x fsdp): make"
            f" the batch {near}{parts}, or put devices on tensor or context (--mesh)"
        )
    if seq_len % context:
        near = " or ".join(str(n) for n in (seq_len // context * context, -(-seq_len // context) * context) if n)
        return (
            f"a sequence of {seq_len} tokens does not divide by context={context}: make it {near} tokens long, or put"
            " these devices on another axis (--mesh)"
        )
    return ""


@functools.cache
def whole_sequences(seq_len: int, context: int) -> None:
    """Warns, once, that generation computes all of a length on each device that `context` does not divide."""
    if seq_len % context:
        log.warning(
            "each device holds and computes all of a sequence, because its %d tokens do not divide by context=%d",
            seq_len,
            context,
        )


def pad_batch(batch: int) -> int:
    """The number of rows, dead ones included, that the mesh in use divides."""
    sizes = jax.sharding.get_abstract_mesh().shape
    ways = sizes["data"] * sizes["fsdp"]
    return -(-batch // ways) * ways
