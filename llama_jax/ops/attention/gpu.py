"""cuDNN's fused attention, through `jax.nn.dot_product_attention`: no scores in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MAX_HEAD = 128
TOO_OLD = ("V100", "T4", "P100", "P4", "P40", "K80", "RTX 20", "TITAN")  # before Ampere
QUERY_BLOCK = 1024  # with a mask, to bound its memory


def fits(dtype: jnp.dtype, head_dim: int, kind: str) -> bool:
    """Whether cuDNN computes this: it has no float32."""
    old = any(name in kind.replace("Tesla ", "").replace("-", " ").split() or name in kind for name in TOO_OLD)
    return dtype in (jnp.bfloat16, jnp.float16) and head_dim <= MAX_HEAD and head_dim % 8 == 0 and not old


def attention(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    slots_BT: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
    axes: str | tuple[str, ...] | None,
    interpret: bool,
) -> jax.Array:
    """Causal attention of one device's rows, heads and queries.

    Packed documents need a mask [B, 1, T, S] of 2 bytes an element, shared by all heads (134 MB a row of 8192 tokens):
    cuDNN knows their bounds, but `jax.nn` has no words for it. So does a part of a sequence (`axes`), whose place is
    known only when it runs: there blocks of queries are computed one after the other, with masks that are made again
    for the gradient.

    Args:
      q_BTKGH: queries; with `axes`, the part of a sequence of S that is this device's along them.
      k_BKSH: keys of the whole sequence.
      v_BKSH: values.
      slots_BT: of the queries' own keys.
      segments: int [B, T] and [B, S]: documents of the queries and of the keys.
      scale: what the scores are multiplied by.
      axes: mesh axes that split the queries by length.
      interpret: let XLA compute instead of cuDNN.
    """
    B, T, K, G, H = q_BTKGH.shape
    q_BTNH, k_BSKH, v_BSKH = q_BTKGH.reshape(B, T, K * G, H), k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)

    def attend(q_BTNH, mask_BTS, is_causal):
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask=None if mask_BTS is None else mask_BTS[:, None],
            is_causal=is_causal,
            scale=scale,
            implementation="xla" if interpret else "cudnn",
        )

    if axes is None:
        mask_BTS = None if segments is None else segments[0][:, :, None] == segments[1][:, None]
        return attend(q_BTNH, mask_BTS, True).reshape(q_BTKGH.shape)

    @jax.checkpoint
    def block(q_BTNH, slots_BT, segments):
        mask_BTS = jnp.arange(k_BSKH.shape[1]) <= slots_BT[:, :, None]
        if segments is not None:
            mask_BTS &= segments[0][:, :, None] == segments[1][:, None]
        return attend(q_BTNH, mask_BTS, False)

    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        queries = slice(start, start + QUERY_BLOCK)
        parts = None if segments is None else (segments[0][:, queries], segments[1])
        blocks.append(block(q_BTNH[:, queries], slots_BT[:, queries], parts))
    return jnp.concatenate(blocks, axis=1).reshape(q_BTKGH.shape)
