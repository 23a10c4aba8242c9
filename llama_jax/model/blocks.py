"""The parts of a layer: attention, the MLP, and the block of both. They declare their parameters with `Params`.

Dimensions: B batch, T query positions, S key positions, D embed_dim, F mlp_dim, K kv heads, G query groups a kv head,
H head_dim. Arrays carry them in their names: `q_BTKGH`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.caches.base import LayerCache, Unsettled
from llama_jax.caches.full import FullCache
from llama_jax.caches.none import NoCache
from llama_jax.config import ModelConfig
from llama_jax.ops.attention import way_of
from llama_jax.ops.linear import einsum
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.rope import apply_rope
from llama_jax.sharding import ShardingRules

INIT_STD = 0.02  # the family's initializer_range


class Params:
    """Makes parameters with the shapes and shardings of one model: random, or abstract without `rngs`."""

    def __init__(self, rules: ShardingRules, dtype: str, rngs: nnx.Rngs | None):
        self.rules, self.dtype, self.rngs = rules, dtype, rngs

    def weight(self, shape: tuple[int, ...], *axes: str) -> nnx.Param:
        """A matrix or table of that shape, its dimensions split as the logical `axes` say."""
        spec = self.rules.spec(axes, shape)
        if self.rngs is None:
            return self._abstract(shape, spec)
        return nnx.Param(INIT_STD * jax.random.normal(self.rngs.params(), shape, self.dtype, out_sharding=spec))

    def norm(self, size: int) -> nnx.Param:
        """The scale of a norm."""
        spec = self.rules.spec(("norm",), (size,))
        if self.rngs is None:
            return self._abstract((size,), spec)
        return nnx.Param(jnp.ones(size, self.dtype, out_sharding=spec))

    def _abstract(self, shape: tuple[int, ...], spec: jax.P) -> nnx.Param:
        sharding = jax.NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding))


class Attention(nnx.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config: ModelConfig, params: Params, implementation: str | None):
        D, K, G, H = config.embed_dim, config.num_kv_heads, config.num_groups, config.head_dim
        self.wq = params.weight((D, K, G, H), "embed", "kv_heads", "groups", "head_dim")
        self.wk = params.weight((D, K, H), "embed", "kv_heads", "head_dim")
        self.wv = params.weight((D, K, H), "embed", "kv_heads", "head_dim")
        self.wo = params.weight((K, G, H, D), "kv_heads", "groups", "head_dim", "embed")
        self.rules, self.way = params.rules, way_of(implementation)
        self.cache: type[LayerCache] = FullCache  # the kind that this layer keeps its keys and values in

    def __call__(self, x_BTD, cache: LayerCache | NoCache, *, angles, **where) -> tuple[jax.Array, Unsettled]:
        """Returns the attention output [B, T, D] and the layer's cache, to be settled as the block ends."""
        B, T, _ = x_BTD.shape
        D, K, G, H = self.wq.shape
        heads = self.rules.spec(("batch", "seq", "kv_heads", "head_dim"), (B, T, K, H))
        with jax.named_scope("qkv"):
            grouped = self.rules.spec(("batch", "seq", "kv_heads", "groups", "head_dim"), (B, T, K, G, H))
            q_BTKGH = apply_rope(einsum("BTD,DKGH->BTKGH", x_BTD, self.wq, out_sharding=grouped), angles)
            turn = self.way.turn_one if T == 1 else apply_rope
            k_BTKH = turn(einsum("BTD,DKH->BTKH", x_BTD, self.wk, out_sharding=heads), angles)
            v_BTKH = einsum("BTD,DKH->BTKH", x_BTD, self.wv, out_sharding=heads)
            q_BTKGH, k_BTKH, v_BTKH = (checkpoint_name(x, "qkv") for x in (q_BTKGH, k_BTKH, v_BTKH))
        out_BTKGH, after = cache.attend(q_BTKGH, k_BTKH, v_BTKH, scale=H**-0.5, way=self.way, **where)
        with jax.named_scope("out"):
            spec = self.rules.spec(("batch", "seq", "act_embed"), (B, T, D))
            out_BTD = checkpoint_name(einsum("BTKGH,KGHD->BTD", out_BTKGH, self.wo, out_sharding=spec), "out")
        return out_BTD, after

    def init_cache(self, batch: int, size: int, dtype: str, layers: int | None = None) -> LayerCache:
        """Returns an empty cache of `size` slots for `batch` rows; of that many layers where they are stacked."""
        K, H = self.wk.shape[-2:]
        return self.cache.init(
            self.rules, batch=batch, size=size, num_kv_heads=K, head_dim=H, dtype=dtype, layers=layers
        )


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, params: Params):
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

    def __init__(self, config: ModelConfig, params: Params, implementation: str | None):
        self.attn_norm = params.norm(config.embed_dim)
        self.attn = Attention(config, params, implementation)
        self.mlp_norm = params.norm(config.embed_dim)
        self.mlp = MLP(config, params)
        self.eps = config.norm_eps

    def __call__(self, x_BTD, layer: LayerCache | None, **where) -> tuple[jax.Array, LayerCache | None]:
        """Returns the residual stream [B, T, D] and the layer's cache."""
        normed_BTD = rms_norm(x_BTD, self.attn_norm.get_value(), eps=self.eps)
        attended_BTD, after = self.attn(normed_BTD, NoCache() if layer is None else layer, **where)
        x_BTD = x_BTD + attended_BTD
        with jax.named_scope("mlp"):
            out_BTD = self.mlp(rms_norm(x_BTD, self.mlp_norm.get_value(), eps=self.eps))
        out_BTD, layer = after.settle(out_BTD)
        return x_BTD + out_BTD, layer

    def init_cache(self, batch: int, size: int, dtype: str, layers: int | None = None) -> LayerCache:
        """Returns an empty cache of `size` slots for `batch` rows; of that many layers where they are stacked."""
        return self.attn.init_cache(batch, size, dtype, layers)
