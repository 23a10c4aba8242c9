"""The Llama model: the embedding table, the layers, the head, and the forward pass.

Dimensions: B batch, T query positions, S key positions, D embed_dim, V vocab_size, L layers.
Modules declare parameters and are pure functions of them: the cache goes in and comes out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.caches import KVCache
from llama_jax.config import ModelConfig
from llama_jax.model.blocks import Params
from llama_jax.model.layers import REMAT, apply_blocks, init_cache, listed, make_blocks, stacks_of
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.rope import inverse_frequencies, rope_angles
from llama_jax.ops.weights import einsum, embed, flatten
from llama_jax.sharding import ShardingRules


def random_keys(seed: int) -> nnx.Rngs:
    """The keys of random initial weights, for `Llama(rngs=)`."""
    return nnx.Rngs(seed)


class Llama(nnx.Module):
    """A Llama. Construct and call it with a mesh in use (`jax.set_mesh`).

    Args:
      config: the architecture.
      rules: from logical to mesh axes.
      dtype: what is computed in.
      param_dtype: what the parameters are stored in.
      stacked: blocks with a leading layer axis, scanned (training), instead of a list of blocks (decoding: slices of
        stacked weights are copied at every step; measured on CPU, 18 tokens/s against 3).
      attention: name of the attention implementation; None chooses one for the platform.
      remat: what the gradient computes again instead of keeping it, of REMAT; stacked blocks without a cache only.
      rngs: keys of the random initial weights; None makes abstract parameters: shapes, dtypes and shardings only.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rules: ShardingRules = ShardingRules(),  # noqa: B008 (frozen)
        dtype: str,
        param_dtype: str,
        stacked: bool = False,
        attention: str | None = None,
        remat: str = "none",
        rngs: nnx.Rngs | None,
    ):
        if remat not in REMAT:
            raise ValueError(f"remat {remat!r} is unknown; there are {', '.join(REMAT)}")
        params = Params(config, rules, param_dtype, rngs)
        self.embed = params("embed")
        self.blocks = make_blocks(params, attention, stacked=stacked)
        self.final_norm = params("final_norm")
        if not config.tie_embeddings:
            self.lm_head = params("lm_head")
        self.config, self.rules, self.dtype, self.remat = config, rules, dtype, remat

    def __call__(self, tokens_BT: jax.Array, **where) -> tuple[jax.Array, KVCache | None]:
        """Float32 logits [B, T, V] of the next token at every position, and the cache. Arguments as `hidden`."""
        x_BTD, cache = self.hidden(tokens_BT, **where)
        return self.logits(x_BTD), cache

    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        span: int | None = None,
        ordered: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """The residual stream after the last block.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32, of RoPE; with a cache also where a token is kept and what it sees. Padding has positions
            past the end of the cache. Default: 0, 1, 2, ...
          segment_ids_BT: int32, for packed documents (without a cache).
          cache: keys and values of earlier positions.
          span: static bound on the slots that the queries can see; None is the whole cache.
          ordered: with a cache, whether token t is at position t, padding excepted (true without a cache).

        Returns:
          [B, T, D] in `dtype`, and the cache with the new keys and values (None without a cache).
        """
        B, T = tokens_BT.shape
        if cache is not None and segment_ids_BT is not None:
            raise ValueError("packed segments and a cache do not go together")
        row_spec = self.rules.spec(("batch", "seq"), (B, T))
        order_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T), out_sharding=row_spec)
        if positions_BT is None:
            positions_BT = order_BT
        config = self.config
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        angles = rope_angles(positions_BT, frequencies, config.rope_scaling)
        spec = self.rules.spec(("batch", "seq", "act_embed"), (B, T, config.embed_dim))
        with jax.named_scope("embed"):
            x_BTD = embed(self.embed, tokens_BT, out_sharding=spec).astype(self.dtype)

        where = {
            "angles": angles, "positions_BT": positions_BT, "order_BT": order_BT, "segment_ids_BT": segment_ids_BT,
        }  # fmt: skip
        static = {"span": span, "ordered": ordered or cache is None}
        return apply_blocks(self.blocks, x_BTD, cache, where, static, remat=self.remat)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Final norm and output head: float32 [B, T, V]. The product is in `dtype`, as in every reference."""
        B, T, _ = x_BTD.shape
        x_BTD = rms_norm(x_BTD, self.final_norm.get_value(), eps=self.config.norm_eps)
        spec = self.rules.spec(("batch", "seq", "vocab"), (B, T, self.config.vocab_size))
        with jax.named_scope("head"):
            if self.config.tie_embeddings:
                logits_BTV = einsum("BTD,VD->BTV", x_BTD, self.embed, out_sharding=spec)
            else:
                logits_BTV = einsum("BTD,DV->BTV", x_BTD, self.lm_head, out_sharding=spec)
        return logits_BTV.astype(jnp.float32)

    @property
    def stacked(self) -> bool:
        """Whether the blocks are stacked along a leading layer axis."""
        return stacks_of(self.blocks) is not None

    def init_cache(self, batch: int, size: int) -> KVCache:
        """Returns an empty cache of `size` slots for `batch` rows, one of its kind for each layer."""
        return init_cache(self.blocks, batch, size, self.dtype)


def flatten_heads(model: Llama) -> Llama:
    """Puts the weights of queries, keys and values of a list of blocks into the form that TPUs multiply with,
    `weights.Flattened`.

    Args:
      model: is changed; its mesh must be in use.

    Returns:
      The model.
    """
    for block in listed(model.blocks):
        for w in (block.attn.wq, block.attn.wk, block.attn.wv):
            w.set_value(flatten(w.get_value()))
    return model
