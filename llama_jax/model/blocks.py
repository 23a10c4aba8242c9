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
from llama_jax.config.params import specs_of
from llama_jax.ops.attention import way_of
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.rope import apply_rope
from llama_jax.ops.weights import einsum
from llama_jax.sharding import ShardingRules

INIT_STD = 0.02  # the family's initializer_range


class Params:
    """Makes the parameters of one model from their table (`config.params`): random, or abstract without `rngs`.

    Args:
      config: gives the sizes.
      rules: from logical to mesh axes.
      dtype: of every parameter.
      rngs: keys of the random initial values.
      kind: of the layer that they are of; None is outside the layers.
    """

    def __init__(
        self, config: ModelConfig, rules: ShardingRules, dtype: str, rngs: nnx.Rngs | None, kind: str | None = None
    ):
        self.config, self.rules, self.dtype, self.rngs, self.kind = config, rules, dtype, rngs, kind

    def of_layer(self, kind: str, key: jax.Array | None = None) -> Params:
        """Those of a layer of that kind; with the random numbers of `key` where it is given."""
        rngs = self.rngs if key is None else nnx.Rngs(params=key)
        return Params(self.config, self.rules, self.dtype, rngs, kind)

    def __call__(self, path: str) -> nnx.Param:
        """The parameter of that path, within its layer where it is in one: "embed", "attn.wq"."""
        spec = specs_of(self.kind)[path]
        shape = spec.shape(self.config)
        split = self.rules.spec(spec.logical_axes, shape)
        if self.rngs is None:
            sharding = jax.NamedSharding(jax.sharding.get_abstract_mesh(), split)
            return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding))
        if spec.kind == "norm":
            return nnx.Param(jnp.ones(shape, self.dtype, out_sharding=split))
        if spec.kind in ("gate", "bias"):
            return nnx.Param(jnp.zeros(shape, self.dtype, out_sharding=split))
        return nnx.Param(INIT_STD * jax.random.normal(self.rngs.params(), shape, self.dtype, out_sharding=split))


class Attention(nnx.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, params: Params, implementation: str | None):
        self.wq, self.wk, self.wv = params("attn.wq"), params("attn.wk"), params("attn.wv")
        self.wo = params("attn.wo")
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

    def __init__(self, params: Params):
        self.w_gate, self.w_up, self.w_down = params("mlp.w_gate"), params("mlp.w_up"), params("mlp.w_down")
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

    def __init__(self, params: Params, implementation: str | None):
        self.attn_norm = params("attn_norm")
        self.attn = Attention(params, implementation)
        self.mlp_norm = params("mlp_norm")
        self.mlp = MLP(params)
        self.eps = params.config.norm_eps

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
