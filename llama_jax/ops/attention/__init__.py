"""Causal grouped-query attention behind one function, with an implementation for each machine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.ops.attention import cpu, one, reference, tpu, xla
from llama_jax.ops.rope import apply_rope, apply_rope_by_product

# With a mask, for any queries and keys: here in blocks of queries, so that scores are never held for all of them.
MASKED = {"reference": reference.attention, "xla": xla.attention, "cpu": cpu.attention}
# For tokens that see one another, in order, without scores in memory: training, and the first tokens of a cache.
KERNELS = ("splash", "cudnn")
IMPLEMENTATIONS = (*MASKED, *KERNELS)

# Scores [B, K, G, T, S] are computed for blocks of queries: at most so many, to bound memory ...
QUERY_BLOCK = 1024
# ... and where queries are in order, not fewer than this, each block with only the keys before its end. CPUs train with
# the reference, which of 256 tokens then computes five eighths of the scores.
SMALL_BLOCK = {"reference": 64, "xla": 256, "cpu": 256, "cudnn": 256}
# Fewer tokens than this are as fast without a kernel (TPU tiles have 128 rows), and their scores are small.
KERNEL_TOKENS = 128


def dot_product_attention(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    slots_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    ordered: bool = False,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """Each query attends to the keys at and before its own slot, within its segment.

    Queries may be split over the mesh by rows, heads and length. Keys that are split by length are gathered, so that
    each device computes its own queries; with one query a row (decoding) they stay where they are, and each device
    contributes a part of the softmax.

    Args:
      q_BTKGH: queries: K kv heads, each shared by G query heads.
      k_BKSH: keys: a cache of S slots, or those of the same T tokens (S = T).
      v_BKSH: values.
      slots_BT: int: index along S of each query's own key. A slot of S or more (padding) sees every key.
      segment_ids_BT: int: documents packed in one row do not see each other; needs S = T.
      ordered: whether query t's own key is in slot t, padding excepted: spares half the work.
      scale: what the scores are multiplied by.
      implementation: "reference", "xla" (`jax.nn.dot_product_attention`), "cpu", or a kernel: "splash" (TPU; on a CPU
        interpreted, which is slow) or "cudnn" (GPU; on a CPU by XLA). A kernel is used for tokens that see one another
        in order (S = T), and "xla" for the rest. None chooses by platform: "cpu"; "splash" in bfloat16 and "cudnn" in
        bfloat16 and float16 from KERNEL_TOKENS tokens on; else "xla". "splash:512" is splash with blocks of 512.

    Returns:
      [B, T, K, G, H] in q's dtype.

    Raises:
      ValueError: an unknown implementation, or one that cannot compute in this dtype.
    """
    T, S = q_BTKGH.shape[1], k_BKSH.shape[2]
    implementation, block = _parse(implementation)
    name = _choose(implementation, q_BTKGH, causal=ordered and S == T > 1)
    q_spec, k_spec = (jax.typeof(x).sharding.spec for x in (q_BTKGH, k_BKSH))
    rows = jax.P(q_spec[0], q_spec[1])
    slots_BT = jax.reshard(jnp.asarray(slots_BT), rows)
    if segment_ids_BT is not None:
        segment_ids_BT = jax.reshard(jnp.asarray(segment_ids_BT), rows)
    axes = k_spec[2]
    if axes is not None and q_spec[1] is None:
        seen_BTS = jnp.arange(S, out_sharding=jax.P(axes)) <= slots_BT[:, :, None]
        return reference.attention(q_BTKGH, k_BKSH, v_BKSH, mask_BTS=seen_BTS, scale=scale, out_sharding=q_spec)
    local = functools.partial(_one_device, name=name, block=block, ordered=ordered, scale=scale, axes=axes)
    # Kernels do not say over which mesh axes their results vary: no check_vma.
    out_BTKGH = jax.shard_map(local, out_specs=q_spec, check_vma=name not in KERNELS)(
        q_BTKGH, k_BKSH, v_BKSH, slots_BT, segment_ids_BT
    )
    # What a gradient may keep goes by the name "attention"; splash gives it to its own residuals.
    return out_BTKGH if name == "splash" else checkpoint_name(out_BTKGH, "attention")


@dataclasses.dataclass(frozen=True)
class Way:
    """How a layer attends on its machine: chosen once, by `way_of`, when the layer is made.

    Attributes:
      implementation: of `dot_product_attention`.
      reads_first: whether one token a row attends to a whole cache before its key and value are written
        (`attention_of_one`). A CPU reads only the blocks of the cache in use instead.
      turn_one: how one key a row is rotated.
    """

    implementation: str | None
    reads_first: bool
    turn_one: Callable[[jax.Array, tuple[jax.Array, jax.Array]], jax.Array]


def way_of(implementation: str | None) -> Way:
    """The way of the mesh in use; its devices may be of a machine that is not there."""
    platform = device()[0]
    reads_first = platform != "cpu" and implementation not in ("reference", "cpu")
    return Way(implementation, reads_first, apply_rope_by_product if platform == "tpu" else apply_rope)


def attention_of_one(
    q_B1KGH: jax.Array,
    own_k_B1KH: jax.Array,
    own_v_B1KH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    slots_B1: jax.Array,
    scale: float,
) -> jax.Array:
    """As `dot_product_attention` for one token a row, from a cache as it was before their keys and values came.

    Args:
      q_B1KGH: queries.
      own_k_B1KH: keys of the same tokens.
      own_v_B1KH: values of the same tokens.
      k_BKSH: keys of a cache whose slots are not split over the mesh.
      v_BKSH: values likewise.
      slots_B1: int: each token's own slot, which is not read; one of S or more (padding) sees every key.
      scale: what the scores are multiplied by.

    Returns:
      [B, 1, K, G, H] in q's dtype.
    """
    q_BKGH, own_k_BKH, own_v_BKH = (x[:, 0] for x in (q_B1KGH, own_k_B1KH, own_v_B1KH))
    local = functools.partial(one.attention, scale=scale)
    out_BKGH = jax.shard_map(local, out_specs=jax.typeof(q_BKGH).sharding.spec)(
        q_BKGH, own_k_BKH, own_v_BKH, k_BKSH, v_BKSH, slots_B1[:, 0]
    )
    return out_BKGH[:, None]


def _one_device(q_BTKGH, k_BKSH, v_BKSH, slots_BT, segment_ids_BT, *, name, block, ordered, scale, axes):
    """Attention of one device's rows, heads and queries; keys are gathered over the mesh axes `axes`."""
    key_segments_BS = segment_ids_BT
    if axes is not None:
        k_BKSH, v_BKSH = (jax.lax.all_gather(x, axes, axis=2, tiled=True) for x in (k_BKSH, v_BKSH))
        if segment_ids_BT is not None:
            key_segments_BS = jax.lax.all_gather(segment_ids_BT, axes, axis=1, tiled=True)
    segments = None if segment_ids_BT is None else (segment_ids_BT, key_segments_BS)
    on_cpu = device()[0] == "cpu"
    if name == "splash":
        return tpu.attention(q_BTKGH, k_BKSH, v_BKSH, segments, scale=scale, axes=axes, block=block, interpret=on_cpu)
    attend = MASKED.get(name, xla.attention if on_cpu else xla.cudnn)  # on a CPU, XLA stands for cuDNN
    if name == "cudnn" and axes is None:
        mask_BTS = None if segments is None else segments[0][:, :, None] == segments[1][:, None]
        return attend(q_BTKGH, k_BKSH, v_BKSH, mask_BTS=mask_BTS, scale=scale, causal=True)

    def part(q_BTKGH, k_BKSH, v_BKSH, slots_BT, segments):
        mask_BTS = jnp.arange(k_BKSH.shape[2]) <= slots_BT[:, :, None]
        if segments is not None:
            mask_BTS &= segments[0][:, :, None] == segments[1][:, None]
        return attend(q_BTKGH, k_BKSH, v_BKSH, mask_BTS=mask_BTS, scale=scale)

    if axes is not None:  # of a long sequence not even the masks of all blocks are kept for the gradient
        part = jax.checkpoint(part)
    T, S = q_BTKGH.shape[1], k_BKSH.shape[2]
    ordered &= axes is None  # else this device's queries start anywhere
    width = min(QUERY_BLOCK, max(SMALL_BLOCK[name], T // 16)) if ordered else QUERY_BLOCK
    blocks = []
    for start in range(0, T, width):  # a Python loop: shapes differ, and 131072 tokens make 128 blocks
        queries = slice(start, min(start + width, T))
        keys = slice(0, min(queries.stop, S) if ordered else S)
        parts = None if segments is None else (segments[0][:, queries], segments[1][:, keys])
        blocks.append(part(q_BTKGH[:, queries], k_BKSH[:, :, keys], v_BKSH[:, :, keys], slots_BT[:, queries], parts))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def check_implementation(name: str | None) -> None:
    """Raises ValueError for a name that is none of IMPLEMENTATIONS; None is the platform's own."""
    kernel, block = _parse(name)
    if kernel is not None and kernel not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {name!r} is unknown; there are {', '.join(IMPLEMENTATIONS)}")
    if block is not None and (kernel != "splash" or block not in tpu.BLOCKS):
        sizes = ", ".join(map(str, tpu.BLOCKS))
        raise ValueError(f"attention implementation {name!r}: splash alone has blocks, of {sizes}, as in splash:512")


def _parse(name: str | None) -> tuple[str | None, int | None]:
    """A kernel, and the size of its blocks where the name has one."""
    kernel, _, block = (name or "").partition(":")
    if not block:
        return kernel or None, None
    return (kernel, int(block)) if block.isdecimal() else (name, None)


def _choose(name: str | None, q_BTKGH: jax.Array, *, causal: bool) -> str:
    """The implementation for these queries."""
    _, T, _, _, H = q_BTKGH.shape
    dtype, (platform, kind) = q_BTKGH.dtype, device()
    if name is None:
        if platform == "cpu":
            return "cpu"
        kernel, fits = ("splash", tpu.fits) if platform == "tpu" else ("cudnn", xla.cudnn_fits)
        return kernel if causal and T >= KERNEL_TOKENS and fits(dtype, H, kind) else "xla"
    check_implementation(name)
    if platform == "cpu" and dtype == jnp.float16 and name in ("xla", "cudnn"):
        raise ValueError(f"attention implementation {name!r} has no float16 on a CPU: use 'cpu', or dtype float32")
    if name == "cudnn" and platform != "cpu" and not xla.cudnn_fits(dtype, H, kind):
        raise ValueError(
            f"attention implementation 'cudnn' computes in bfloat16 or float16 with a head_dim of up to {xla.MAX_HEAD},"
            f" in multiples of 8, on Ampere or newer; not in {dtype} with {H} on {kind}. Use dtype bfloat16, or 'xla'"
        )
    if name in KERNELS:
        return name if causal else "cpu" if platform == "cpu" else "xla"
    return name


def device() -> tuple[str, str]:
    """Platform and kind of the mesh in use, which may be of a machine that is not there (ahead-of-time compilation)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend(), jax.devices()[0].device_kind
    return device.platform, device.device_kind
