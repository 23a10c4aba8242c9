"""What each key of config.json, params.json and GGUF metadata means for the forward pass: one table for each format.

Every key that is known is in one class: it is computed (the readers take it), it is neutral under some values and
refused by name under all others, or it says nothing about the forward pass. An unknown key is refused where
the format keeps the namespace to the architecture (GGUF's `llama.*`). Elsewhere a warning names it, and
`ignored_keys` reports it. Null means the same as no key: transformers and Meta's code write it for their defaults.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from llama_jax.config import ConfigError
from llama_jax.typing import Fields

ConfigFormat = Literal["hf", "native", "meta", "gguf"]


@dataclasses.dataclass(frozen=True)
class KeyTable:
    """The keys of one format.

    Attributes:
      where: the file, in messages.
      computed: taken by the reader.
      neutral: what the keys are about -> key -> the values under which they change nothing. The others are refused.
      silent: keys that say nothing about the forward pass.
      silent_prefixes: begin such keys.
      refused_prefixes: begin keys that are refused unless they are in a class; -> a name for such keys.
    """

    where: str
    computed: frozenset[str]
    neutral: Mapping[str, Mapping[str, tuple]]
    silent: frozenset[str]
    silent_prefixes: tuple[str, ...] = ()
    refused_prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def class_of(self, key: str) -> str | None:
        """Returns the one class of a key: "computed", "neutral", "silent", "refused", or None for an unknown one."""
        if key in self.computed:
            return "computed"
        if any(key in keys for keys in self.neutral.values()):
            return "neutral"
        if key in self.silent:
            return "silent"
        if any(key.startswith(prefix) for prefix in self.refused_prefixes):
            return "refused"
        return "silent" if key.startswith(self.silent_prefixes) else None

    def check(self, mapping: Fields) -> None:
        """Refuses, by its name and value, a key that this library does not compute.

        Raises:
          ConfigError: there is one.
        """
        for about, keys in self.neutral.items():
            for key, values in keys.items():
                if key in mapping and not _is_neutral(mapping[key], values):
                    raise self._refusal(key, mapping[key], about)
        for key, value in mapping.items():
            if value is not None and self.class_of(key) == "refused":
                about = next(what for prefix, what in self.refused_prefixes.items() if key.startswith(prefix))
                raise self._refusal(key, value, about)

    def unknown(self, mapping: Fields) -> list[str]:
        """Returns the keys, other than null ones, that are in no class."""
        return sorted(key for key, value in mapping.items() if value is not None and self.class_of(key) is None)

    def _refusal(self, key: str, value: Any, about: str) -> ConfigError:
        shown = repr(_plain(value))
        return ConfigError(
            f"{self.where} sets {key} = {shown if len(shown) < 200 else shown[:200] + '...'}, which changes the"
            f" mathematics and is not supported: {about}"
        )


def _plain(value: Any) -> Any:
    """Returns an array, as GGUF has them, as a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_neutral(value: Any, neutral: tuple) -> bool:
    """Returns whether a value, or each element of a list with one value a layer, changes nothing."""
    value = _plain(value)
    if isinstance(value, list):
        return bool(value) and all(element in neutral for element in value)
    return value is None or value in neutral


def check_keys(format: ConfigFormat, mapping: Fields, *, stacklevel: int = 3) -> None:
    """Refuses the keys that change the mathematics and are not computed, and warns of the unknown ones.

    Args:
      format: whose table.
      mapping: the content of the file.
      stacklevel: of the warning.

    Raises:
      ConfigError: a key is refused.
    """
    table = TABLES[format]
    table.check(mapping)
    if unknown := table.unknown(mapping):
        warnings.warn(
            f"{table.where} has keys that a Llama does not use, ignored: {', '.join(unknown)}", stacklevel=stacklevel
        )


def ignored_keys(format: ConfigFormat, mapping: Fields) -> list[str]:
    """Returns the names of the keys that a reader drops without knowing what they mean.

    Args:
      format: "hf", "native", "meta" or "gguf".
      mapping: the content of config.json, of params.json, or the metadata of a GGUF file.

    Returns:
      The names in order; those within an object as "rope_scaling.NAME".
    """
    if format == "meta":
        mapping = inner_params(mapping)
        return sorted([*TABLES["meta"].unknown(mapping), *unscaled_keys(mapping)])
    found = TABLES[format].unknown(mapping)
    if format in ("hf", "native"):
        for name in ("rope_parameters", "rope_scaling"):
            rope = mapping.get(name)
            found += [f"{name}.{key}" for key in unused_rope_keys(rope)] if isinstance(rope, Mapping) else []
    return sorted(found)


def inner_params(params: Fields) -> Fields:
    """Returns the object under "model" of a params.json where there is one."""
    inner = params.get("model")
    return inner if isinstance(inner, Mapping) else params


def unscaled_keys(params: Fields) -> list[str]:
    """Returns the keys of a params.json that Meta's code takes only with `use_scaled_rope`, which is not set."""
    keys = ("rope_scaling_factor", "rope_high_freq_factor")
    return [] if params.get("use_scaled_rope") else [key for key in keys if params.get(key) is not None]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# ---------------------------------------------------------------------------------------------------------------------
# config.json, of transformers 4 and 5, and of what descends from Llama under its model_type
# ---------------------------------------------------------------------------------------------------------------------

NO = (False, 0)

_HF = KeyTable(
    where="config.json",
    computed=_words(
        """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings tie_word_embeddings model_type
        original_max_position_embeddings"""
    ),
    neutral={
        "another activation": {"hidden_act": ("silu", "swish")},
        "biases": dict.fromkeys(_words("attention_bias mlp_bias use_qkv_bias qkv_bias head_bias lm_head_bias"), NO),
        "RoPE on other pairs, or on a part of a head": {
            "rope_interleaved": NO,
            "partial_rotary_factor": (1,),
            "rotary_pct": (1,),
            "no_rope_layers": (1,),
            "no_rope_layer_interval": (0,),
            "position_embedding_type": ("rope", "rotary"),
            "alibi": NO,
        },
        "another mask": {
            "sliding_window": (),
            "use_sliding_window": NO,
            "layer_types": ("full_attention",),
            "attention_chunk_size": (),
            "is_causal": (True,),
            "use_bidirectional_attention": NO,
            "is_decoder": (False, True),
            "add_cross_attention": NO,
        },
        "quantized weights; take the version of this model in bfloat16": {
            "quantization_config": (),
            "compression_config": (),
        },
        "scaled activations": {
            "embedding_multiplier": (1,),
            "residual_multiplier": (1,),
            "attention_multiplier": (),
            "logits_scaling": (1,),
            "logit_scale": (1,),
            "query_pre_attn_scalar": (),
            "attn_temperature_tuning": NO,
        },
        "capped or clipped activations": {
            "final_logit_softcapping": (),
            "attn_logit_softcapping": (),
            "clip_qkv": (),
        },
        "normalized queries and keys": dict.fromkeys(
            ("qk_norm", "use_qk_norm", "qk_layernorm", "use_qk_layernorm"), NO
        ),
        "parallel attention and MLP": {"parallel_residual": NO, "use_parallel_residual": NO},
        "a mixture of experts": {"num_local_experts": (0, 1), "num_experts": (0, 1), "n_routed_experts": (0, 1)},
        "keys and values shared by layers": {"kv_sharing_modes": ()},
    },
    silent=_words(
        """architectures torch_dtype dtype bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id
        decoder_start_token_id initializer_range pretraining_tp use_cache attention_dropout transformers_version
        _name_or_path name_or_path _attn_implementation _attn_implementation_autoset attn_implementation auto_map
        is_llama_config transformers.js_config return_dict output_attentions output_hidden_states torchscript
        use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward is_encoder_decoder cross_attention_hidden_size
        tie_encoder_decoder finetuning_task id2label label2id task_specific_params problem_type tokenizer_class prefix
        max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
        top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
        remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_fixed
        unsloth_version"""
    ),
)

# Keys of `rope_parameters` and `rope_scaling`: of every kind of RoPE, and of each kind that is computed.
_ROPE_COMMON = _words("rope_type type rope_theta partial_rotary_factor")
ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": _ROPE_COMMON,
    "llama3": _ROPE_COMMON | _words("factor low_freq_factor high_freq_factor original_max_position_embeddings"),
    "linear": _ROPE_COMMON | {"factor"},
    "yarn": _ROPE_COMMON
    | _words(
        """factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate
        finetuned"""
    ),
}
ROPE_TABLE = KeyTable(
    where="config.json: RoPE",
    computed=frozenset().union(*ROPE_KEYS.values()) - {"partial_rotary_factor", "finetuned"},
    neutral={
        "RoPE on a part of a head": {"partial_rotary_factor": (1,)},
        "positions in several dimensions": {"mrope_section": (), "mrope_interleaved": NO},
        "LongRoPE": {"short_factor": (), "long_factor": (), "short_mscale": (), "long_mscale": ()},
        "YaRN's other factors": {"attn_factor": (1,), "extrapolation_factor": (1,)},
    },
    silent=_words("finetuned"),
)


def check_rope_keys(rope: Fields) -> None:
    """Refuses keys of `rope_parameters` or `rope_scaling` that change the mathematics and are not computed.

    Raises:
      ConfigError: there is one.
    """
    ROPE_TABLE.check(rope)
    for key, value in rope.items():
        if isinstance(value, Mapping):
            raise ConfigError(f"config.json: RoPE of its own for layers of type {key!r} is not supported")


def unused_rope_keys(rope: Fields) -> list[str]:
    """Returns the non-null keys of `rope_parameters` or `rope_scaling` that its kind of RoPE does not use."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    used = ROPE_KEYS.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
    known = {key for key in rope if ROPE_TABLE.class_of(key) in ("neutral", "silent")}
    return sorted(key for key, value in rope.items() if value is not None and key not in used | known)


# ---------------------------------------------------------------------------------------------------------------------
# params.json, of Meta's code for all generations
# ---------------------------------------------------------------------------------------------------------------------

_META = KeyTable(
    where="params.json",
    computed=_words(
        """dim n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size multiple_of ffn_dim_multiplier norm_eps
        rope_theta use_scaled_rope rope_scaling_factor rope_high_freq_factor"""
    ),
    neutral={
        "a vision model": {
            "vision_chunk_size": (-1,),
            "vision_max_num_chunks": (-1, 4),
            "vision_num_cross_attention_layers": (-1, 0),
            "vision_model": (),
            "vision_args": (),
        },
        "quantized weights; take the version of this model in bfloat16": {"quantization_args": ()},
        "LoRA weights; merge them into the base model": {"lora_args": ()},
        "a mixture of experts": {"moe_args": (), "moe": (), "ffn_exp": ()},
        "another mask": {"attention_chunk_size": (0,), "sliding_window": ()},
        "layers without RoPE": {"nope_layer_interval": (0,)},
        "normalized queries and keys": {"use_qk_norm": NO},
        "scaled activations": {"attn_temperature_tuning": NO},
        "biases": {"use_biases": NO, "qkv_bias": NO},
    },
    silent=_words("max_seq_len max_batch_size floor_scale attn_scale"),  # the last two of attn_temperature_tuning
    refused_prefixes={
        "vision": "a vision model",
        "quantization": "quantized weights; take the version of this model in bfloat16",
        "lora": "LoRA weights; merge them into the base model",
        "moe": "a mixture of experts",
        "rope": "another RoPE",
        "use_scaled": "another RoPE",
    },
)

# ---------------------------------------------------------------------------------------------------------------------
# GGUF metadata of architecture llama
# ---------------------------------------------------------------------------------------------------------------------


def _llama(keys: Iterable[str]) -> frozenset[str]:
    return frozenset(f"llama.{key}" for key in keys)


def _grouped(groups: Mapping[str, tuple[str, tuple]]) -> dict[str, dict[str, tuple]]:
    return {about: dict.fromkeys(sorted(_llama(keys.split())), values) for about, (keys, values) in groups.items()}


_GGUF = KeyTable(
    where="GGUF metadata",
    computed=frozenset(["general.architecture", "general.type"])
    | _llama(
        """vocab_size context_length embedding_length block_count feed_forward_length attention.head_count
        attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon
        attention.scale rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.type rope.scaling.factor
        rope.scaling.attn_factor rope.scaling.original_context_length rope.scaling.yarn_attn_factor
        rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow""".split()
    ),
    neutral={"blocks of another version of GGML": {"general.quantization_version": (0, 2)}}
    | _grouped(
        {
            "a mixture of experts": (
                """expert_count expert_feed_forward_length expert_shared_feed_forward_length
            expert_chunk_feed_forward_length expert_shared_count expert_group_count expert_group_used_count
            experts_per_group moe_every_n_layers moe_latent_size interleave_moe_layer_step
            leading_dense_block_count""",
                NO,
            ),
            "weights of experts": (
                """expert_weights_scale expert_weights_norm expert_gating_func expert_group_scale
                router_logit_softcapping""",
                (0, 1),
            ),
            "scaled activations": ("logit_scale residual_scale embedding_scale attention.output_scale", (0, 1)),
            "capped or clipped activations": (
                """attn_logit_softcapping final_logit_softcapping attention.clamp_kqv swiglu_clamp_exp
            swiglu_clamp_shexp activation_sparsity_scale""",
                NO,
            ),
            "attention by temperature": ("attention.temperature_length attention.temperature_scale", NO),
            "another mask": (
                """attention.sliding_window attention.sliding_window_pattern attention.shared_kv_layers
            attention.key_length_swa attention.value_length_swa full_attention_interval""",
                NO,
            ),
            "attention to what follows": ("attention.causal", (True,)),
            "other positions than RoPE's": ("attention.max_alibi_bias attention.relative_buckets_count", NO),
            "RoPE in several dimensions, or by layer": (
                "rope.dimension_sections rope.dimension_count_swa rope.freq_base_swa",
                NO,
            ),
            "another RoPE scaling": ("rope.scaling.yarn_log_multiplier", NO),
            "dynamic RoPE scaling": ("rope.scaling.alpha", (0, 1)),
            "YaRN in part": ("rope.scaling.yarn_ext_factor", (-1, 1)),
            "attention and MLP side by side": ("use_parallel_residual", NO),
            "another order of the rows of queries and keys": ("tensor_data_layout", ("Meta AI original pth",)),
            "another norm": (
                "attention.layer_norm_epsilon attention.group_norm_epsilon attention.group_norm_groups swin_norm",
                NO,
            ),
            "attention of low rank": (
                """attention.q_lora_rank attention.kv_lora_rank attention.decay_lora_rank attention.iclr_lora_rank
            attention.value_residual_mix_lora_rank attention.gate_lora_rank attention.key_length_mla
            attention.value_length_mla attention.indexer.head_count attention.indexer.key_length
            attention.indexer.top_k""",
                NO,
            ),
            "another kind of layer": (
                """nextn_predict_layers n_deepstack_layers decoder_start_token_id decoder_block_count
            rescale_every_n_layers time_mix_extra_dim time_decay_extra_dim token_shift_count altup.active_idx
            altup.num_inputs embedding_length_per_layer_input features_length ssm.conv_kernel ssm.inner_size
            ssm.state_size ssm.time_step_rank ssm.group_count ssm.dt_b_c_rms kda.head_dim wkv.head_size
            posnet.embedding_length posnet.block_count convnext.embedding_length convnext.block_count
            shortconv.l_cache""",
                NO,
            ),
            "another output than tokens": (
                """embedding_length_out dense_2_feat_in dense_2_feat_out dense_3_feat_in dense_3_feat_out
            classifier.output_labels""",
                NO,
            ),
        }
    ),
    # Of experts that are not there; of an embedding that is made from the outputs; said, but used by nobody.
    silent=_llama(["expert_used_count", "pooling_type", "rope.scaling.finetuned"]),
    silent_prefixes=("general.", "tokenizer.", "split.", "quantize.", "imatrix.", "llama_jax.", "mradermacher."),
    refused_prefixes={
        "llama.": "no key of this architecture that is known",
        "adapter.": "an adapter, not a model; merge it into its base model",
        "clip.": "the encoder of a vision or sound model",
        "diffusion.": "a diffusion model",
        "xielu.": "another activation",
    },
)

TABLES: dict[ConfigFormat, KeyTable] = {"hf": _HF, "native": _HF, "meta": _META, "gguf": _GGUF}
