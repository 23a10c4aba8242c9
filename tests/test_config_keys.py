"""Every key that the installed packages know is in one class of our tables, and does what its class says."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import transformers
from gguf.constants import Keys
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

import llama_jax
from llama_jax.config import ConfigError, ModelConfig
from llama_jax.config.gguf import from_gguf_metadata, to_gguf_metadata
from llama_jax.config.hf import from_hf_config, to_hf_config
from llama_jax.config.keys import ROPE_KEYS, ROPE_TABLE, TABLES, KeyTable, ignored_keys
from llama_jax.config.meta import from_meta_params, to_meta_params
from llama_jax.config.presets import PRESETS
from tests.builders import hf_model, tiny_config, write_gguf

CONFIG = tiny_config(num_kv_heads=8)
HF, META, GGUF = TABLES["hf"], TABLES["meta"], TABLES["gguf"]
HF_BASE, META_BASE, GGUF_BASE = to_hf_config(CONFIG, dtype="float32"), to_meta_params(CONFIG), to_gguf_metadata(CONFIG)


def read_gguf(**changes) -> ModelConfig:
    metadata = GGUF_BASE | changes
    return from_gguf_metadata({k: v for k, v in metadata.items() if v is not ...}, tie_embeddings=False)


def read_hf(**changes) -> ModelConfig:
    return from_hf_config({key: value for key, value in (HF_BASE | changes).items() if value is not ...})


def read_meta(**changes) -> ModelConfig:
    return from_meta_params(META_BASE | changes, vocab_size=CONFIG.vocab_size)


def keys_of_gguf() -> list[str]:
    """What the gguf package names, for architecture llama."""

    def walk(group: type) -> Iterator[str]:
        for name, value in vars(group).items():
            if isinstance(value, type):
                yield from walk(value)
            elif isinstance(value, str) and not name.startswith("__"):
                yield value

    found = []
    for key in walk(Keys):
        for dense in ("dense_2", "dense_3") if "{dense}" in key else ("",):
            found.append(key.format(arch="llama", id=0, name="tool_use", dense=dense))
    return found


# Fields of ModelArgs in the package llama-models 0.3.0 (Meta's own), llama3/args.py and llama4/args.py; those of
# Llama 1 and 2 are among the first. `vision_model` is read by llama3's constructor.
LLAMA3_ARGS = """dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta
    use_scaled_rope max_batch_size max_seq_len vision_chunk_size vision_max_num_chunks
    vision_num_cross_attention_layers quantization_args lora_args vision_model""".split()
LLAMA4_ARGS = """dim n_layers n_heads n_kv_heads head_dim vocab_size multiple_of ffn_dim_multiplier ffn_exp norm_eps
    attention_chunk_size rope_theta use_scaled_rope rope_scaling_factor rope_high_freq_factor nope_layer_interval
    use_qk_norm attn_temperature_tuning floor_scale attn_scale vision_args moe_args quantization_args lora_args
    max_batch_size max_seq_len""".split()
# What LlamaConfig().to_dict() has in transformers 4.57.6 and no longer in 5.
TRANSFORMERS4_KEYS = """add_cross_attention bad_words_ids begin_suppress_tokens cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id is_decoder length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix
    pruned_heads remove_invalid_values repetition_penalty return_dict_in_generate rope_scaling rope_theta sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torchscript torch_dtype typical_p use_bfloat16""".split()


def keys_of_transformers() -> set[str]:
    fields = {field.name for field in dataclasses.fields(transformers.LlamaConfig)}
    return fields | transformers.LlamaConfig().to_dict().keys() | set(TRANSFORMERS4_KEYS)


@pytest.mark.parametrize(
    ("table", "keys"),
    [
        (GGUF, keys_of_gguf()),
        (HF, sorted(keys_of_transformers())),
        (META, sorted({*LLAMA3_ARGS, *LLAMA4_ARGS})),
        (ROPE_TABLE, sorted(RopeParameters.__annotations__)),
    ],
    ids=["gguf", "transformers", "llama-models", "RopeParameters"],
)
def test_every_key_of_the_packages_has_a_class(table, keys):
    assert len(keys) > 10
    assert not [key for key in keys if table.class_of(key) is None]


@pytest.mark.parametrize("table", [HF, META, GGUF, ROPE_TABLE], ids=lambda table: table.where)
def test_no_key_has_two_classes(table: KeyTable):
    keys = [*table.computed, *table.silent, *(key for group in table.neutral.values() for key in group)]
    assert len(keys) == len(set(keys))


def test_every_kind_of_rope_of_transformers_is_computed_or_refused():
    for kind in ROPE_INIT_FUNCTIONS.keys() - ROPE_KEYS.keys():
        with pytest.raises(ConfigError, match=f"RoPE type '{kind}' is not supported: (?!it is unknown)"):
            read_hf(rope_scaling={"rope_type": kind, "factor": 2.0})


# -----------------------------------------------------------------------------------------------------------
# Neutral keys: refused by name under other values, and not seen under theirs
# -----------------------------------------------------------------------------------------------------------

NEUTRAL = [
    (read, key, values)
    for read, table in ((read_hf, HF), (read_meta, META), (read_gguf, GGUF))
    for group in table.neutral.values()
    for key, values in sorted(group.items())
]


def names(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", "")


@pytest.mark.parametrize(("read", "key", "values"), NEUTRAL, ids=names)
def test_neutral_keys(read: Callable[..., ModelConfig], key: str, values: tuple):
    """Null and the neutral values load alike and without a warning; another value is refused by its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (None, *values):
            assert read(**{key: value}) == read()
    other = "another" if values and isinstance(values[0], str) else 3
    for bad in (other, [*values, other], np.array([3, 3])) if read is read_gguf else (other,):
        with pytest.raises(ConfigError, match=f"{key} = .*changes the mathematics"):
            read(**{key: bad})


@pytest.mark.parametrize(
    "key", [key for key in keys_of_gguf() if GGUF.class_of(key) == "refused"] + ["llama.favourite_colour"]
)
def test_foreign_keys_of_gguf_are_refused(key):
    with pytest.raises(ConfigError, match=f"{key} = 3"):
        read_gguf(**{key: 3})


@pytest.mark.parametrize("key", ["vision_favourite", "moe_top_k", "rope_scaling", "rope_freq_base", "lora_rank"])
def test_foreign_keys_of_params_json_are_refused(key):
    assert read_meta(**{key: None}) == read_meta()
    with pytest.raises(ConfigError, match=f"{key} = 3"):
        read_meta(**{key: 3})


# -----------------------------------------------------------------------------------------------------------
# Computed keys: another value is another model
# -----------------------------------------------------------------------------------------------------------

YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
SCALED = {"use_scaled_rope": True}
YARN_ROPE = {
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "original_max_position_embeddings": 256,
}
# Key -> another value, and what else must be said for it to count. Either another model is read, or the key is refused.
OTHER_GGUF: dict[str, tuple[Any, dict[str, Any]]] = {
    "general.architecture": ("qwen2", {}),
    "general.type": ("adapter", {}),
    "llama.vocab_size": (300, {}),
    "llama.context_length": (4096, {}),
    "llama.embedding_length": (96, {}),
    "llama.block_count": (3, {}),
    "llama.feed_forward_length": (200, {}),
    "llama.attention.head_count": (16, {}),
    "llama.attention.head_count_kv": (4, {}),
    "llama.attention.key_length": (32, {}),
    "llama.attention.value_length": (32, {}),
    "llama.attention.layer_norm_rms_epsilon": (1e-6, {}),
    "llama.attention.scale": (0.5, {}),
    "llama.rope.dimension_count": (8, {}),
    "llama.rope.freq_base": (5e5, {}),
    "llama.rope.scale_linear": (4.0, {}),
    "llama.rope.scaling.type": ("longrope", {}),
    "llama.rope.scaling.factor": (4.0, {}),
    "llama.rope.scaling.attn_factor": (2.0, YARN),
    "llama.rope.scaling.original_context_length": (128, YARN),
    "llama.rope.scaling.yarn_attn_factor": (2.0, YARN),
    "llama.rope.scaling.yarn_beta_fast": (16.0, YARN),
    "llama.rope.scaling.yarn_beta_slow": (2.0, YARN),
}
OTHER_META: dict[str, tuple[Any, dict[str, Any]]] = {
    "dim": (128, {}),
    "n_layers": (3, {}),
    "n_heads": (16, {}),
    "n_kv_heads": (4, {}),
    "head_dim": (16, {}),
    "hidden_dim": (200, {}),
    "vocab_size": (300, {}),
    "multiple_of": (512, {}),
    "ffn_dim_multiplier": (4.0, {}),
    "norm_eps": (1e-6, {}),
    "rope_theta": (5e5, {}),
    "use_scaled_rope": (True, {}),
    "rope_scaling_factor": (32.0, SCALED),
    "rope_high_freq_factor": (2.0, SCALED),
}
OTHER_HF: dict[str, tuple[Any, dict[str, Any]]] = {
    "vocab_size": (300, {}),
    "hidden_size": (96, {}),
    "intermediate_size": (200, {}),
    "num_hidden_layers": (3, {}),
    "num_attention_heads": (16, {}),
    "num_key_value_heads": (4, {}),
    "head_dim": (32, {}),
    "rms_norm_eps": (1e-6, {}),
    "rope_theta": (5e5, {}),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {}),
    "rope_parameters": ({"rope_type": "linear", "factor": 2.0}, {}),
    "max_position_embeddings": (4096, {}),
    "tie_word_embeddings": (True, {}),
    "model_type": ("mistral", {}),
    "original_max_position_embeddings": (128, YARN_ROPE),
}
OTHER_ROPE: dict[str, tuple[Any, dict[str, Any]]] = {
    "rope_type": ("longrope", {"type": ..., "rope_type": "yarn"}),
    "type": ("longrope", {}),
    "rope_theta": (5e5, {}),
    "factor": (2.0, {}),
    "original_max_position_embeddings": (128, {}),
    "attention_factor": (2.0, {}),
    "beta_fast": (16.0, {}),
    "beta_slow": (2.0, {}),
    "mscale": (2.0, {"mscale_all_dim": 1.0}),
    "mscale_all_dim": (2.0, {"mscale": 1.0}),
    "truncate": (False, {}),
    "low_freq_factor": (0.5, {"rope_type": "llama3", "type": ..., "high_freq_factor": 4.0}),
    "high_freq_factor": (2.0, {"rope_type": "llama3", "type": ..., "low_freq_factor": 1.0}),
}


def read_rope(**changes) -> ModelConfig:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256} | changes
    rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | rope if rope.get("rope_type") == "llama3" else rope
    return read_hf(rope_theta=..., rope_scaling={key: value for key, value in rope.items() if value is not ...})


COMPUTED = [
    (read, table, key, *others[key])
    for read, table, others in (
        (read_gguf, GGUF, OTHER_GGUF),
        (read_meta, META, OTHER_META),
        (read_hf, HF, OTHER_HF),
        (read_rope, ROPE_TABLE, OTHER_ROPE),
    )
    for key in sorted(table.computed)
]


@pytest.mark.parametrize(("read", "table", "key", "value", "more"), COMPUTED, ids=names)
def test_computed_keys(read, table, key, value, more):
    base = read(**more)
    try:
        other = read(**more | {key: value})
    except ConfigError as error:
        assert key.rpartition(".")[2] in str(error) or repr(value) in str(error)  # noqa: PT017
    else:
        assert other != base


def test_head_dim_and_hidden_dim_of_params_json():
    assert read_meta(head_dim=16).head_dim == 16
    assert read_meta(hidden_dim=200, multiple_of=256).mlp_dim == 200


# -----------------------------------------------------------------------------------------------------------
# What is known, and what nobody knows
# -----------------------------------------------------------------------------------------------------------


def test_per_layer_values_of_gguf():
    """One number for each layer, as newer files have it: the same as one number where they are equal."""
    arrays = {
        "llama.feed_forward_length": np.full(2, CONFIG.mlp_dim, np.uint32),
        "llama.attention.head_count": np.full(2, CONFIG.num_heads, np.int32),
        "llama.attention.head_count_kv": [CONFIG.num_kv_heads] * 2,
        "llama.attention.sliding_window_pattern": [False, False],
    }
    assert read_gguf(**arrays) == CONFIG
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        with pytest.raises(ConfigError, match=f"llama.{key} differs from layer to layer"):
            read_gguf(**{f"llama.{key}": np.array([8, 16], np.uint32)})


def test_attention_scale_of_gguf():
    for scale in (0.0, float(np.float32(CONFIG.head_dim**-0.5))):
        assert read_gguf(**{"llama.attention.scale": scale}) == CONFIG


@pytest.mark.parametrize(
    ("read", "format", "key"),
    [
        (read_hf, "hf", "favourite_colour"),
        (read_meta, "meta", "favourite_colour"),
        (read_gguf, "gguf", "my_tool.favourite_colour"),
    ],
)
def test_unknown_keys_are_said_and_reported(read, format, key):
    with pytest.warns(UserWarning, match=f"ignored: {key}$"):
        assert read(**{key: 3}) == read()
    base = {"hf": HF_BASE, "meta": META_BASE, "gguf": GGUF_BASE}[format]
    assert ignored_keys(format, base) == []
    assert ignored_keys(format, base | {key: 3}) == [key]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(**{key: None}) == read()  # null says nothing


def test_unused_keys_of_rope_are_said_and_reported():
    rope = {"type": "linear", "factor": 2.0, "beta_fast": 32.0, "favourite_colour": "red"}
    with pytest.warns(UserWarning, match="'linear' does not use beta_fast, favourite_colour: ignored"):
        read_hf(rope_scaling=rope)
    found = ignored_keys("native", HF_BASE | {"rope_scaling": rope})
    assert found == ["rope_scaling.beta_fast", "rope_scaling.favourite_colour"]
    assert ignored_keys("meta", {"model": META_BASE | {"rope_scaling_factor": 8.0}}) == ["rope_scaling_factor"]


@pytest.mark.parametrize("name", ["llama2-7b", "llama3.1-8b", "llama3.2-1b", "smollm2-135m"])
def test_what_we_write_has_no_unknown_key(name):
    config = PRESETS[name]
    assert ignored_keys("hf", to_hf_config(config, dtype="bfloat16", transformers=5)) == []
    assert ignored_keys("meta", to_meta_params(config)) == []
    assert ignored_keys("gguf", to_gguf_metadata(config)) == []


def test_a_gguf_adapter_says_what_it_is():
    metadata = GGUF_BASE | {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
    with pytest.raises(ConfigError, match="general.type is 'adapter', a LoRA adapter: merge it"):
        from_gguf_metadata(metadata, tie_embeddings=False)


def test_refused_key_of_a_file(tmp_path):
    """The whole way: a GGUF file of the gguf package, with a window."""
    path = tmp_path / "x.gguf"
    write_gguf(path, CONFIG, hf_model(CONFIG), more=lambda writer: writer.add_sliding_window(128))
    with pytest.raises(ConfigError, match="x.gguf: GGUF metadata sets llama.attention.sliding_window = 128"):
        llama_jax.load(path)
