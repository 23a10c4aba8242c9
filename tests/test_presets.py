"""Released models and their sizes, and ModelConfig to and from the three formats' own configurations."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import warnings

import jax
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import ConfigError, ModelConfig, RopeScaling
from llama_jax.config.gguf import from_gguf_metadata, rope_divisors, to_gguf_metadata
from llama_jax.config.hf import from_hf_config, to_hf_config
from llama_jax.config.meta import from_meta_params, meta_mlp_dim, meta_warnings, to_meta_extra, to_meta_params
from llama_jax.config.presets import PRESETS
from llama_jax.model import Llama
from llama_jax.ops.rope import inverse_frequencies
from llama_jax.sharding import make_mesh
from llama_jax.weights.formats.meta import embed_axis
from tests.builders import LLAMA31, LLAMA32, hf_config, tiny_config

PARAMETERS = {
    "llama1-7b": 6_738_415_616,
    "llama1-13b": 13_015_864_320,
    "llama1-33b": 32_528_943_616,
    "llama1-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-7b-chat": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-13b-chat": 13_015_864_320,
    "llama2-34b": 33_743_970_304,
    "llama2-34b-chat": 33_743_970_304,
    "llama2-70b": 68_976_648_192,
    "llama2-70b-chat": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-7b-instruct": 6_738_546_688,
    "codellama-7b-python": 6_738_415_616,
    "codellama-13b": 13_016_028_160,
    "codellama-13b-instruct": 13_016_028_160,
    "codellama-13b-python": 13_015_864_320,
    "codellama-34b": 33_743_970_304,
    "codellama-34b-instruct": 33_743_970_304,
    "codellama-34b-python": 33_743_970_304,
    "codellama-70b": 68_976_910_336,
    "codellama-70b-instruct": 68_976_910_336,
    "codellama-70b-python": 68_976_910_336,
    "llama3-8b": 8_030_261_248,
    "llama3-8b-instruct": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-70b-instruct": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-8b-instruct": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-70b-instruct": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.1-405b-instruct": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-1b-instruct": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.2-3b-instruct": 3_212_749_824,
    "llama3.3-70b-instruct": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-135m-instruct": 134_515_008,
}
DISTINCT = {config: name for name, config in reversed(PRESETS.items())}


def test_param_count():
    assert {name: config.param_count() for name, config in PRESETS.items()} == PARAMETERS


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
@pytest.mark.parametrize("name", DISTINCT.values())
def test_builds_abstractly(name, stacked):
    config = PRESETS[name]
    with jax.set_mesh(make_mesh(config, fsdp=2, tensor=4)):
        model = Llama(config, dtype="bfloat16", param_dtype="bfloat16", stacked=stacked, rngs=None)
    leaves = jax.tree.leaves(model)
    assert len(leaves) == 2 + (not config.tie_embeddings) + 9 * (1 if stacked else config.num_layers)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[name]
    split = [math.prod(leaf.shape) / math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    assert set(split) == {2.0, 8.0}  # norms, and SmolLM2's 3 kv heads, over fsdp alone


# -----------------------------------------------------------------------------------------------------------
# RoPE. Values: Meta's apply_scaling in float32.
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "scaling", "golden"),
    [
        (128, None, {28: 3.21144611e-03, 29: 2.61609908e-03, 35: 7.64497032e-04, 63: 2.45514070e-06}),
        (
            128,
            LLAMA31,
            {
                28: 3.21144611e-03,
                29: 2.16657063e-03,
                34: 1.78507791e-04,
                35: 9.55621290e-05,
                63: 3.06892588e-07,
            },
        ),
        (
            128,
            LLAMA32,
            {
                28: 3.21144611e-03,
                29: 2.11840682e-03,
                34: 9.70828623e-05,
                35: 2.38905322e-05,
                63: 7.67231469e-08,
            },
        ),
        (64, None, {15: 2.13111960e-03, 18: 6.22772437e-04}),
        (64, LLAMA32, {15: 1.29054801e-03, 18: 1.94616387e-05}),
    ],
)
def test_inverse_frequencies(head_dim, scaling, golden):
    frequencies = inverse_frequencies(head_dim, 5e5, scaling)
    assert frequencies.dtype == np.float32
    assert frequencies.shape == (head_dim // 2,)
    np.testing.assert_allclose(frequencies[list(golden)], list(golden.values()), rtol=1e-6)


@pytest.mark.parametrize(("head_dim", "unchanged", "divided"), [(128, 29, 35), (64, 15, 18)])
@pytest.mark.parametrize("scaling", [LLAMA31, LLAMA32], ids=["factor 8", "factor 32"])
def test_which_frequencies_are_scaled(head_dim, unchanged, divided, scaling):
    ratio = inverse_frequencies(head_dim, 5e5, None) / inverse_frequencies(head_dim, 5e5, scaling)
    np.testing.assert_array_equal(ratio[:unchanged], 1)
    assert (ratio[unchanged:divided] > 1).all()
    assert (ratio[unchanged:divided] < scaling.factor).all()
    np.testing.assert_allclose(ratio[divided:], scaling.factor, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama2-7b", "codellama-7b", "llama3-8b", "llama3.1-8b", "llama3.2-1b"])
def test_inverse_frequencies_equal_transformers(name):
    config = PRESETS[name]
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config(config))
    ours = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(ours, rotary.inv_freq.numpy(), rtol=2e-7)  # one rounding step


# -----------------------------------------------------------------------------------------------------------
# Hugging Face config.json
# -----------------------------------------------------------------------------------------------------------

# As published, in the spelling of transformers 4.
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
# Of the time before GQA: neither num_key_value_heads nor head_dim nor rope_theta.
LLAMA_1_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(("hf", "name"), [(LLAMA_32_1B, "llama3.2-1b"), (LLAMA_1_7B, "llama1-7b")])
def test_published_hf_config(hf, name):
    assert from_hf_config(hf) == PRESETS[name]


@pytest.mark.parametrize("transformers_version", [4, 5])
@pytest.mark.parametrize("name", DISTINCT.values())
def test_hf_config_round_trip(name, transformers_version):
    hf = to_hf_config(PRESETS[name], dtype="bfloat16", transformers=transformers_version)
    assert from_hf_config(json.loads(json.dumps(hf))) == PRESETS[name]
    assert ("rope_parameters" in hf, "dtype" in hf) == (transformers_version == 5,) * 2
    assert ("rope_theta" in hf, "torch_dtype" in hf) == (transformers_version == 4,) * 2


@pytest.mark.parametrize("name", ["llama1-7b", "llama2-70b", "codellama-34b", "llama3.1-405b", "llama3.2-1b"])
def test_hf_config_of_transformers(name):
    """What transformers writes we read, and what we write in either spelling it reads alike."""
    config = PRESETS[name]
    theirs = hf_config(config)
    with warnings.catch_warnings(record=True) as caught:  # none of its keys is unknown to us
        warnings.simplefilter("always")
        assert from_hf_config(theirs.to_dict()) == config
        assert from_hf_config(theirs.to_diff_dict()) == config
    assert not caught
    for version in (4, 5):
        read = transformers.LlamaConfig(**to_hf_config(config, dtype="bfloat16", transformers=version))
        assert str(read.dtype).removeprefix("torch.") == "bfloat16"
        assert from_hf_config(read.to_dict()) == config
        assert {k: v for k, v in read.rope_parameters.items() if v is not None} == theirs.rope_parameters
    with pytest.raises(ValueError, match="4 or 5"):
        to_hf_config(config, dtype="bfloat16", transformers=3)


def bad(changes, **more):
    hf = to_hf_config(tiny_config(rope_scaling=LLAMA31), dtype="float32") | changes | more
    return {key: value for key, value in hf.items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type 'yarn'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "RoPE type 'longrope'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "factor": 4.0,
                }
            },
            "RoPE type 'dynamic'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling does not say"),
        ({"rope_scaling": "llama3"}, "RoPE parameters"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling contradict"),
        (
            {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is both 500000.0 and 10000.0",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"qk_norm": True}, "qk_norm"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"intermediate_size": ...}, "intermediate_size"),
        ({"num_hidden_layers": ...}, "num_hidden_layers"),
        ({"num_attention_heads": ...}, "num_attention_heads"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_attention_heads": 0}, "heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_hidden_layers": "two"}, "num_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": 0}, "norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_refused_hf_config(changes, words):
    with pytest.raises(ConfigError, match=words):
        from_hf_config(bad(changes))


def test_unknown_hf_key_warns():
    with pytest.warns(UserWarning, match="ignored: favourite_colour$"):
        assert from_hf_config(bad({"favourite_colour": "red"})) == tiny_config(rope_scaling=LLAMA31)


def test_refused_rope_scaling():
    with pytest.raises(ConfigError, match="high_freq_factor"):
        RopeScaling(8.0, low_freq_factor=4.0, high_freq_factor=1.0, original_max_seq_len=8192)


# -----------------------------------------------------------------------------------------------------------
# Meta params.json
# -----------------------------------------------------------------------------------------------------------


def params(dim, layers, heads, kv_heads=None, *, eps=1e-5, multiple_of, **more):
    kv = {} if kv_heads is None else {"n_kv_heads": kv_heads}
    sizes = {"dim": dim, "n_layers": layers, "n_heads": heads, "multiple_of": multiple_of, "norm_eps": eps}
    return sizes | kv | more


LLAMA3 = {"vocab_size": 128256, "rope_theta": 500000.0}
LLAMA31_META = LLAMA3 | {"use_scaled_rope": True}
# As published; LLaMA 1 and Llama 2 say vocab_size -1, Code Llama says nothing.
META = {
    "llama1-7b": params(4096, 32, 32, multiple_of=256, eps=1e-6, vocab_size=-1),
    "llama1-65b": params(8192, 80, 64, multiple_of=256, vocab_size=-1),
    "llama2-7b": params(4096, 32, 32, multiple_of=256, vocab_size=-1),
    "llama2-70b": params(8192, 80, 64, 8, multiple_of=4096, ffn_dim_multiplier=1.3, vocab_size=-1),
    "codellama-7b": params(4096, 32, 32, multiple_of=256, ffn_dim_multiplier=1.0, rope_theta=1000000),
    "llama3-8b": params(4096, 32, 32, 8, multiple_of=1024, ffn_dim_multiplier=1.3, **LLAMA3),
    "llama3.1-8b": params(4096, 32, 32, 8, multiple_of=1024, ffn_dim_multiplier=1.3, **LLAMA31_META),
    "llama3.1-405b": params(16384, 126, 128, 8, multiple_of=4096, ffn_dim_multiplier=1.2, **LLAMA31_META),
    "llama3.2-1b": params(2048, 16, 32, 8, multiple_of=256, ffn_dim_multiplier=1.5, **LLAMA31_META),
    "llama3.2-3b": params(3072, 28, 24, 8, multiple_of=256, ffn_dim_multiplier=1.0, **LLAMA31_META),
}


@pytest.mark.parametrize("name", META)
def test_meta_params(name):
    vocab_size = None if META[name].get("vocab_size", -1) > 0 else PRESETS[name].vocab_size
    for file in (META[name], {"model": META[name]}):
        assert from_meta_params(file, vocab_size=vocab_size) == PRESETS[name]


# The argument names of each generation's ModelArgs, which refuses others (and takes max_seq_len from the command line).
LLAMA1_ARGS = {"dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps"}
LLAMA2_ARGS = LLAMA1_ARGS | {"n_kv_heads", "ffn_dim_multiplier"}
CODELLAMA_ARGS = LLAMA3_ARGS = LLAMA2_ARGS | {"rope_theta"}
LLAMA31_ARGS = LLAMA3_ARGS | {"use_scaled_rope"}
META_ARGS = {
    "llama1": LLAMA1_ARGS, "llama2": LLAMA2_ARGS, "codellama": CODELLAMA_ARGS, "llama3": LLAMA3_ARGS,
    "llama3.1": LLAMA31_ARGS, "llama3.2": LLAMA31_ARGS, "llama3.3": LLAMA31_ARGS, "smollm2": LLAMA3_ARGS,
}  # fmt: skip


@pytest.mark.parametrize("name", DISTINCT.values())
def test_meta_params_round_trip(name):
    """For all models of Meta's, the context and whether embeddings are tied follow from the other numbers."""
    config = PRESETS[name]
    params = json.loads(json.dumps(to_meta_params(config)))
    assert params.keys() <= META_ARGS[name.partition("-")[0]]
    assert ("n_kv_heads" in params) == (config.num_kv_heads < config.num_heads)
    assert ("use_scaled_rope" in params) == (config.max_seq_len == 131072)
    assert ("rope_theta" in params) == (config.rope_theta > 10000)
    extra = to_meta_extra(config)
    assert extra == ({"max_seq_len": 8192, "tie_embeddings": True} if name == "smollm2-135m" else {})
    assert from_meta_params(params, extra=extra) == config


@pytest.mark.parametrize("name", META)
def test_meta_params_are_the_published_ones(name):
    """Up to values that say the same."""
    ours, published = to_meta_params(PRESETS[name]), dict(META[name])
    assert ours["vocab_size"] == PRESETS[name].vocab_size
    for both in (ours, published):
        sizes = (both["dim"], both.pop("multiple_of"), both.pop("ffn_dim_multiplier", None))
        assert meta_mlp_dim(*sizes) == PRESETS[name].mlp_dim
        both.pop("vocab_size", None)
    assert ours == published


sizes = st.one_of(st.integers(1, 8), st.integers(1, 2**30 - 1), st.sampled_from([64, 2048, 3072, 4096, 8192]))
scalings = st.builds(
    RopeScaling,
    factor=st.sampled_from([1.0, 8.0, 8, 32.0, 4.5]),
    low_freq_factor=st.sampled_from([1.0, 0.5]),
    high_freq_factor=st.sampled_from([4.0, 1.5]),
    original_max_seq_len=st.sampled_from([8192, 4096]),
)


@st.composite
def configs(draw):
    kv_heads = draw(st.sampled_from([1, 2, 3, 8, 64]))
    return ModelConfig(
        vocab_size=draw(st.one_of(sizes, st.just(32000))),
        embed_dim=draw(sizes),
        mlp_dim=draw(sizes),
        num_layers=draw(st.sampled_from([1, 2, 16, 28, 32, 80])),
        num_heads=kv_heads * draw(st.integers(1, 9)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.sampled_from([1, 16, 32, 64])),
        norm_eps=draw(st.one_of(st.sampled_from([1e-5, 1e-6]), st.floats(1e-12, 1))),
        rope_theta=draw(st.one_of(st.sampled_from([1e4, 10000, 1e5, 5e5, 1e6]), st.floats(1e-3, 1e12))),
        rope_scaling=draw(st.one_of(st.none(), scalings)),
        max_seq_len=draw(st.sampled_from([1, 2048, 4096, 8192, 16384, 131072])),
        tie_embeddings=draw(st.booleans()),
    )


@settings(deadline=None)
@given(configs())
def test_meta_params_and_extra_say_everything(config):
    params, extra = json.loads(json.dumps([to_meta_params(config), to_meta_extra(config)]))
    assert from_meta_params(params, vocab_size=config.vocab_size, extra=extra) == config
    # ... and extra has no more than that: without any one of its keys, another model is read.
    for key in extra:
        rest = {other: value for other, value in extra.items() if other != key}
        with contextlib.suppress(ConfigError):  # dim / n_heads may be 0 or odd
            assert from_meta_params(params, vocab_size=config.vocab_size, extra=rest) != config


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"num_heads": 4}, "unknown keys: num_heads; known are head_dim"),
        ({"head_dim": "64"}, "head_dim"),
        ({"head_dim": None}, "head_dim"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"rope_theta": "5e5"}, "rope_theta"),
        ({"tie_embeddings": 1}, "tie_embeddings must be true or false"),
        ({"rope_scaling": 8}, "rope_scaling must be null or give numbers for factor, low_freq_factor"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling must be null or give"),
        ({"rope_scaling": {**dataclasses.asdict(LLAMA31), "type": 1}}, "rope_scaling must be null or give"),
        ({"rope_scaling": {**dataclasses.asdict(LLAMA31), "factor": "8"}}, "rope_scaling must be null or give"),
        ({"rope_scaling": {**dataclasses.asdict(LLAMA31), "factor": 0.5}}, "factor >= 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_refused_meta_extra(extra, words):
    with pytest.raises(ConfigError, match=words):
        from_meta_params(to_meta_params(PRESETS["llama3.1-8b"]), extra=extra)


def test_meta_extra_can_take_scaling_away():
    params = to_meta_params(PRESETS["llama3.1-8b"])
    read = from_meta_params(params, extra={"rope_scaling": None, "max_seq_len": 8192})
    assert read == PRESETS["llama3-8b"]


def test_meta_warnings():
    def warnings_of(**changes):
        return meta_warnings(PRESETS["llama3.1-8b"].replace(**changes))

    for name in DISTINCT.values():
        assert len(meta_warnings(PRESETS[name])) == (name in ("llama3.2-1b", "llama3.2-3b")), name
    (factor,) = meta_warnings(PRESETS["llama3.2-1b"])
    assert "factor=8.0" in factor
    assert "factor=32.0" in factor
    (factor,) = warnings_of(rope_scaling=dataclasses.replace(LLAMA31, original_max_seq_len=4096))
    assert "original_max_seq_len=4096" in factor
    (head_dim,) = warnings_of(head_dim=64)
    assert "cannot load" in head_dim
    assert "4096 / 32, and this model's have 64" in head_dim
    (theta,) = warnings_of(rope_theta=10000.0, rope_scaling=None)
    assert "rope_theta" in theta
    assert len(warnings_of(rope_scaling=LLAMA32, head_dim=64)) == 2


def test_meta_embed_axis():
    axes = {name: embed_axis(config) for name, config in PRESETS.items()}
    assert {name for name, axis in axes.items() if axis == 1} == {
        name for name in PRESETS if name.startswith(("llama1", "llama2", "codellama"))
    }
    assert set(axes.values()) == {0, 1}


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "mlp_dim"),
    [
        (4096, 256, None, 11008), (5120, 256, None, 13824), (6656, 256, None, 17920),
        (8192, 256, None, 22016), (8192, 256, 1.0, 22016), (8192, 4096, 1.3, 28672), (4096, 1024, 1.3, 14336),
        (16384, 4096, 1.2, 53248), (2048, 256, 1.5, 8192), (3072, 256, 1.0, 8192),
    ],
)  # fmt: skip
def test_meta_mlp_dim(dim, multiple_of, multiplier, mlp_dim):
    assert meta_mlp_dim(dim, multiple_of, multiplier) == mlp_dim


@pytest.mark.parametrize(("dim", "mlp_dim"), [(64, 160), (576, 1536), (1000, 3001), (64, 7), (4096, 12288)])
def test_meta_params_say_any_mlp_dim(dim, mlp_dim):
    config = tiny_config(embed_dim=dim, mlp_dim=mlp_dim, num_heads=4, head_dim=dim // 4)
    assert from_meta_params(to_meta_params(config)).mlp_dim == mlp_dim


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": None}, "dim"),
        ({"vocab_size": -1}, "vocab_size.*tok_embeddings"),
        ({"vision_chunk_size": 448}, "vision_chunk_size"),
        ({"quantization_args": {}}, "quantization_args"),
        ({"lora_args": {"rank": 16}}, "lora_args"),
        ({"moe_args": {}}, "moe_args"),
        ({"n_kv_heads": 3}, "num_kv_heads"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_refused_meta_params(changes, words):
    with pytest.raises(ConfigError, match=words):
        from_meta_params(to_meta_params(PRESETS["llama3-8b"]) | changes)


def test_unknown_meta_key_warns():
    with pytest.warns(UserWarning, match="ignored: favourite_colour$"):
        from_meta_params(to_meta_params(PRESETS["llama3-8b"]) | {"favourite_colour": "red"})


# -----------------------------------------------------------------------------------------------------------
# GGUF metadata
# -----------------------------------------------------------------------------------------------------------


def as_stored(config: ModelConfig):
    """Metadata and divisors as a file holds them: numbers in float32."""
    metadata = {
        key: float(np.float32(value)) if isinstance(value, float) else value
        for key, value in to_gguf_metadata(config).items()
    }
    divisors = rope_divisors(config)
    return metadata, None if divisors is None else np.asarray(divisors, np.float32).tolist()


@pytest.mark.parametrize("name", DISTINCT.values())
def test_gguf_metadata_round_trip(name):
    config = PRESETS[name]
    metadata, divisors = as_stored(config)
    read = from_gguf_metadata(metadata, tie_embeddings=config.tie_embeddings, rope_divisors=divisors)
    assert read == config


def test_rope_divisors():
    """Values: llama.cpp's converter, which works in float64."""
    divisors = rope_divisors(PRESETS["llama3.1-8b"])
    assert divisors is not None
    assert divisors[:29] == [1.0] * 29
    assert divisors[35:] == [8.0] * 29
    np.testing.assert_allclose(divisors[29], 2.61609908 / 2.16657063, rtol=1e-6)
    np.testing.assert_allclose(divisors[34], 9.38473851 / 1.78507791, rtol=1e-6)
    assert rope_divisors(PRESETS["llama3-8b"]) is None
    # A file without scaling may hold ones.
    metadata, _ = as_stored(PRESETS["llama3-8b"])
    read = from_gguf_metadata(metadata, tie_embeddings=False, rope_divisors=[1.0] * 64)
    assert read == PRESETS["llama3-8b"]


def test_gguf_vocabulary_from_tokens():
    metadata, _ = as_stored(PRESETS["llama2-7b"])
    del metadata["llama.vocab_size"]
    metadata["tokenizer.ggml.tokens"] = ["a"] * 32000
    assert from_gguf_metadata(metadata, tie_embeddings=False) == PRESETS["llama2-7b"]


@pytest.mark.parametrize(
    ("changes", "divisors", "words"),
    [
        ({"general.architecture": "qwen2"}, None, "general.architecture is 'qwen2'"),
        ({"llama.rope.scaling.type": "yarn"}, None, "llama.rope.scaling.type 'yarn'"),
        ({"llama.expert_count": 8}, None, "llama.expert_count"),
        ({"llama.rope.dimension_count": 64}, None, "llama.rope.dimension_count"),
        ({"llama.attention.value_length": 64}, None, "llama.attention.value_length"),
        ({"llama.embedding_length": None}, None, "llama.embedding_length"),
        ({"llama.block_count": None}, None, "llama.block_count"),
        ({}, [8.0] * 63, "rope_freqs.weight has 63"),
        ({}, [8.0] * 64, "rope_freqs.weight is not"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused_gguf_metadata(changes, divisors, words):
    metadata, _ = as_stored(PRESETS["llama3-8b"])
    with pytest.raises(ConfigError, match=words):
        from_gguf_metadata(metadata | changes, tie_embeddings=False, rope_divisors=divisors)
