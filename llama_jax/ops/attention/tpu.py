"""Splash attention, JAX's Pallas kernel for TPU: no scores in HBM, and blocks after the diagonal are not computed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.ops.attention import context
from llama_jax.typing import Foreign

BLOCKS = (1024, 512, 256, 128)  # queries, and keys: multiples of a register's 128 lanes, the largest that VMEM holds


def fits(dtype: jnp.dtype, head_dim: int, kind: str) -> bool:
    """Whether the kernel keeps this dtype's precision: it multiplies float32 inputs in bfloat16."""
    return dtype == jnp.bfloat16


def attention(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
    axes: str | tuple[str, ...] | None,
    block: int | None,
    interpret: bool,
) -> jax.Array:
    """Causal attention of one device's rows, heads and queries: query t's own key is in slot t of the whole sequence.

    Args:
      q_BTKGH: queries; with `axes`, the part of a sequence of S that is this device's along them.
      k_BKSH: keys of the whole sequence.
      v_BKSH: values.
      segments: int [B, T] and [B, S]: documents of the queries and of the keys.
      scale: what the scores are multiplied by.
      axes: mesh axes that split the queries by length.
      block: queries and keys in a block, one of BLOCKS; None, or one of more than T, is that which pads least.
      interpret: compute with JAX instead of compiling for a TPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # 0.3 s that only a TPU needs

    B, T, K, G, H = q_BTKGH.shape
    S, shards = k_BKSH.shape[2], k_BKSH.shape[2] // T
    q_BTKGH = (q_BTKGH.astype(jnp.float32) * scale).astype(q_BTKGH.dtype)  # the kernel scales nothing
    own_BT, keys_BS = segments or (None, None)
    if axes is not None:
        q_BTKGH = context.balance(q_BTKGH, axes)
        own_BT = None if own_BT is None else context.balance(own_BT, axes)
    block = block if block and block <= T else _block(T)
    q_BNTH = _pad(q_BTKGH.reshape(B, T, K * G, H).swapaxes(1, 2), 2, block)
    k_BKSH, v_BKSH = (_pad(x, 2, block) for x in (k_BKSH, v_BKSH))
    ids = None
    if own_BT is not None and keys_BS is not None:  # padding comes after every query's own slot
        ids = SegmentIds(_pad(own_BT, 1, block), _pad(keys_BS, 1, block))
    shard = 0 if axes is None else jax.lax.axis_index(axes)
    kernel = _kernel(T, S, shards, block, shard, interpret)
    out_BNTH = jnp.asarray(jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, ids))
    out_BTKGH = out_BNTH[:, :, :T].swapaxes(1, 2).reshape(B, T, K, G, H)
    return out_BTKGH if axes is None else context.unbalance(out_BTKGH, axes)


def _block(T: int) -> int:
    """The block that pads T least; of equals, the largest."""
    return min(BLOCKS, key=lambda block: (-(-T // block) * block, -block))


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    extra = [(0, 0)] * x.ndim
    extra[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, extra)


def _kernel(T: int, S: int, shards: int, block: int, shard: int | jax.Array, interpret: bool) -> Foreign:
    """The kernel for the queries of one of `shards` devices.

    JAX's own `make_splash_mha` looks at every element of the mask (50 s for 131,072 tokens); whether a block is empty
    follows from its first and last rows.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    # A row of padding is row 0, which sees one key.
    rows = [np.pad(context.rows(i, T, shards), (0, -T % block)) for i in range(shards)]
    of = functools.partial(_mask_info, rows, -(-S // block) * block, block, shard)
    forward, backward = of(by_column=False), of(by_column=True)
    sizes = splash.BlockSizes(block, block, block, block, block, block, block, block)
    return splash.SplashAttentionKernel(
        forward,
        forward,
        backward,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="attention",  # with the sums that its gradient needs,
        mask_function=_not_after,
        interpret=interpret,
    )


def _not_after(row, slot):
    return row >= slot


def _mask_info(rows: list[np.ndarray], S: int, block: int, shard: int | jax.Array, *, by_column: bool) -> Foreign:
    """What the kernel reads from scalar memory: which blocks to compute, and which to fetch meanwhile.

    Args:
      rows: for each device, the slot of each of its queries.
      S: keys, padding included.
      block: queries and keys in a block.
      shard: which device.
      by_column: in the order of the gradient of keys and values: for each block of keys, all blocks of queries.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    first = np.arange(0, S, block)
    small = np.int8 if max(len(first), len(rows[0]) // block) < 128 else np.int16  # scalar memory is scarce
    block_mask, data_next = [], []
    for slots in rows:
        blocks = slots.reshape(-1, block)
        some, every = (first <= x[:, None] for x in (blocks.max(1), blocks.min(1) - block + 1))
        block_mask.append(some.astype(np.int8) + every)
        index = np.arange(len(blocks))[:, None] if by_column else np.arange(len(first))
        index = np.broadcast_to(index, some.shape).astype(small)
        data_next.append(_next(some.T, index.T).T if by_column else _next(some, index))

    def mine(arrays: list[np.ndarray]) -> jax.Array:
        if isinstance(shard, int):
            return jnp.asarray(arrays[shard])
        return jax.lax.dynamic_index_in_dim(jnp.asarray(np.stack(arrays)), shard, keepdims=False)

    return MaskInfo(
        data_next=mine(data_next)[None],  # of all heads alike
        mask_next=None,
        block_mask=mine(block_mask)[None],
        partial_mask_blocks=None,
        q_sequence=mine([slots.astype(np.int32) for slots in rows]),  # pyright: ignore[reportArgumentType]
    )


def _next(some: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The index of each block, or of the next one that is computed; after the last comes the first."""
    at = np.flatnonzero(some)
    return index.flat[at[np.searchsorted(at, np.arange(some.size)) % len(at)]].reshape(some.shape)
