"""Every released Llama as one row, and ModelConfig <-> HF config.json, Meta params.json, GGUF metadata.

A model that is loaded is what its own file says (the readers below); the rows are for planning, for training from
scratch and for tests. Sources: Meta's model cards and `params.json`, the LLaMA, Llama 2, Code Llama and Llama 3 papers.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from llama_jax.config import ConfigError, ModelConfig, RopeScaling

# ---------------------------------------------------------------------------------------------------------------------
# The table. Columns: D, L, N, K, F, V, eps, theta, RoPE factor, context, tied.
# ---------------------------------------------------------------------------------------------------------------------


def _row(dim, layers, heads, kv, mlp, vocab, eps, theta, factor, context, tied=False) -> ModelConfig:
    scaling = RopeScaling(float(factor), 1.0, 4.0, 8192) if factor else None
    return ModelConfig(
        vocab_size=vocab, embed_dim=dim, mlp_dim=mlp, num_layers=layers, num_heads=heads, num_kv_heads=kv,
        head_dim=dim // heads, norm_eps=eps, rope_theta=float(theta), rope_scaling=scaling, max_seq_len=context,
        tie_embeddings=tied,
    )  # fmt: skip


# fmt: off
_ROWS = {
    # name (and -suffixes that share the row): D      L    N    K   F      V       eps   theta   factor context
    "llama1-7b":                         _row(4096,  32,  32,  32, 11008, 32000,  1e-6, 10_000,  None, 2048),
    "llama1-13b":                        _row(5120,  40,  40,  40, 13824, 32000,  1e-6, 10_000,  None, 2048),
    "llama1-33b":                        _row(6656,  60,  52,  52, 17920, 32000,  1e-6, 10_000,  None, 2048),
    "llama1-65b":                        _row(8192,  80,  64,  64, 22016, 32000,  1e-5, 10_000,  None, 2048),
    "llama2-7b chat":                    _row(4096,  32,  32,  32, 11008, 32000,  1e-5, 10_000,  None, 4096),
    "llama2-13b chat":                   _row(5120,  40,  40,  40, 13824, 32000,  1e-5, 10_000,  None, 4096),
    "llama2-34b chat":                   _row(8192,  48,  64,   8, 22016, 32000,  1e-5, 10_000,  None, 4096),
    "llama2-70b chat":                   _row(8192,  80,  64,   8, 28672, 32000,  1e-5, 10_000,  None, 4096),
    "codellama-7b instruct":             _row(4096,  32,  32,  32, 11008, 32016,  1e-5, 1_000_000, None, 16384),
    "codellama-7b-python":               _row(4096,  32,  32,  32, 11008, 32000,  1e-5, 1_000_000, None, 16384),
    "codellama-13b instruct":            _row(5120,  40,  40,  40, 13824, 32016,  1e-5, 1_000_000, None, 16384),
    "codellama-13b-python":              _row(5120,  40,  40,  40, 13824, 32000,  1e-5, 1_000_000, None, 16384),
    "codellama-34b instruct python":     _row(8192,  48,  64,   8, 22016, 32000,  1e-5, 1_000_000, None, 16384),
    "codellama-70b":                     _row(8192,  80,  64,   8, 28672, 32016,  1e-5, 1_000_000, None, 16384),
    # Only the 70B base model had the long-context stage: Python and Instruct keep theta 10000 and 4096 tokens.
    "codellama-70b-instruct":            _row(8192,  80,  64,   8, 28672, 32016,  1e-5, 10_000,  None, 4096),
    "codellama-70b-python":              _row(8192,  80,  64,   8, 28672, 32016,  1e-5, 10_000,  None, 4096),
    "llama3-8b instruct":                _row(4096,  32,  32,   8, 14336, 128256, 1e-5, 500_000, None, 8192),
    "llama3-70b instruct":               _row(8192,  80,  64,   8, 28672, 128256, 1e-5, 500_000, None, 8192),
    "llama3.1-8b instruct":              _row(4096,  32,  32,   8, 14336, 128256, 1e-5, 500_000, 8,   131072),
    "llama3.1-70b instruct":             _row(8192,  80,  64,   8, 28672, 128256, 1e-5, 500_000, 8,   131072),
    "llama3.1-405b instruct":            _row(16384, 126, 128,  8, 53248, 128256, 1e-5, 500_000, 8,   131072),
    "llama3.2-1b instruct":              _row(2048,  16,  32,   8,  8192, 128256, 1e-5, 500_000, 32,  131072, True),
    "llama3.2-3b instruct":              _row(3072,  28,  24,   8,  8192, 128256, 1e-5, 500_000, 32,  131072, True),
    "llama3.3-70b-instruct":             _row(8192,  80,  64,   8, 28672, 128256, 1e-5, 500_000, 8,   131072),
    "smollm2-135m instruct":             _row(576,   30,   9,   3,  1536, 49152,  1e-5, 100_000, None, 8192, True),
}
# fmt: on


def _expand() -> dict[str, ModelConfig]:
    presets = {}
    for names, config in _ROWS.items():
        base, *suffixes = names.split()
        presets |= {base: config} | {f"{base}-{suffix}": config for suffix in suffixes}
    return presets


PRESETS: dict[str, ModelConfig] = _expand()


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face config.json, in the spelling of transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5
# (rope_parameters, dtype).
# ---------------------------------------------------------------------------------------------------------------------

# Keys that change the mathematics, with the values under which they do not. Anything else is refused by name.
_HF_NEUTRAL: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "layer_types": (None,),
    "quantization_config": (None,),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "qk_norm": (False, None),
    "use_qk_norm": (False, None),
    "use_qkv_bias": (False, None),
    "qkv_bias": (False, None),
    "clip_qkv": (None,),
    "alibi": (False, None),
    "parallel_residual": (False, None),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "no_rope_layers": (None,),
    "no_rope_layer_interval": (None,),
    "attn_temperature_tuning": (False, None),
    "is_decoder": (False, None, True),
    "add_cross_attention": (False, None),
    "head_bias": (False, None),
    "lm_head_bias": (False, None),
}
# Keys that are read below, or that say nothing about the forward pass.
_HF_KNOWN = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings tie_word_embeddings model_type
    architectures torch_dtype dtype bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id
    decoder_start_token_id initializer_range pretraining_tp use_cache attention_dropout transformers_version
    _name_or_path name_or_path _attn_implementation _attn_implementation_autoset attn_implementation auto_map
    is_llama_config transformers.js_config return_dict output_attentions output_hidden_states torchscript use_bfloat16
    tf_legacy_loss pruned_heads chunk_size_feed_forward is_encoder_decoder cross_attention_hidden_size
    tie_encoder_decoder finetuning_task id2label label2id task_specific_params problem_type tokenizer_class prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_fixed
    unsloth_version original_max_position_embeddings""".split()
)


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face `config.json` of a Llama, in the spelling of transformers 4 or 5.

    Raises:
      ConfigError: a key is missing, or one that changes the mathematics has a value that is not supported.
    """
    model_type = hf.get("model_type", "llama")
    if model_type != "llama":
        raise ConfigError(f"config.json says model_type {model_type!r}; this library computes 'llama' models only")
    for key, neutral in _HF_NEUTRAL.items():
        if key in hf and hf[key] not in neutral:
            raise ConfigError(
                f"config.json sets {key} = {hf[key]!r}, which changes the mathematics and is not supported"
            )
    unknown = sorted(key for key in hf if key not in _HF_KNOWN and key not in _HF_NEUTRAL)
    if unknown:
        warnings.warn(f"config.json has keys that a Llama does not use, ignored: {', '.join(unknown)}", stacklevel=2)

    rope = _hf_rope(hf)
    heads = _need(hf, "num_attention_heads", "config.json")
    dim = _need(hf, "hidden_size", "config.json")
    return ModelConfig(
        vocab_size=_need(hf, "vocab_size", "config.json"),
        embed_dim=dim,
        mlp_dim=_need(hf, "intermediate_size", "config.json"),
        num_layers=_need(hf, "num_hidden_layers", "config.json"),
        num_heads=heads,
        num_kv_heads=_or(hf.get("num_key_value_heads"), heads),
        head_dim=_or(hf.get("head_dim"), _divide(dim, heads)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),  # HF's default; Llama 2 and later write 1e-5
        rope_theta=float(_or(rope.get("rope_theta"), _or(hf.get("rope_theta"), 10000.0))),
        rope_scaling=_hf_scaling(rope),
        max_seq_len=hf.get("max_position_embeddings", 2048),
        tie_embeddings=_or(hf.get("tie_word_embeddings"), False),
    )


def _hf_rope(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    both = [hf[key] for key in ("rope_parameters", "rope_scaling") if hf.get(key) is not None]
    for rope in both:
        if not isinstance(rope, Mapping):
            raise ConfigError(f"config.json: RoPE parameters must be an object, got {rope!r}")
    if len(both) == 2 and _hf_scaling(both[0]) != _hf_scaling(both[1]):
        raise ConfigError("config.json: rope_parameters and rope_scaling contradict each other; remove the wrong one")
    rope = both[0] if both else {}
    thetas = [theta for theta in (rope.get("rope_theta"), hf.get("rope_theta")) if theta is not None]
    if len(set(thetas)) == 2:
        raise ConfigError(f"config.json: rope_theta is both {thetas[0]} and {thetas[1]}; remove the wrong one")
    return rope


def _hf_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) not in (1, None):
        raise ConfigError(f"config.json: partial_rotary_factor = {rope['partial_rotary_factor']} is not supported")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"config.json: RoPE type {kind!r} is not supported; Llama uses 'default' or 'llama3'")
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    return RopeScaling(
        *(float(_need(rope, key, "config.json: rope_scaling")) for key in keys),
        original_max_seq_len=int(_need(rope, "original_max_position_embeddings", "config.json: rope_scaling")),
    )


def to_hf_config(config: ModelConfig, *, dtype: str, transformers: int = 4) -> dict[str, Any]:
    """Writes `config.json`.

    Args:
      config: the architecture.
      dtype: of the stored weights: "float32", "bfloat16" or "float16".
      transformers: spelling of major version 4 (which version 5 reads too) or 5.
    """
    if transformers not in (4, 5):
        raise ValueError(f"transformers must be 4 or 5, got {transformers}")
    scaling = None
    if config.rope_scaling:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
        }
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if transformers == 5:
        rope = (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
        return hf | {"rope_parameters": rope, "dtype": dtype}
    return hf | {"rope_theta": config.rope_theta, "rope_scaling": scaling, "torch_dtype": dtype}


# ---------------------------------------------------------------------------------------------------------------------
# Meta params.json
# ---------------------------------------------------------------------------------------------------------------------

_META_KNOWN = frozenset(
    "dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta use_scaled_rope "
    "max_seq_len max_batch_size".split()
)
# What `llama_jax.json` may say beside Meta's file, under our own names: params.json has no key for it, or not always.
_META_EXTRA = ("head_dim", "max_seq_len", "rope_theta", "rope_scaling", "tie_embeddings")
META_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)  # the only one that Meta's code computes


def meta_mlp_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Meta's rule for F: two truncations, then rounded up to a multiple."""
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def meta_embed_axis(config: ModelConfig) -> int:
    """The axis of [V, D] that Meta's model-parallel files split: D up to Code Llama, V from Llama 3 on."""
    return 1 if config.rope_scaling is None and config.rope_theta in (10_000, 1_000_000) else 0


def from_meta_params(
    params: Mapping[str, Any], *, vocab_size: int | None = None, extra: Mapping[str, Any] | None = None
) -> ModelConfig:
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
        fields["rope_scaling"] = _meta_scaling(extra["rope_scaling"])
    return ModelConfig(**fields)


def _meta_fields(params: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """What `params.json` alone says, by the names of ModelConfig's fields."""
    params = params.get("model", params)
    refused = [key for key in params if key.startswith(("vision", "quantization", "lora", "moe"))]
    if refused:
        raise ConfigError(f"params.json has {', '.join(sorted(refused))}: such checkpoints are not supported")
    unknown = sorted(set(params) - _META_KNOWN)
    if unknown:
        warnings.warn(f"params.json has keys that a Llama does not use, ignored: {', '.join(unknown)}", stacklevel=3)
    dim, layers, heads = (_need(params, key, "params.json") for key in ("dim", "n_layers", "n_heads"))
    vocab = params.get("vocab_size", -1)
    if vocab in (-1, None):
        if vocab_size is None:
            raise ConfigError("params.json does not say vocab_size: pass the rows of tok_embeddings.weight")
        vocab = vocab_size
    kv_heads = _or(params.get("n_kv_heads"), heads)
    norm_eps = _or(params.get("norm_eps"), 1e-5)
    theta = float(_or(params.get("rope_theta"), 10000.0))
    scaled = _or(params.get("use_scaled_rope"), False)
    if not isinstance(scaled, bool):
        raise ConfigError(f"params.json: use_scaled_rope must be true or false, got {scaled!r}")
    small = scaled and (dim, layers) in ((2048, 16), (3072, 28))  # 3.2 1B, 3B: the file says neither factor 32 nor tied
    if scaled:
        context = 131072
    elif norm_eps == 1e-6 or (layers, kv_heads, theta) == (80, 64, 10000):  # LLaMA 1; its 65B says 1e-5
        context = 2048
    else:
        context = {500_000.0: 8192, 1_000_000.0: 16384}.get(theta, 4096)
    return {
        "vocab_size": vocab,
        "embed_dim": dim,
        "mlp_dim": meta_mlp_dim(dim, _or(params.get("multiple_of"), 256), params.get("ffn_dim_multiplier")),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": _divide(dim, heads),
        "norm_eps": norm_eps,
        "rope_theta": theta,
        "rope_scaling": dataclasses.replace(META_SCALING, factor=32.0) if small else META_SCALING if scaled else None,
        "max_seq_len": context,
        "tie_embeddings": small,
    }


def _meta_scaling(scaling: Any) -> RopeScaling:
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    if (
        not isinstance(scaling, Mapping)
        or set(scaling) != set(names)
        or not all(isinstance(value, (int, float)) for value in scaling.values())
    ):
        raise ConfigError(f"llama_jax.json: rope_scaling must be null or give numbers for {', '.join(names)}")
    return RopeScaling(**scaling)


def to_meta_params(config: ModelConfig) -> dict[str, Any]:
    """Writes Meta's `params.json` as Meta's code of the same generation takes it, which refuses keys that it has not.

    Grouped-query attention came with Llama 2, `rope_theta` with Code Llama, `use_scaled_rope` with Llama 3.1. What the
    file cannot say goes to `to_meta_extra`.
    """
    multiple_of, multiplier = _meta_ffn(config.embed_dim, config.mlp_dim)
    params: dict[str, Any] = {
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
    if config.rope_theta != 10_000 or config.rope_scaling:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling:
        params["use_scaled_rope"] = True
    return params


def _meta_ffn(dim: int, mlp_dim: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give `mlp_dim`: those of a released model if one does."""
    released = [(256, None), (256, 1.0), (1024, 1.3), (4096, 1.3), (4096, 1.2), (256, 1.5)]
    exact = [(mlp_dim, None), (mlp_dim, (mlp_dim + 0.5) / int(8 * dim / 3))]
    return next(pair for pair in released + exact if meta_mlp_dim(dim, *pair) == mlp_dim)


def to_meta_extra(config: ModelConfig) -> dict[str, Any]:
    """What `params.json` alone would be read back wrongly as; `llama_jax.json` keeps it beside that file.

    Returns:
      The `extra` of `from_meta_params`; {} for most released models.
    """
    read = _meta_fields(to_meta_params(config), config.vocab_size)
    extra = {name: getattr(config, name) for name in _META_EXTRA if getattr(config, name) != read[name]}
    if "rope_scaling" in extra:
        extra["rope_scaling"] = dataclasses.asdict(extra["rope_scaling"])
    return extra


def meta_warnings(config: ModelConfig) -> list[str]:
    """What Meta's own code computes otherwise than this model; [] where it agrees."""
    found = []
    if config.head_dim * config.num_heads != config.embed_dim:
        found.append(
            f"Meta's code cannot load it: it takes heads of dim / n_heads = {config.embed_dim} / {config.num_heads},"
            f" and this model's have {config.head_dim}"
        )
    if config.rope_scaling not in (None, META_SCALING):
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


# ---------------------------------------------------------------------------------------------------------------------
# GGUF metadata
# ---------------------------------------------------------------------------------------------------------------------


_GGUF_SCALING = {
    "llama_jax.rope.factor": "factor",
    "llama_jax.rope.low_freq_factor": "low_freq_factor",
    "llama_jax.rope.high_freq_factor": "high_freq_factor",
    "llama_jax.rope.original_context_length": "original_max_seq_len",
}


def from_gguf_metadata(
    metadata: Mapping[str, Any], *, tie_embeddings: bool, rope_divisors: list[float] | None = None
) -> ModelConfig:
    """Reads the metadata of a GGUF file.

    Args:
      metadata: key -> value, `llama.*` and `tokenizer.ggml.tokens`.
      tie_embeddings: whether the file has no `output.weight`.
      rope_divisors: values of `rope_freqs.weight` [H / 2] if the file has it: Llama 3.1's scaling lies only there.

    Raises:
      ConfigError: not a Llama, a key is missing, or RoPE is of a form that is not supported.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"GGUF: general.architecture is {architecture!r}; this library computes 'llama' models only")
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind != "none":
        raise ConfigError(f"GGUF: llama.rope.scaling.type {kind!r} is not supported; Llama 3.1 uses rope_freqs.weight")
    if metadata.get("llama.expert_count", 0):
        raise ConfigError("GGUF: llama.expert_count is set: mixture-of-experts models are not supported")

    def need(key: str):
        return _need(metadata, f"llama.{key}", "GGUF metadata")

    dim, heads = need("embedding_length"), need("attention.head_count")
    head_dim = metadata.get(
        "llama.attention.key_length", metadata.get("llama.rope.dimension_count", _divide(dim, heads))
    )
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(key, head_dim) != head_dim:
            raise ConfigError(f"GGUF: {key} = {metadata[key]} but the head size is {head_dim}: not supported")
    vocab = metadata.get("llama.vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ()))
    theta = float(metadata.get("llama.rope.freq_base", 10000.0))
    return ModelConfig(
        vocab_size=vocab,
        embed_dim=dim,
        mlp_dim=need("feed_forward_length"),
        num_layers=need("block_count"),
        num_heads=heads,
        num_kv_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        norm_eps=_shortest(need("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_gguf_scaling(metadata, rope_divisors, head_dim, theta),
        max_seq_len=need("context_length"),
        tie_embeddings=tie_embeddings,
    )


def to_gguf_metadata(config: ModelConfig) -> dict[str, Any]:
    """Writes the `llama.*` keys. RoPE scaling goes into `rope_freqs.weight`: see `rope_divisors`.

    Where that tensor alone would be read back wrongly, keys of our own (`_GGUF_SCALING`) say what it was made from.
    """
    metadata = {
        "general.architecture": "llama",
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.embed_dim,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.mlp_dim,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
    }
    try:
        read = _gguf_scaling({}, rope_divisors(config), config.head_dim, config.rope_theta)
    except ConfigError:
        read = None
    if config.rope_scaling and read != config.rope_scaling:
        metadata |= {key: getattr(config.rope_scaling, name) for key, name in _GGUF_SCALING.items()}
    return metadata


def rope_divisors(config: ModelConfig) -> list[float] | None:
    """Values of GGUF's `rope_freqs.weight` [H / 2], or None where the model has no RoPE scaling."""
    if config.rope_scaling is None:
        return None
    return _divisors(config.rope_scaling, config.head_dim, config.rope_theta)


def _divisors(scaling: RopeScaling, head_dim: int, theta: float) -> list[float]:
    return [scaling.divisor(theta ** (-2 * i / head_dim)) for i in range(head_dim // 2)]


def _gguf_scaling(
    metadata: Mapping[str, Any], divisors: list[float] | None, head_dim: int, theta: float
) -> RopeScaling | None:
    if divisors is None:
        return None
    divisors = [float(d) for d in divisors]
    if len(divisors) != head_dim // 2:
        raise ConfigError(
            f"GGUF: rope_freqs.weight has {len(divisors)} values, expected head_dim / 2 = {head_dim // 2}"
        )
    said = {name: metadata[key] for key, name in _GGUF_SCALING.items() if key in metadata}
    if len(said) == len(_GGUF_SCALING):
        context = said.pop("original_max_seq_len")
        scaling = RopeScaling(**{name: _shortest(value) for name, value in said.items()}, original_max_seq_len=context)
    elif all(d == 1.0 for d in divisors):
        return None
    else:
        scaling = RopeScaling(_shortest(max(*divisors, 1.0)), 1.0, 4.0, 8192)
    expected = _divisors(scaling, head_dim, theta)
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(divisors, expected, strict=True)):
        raise ConfigError("GGUF: rope_freqs.weight is not Llama 3.1's frequency scaling: not supported")
    return scaling


# ---------------------------------------------------------------------------------------------------------------------


def _need(mapping: Mapping[str, Any], key: str, where: str):
    if mapping.get(key) is None:
        raise ConfigError(f"{where} does not say {key}")
    return mapping[key]


def _or(value, default):
    return default if value is None else value


def _divide(dim: int, heads: int) -> int:
    if not isinstance(dim, int) or not isinstance(heads, int) or heads < 1:
        raise ConfigError(f"width {dim!r} and number of heads {heads!r} must be positive integers")
    return dim // heads


def _shortest(value: float) -> float:
    """GGUF stores float32: 9.999999747378752e-06 is 1e-05, the same number in float32."""
    return float(f"{value:.7g}")
