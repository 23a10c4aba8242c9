"""ModelConfig <-> Hugging Face config.json, in the spelling of transformers 4 (rope_theta, rope_scaling, torch_dtype)
and 5 (rope_parameters, dtype)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from llama_jax.config import (
    AnyRopeScaling,
    ConfigError,
    LinearScaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)
from llama_jax.config.keys import check_keys, check_rope_keys, unused_rope_keys
from llama_jax.config.values import divide, either, need, number
from llama_jax.typing import Fields, JsonObject

ORIGINAL = "original_max_position_embeddings"


def from_hf_config(hf: Fields) -> ModelConfig:
    """Reads a Hugging Face `config.json` of a Llama, in the spelling of transformers 4 or 5.

    Raises:
      ConfigError: a key is missing, or one that changes the mathematics has a value that is not supported.
    """
    model_type = hf.get("model_type", "llama")
    if model_type != "llama":
        raise ConfigError(f"config.json says model_type {model_type!r}; this library computes 'llama' models only")
    check_keys("hf", hf)
    rope, theta = _hf_rope(hf)
    scaling = _hf_scaling(rope, hf)
    if unused := unused_rope_keys(rope):
        kind = rope_kind(rope)
        warnings.warn(f"config.json: RoPE type {kind!r} does not use {', '.join(unused)}: ignored", stacklevel=2)
    heads = need(hf, "num_attention_heads", "config.json")
    dim = need(hf, "hidden_size", "config.json")
    return ModelConfig(
        vocab_size=need(hf, "vocab_size", "config.json"),
        embed_dim=dim,
        mlp_dim=need(hf, "intermediate_size", "config.json"),
        num_layers=need(hf, "num_hidden_layers", "config.json"),
        num_heads=heads,
        num_kv_heads=either(hf.get("num_key_value_heads"), heads),
        head_dim=either(hf.get("head_dim"), divide(dim, heads)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),  # HF's default; Llama 2 and later write 1e-5
        rope_theta=float(theta),
        rope_scaling=scaling,
        max_seq_len=hf.get("max_position_embeddings", 2048),
        tie_embeddings=either(hf.get("tie_word_embeddings"), False),
    )


def _hf_rope(hf: Fields) -> tuple[Fields, float]:
    """Returns `rope_parameters` or `rope_scaling`, and the base, wherever the file has it."""
    both = [hf[key] for key in ("rope_parameters", "rope_scaling") if hf.get(key)]  # {} and false are none, too
    for rope in both:
        if not isinstance(rope, Mapping):
            raise ConfigError(f"config.json: RoPE parameters must be an object, got {rope!r}")
    if len(both) == 2 and _hf_scaling(both[0], hf) != _hf_scaling(both[1], hf):
        raise ConfigError("config.json: rope_parameters and rope_scaling contradict each other; remove the wrong one")
    theta = _one_value("rope_theta", [*(rope.get("rope_theta") for rope in both), hf.get("rope_theta")])
    return both[0] if both else {}, either(theta, 10000.0)


def _one_value(name: str, values: list[Any]) -> Any:
    """Returns the value that a key has in several places; None where it has none."""
    found = [value for value in values if value is not None]
    for other in found[1:]:
        if other != found[0]:
            raise ConfigError(f"config.json: {name} is both {found[0]} and {other}; remove the wrong one")
    return found[0] if found else None


def rope_kind(rope: Fields) -> str:
    """Returns the kind of RoPE that `rope_parameters` or `rope_scaling` names.

    Raises:
      ConfigError: two kinds: transformers 4 takes `type`, transformers 5 `rope_type`.
    """
    kind = _one_value("the type of RoPE (type, rope_type)", [rope.get("rope_type"), rope.get("type")])
    if not isinstance(kind, str | None):
        raise ConfigError(f"config.json: the type of RoPE must be a name, got {kind!r}")
    return either(kind, "default")


def _hf_scaling(rope: Fields, hf: Fields) -> AnyRopeScaling | None:
    kind = rope_kind(rope)
    if kind not in _READERS:
        reason = _REFUSED_KINDS.get(kind, "it is unknown")
        raise ConfigError(
            f"config.json: RoPE type {kind!r} is not supported: {reason}. There are {', '.join(map(repr, _READERS))}"
        )
    check_rope_keys(rope)
    return _READERS[kind](rope, hf)


WHERE = "config.json: rope_scaling"


def _llama3(rope: Fields, hf: Fields) -> RopeScaling:
    factors = (number(rope, key, WHERE) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    return RopeScaling(*factors, original_max_seq_len=need({ORIGINAL: _original(rope, hf)}, ORIGINAL, WHERE))


def _linear(rope: Fields, hf: Fields) -> LinearScaling | None:
    del hf
    scaling = LinearScaling(number(rope, "factor", WHERE))
    return None if scaling.factor == 1 else scaling


def _yarn(rope: Fields, hf: Fields) -> YarnScaling | None:
    factor = number(rope, "factor", WHERE)
    mscales = (number(rope, key, WHERE, None) for key in ("mscale", "mscale_all_dim"))
    attention = number(rope, "attention_factor", WHERE, None)
    original = _original(rope, hf)
    if original is None:
        raise ConfigError(
            f"config.json: RoPE type 'yarn' needs {ORIGINAL}, the context before it was stretched; transformers takes"
            f" max_position_embeddings ({hf.get('max_position_embeddings', 2048)}) for it: if that is right, add it to"
            " rope_scaling"
        )
    scaling = YarnScaling(
        factor,
        original,
        yarn_attention_factor(factor, *mscales) if attention is None else attention,
        number(rope, "beta_fast", WHERE, None) or 32.0,  # transformers takes 0, too, for nothing said
        number(rope, "beta_slow", WHERE, None) or 1.0,
        either(rope.get("truncate", True), False),  # transformers takes null for false
    )
    return None if scaling.factor == 1 and scaling.attention_factor == 1 else scaling


def _original(rope: Fields, hf: Fields) -> Any:
    """Returns the context before it was stretched; transformers 5 takes it from outside the object, too."""
    said = _one_value(ORIGINAL, [number(place, ORIGINAL, WHERE, None) for place in (rope, hf)])
    return int(said) if said is not None and said == int(said) else said


_READERS: dict[str, Callable[[Fields, Fields], AnyRopeScaling | None]] = {
    "default": lambda rope, hf: None,
    "llama3": _llama3,
    "linear": _linear,
    "yarn": _yarn,
}
_LONG = "its frequencies depend on the length of the longest text of a batch, and cached keys keep the older ones"
_REFUSED_KINDS = {
    "dynamic": f"{_LONG}. Up to max_position_embeddings tokens it is the same as no scaling: for such texts set"
    " rope_scaling to null",
    "longrope": _LONG,
    "su": _LONG,
    "proportional": "it rotates a part of each head",
    "mrope": "its positions have several dimensions",
}


def to_hf_config(config: ModelConfig, *, dtype: str, transformers: int = 4) -> JsonObject:
    """Writes `config.json`.

    Args:
      config: the architecture.
      dtype: of the stored weights: "float32", "bfloat16" or "float16".
      transformers: spelling of major version 4 (which version 5 reads too) or 5.
    """
    if transformers not in (4, 5):
        raise ValueError(f"transformers must be 4 or 5, got {transformers}")
    scaling = _WRITERS[type(config.rope_scaling)](config.rope_scaling)
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


def _write_llama3(scaling: RopeScaling) -> JsonObject:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        ORIGINAL: scaling.original_max_seq_len,
    }


def _write_yarn(scaling: YarnScaling) -> JsonObject:
    """Returns YaRN's object without the usual values."""
    rope = {"rope_type": "yarn", "factor": scaling.factor, ORIGINAL: scaling.original_max_seq_len}
    usual = YarnScaling(scaling.factor, scaling.original_max_seq_len, yarn_attention_factor(scaling.factor))
    names = ("attention_factor", "beta_fast", "beta_slow", "truncate")
    return rope | {name: getattr(scaling, name) for name in names if getattr(scaling, name) != getattr(usual, name)}


_WRITERS: dict[type, Callable[[Any], JsonObject | None]] = {
    type(None): lambda scaling: None,
    RopeScaling: _write_llama3,
    LinearScaling: lambda scaling: {"rope_type": "linear", "factor": scaling.factor},
    YarnScaling: _write_yarn,
}
