"""ModelConfig <-> Meta's params.json, and llama_jax.json beside it for what that file cannot say."""

from __future__ import annotations

import dataclasses
import math
import warnings

from llama_jax.config import (
    ConfigError,
    LinearScaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
    scaling_from_json,
    scaling_to_json,
)
from llama_jax.config.keys import check_keys, inner_params, unscaled_keys
from llama_jax.config.values import divide, either, need, number
from llama_jax.typing import Fields, JsonObject

# What `llama_jax.json` may say beside Meta's file, under our own names: params.json has no key for it, or not always.
_META_EXTRA = ("head_dim", "max_seq_len", "rope_theta", "rope_scaling", "tie_embeddings")
META_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)  # the only one that Meta's code computes


def meta_mlp_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Returns F by Meta's rule: two truncations, then rounded up to a multiple."""
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def from_meta_params(params: Fields, *, vocab_size: int | None = None, extra: Fields | None = None) -> ModelConfig:
    """Reads Meta's `params.json`.

    Args:
      params: the JSON object (the one under "model" where there is one).
      vocab_size: rows of the embedding table, for files that say -1 or nothing (LLaMA 1, Llama 2, Code Llama).
      extra: the content of `llama_jax.json`, which `to_meta_extra` makes; wins over `params`.

    Raises:
      ConfigError: a key is missing, or one that changes the mathematics is not supported.
    """
    fields = _meta_fields(params, vocab_size)
    extra = {} if extra is None else extra
    if unknown := sorted(set(extra) - set(_META_EXTRA)):
        raise ConfigError(f"llama_jax.json has unknown keys: {', '.join(unknown)}; known are {', '.join(_META_EXTRA)}")
    fields |= extra
    if not isinstance(fields["tie_embeddings"], bool):
        raise ConfigError(f"llama_jax.json: tie_embeddings must be true or false, got {fields['tie_embeddings']!r}")
    if extra.get("rope_scaling") is not None:
        fields["rope_scaling"] = scaling_from_json(extra["rope_scaling"], "llama_jax.json")
    return ModelConfig(**fields)


def _meta_fields(params: Fields, vocab_size: int | None) -> JsonObject:
    """Returns ModelConfig's fields as `params.json` alone gives them."""
    params = inner_params(params)
    check_keys("meta", params, stacklevel=4)
    if unscaled := unscaled_keys(params):
        warnings.warn(f"params.json: use_scaled_rope is not set, ignored: {', '.join(unscaled)}", stacklevel=3)
    dim, layers, heads = (need(params, key, "params.json") for key in ("dim", "n_layers", "n_heads"))
    vocab = params.get("vocab_size", -1)
    if vocab in (-1, None):
        if vocab_size is None:
            raise ConfigError("params.json does not say vocab_size: pass the rows of tok_embeddings.weight")
        vocab = vocab_size
    kv_heads = either(params.get("n_kv_heads"), heads)
    mlp_dim = meta_mlp_dim(dim, either(params.get("multiple_of"), 256), params.get("ffn_dim_multiplier"))
    norm_eps = either(params.get("norm_eps"), 1e-5)
    theta = float(either(params.get("rope_theta"), 10000.0))
    scaled = either(params.get("use_scaled_rope"), False)
    if not isinstance(scaled, bool):
        raise ConfigError(f"params.json: use_scaled_rope must be true or false, got {scaled!r}")
    small = scaled and (dim, layers) in ((2048, 16), (3072, 28))  # 3.2 1B, 3B: the file says neither factor 32 nor tied
    scaling = None
    if scaled:
        usual = dataclasses.replace(META_SCALING, factor=32.0) if small else META_SCALING
        scaling = dataclasses.replace(
            usual,
            factor=number(params, "rope_scaling_factor", "params.json", usual.factor),
            high_freq_factor=number(params, "rope_high_freq_factor", "params.json", usual.high_freq_factor),
        )
    if scaled:
        context = 131072
    elif norm_eps == 1e-6 or (layers, kv_heads, theta) == (80, 64, 10000):  # LLaMA 1; its 65B says 1e-5
        context = 2048
    else:
        context = {500_000.0: 8192, 1_000_000.0: 16384}.get(theta, 4096)
    return {
        "vocab_size": vocab,
        "embed_dim": dim,
        "mlp_dim": either(params.get("hidden_dim"), mlp_dim),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": either(params.get("head_dim"), divide(dim, heads)),
        "norm_eps": norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_seq_len": context,
        "tie_embeddings": small,
    }


def to_meta_params(config: ModelConfig) -> JsonObject:
    """Writes Meta's `params.json` for Meta's code of the same generation, which refuses keys that it does not know.

    Grouped-query attention came with Llama 2, `rope_theta` with Code Llama, `use_scaled_rope` with Llama 3.1. What the
    file cannot say goes to `to_meta_extra`.
    """
    multiple_of, multiplier = _meta_ffn(config.embed_dim, config.mlp_dim)
    params: JsonObject = {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": config.norm_eps,
    }
    if config.num_kv_heads != config.num_heads:
        params["n_kv_heads"] = config.num_kv_heads
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.rope_theta != 10_000 or isinstance(config.rope_scaling, RopeScaling):
        params["rope_theta"] = config.rope_theta
    if isinstance(config.rope_scaling, RopeScaling):
        params["use_scaled_rope"] = True
    return params


def _meta_ffn(dim: int, mlp_dim: int) -> tuple[int, float | None]:
    """Returns multiple_of and ffn_dim_multiplier that give `mlp_dim`: those of a released model if one does."""
    released = [(256, None), (256, 1.0), (1024, 1.3), (4096, 1.3), (4096, 1.2), (256, 1.5)]
    exact = [(mlp_dim, None), (mlp_dim, (mlp_dim + 0.5) / int(8 * dim / 3))]
    return next(pair for pair in released + exact if meta_mlp_dim(dim, *pair) == mlp_dim)


def to_meta_extra(config: ModelConfig) -> JsonObject:
    """Returns the fields that `params.json` cannot hold; `llama_jax.json` keeps them beside that file.

    Returns:
      The `extra` of `from_meta_params`; {} for most released models.
    """
    read = _meta_fields(to_meta_params(config), config.vocab_size)
    extra = {name: getattr(config, name) for name in _META_EXTRA if getattr(config, name) != read[name]}
    if extra.get("rope_scaling") is not None:
        extra["rope_scaling"] = scaling_to_json(extra["rope_scaling"])
    return extra


def meta_warnings(config: ModelConfig) -> list[str]:
    """Returns sentences on what Meta's own code computes differently; [] where it agrees."""
    found = []
    if config.head_dim * config.num_heads != config.embed_dim:
        found.append(
            f"Meta's code cannot load it: it takes heads of dim / n_heads = {config.embed_dim} / {config.num_heads},"
            f" and this model's have {config.head_dim}"
        )
    if isinstance(config.rope_scaling, (LinearScaling, YarnScaling)):
        found.append(
            f"Meta's code computes RoPE without scaling, and this model needs {config.rope_scaling}, which only"
            " llama_jax.json says: what Meta's code says will be wrong, most of all after long texts"
        )
    elif config.rope_scaling not in (None, META_SCALING):
        found.append(
            f"Meta's code always computes RoPE with {META_SCALING}, and this model needs {config.rope_scaling}: what it"
            " says will differ, most of all after long texts"
        )
    # Vocabularies up to Code Llama, whose code takes 10000 where the file says nothing.
    if "rope_theta" not in to_meta_params(config) and config.vocab_size not in (32000, 32016):
        found.append(
            "params.json does not say rope_theta, because Llama 1 and 2 always take 10000, as this model does; Meta's"
            " code for Llama 3 would take 500000"
        )
    return found
