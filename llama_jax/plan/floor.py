"""The least that a decode step computes: its products, one after the other, and nothing between them.

What the compiler expects of this program is the bound that `decode` is measured against on the same devices: the same
weights and cache in the same places, and the reductions that tensor parallelism needs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.kv_cache import KVCache, LayerCache
from llama_jax.model import Block, Llama
from llama_jax.ops.linear import einsum


def decode_floor(model: Llama, cache: KVCache, x_B1D: jax.Array) -> jax.Array:
    """The products of one step with each other's results: no norms, RoPE, mask, softmax, cache writes or sampling.

    Args:
      model: blocks in a list.
      cache: of the model.
      x_B1D: the residual stream, one token a row.

    Returns:
      [B, 1, V] in x's dtype, split as logits are. The numbers mean nothing.
    """
    assert not isinstance(model.blocks, Block), "decoding walks a list of blocks"
    assert not isinstance(cache, LayerCache), "a list of blocks takes a list of caches"
    rules, config = model.rules, model.config
    for block, layer in zip(model.blocks, cache, strict=True):
        x_B1D = _block(block, layer, x_B1D)
    spec = rules.spec(("batch", "seq", "vocab"), (*x_B1D.shape[:2], config.vocab_size))
    if config.tie_embeddings:
        return einsum("BTD,VD->BTV", x_B1D, model.embed, out_sharding=spec)
    return einsum("BTD,DV->BTV", x_B1D, model.lm_head, out_sharding=spec)


def _block(block: Block, layer: LayerCache, x_B1D: jax.Array) -> jax.Array:
    attn, mlp, rules = block.attn, block.mlp, block.attn.rules
    (B, T, D), (_, K, G, H), F = x_B1D.shape, attn.wq.shape, mlp.w_up.shape[1]
    whole = rules.spec(("batch", "seq", "act_embed"), (B, T, D))
    heads = rules.spec(("batch", "seq", "kv_heads", "head_dim"), (B, T, K, H))
    grouped = rules.spec(("batch", "seq", "kv_heads", "groups", "head_dim"), (B, T, K, G, H))
    wide = rules.spec(("batch", "seq", "mlp"), (B, T, F))
    q_B1KGH = einsum("BTD,DKGH->BTKGH", x_B1D, attn.wq, out_sharding=grouped)
    k_B1KH = einsum("BTD,DKH->BTKH", x_B1D, attn.wk, out_sharding=heads)
    v_B1KH = einsum("BTD,DKH->BTKH", x_B1D, attn.wv, out_sharding=heads)
    q_BKGH = (q_B1KGH + k_B1KH[:, :, :, None] + v_B1KH[:, :, :, None])[:, 0]  # so that each is used
    out_BKGH = jax.shard_map(_contract, out_specs=jax.typeof(q_BKGH).sharding.spec)(q_BKGH, layer.k, layer.v)
    x_B1D = einsum("BTKGH,KGHD->BTD", out_BKGH[:, None], attn.wo, out_sharding=whole)
    gate_B1F = einsum("BTD,DF->BTF", x_B1D, mlp.w_gate, out_sharding=wide)
    up_B1F = einsum("BTD,DF->BTF", x_B1D, mlp.w_up, out_sharding=wide)
    return einsum("BTF,FD->BTD", gate_B1F * up_B1F, mlp.w_down, out_sharding=whole)


def _contract(q_BKGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    scores_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH)
    return jnp.einsum("BKGS,BKSH->BKGH", scores_BKGS, v_BKSH)
