"""ModelConfig <-> the metadata of a GGUF file of architecture llama."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from llama_jax.config import (
    AnyRopeScaling,
    ConfigError,
    LinearScaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
    float32,
    scaling_from_json,
    scaling_to_json,
    yarn_attention_factor,
)
from llama_jax.config.keys import check_keys
from llama_jax.config.values import divide, need, number
from llama_jax.typing import Fields, JsonObject

WHERE = "GGUF metadata"
# Keys of our own: what `rope_freqs.weight` was made from, where that tensor alone would be read as another scaling.
_OWN_LLAMA3 = {
    "llama_jax.rope.factor": "factor",
    "llama_jax.rope.low_freq_factor": "low_freq_factor",
    "llama_jax.rope.high_freq_factor": "high_freq_factor",
    "llama_jax.rope.original_context_length": "original_max_seq_len",
}
_OWN = "llama_jax.rope_scaling"  # JSON: any other scaling that the keys of llama.cpp do not say to the last digit


def from_gguf_metadata(
    metadata: Fields, *, tie_embeddings: bool, rope_divisors: list[float] | None = None
) -> ModelConfig:
    """Reads the metadata of a GGUF file.

    Args:
      metadata: key -> value, `llama.*` and `tokenizer.ggml.tokens`.
      tie_embeddings: whether the file has no `output.weight`.
      rope_divisors: values of `rope_freqs.weight` [H / 2] if the file has it: Llama 3.1's scaling is stored only there.

    Raises:
      ConfigError: not a Llama, a key is missing, or one that changes the mathematics is not supported.
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        kinds = {"adapter": "a LoRA adapter: merge it into its base model", "mmproj": "the encoder of a vision model"}
        what = kinds.get(str(kind), "not a model")
        raise ConfigError(f"GGUF: general.type is {kind!r}, {what}; give the model's file")
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"GGUF: general.architecture is {architecture!r}; this library computes 'llama' models only")
    check_keys("gguf", metadata)

    def of_all_layers(key: str, *default: int) -> Any:
        """Returns one number, which may be repeated for each layer."""
        value = metadata.get(f"llama.{key}", *default) if default else need(metadata, f"llama.{key}", WHERE)
        if isinstance(value, str) or not (isinstance(value, Sequence) or hasattr(value, "tolist")):
            return value
        values = list(value)
        if len({*values}) != 1:
            raise ConfigError(f"GGUF: llama.{key} differs from layer to layer, {values}: not supported")
        return int(values[0])

    dim, heads = need(metadata, "llama.embedding_length", WHERE), of_all_layers("attention.head_count")
    head_dim = metadata.get(
        "llama.attention.key_length", metadata.get("llama.rope.dimension_count", divide(dim, heads))
    )
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(key, head_dim) != head_dim:
            raise ConfigError(f"GGUF: {key} = {metadata[key]} but the head size is {head_dim}: not supported")
    scale = number(metadata, "llama.attention.scale", WHERE, 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise ConfigError(
            f"GGUF: llama.attention.scale = {scale}, where 1 / sqrt({head_dim}) is computed: not supported"
        )
    vocab = metadata.get("llama.vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ()))
    theta = float(metadata.get("llama.rope.freq_base", 10000.0))
    context = need(metadata, "llama.context_length", WHERE)
    return ModelConfig(
        vocab_size=vocab,
        embed_dim=dim,
        mlp_dim=of_all_layers("feed_forward_length"),
        num_layers=need(metadata, "llama.block_count", WHERE),
        num_heads=heads,
        num_kv_heads=of_all_layers("attention.head_count_kv", heads),
        head_dim=head_dim,
        norm_eps=shortest(need(metadata, "llama.attention.layer_norm_rms_epsilon", WHERE)),
        rope_theta=theta,
        rope_scaling=_scaling(metadata, rope_divisors, head_dim, theta, context),
        max_seq_len=context,
        tie_embeddings=tie_embeddings,
    )


def _scaling(
    metadata: Fields, divisors: list[float] | None, head_dim: int, theta: float, context: int
) -> AnyRopeScaling | None:
    """Returns the scaling that keys and `rope_freqs.weight` give together."""
    if divisors is not None:
        divisors = [float(d) for d in divisors]
        if len(divisors) != head_dim // 2:
            raise ConfigError(
                f"GGUF: rope_freqs.weight has {len(divisors)} values, expected head_dim / 2 = {head_dim // 2}"
            )
    if _OWN in metadata:
        return _own_scaling(metadata, divisors, head_dim, theta)
    by_keys = _scaling_of_keys(metadata, context)
    said = {name: metadata[key] for key, name in _OWN_LLAMA3.items() if key in metadata}
    if divisors is None or (len(said) < len(_OWN_LLAMA3) and all(d == 1.0 for d in divisors)):
        return by_keys
    if by_keys is not None:
        raise ConfigError(f"GGUF: both llama.rope.scaling ({by_keys}) and rope_freqs.weight: not supported")
    scaling = RopeScaling(shortest(max(*divisors, 1.0)), 1.0, 4.0, 8192)
    if len(said) == len(_OWN_LLAMA3):
        original = said.pop("original_max_seq_len")
        scaling = RopeScaling(**{name: shortest(value) for name, value in said.items()}, original_max_seq_len=original)
    if not _close(divisors, scaling.divisors(head_dim, theta)):
        raise ConfigError("GGUF: rope_freqs.weight is not Llama 3.1's frequency scaling: not supported")
    return scaling


def _close(divisors: list[float] | None, expected: list[float] | None) -> bool:
    if divisors is None or expected is None:
        return (divisors or expected) is None
    return all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(divisors, expected, strict=True))


def _own_scaling(metadata: Fields, divisors: list[float] | None, head_dim: int, theta: float) -> AnyRopeScaling:
    """Returns the scaling that a key of our own says, if llama.cpp reads the same from the rest of the file."""
    try:
        scaling = scaling_from_json(json.loads(metadata[_OWN]), f"GGUF: {_OWN}")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"GGUF: {_OWN}: {error}") from None
    keys = _scaling_keys(scaling)
    agree = _close(divisors, _freqs(scaling, head_dim, theta)) and metadata.keys() >= keys.keys()
    for key, value in keys.items() if agree else ():
        found = metadata[key]
        agree &= math.isclose(found, value, rel_tol=1e-6) if isinstance(value, float) else found == value
    if not agree:
        raise ConfigError(f"GGUF: {_OWN} says {scaling}, and llama.rope.scaling or rope_freqs.weight something else")
    return scaling


def _scaling_of_keys(metadata: Fields, context: int) -> LinearScaling | YarnScaling | None:
    """Linear or YaRN scaling, resolved as llama.cpp does: a factor without a type is linear, 0 is none, and
    `scale_linear` counts where `scaling.factor` is not said."""
    prefix = "llama.rope.scaling."
    kind = metadata.get(f"{prefix}type", "linear")
    attention = number(metadata, f"{prefix}attn_factor", WHERE, 1.0)
    factor_said = metadata.get(f"{prefix}factor", metadata.get("llama.rope.scale_linear"))
    factor = shortest(number({"factor": factor_said}, "factor", f"{WHERE} (llama.rope.scaling)", 1.0)) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"GGUF: llama.rope.scaling.type {kind!r} is not supported; there are 'none', 'linear' and 'yarn', and Llama"
            " 3.1's scaling in rope_freqs.weight"
        )
    if kind == "yarn":
        if not factor_said:
            raise ConfigError(f"GGUF: llama.rope.scaling.type 'yarn', but the file does not say {prefix}factor")
        return _yarn(metadata, factor, attention, context)
    for key, neutral in (("attn_factor", 1.0), ("yarn_attn_factor", 1.0)):
        if (value := number(metadata, f"{prefix}{key}", WHERE, neutral)) != neutral:
            raise ConfigError(f"GGUF: {prefix}{key} = {value} without YaRN: not supported")
    return None if kind == "none" or factor == 1 else LinearScaling(factor)


def _yarn(metadata: Fields, factor: float, attention: float, context: int) -> YarnScaling | None:
    """YaRN as llama.cpp has it: its bounds are whole indices, and `attn_factor` is multiplied with the usual factor."""
    prefix = "llama.rope.scaling."
    usual = yarn_attention_factor(factor)
    stated = number(metadata, f"{prefix}yarn_attn_factor", WHERE, usual)
    if not math.isclose(stated, usual, rel_tol=1e-6):
        raise ConfigError(
            f"GGUF: {prefix}yarn_attn_factor = {stated}, which converters write as YaRN's whole attention factor and"
            f" llama.cpp does not read as such (it computes {usual:.7g}): not supported; convert this model from its"
            " Hugging Face folder"
        )
    scaling = YarnScaling(
        factor,
        int(metadata.get(f"{prefix}original_context_length") or context),
        usual if attention == 1 else shortest(attention * usual),
        shortest(number(metadata, f"{prefix}yarn_beta_fast", WHERE, 32.0)),
        shortest(number(metadata, f"{prefix}yarn_beta_slow", WHERE, 1.0)),
    )
    return None if scaling.factor == 1 and scaling.attention_factor == 1 else scaling


def to_gguf_metadata(config: ModelConfig) -> JsonObject:
    """Writes the `llama.*` keys, RoPE scaling with them where llama.cpp computes it from keys. What it does not goes
    into `rope_freqs.weight`: see `rope_divisors`.

    Where both together would be read back as another scaling, keys of our own say which it is.
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
    return metadata | _scaling_metadata(config)


def _scaling_metadata(config: ModelConfig) -> JsonObject:
    """Returns the metadata of RoPE scaling beside `rope_freqs.weight`."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    keys = _scaling_keys(scaling)
    stored = {key: float32(value) if isinstance(value, float) else value for key, value in keys.items()}
    try:
        read = _scaling(stored, rope_divisors(config), config.head_dim, config.rope_theta, config.max_seq_len)
    except ConfigError:
        read = None
    if read == scaling:
        return keys
    if isinstance(scaling, RopeScaling):
        return {key: getattr(scaling, name) for key, name in _OWN_LLAMA3.items()}
    return keys | {_OWN: json.dumps(scaling_to_json(scaling))}


def _scaling_keys(scaling: AnyRopeScaling) -> JsonObject:
    """Returns the keys from which llama.cpp computes a scaling, or the rest beside `rope_freqs.weight`."""
    prefix = "llama.rope.scaling."
    if isinstance(scaling, LinearScaling):
        return {f"{prefix}type": "linear", f"{prefix}factor": float(scaling.factor)}
    if isinstance(scaling, RopeScaling):
        return {}
    if not _is_usual(scaling):
        return {f"{prefix}type": "none", f"{prefix}attn_factor": float(scaling.attention_factor)}
    attention = scaling.attention_factor / yarn_attention_factor(scaling.factor)
    return {
        f"{prefix}type": "yarn",
        f"{prefix}factor": float(scaling.factor),
        f"{prefix}original_context_length": scaling.original_max_seq_len,
    } | ({f"{prefix}attn_factor": attention} if attention != 1 else {})


def _is_usual(scaling: YarnScaling) -> bool:
    """Returns whether llama.cpp computes it from the keys that it reads of this architecture."""
    return (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32.0, 1.0, True)


def rope_divisors(config: ModelConfig) -> list[float] | None:
    """Values of GGUF's `rope_freqs.weight` [H / 2], or None where the model has no RoPE scaling, or one that is said in
    keys alone."""
    scaling = config.rope_scaling
    return None if scaling is None else _freqs(scaling, config.head_dim, config.rope_theta)


def _freqs(scaling: AnyRopeScaling, head_dim: int, theta: float) -> list[float] | None:
    if isinstance(scaling, RopeScaling) or (isinstance(scaling, YarnScaling) and not _is_usual(scaling)):
        return scaling.divisors(head_dim, theta)
    return None


def shortest(value: float) -> float:
    """Returns the shortest decimal of a float32: GGUF stores 1e-05 as 9.999999747378752e-06."""
    return float(f"{value:.7g}")
