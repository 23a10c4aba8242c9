"""`jax.nn.dot_product_attention`: by XLA, and on GPU by cuDNN, which stores no scores."""

from __future__ import annotations

import functools
import re
from typing import Literal

import jax
import jax.numpy as jnp

MAX_HEAD = 128  # of cuDNN on every GPU that it supports
# NVIDIA's GPUs before Ampere.
TOO_OLD = re.compile(r"\b(V100|[KMPT]\d{1,4}|GTX|TITAN|RTX 20\d\d)\b")


def attention(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    mask_BTS: jax.Array | None,
    scale: float,
    causal: bool = False,
    implementation: Literal["xla", "cudnn"] = "xla",
) -> jax.Array:
    """As `reference.attention`, on the rows and heads of one device.

    A mask costs cuDNN [B, 1, T, S] of 2 bytes an element, shared by all heads: 134 MB a row of 8192 tokens.

    Args:
      q_BTKGH: queries.
      k_BKSH: keys.
      v_BKSH: values.
      mask_BTS: bool: where a query may look; None is everywhere.
      scale: what the scores are multiplied by.
      causal: whether query t sees no key after t, whatever the mask says; cuDNN then leaves those blocks out.
      implementation: "xla" or "cudnn".
    """
    B, T, K, G, H = q_BTKGH.shape
    with jax.default_matmul_precision("highest" if q_BTKGH.dtype == jnp.float32 else None):
        out_BTNH = jax.nn.dot_product_attention(
            q_BTKGH.reshape(B, T, K * G, H),
            k_BKSH.swapaxes(1, 2),
            v_BKSH.swapaxes(1, 2),
            mask=None if mask_BTS is None else mask_BTS[:, None],
            is_causal=causal,
            scale=scale,
            implementation=implementation,
        )
    return out_BTNH.reshape(B, T, K, G, H)


cudnn = functools.partial(attention, implementation="cudnn")


def cudnn_fits(dtype: jnp.dtype, head_dim: int, kind: str) -> bool:
    """Whether cuDNN computes this on a GPU of this kind: it has no float32."""
    size = head_dim <= MAX_HEAD and head_dim % 8 == 0
    return dtype in (jnp.bfloat16, jnp.float16) and size and not TOO_OLD.search(kind.replace("-", " "))
