"""ModelConfig <-> the metadata of a GGUF file of architecture llama."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
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
from llama_jax.config_keys import check_keys, divide, need, number

WHERE = "GGUF metadata"
# Keys of our own, which say what `rope_freqs.weight` was made from where that tensor alone would be read wrongly.
_OWN = "llama_jax.rope."
_OWN_KEYS = {"original_max_seq_len": "original_context_length"}  # spelled otherwise than our fields
_OWN_KINDS: dict[str, type[RopeScaling | YarnScaling]] = {"llama3": RopeScaling, "yarn": YarnScaling}


def from_gguf_metadata(
    metadata: Mapping[str, Any], *, tie_embeddings: bool, rope_divisors: list[float] | None = None
) -> ModelConfig:
    """Reads the metadata of a GGUF file.

    Args:
      metadata: key -> value, `llama.*` and `tokenizer.ggml.tokens`.
      tie_embeddings: whether the file has no `output.weight`.
      rope_divisors: values of `rope_freqs.weight` [H / 2] if the file has it: Llama 3.1's scaling lies only there.

    Raises:
      ConfigError: not a Llama, a key is missing, or one that changes the mathematics is not supported.
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        what = {"adapter": "a LoRA adapter: merge it into its base model", "mmproj": "the encoder of a vision model"}
        raise ConfigError(f"GGUF: general.type is {kind!r}, {what.get(kind, 'not a model')}; give the model's file")
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"GGUF: general.architecture is {architecture!r}; this library computes 'llama' models only")
    check_keys("gguf", metadata)

    def of_all_layers(key: str, *default: int) -> Any:
        """One number, which may be said once for each layer."""
        value = metadata.get(f"llama.{key}", *default) if default else need(metadata, f"llama.{key}", WHERE)
        if not isinstance(value, Sequence) and not hasattr(value, "tolist"):
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
    scale = metadata.get("llama.attention.scale", 0)
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
    metadata: Mapping[str, Any], divisors: list[float] | None, head_dim: int, theta: float, context: int
) -> AnyRopeScaling | None:
    """What keys and `rope_freqs.weight` say together."""
    if divisors is not None:
        divisors = [float(d) for d in divisors]
        if len(divisors) != head_dim // 2:
            raise ConfigError(
                f"GGUF: rope_freqs.weight has {len(divisors)} values, expected head_dim / 2 = {head_dim // 2}"
            )
        if own := _own_scaling(metadata):
            return _agreeing(own, divisors, head_dim, theta)
    by_keys = _scaling_of_keys(metadata, context)
    if divisors is None or all(d == 1.0 for d in divisors):
        return by_keys
    if by_keys is not None:
        raise ConfigError(f"GGUF: both llama.rope.scaling ({by_keys}) and rope_freqs.weight: not supported")
    return _agreeing(RopeScaling(shortest(max(*divisors, 1.0)), 1.0, 4.0, 8192), divisors, head_dim, theta)


def _agreeing(
    scaling: RopeScaling | YarnScaling, divisors: list[float], head_dim: int, theta: float
) -> RopeScaling | YarnScaling:
    """A scaling, if its divisors are those of `rope_freqs.weight`."""
    expected = scaling.divisors(head_dim, theta)
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(divisors, expected, strict=True)):
        raise ConfigError("GGUF: rope_freqs.weight is not Llama 3.1's frequency scaling: not supported")
    return scaling


def _own_scaling(metadata: Mapping[str, Any]) -> RopeScaling | YarnScaling | None:
    kind = _OWN_KINDS.get(metadata.get(f"{_OWN}type", "llama3"))
    if kind is None:
        return None
    said = {}
    for field in dataclasses.fields(kind):
        key = f"{_OWN}{_OWN_KEYS.get(field.name, field.name)}"
        if key not in metadata:
            return None
        value = metadata[key]
        said[field.name] = shortest(value) if isinstance(value, float) else value
    return kind(**said)


def _scaling_of_keys(metadata: Mapping[str, Any], context: int) -> LinearScaling | YarnScaling | None:
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


def _yarn(metadata: Mapping[str, Any], factor: float, attention: float, context: int) -> YarnScaling | None:
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


def to_gguf_metadata(config: ModelConfig) -> dict[str, Any]:
    """Writes the `llama.*` keys, RoPE scaling with them where llama.cpp computes it from keys. What it does not goes
    into `rope_freqs.weight`: see `rope_divisors`.

    Where that tensor alone would be read back wrongly, keys of our own say what it was made from.
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


def _scaling_metadata(config: ModelConfig) -> dict[str, Any]:
    scaling, prefix = config.rope_scaling, "llama.rope.scaling."
    if isinstance(scaling, LinearScaling):
        return {f"{prefix}type": "linear", f"{prefix}factor": float(scaling.factor)}
    attention = {}
    if isinstance(scaling, YarnScaling):
        usual = yarn_attention_factor(scaling.factor)
        if _is_usual(scaling):
            attention = {f"{prefix}attn_factor": scaling.attention_factor / usual}
            return {
                f"{prefix}type": "yarn",
                f"{prefix}factor": float(scaling.factor),
                f"{prefix}original_context_length": scaling.original_max_seq_len,
            } | (attention if scaling.attention_factor != usual else {})
        attention = {f"{prefix}type": "none", f"{prefix}attn_factor": scaling.attention_factor}
    divisors = rope_divisors(config)
    if scaling is None or divisors is None:
        return {}
    try:
        read = _scaling({}, divisors, config.head_dim, config.rope_theta, config.max_seq_len)
    except ConfigError:
        read = None
    if read == scaling:
        return {}
    kind = next(name for name, kind in _OWN_KINDS.items() if isinstance(scaling, kind))
    values = {_OWN_KEYS.get(name, name): value for name, value in dataclasses.asdict(scaling).items()}
    own = {f"{_OWN}{name}": value for name, value in values.items()}
    return own if kind == "llama3" else own | {f"{_OWN}type": kind} | attention


def _is_usual(scaling: YarnScaling) -> bool:
    """Whether llama.cpp computes it from the keys that it reads of this architecture."""
    return (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32.0, 1.0, True)


def rope_divisors(config: ModelConfig) -> list[float] | None:
    """Values of GGUF's `rope_freqs.weight` [H / 2], or None where the model has no RoPE scaling, or one that is said in
    keys alone."""
    scaling = config.rope_scaling
    if (
        scaling is None
        or isinstance(scaling, LinearScaling)
        or (isinstance(scaling, YarnScaling) and _is_usual(scaling))
    ):
        return None
    return scaling.divisors(config.head_dim, config.rope_theta)


def shortest(value: float) -> float:
    """GGUF stores float32: 9.999999747378752e-06 is 1e-05, the same number in float32."""
    return float(f"{value:.7g}")
