"""The Llama model: parameter shapes and the forward pass.

Dimensions: B batch, T query positions, S key positions, D embed_dim, F mlp_dim, V vocab_size, L layers, K kv heads,
G query groups a kv head, H head_dim. Arrays carry them in their names: `q_BTKGH`.

Modules declare parameters and are pure functions of them: the cache goes in and comes out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax import kv_cache
from llama_jax.config import ModelConfig
from llama_jax.kv_cache import KVCache, LayerCache
from llama_jax.ops.attention import attention_of_one, device, dot_product_attention, reads_before_write
from llama_jax.ops.embed import embed
from llama_jax.ops.linear import einsum, flatten
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.rope import apply_rope, apply_rope_by_product, inverse_frequencies, rope_angles
from llama_jax.sharding import ShardingRules

INIT_STD = 0.02  # the family's initializer_range
_POLICIES = jax.checkpoint_policies
# What is kept of a block for the gradient; the rest is computed again. From the most memory to the least:
REMAT = {
    "none": _POLICIES.everything_saveable,
    "matmuls": _POLICIES.save_only_these_names("qkv", "attention", "out", "mlp"),  # of products, as LLaMA 1 did
    "attention": _POLICIES.save_only_these_names("qkv", "attention"),
    "full": _POLICIES.nothing_saveable,  # but the block's input
    "groups": _POLICIES.nothing_saveable,  # but the input of a group of about sqrt(L) blocks: a third forward pass
    "offload": _POLICIES.save_and_offload_only_these_names(  # and that in the host's memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block"], offload_src="device",
        offload_dst="pinned_host",
    ),
}  # fmt: skip


class _Params:
    """Makes parameters with the shapes and shardings of one model: random, or abstract without `rngs`."""

    def __init__(self, rules: ShardingRules, dtype: str, rngs: nnx.Rngs | None):
        self.rules, self.dtype, self.rngs = rules, dtype, rngs

    def weight(self, shape: tuple[int, ...], *axes: str) -> nnx.Param:
        spec = self.rules.spec(axes, shape)
        if self.rngs is None:
            return self._abstract(shape, spec)
        return nnx.Param(INIT_STD * jax.random.normal(self.rngs.params(), shape, self.dtype, out_sharding=spec))

    def norm(self, size: int) -> nnx.Param:
        spec = self.rules.spec(("norm",), (size,))
        if self.rngs is None:
            return self._abstract((size,), spec)
        return nnx.Param(jnp.ones(size, self.dtype, out_sharding=spec))

    def _abstract(self, shape: tuple[int, ...], spec: jax.P) -> nnx.Param:
        sharding = jax.NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding))


def random_keys(seed: int) -> nnx.Rngs:
    """The keys of random initial weights, for `Llama(rngs=)`."""
    return nnx.Rngs(seed)


class Attention(nnx.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config: ModelConfig, params: _Params, implementation: str | None):
        D, K, G, H = config.embed_dim, config.num_kv_heads, config.num_groups, config.head_dim
        self.wq = params.weight((D, K, G, H), "embed", "kv_heads", "groups", "head_dim")
        self.wk = params.weight((D, K, H), "embed", "kv_heads", "head_dim")
        self.wv = params.weight((D, K, H), "embed", "kv_heads", "head_dim")
        self.wo = params.weight((K, G, H, D), "kv_heads", "groups", "head_dim", "embed")
        self.rules, self.implementation = params.rules, implementation

    def __call__(self, x_BTD, layer: LayerCache | None, *, angles, slots_BT, segment_ids_BT, span, ordered):
        """Returns the attention output [B, T, D], the layer's cache, and what is still to be written to it: nothing, or
        the key, value and slot of one token a row."""
        B, T, _ = x_BTD.shape
        D, K, G, H = self.wq.shape
        heads = self.rules.spec(("batch", "seq", "kv_heads", "head_dim"), (B, T, K, H))
        with jax.named_scope("qkv"):
            grouped = self.rules.spec(("batch", "seq", "kv_heads", "groups", "head_dim"), (B, T, K, G, H))
            q_BTKGH = apply_rope(einsum("BTD,DKGH->BTKGH", x_BTD, self.wq, out_sharding=grouped), angles)
            turn = apply_rope_by_product if T == 1 and device()[0] == "tpu" else apply_rope
            k_BTKH = turn(einsum("BTD,DKH->BTKH", x_BTD, self.wk, out_sharding=heads), angles)
            v_BTKH = einsum("BTD,DKH->BTKH", x_BTD, self.wv, out_sharding=heads)
            q_BTKGH, k_BTKH, v_BTKH = (checkpoint_name(x, "qkv") for x in (q_BTKGH, k_BTKH, v_BTKH))
        if layer is not None and not ordered and reads_before_write(T, layer.k, self.implementation):
            with jax.named_scope("attention"):
                out_BTKGH = attention_of_one(
                    q_BTKGH, k_BTKH, v_BTKH, layer.k, layer.v, slots_B1=slots_BT, scale=H**-0.5
                )  # fmt: skip
            unwritten = (k_BTKH, v_BTKH, slots_BT)
        else:
            unwritten = None
            with jax.named_scope("cache"):
                layer = None if layer is None else kv_cache.write(layer, k_BTKH, v_BTKH, slots_BT, ordered=ordered)
                # The first tokens of a cache see one another only, as without one.
                seen = kv_cache.of_tokens(k_BTKH, v_BTKH) if layer is None or ordered else kv_cache.prefix(layer, span)
            with jax.named_scope("attention"):
                out_BTKGH = dot_product_attention(
                    q_BTKGH, seen.k, seen.v, slots_BT=slots_BT, segment_ids_BT=segment_ids_BT, ordered=ordered,
                    scale=H**-0.5, implementation=self.implementation,
                )  # fmt: skip
        with jax.named_scope("out"):
            spec = self.rules.spec(("batch", "seq", "act_embed"), (B, T, D))
            out_BTD = checkpoint_name(einsum("BTKGH,KGHD->BTD", out_BTKGH, self.wo, out_sharding=spec), "out")
        return out_BTD, layer, unwritten


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, params: _Params):
        D, F = config.embed_dim, config.mlp_dim
        self.w_gate = params.weight((D, F), "embed", "mlp")
        self.w_up = params.weight((D, F), "embed", "mlp")
        self.w_down = params.weight((F, D), "mlp", "embed")
        self.rules = params.rules

    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D]."""
        B, T, D = x_BTD.shape
        wide = self.rules.spec(("batch", "seq", "mlp"), (B, T, self.w_up.shape[1]))
        gate_BTF = checkpoint_name(einsum("BTD,DF->BTF", x_BTD, self.w_gate, out_sharding=wide), "mlp")
        up_BTF = checkpoint_name(einsum("BTD,DF->BTF", x_BTD, self.w_up, out_sharding=wide), "mlp")
        spec = self.rules.spec(("batch", "seq", "act_embed"), (B, T, D))
        return einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.w_down, out_sharding=spec)


class Block(nnx.Module):
    """One layer: attention and MLP, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, params: _Params, implementation: str | None):
        self.attn_norm = params.norm(config.embed_dim)
        self.attn = Attention(config, params, implementation)
        self.mlp_norm = params.norm(config.embed_dim)
        self.mlp = MLP(config, params)
        self.eps = config.norm_eps

    def __call__(self, x_BTD, layer: LayerCache | None, **where):
        """Returns the residual stream [B, T, D] and the layer's cache."""
        normed_BTD = rms_norm(x_BTD, self.attn_norm.get_value(), eps=self.eps)
        attended_BTD, layer, unwritten = self.attn(normed_BTD, layer, **where)
        x_BTD = x_BTD + attended_BTD
        with jax.named_scope("mlp"):
            out_BTD = self.mlp(rms_norm(x_BTD, self.mlp_norm.get_value(), eps=self.eps))
        if unwritten is not None:
            with jax.named_scope("cache"):
                # Between two blocks. Left alone the TPU compiler writes for all blocks at the end of a step: until then
                # the keys and values wait in HBM (8B on 8 v5e: 4 % of the cycles). Written before the MLP, the next
                # block's cache is not fetched ahead (70B on 16 v5e: 10 %).
                out_BTD, read = jax.lax.optimization_barrier((out_BTD, layer))
                out_BTD, layer = jax.lax.optimization_barrier((out_BTD, kv_cache.write(read, *unwritten)))
        return x_BTD + out_BTD, layer


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
        params = _Params(rules, param_dtype, rngs)
        V, D = config.vocab_size, config.embed_dim
        self.embed = params.weight((V, D), "vocab", "embed")
        if stacked and rngs is None:
            self.blocks = jax.tree.map(lambda x: _stack(x, config.num_layers), Block(config, params, attention))
        elif stacked and rngs is not None:
            keys = jax.random.split(rngs.params(), config.num_layers)
            self.blocks = jax.vmap(
                lambda key: Block(config, _Params(rules, param_dtype, nnx.Rngs(params=key)), attention)
            )(keys)
        else:
            self.blocks = nnx.List([Block(config, params, attention) for _ in range(config.num_layers)])
        self.final_norm = params.norm(D)
        if not config.tie_embeddings:
            self.lm_head = params.weight((D, V), "embed", "vocab")
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
          positions_BT: int32, RoPE positions; with a cache also the slots that are written and seen from. Padding has
            positions past the end of the cache. Default: 0, 1, 2, ...
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
        slots_BT = order_BT if cache is None else positions_BT
        config = self.config
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        angles = rope_angles(positions_BT, frequencies, config.rope_scaling)
        spec = self.rules.spec(("batch", "seq", "act_embed"), (B, T, config.embed_dim))
        with jax.named_scope("embed"):
            x_BTD = embed(self.embed.get_value(), tokens_BT, out_sharding=spec).astype(self.dtype)

        where = {"angles": angles, "slots_BT": slots_BT, "segment_ids_BT": segment_ids_BT}
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
        return isinstance(self.blocks, Block)

    def init_cache(self, batch: int, size: int) -> KVCache:
        """An empty cache of `size` slots for `batch` rows."""
        return kv_cache.init(self.config, self.rules, batch=batch, size=size, dtype=self.dtype, stacked=self.stacked)


def flatten_heads(model: Llama) -> Llama:
    """Puts the weights of queries, keys and values of a list of blocks into the form that TPUs multiply with,
    `linear.Flattened`.

    Args:
      model: is changed; its mesh must be in use.

    Returns:
      The model.
    """
    assert not isinstance(model.blocks, Block), "of decoding, which walks a list of blocks"
    for block in model.blocks:
        for w in (block.attn.wq, block.attn.wk, block.attn.wv):
            w.set_value(flatten(w.get_value()))
    return model


def _stack(x: jax.ShapeDtypeStruct, num_layers: int) -> jax.ShapeDtypeStruct:
    sharding = jax.NamedSharding(x.sharding.mesh, jax.P(None, *x.sharding.spec))
    return jax.ShapeDtypeStruct((num_layers, *x.shape), x.dtype, sharding=sharding)


def group_size(num_layers: int) -> int:
    """Blocks in a group of two-level recomputation: the divisor of the layers whose two sums of inputs are least."""
    return min((n for n in range(1, num_layers + 1) if num_layers % n == 0), key=lambda n: n + num_layers // n)


def apply_blocks(
    blocks: nnx.List | Block,
    x_BTD: jax.Array,
    cache: KVCache | None,
    where: dict[str, Any],
    static: dict[str, Any],
    *,
    remat: str = "none",
) -> tuple[jax.Array, KVCache | None]:
    """Runs the blocks one after the other: the one function that knows how they lie in memory.

    Args:
      blocks: a list, or one block with a leading layer axis.
      x_BTD: the residual stream.
      cache: one layer cache a block, stacked if the blocks are; None without a cache.
      where: arrays that every block takes: angles, slots and segments.
      static: what every block takes that is no array.
      remat: of REMAT.
    """
    if isinstance(blocks, Block):
        assert not isinstance(cache, tuple), "stacked blocks take a stacked cache"

        def step(x_BTD, layer):
            return layer[0](checkpoint_name(x_BTD, "block"), layer[1], **where, **static)

        if remat != "none" and cache is None:  # a scan cannot merge the two computations: no barrier is needed
            step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
        if remat == "groups" and cache is None:
            size = group_size(jax.tree.leaves(blocks)[0].shape[0])
            groups = jax.tree.map(lambda w: w.reshape(-1, size, *w.shape[1:]), blocks)
            group = jax.checkpoint(
                lambda x_BTD, layers: jax.lax.scan(step, x_BTD, (layers, None)),
                policy=REMAT[remat],
                prevent_cse=False,
            )
            return jax.lax.scan(group, x_BTD, groups)
        return jax.lax.scan(step, x_BTD, (blocks, cache))
    # Jitted within the jitted step, so that a list of blocks is traced once and not once a layer.
    apply = jax.jit(lambda block, x_BTD, layer, where: block(x_BTD, layer, **where, **static))
    assert not isinstance(cache, LayerCache), "a list of blocks takes a list of caches"
    layers = []
    for i, block in enumerate(blocks):
        x_BTD, layer = apply(block, x_BTD, None if cache is None else cache[i], where)
        layers.append(layer)
    return x_BTD, None if cache is None else tuple(layers)
