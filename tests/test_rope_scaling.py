"""Linear and YaRN scaling of RoPE: against transformers, in every format and both ways, and in decoding.

Weights have a deviation of 0.15, which makes attention sharp, and the text is longer than the original contexts.
Measured, with logits up to 5: largest difference to transformers 1e-5; without the scaling, logits move by 4 and more.
"""

from __future__ import annotations

import itertools
import json
import warnings

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import llama_jax
from llama_jax.config import ConfigError, LinearScaling, RopeScaling, YarnScaling, yarn_attention_factor
from llama_jax.config.gguf import from_gguf_metadata, rope_divisors, to_gguf_metadata
from llama_jax.config.hf import from_hf_config, to_hf_config
from llama_jax.config.meta import from_meta_params, meta_warnings, to_meta_extra, to_meta_params
from llama_jax.config.presets import PRESETS
from llama_jax.evaluate.compare import compare
from llama_jax.ops.rope import inverse_frequencies
from llama_jax.weights.formats.meta import embed_axis
from tests.builders import hf_config, hf_model, one_device, tiny_config, write_gguf
from tests.infer.helpers import random_ids, random_llama

CONFIG = tiny_config(vocab_size=128, num_kv_heads=2, head_dim=32, num_layers=2, max_seq_len=1024)
LENGTH, LAST, TOLERANCE = 1024, 64, 1e-4
USUAL = yarn_attention_factor(4.0)
ORIGINAL = "original_max_position_embeddings"
# What transformers is given -> what we must make of it.
KINDS = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, LinearScaling(4.0)),
    "linear, not a power of two": ({"rope_type": "linear", "factor": 2.7}, LinearScaling(2.7)),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 256}, YarnScaling(4.0, 256, USUAL)),
    "yarn, every key": (
        {
            "rope_type": "yarn", "factor": 4.0, ORIGINAL: 200, "attention_factor": 1.25, "beta_fast": 16.0,
            "beta_slow": 2.0, "truncate": False,
        },
        YarnScaling(4.0, 200, 1.25, 16.0, 2.0, truncate=False),
    ),
    "yarn, mscale": (
        {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 128, "mscale": 1.0, "mscale_all_dim": 0.7},
        YarnScaling(8.0, 128, yarn_attention_factor(8.0, 1.0, 0.7)),
    ),
}  # fmt: skip


def rescale(hf: transformers.LlamaForCausalLM, rope: dict) -> transformers.LlamaForCausalLM:
    """The same weights with another RoPE."""
    hf.config.rope_parameters = rope | {"rope_theta": CONFIG.rope_theta}
    hf.model.rotary_emb = LlamaRotaryEmbedding(hf.config)
    return hf


@pytest.fixture(scope="module")
def hf() -> transformers.LlamaForCausalLM:
    return hf_model(CONFIG, std=0.15, embed_std=0.02)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, LENGTH), np.int32)


def their_logits(hf, tokens) -> np.ndarray:
    with torch.no_grad():
        return hf(torch.from_numpy(tokens).long(), logits_to_keep=LAST, use_cache=False).logits.numpy()


def our_logits(path, tokens) -> tuple[np.ndarray, llama_jax.LoadedLlama]:
    llama = llama_jax.load(path, mesh=one_device(), dtype="float32")
    with jax.set_mesh(llama.mesh):
        return np.asarray(_last_logits(llama.model, tokens)), llama


@jax.jit
def _last_logits(model, tokens_BT):
    return model.logits(model.hidden(tokens_BT)[0][:, -LAST:])


@pytest.mark.parametrize("name", KINDS)
def test_logits_equal_transformers_in_every_format(name, hf, tokens, tmp_path):
    rope, scaling = KINDS[name]
    rescale(hf, rope).save_pretrained(tmp_path / "hf")
    expected = their_logits(hf, tokens)
    ours, llama = our_logits(tmp_path / "hf", tokens)
    assert llama.config == CONFIG.replace(rope_scaling=scaling)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    plain = their_logits(rescale(hf, {"rope_type": "default"}), tokens)
    assert np.abs(plain - expected).max() > 1000 * TOLERANCE  # another scaling would show

    path = tmp_path / "hf"
    for i, to in enumerate(("gguf", "native", "meta", "gguf", "hf")):
        result = llama_jax.convert(path, tmp_path / f"{i}{to}", to=to)
        path = tmp_path / f"{i}{to}"
        if to == "meta":
            assert any("without scaling" in text for text in result.warnings)
        if to == "gguf":
            found, _ = our_logits(path, tokens)
            np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    theirs = transformers.LlamaForCausalLM.from_pretrained(path, dtype="float32")
    np.testing.assert_allclose(their_logits(theirs, tokens), expected, rtol=0, atol=1e-5)


# -----------------------------------------------------------------------------------------------------------
# GGUF, as converters and old versions of llama.cpp wrote it
# -----------------------------------------------------------------------------------------------------------

LINEAR, YARN = gguf.RopeScalingType.LINEAR, gguf.RopeScalingType.YARN


def scale_linear(writer):
    writer.add_float32("llama.rope.scale_linear", 4.0)


@pytest.mark.parametrize(
    ("more", "rope"),
    [
        ([scale_linear], KINDS["linear"][0]),
        ([scale_linear, lambda w: w.add_rope_scaling_type(LINEAR)], KINDS["linear"][0]),
        ([lambda w: w.add_rope_scaling_factor(4.0)], KINDS["linear"][0]),  # llama.cpp takes "linear" for no type
        ([lambda w: w.add_rope_scaling_type(LINEAR), lambda w: w.add_rope_scaling_factor(4.0)], KINDS["linear"][0]),
        ([scale_linear, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE)], {"rope_type": "default"}),
        ([scale_linear, lambda w: w.add_rope_scaling_factor(1.0)], {"rope_type": "default"}),
        (
            [
                lambda w: w.add_rope_scaling_type(YARN),
                lambda w: w.add_rope_scaling_factor(4.0),
                lambda w: w.add_rope_scaling_orig_ctx_len(256),
                lambda w: w.add_rope_scaling_finetuned(True),
                lambda w: w.add_rope_scaling_yarn_ext_factor(1.0),
                lambda w: w.add_rope_scaling_yarn_beta_fast(16.0),
                lambda w: w.add_rope_scaling_yarn_beta_slow(2.0),
                lambda w: w.add_rope_scaling_attn_factors(1.5),
            ],
            {
                "rope_type": "yarn", "factor": 4.0, ORIGINAL: 256, "beta_fast": 16.0, "beta_slow": 2.0,
                "attention_factor": 1.5 * (0.1 * np.log(4.0) + 1),
            },
        ),
    ],
    ids=["scale_linear", "scale_linear, type", "no type", "linear", "none", "factor 1", "yarn"],
)  # fmt: skip
def test_gguf_keys_equal_transformers(more, rope, hf, tokens, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", CONFIG, hf, more=lambda writer: [add(writer) for add in more])
    expected = their_logits(rescale(hf, rope), tokens)
    ours, _ = our_logits(path, tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_verify_notices_a_lost_scaling(hf, tmp_path):
    plain = write_gguf(tmp_path / "plain.gguf", CONFIG, hf)
    scaled = write_gguf(tmp_path / "scaled.gguf", CONFIG, hf, more=scale_linear)
    found = compare(plain, scaled, with_logits=False)
    assert [problem for problem in found.problems(0) if "rope_scaling" in problem]


SCALING = "llama.rope.scaling."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "longrope"}, "scaling.type 'longrope'"),
        ({"type": "dynamic", "factor": 2.0}, "scaling.type 'dynamic'"),
        ({"type": "yarn"}, "scaling.type 'yarn', but the file does not say .*factor"),
        ({"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5"),
        ({"type": "yarn", "factor": 4.0, "yarn_attn_factor": 1.0}, "yarn_attn_factor = 1.0"),
        ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}, "yarn_log_multiplier = 0.1"),
        ({"attn_factor": 1.2}, "attn_factor = 1.2 without YaRN"),
        ({"type": "linear", "factor": -4.0}, "factor must be a positive number"),
        ({"type": "linear", "factor": "four"}, "factor must be a number"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused_gguf_scaling(changes, words):
    metadata = to_gguf_metadata(CONFIG) | {f"{SCALING}{key}": value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=words):
        from_gguf_metadata(metadata, tie_embeddings=False)


def test_gguf_keys_and_rope_freqs_together_are_refused():
    config = PRESETS["llama3.1-8b"]
    metadata = to_gguf_metadata(config) | {"llama.rope.scale_linear": 4.0}
    with pytest.raises(ConfigError, match="both llama.rope.scaling .*LinearScaling.* and rope_freqs.weight"):
        from_gguf_metadata(metadata, tie_embeddings=False, rope_divisors=rope_divisors(config))


# -----------------------------------------------------------------------------------------------------------
# config.json
# -----------------------------------------------------------------------------------------------------------


def test_frequencies_equal_transformers():
    """Bit for bit wherever the powers of theta are rounded alike, which they are but for a few."""
    turns = [(None, None, True), (16.0, 2.0, False), (4.0, 4.0, True)]
    for head_dim, theta, factor in itertools.product((8, 32, 128), (1e4, 5e5), (1.5, 4.0, 16.0)):
        config = tiny_config(head_dim=head_dim, rope_theta=theta)
        ours, theirs = inverse_frequencies(head_dim, theta, None), frequencies_of(config, {"rope_type": "default"})
        alike = ours == theirs[0]
        cases: list[tuple[dict, LinearScaling | YarnScaling]] = [
            ({"rope_type": "linear", "factor": factor}, LinearScaling(factor))
        ]
        for (fast, slow, truncate), original in itertools.product(turns, (5, 300, 8192)):
            rope = {"rope_type": "yarn", "factor": factor, ORIGINAL: original, "beta_fast": fast, "beta_slow": slow}
            usual = yarn_attention_factor(factor)
            scaling = YarnScaling(factor, original, usual, fast or 32.0, slow or 1.0, truncate)
            cases.append((rope | {"truncate": truncate}, scaling))
        for rope, scaling in cases:
            expected, attention = frequencies_of(config, rope)
            found = inverse_frequencies(head_dim, theta, scaling)
            np.testing.assert_array_equal(found[alike], expected[alike])
            np.testing.assert_allclose(found, expected, rtol=3e-7)
            assert scaling.cos_sin_factor == attention
            np.testing.assert_allclose(ours / scaling.divisors(head_dim, theta), expected, rtol=3e-6)


def frequencies_of(config, rope) -> tuple[np.ndarray, float]:
    theirs = hf_config(config)
    theirs.rope_parameters = rope | {"rope_theta": config.rope_theta}
    rotary = LlamaRotaryEmbedding(theirs)
    return rotary.inv_freq.numpy(), rotary.attention_scaling


def read(rope, key="rope_scaling", **more):
    return from_hf_config(to_hf_config(CONFIG, dtype="float32") | {key: rope} | more).rope_scaling


@pytest.mark.parametrize(
    ("rope", "more", "scaling"),
    [
        ({"type": "linear", "factor": 4}, {}, LinearScaling(4.0)),
        ({"type": "linear", "rope_type": "linear", "factor": 4.0}, {}, LinearScaling(4.0)),
        ({"type": "linear", "factor": 1.0}, {}, None),
        ({"type": "default"}, {}, None),
        ({"rope_type": "default", "type": None, "factor": None}, {}, None),
        ({}, {}, None),
        (False, {}, None),
        ({"type": "yarn", "factor": 4.0}, {ORIGINAL: 256}, YarnScaling(4.0, 256, USUAL)),
        ({"type": "yarn", "factor": 4.0, ORIGINAL: 256, "finetuned": True}, {}, YarnScaling(4.0, 256, USUAL)),
        ({"type": "yarn", "factor": 4.0, ORIGINAL: 256, "beta_fast": 0}, {}, YarnScaling(4.0, 256, USUAL)),
        ({"type": "yarn", "factor": 4.0, ORIGINAL: 256, "mscale": 2.0}, {}, YarnScaling(4.0, 256, USUAL)),
        (
            {"type": "yarn", "factor": 4.0, ORIGINAL: 256, "truncate": None},
            {},
            YarnScaling(4.0, 256, USUAL, truncate=False),
        ),
        ({"type": "yarn", "factor": 1.0, ORIGINAL: 256}, {}, None),
        ({"type": "yarn", "factor": 1.0, ORIGINAL: 256, "attention_factor": 1.5}, {}, YarnScaling(1.0, 256, 1.5)),
    ],
    ids=str,
)
def test_spellings_of_config_json(rope, more, scaling):
    """Values: transformers reads them so, which the second half checks."""
    assert read(rope, **more) == read(rope, "rope_parameters", **more) == scaling
    theirs = transformers.LlamaConfig(
        head_dim=32, max_position_embeddings=1024, rope_scaling=rope and {k: rope[k] for k in rope if k != "finetuned"}
    )  # fmt: skip
    for key, value in more.items():
        setattr(theirs, key, value)
    rotary = LlamaRotaryEmbedding(theirs)
    ours = inverse_frequencies(32, 1e4, scaling)
    np.testing.assert_allclose(ours, rotary.inv_freq.numpy(), rtol=3e-7)
    assert (scaling.cos_sin_factor if scaling else 1.0) == rotary.attention_scaling


@pytest.mark.parametrize(
    ("rope", "more", "words"),
    [
        ({"type": "dynamic", "factor": 2.0}, {}, "RoPE type 'dynamic' .*longest text of a batch.*set rope_scaling to"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, {}, "RoPE type 'longrope'"),
        ({"type": "su", "short_factor": [1.0]}, {}, "RoPE type 'su'"),
        ({"rope_type": "proportional"}, {}, "RoPE type 'proportional'"),
        ({"rope_type": ["linear"], "factor": 2.0}, {}, "type of RoPE must be a name, got .'linear'."),
        (
            {"full_attention": {"rope_type": "linear", "factor": 2.0}},
            {},
            "layers of type 'full_attention' is not supported",
        ),
        ({"type": "yarn", "factor": 2.0, ORIGINAL: 256.5}, {}, "must be an integer, got 256.5"),
        ({"rope_type": "ntk-by-eye"}, {}, "RoPE type 'ntk-by-eye' is not supported: it is unknown"),
        ({"rope_type": "default", "type": "linear", "factor": 2.0}, {}, "type of RoPE .* is both default and linear"),
        ({"type": "linear"}, {}, "rope_scaling does not say factor"),
        ({"type": "linear", "factor": "4x"}, {}, "factor must be a number, got '4x'"),
        ({"type": "linear", "factor": 0}, {}, "factor must be a positive number"),
        ({"type": "yarn", "factor": 2.0}, {}, "'yarn' needs original_max_pos.* takes max_pos.* .1024. for it"),
        ({"type": "yarn", "factor": 0.5}, {ORIGINAL: 256}, "factor >= 1"),
        ({"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 8}, {ORIGINAL: 256}, "beta_fast >= beta_slow"),
        ({"type": "yarn", "factor": 2.0, "truncate": "no"}, {ORIGINAL: 256}, "truncate must be true or false"),
        ({"type": "yarn", "factor": 2.0, "attn_factor": 0.5}, {ORIGINAL: 256}, "attn_factor = 0.5"),
        ({"type": "yarn", "factor": 2.0, ORIGINAL: 256}, {ORIGINAL: 512}, "is both 256.0 and 512.0"),
        ({"type": "yarn", "factor": 2.0, ORIGINAL: "many"}, {}, "must be a number, got 'many'"),
        ({"type": "yarn", "factor": 2.0, ORIGINAL: 256}, {"rope_theta": 1.0}, "YaRN needs rope_theta > 1"),
        ({"type": "default", "mrope_section": [2, 3, 3]}, {}, "mrope_section"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, {}, "partial_rotary_factor"),
        (
            {"type": "linear", "factor": 2.0},
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "contradict",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_refused_kinds_of_config_json(rope, more, words):
    with pytest.raises(ConfigError, match=words):
        read(rope, **more)


def test_the_base_may_be_said_in_either_object():
    hf = to_hf_config(CONFIG, dtype="float32")
    del hf["rope_theta"]
    hf["rope_parameters"] = {"rope_type": "linear", "factor": 2.0}
    hf["rope_scaling"] = {"type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert from_hf_config(hf) == CONFIG.replace(rope_scaling=LinearScaling(2.0), rope_theta=5e5)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", KINDS)
def test_config_json_round_trip(name, version):
    config = CONFIG.replace(rope_scaling=KINDS[name][1])
    written = json.loads(json.dumps(to_hf_config(config, dtype="float32", transformers=version)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_hf_config(written) == config
        theirs = transformers.LlamaConfig(**written)
        assert from_hf_config(theirs.to_dict()) == config


# -----------------------------------------------------------------------------------------------------------
# The other formats' configurations
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_meta_and_gguf_round_trip(name):
    config = PRESETS["llama2-7b"].replace(rope_scaling=KINDS[name][1], max_seq_len=16384)
    params, extra = json.loads(json.dumps([to_meta_params(config), to_meta_extra(config)]))
    assert "use_scaled_rope" not in params
    assert "rope_theta" not in params  # of its generation
    assert from_meta_params(params, extra=extra) == config
    assert embed_axis(config) == embed_axis(PRESETS["llama2-7b"]) == 1
    (text,) = meta_warnings(config)
    assert "without scaling" in text
    assert type(config.rope_scaling).__name__ in text

    stored = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in to_gguf_metadata(config).items()}
    divisors = rope_divisors(config)
    stored_divisors = None if divisors is None else np.asarray(divisors, np.float32).tolist()
    assert from_gguf_metadata(stored, tie_embeddings=False, rope_divisors=stored_divisors) == config


def test_our_own_gguf_key_must_agree_with_the_others():
    config = CONFIG.replace(rope_scaling=KINDS["yarn, mscale"][1])
    metadata = to_gguf_metadata(config)
    assert json.loads(metadata["llama_jax.rope_scaling"])["kind"] == "yarn"
    with pytest.raises(ConfigError, match="llama_jax.rope_scaling says YarnScaling.* something else"):
        from_gguf_metadata(metadata | {"llama.rope.scaling.factor": 2.0}, tie_embeddings=False)
    with pytest.raises(ConfigError, match="something else"):
        from_gguf_metadata(metadata, tie_embeddings=False, rope_divisors=[2.0] * 16)
    with pytest.raises(ConfigError, match="llama_jax.rope_scaling: .*char 0"):
        from_gguf_metadata(metadata | {"llama_jax.rope_scaling": "yarn"}, tie_embeddings=False)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"kind": "dynamic", "factor": 2.0}, "unknown kind 'dynamic'"),
        ({"kind": "linear"}, "give numbers for factor"),
        ({"kind": "linear", "factor": 0}, "positive"),
    ],
)
def test_refused_scaling_of_llama_jax_json(scaling, words):
    with pytest.raises(ConfigError, match=words):
        from_meta_params(to_meta_params(CONFIG), extra={"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("more", "scaling"),
    [
        ({"rope_scaling_factor": 32.0}, RopeScaling(32.0, 1.0, 4.0, 8192)),
        ({"rope_scaling_factor": 16, "rope_high_freq_factor": 2}, RopeScaling(16.0, 1.0, 2.0, 8192)),
        ({"rope_scaling_factor": None, "rope_high_freq_factor": None}, RopeScaling(8.0, 1.0, 4.0, 8192)),
        ({"dim": 2048, "n_layers": 16, "n_heads": 32}, RopeScaling(32.0, 1.0, 4.0, 8192)),
        ({"dim": 2048, "n_layers": 16, "n_heads": 32, "rope_scaling_factor": 8}, RopeScaling(8.0, 1.0, 4.0, 8192)),
    ],
)
def test_scaling_factor_of_params_json(more, scaling):
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 300, "use_scaled_rope": True}
    assert from_meta_params(params | more).rope_scaling == scaling


def test_a_factor_without_use_scaled_rope_is_said():
    """Meta's code ignores it."""
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 300, "rope_scaling_factor": 32.0}
    with pytest.warns(UserWarning, match="use_scaled_rope is not set, ignored: rope_scaling_factor"):
        assert from_meta_params(params).rope_scaling is None


# -----------------------------------------------------------------------------------------------------------
# Decoding
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [LinearScaling(4.0), YarnScaling(4.0, 16, USUAL)], ids=["linear", "yarn"])
def test_decoding_equals_the_whole_text(scaling):
    """The whole text meets transformers above."""
    llama = random_llama(tiny_config(rope_scaling=scaling))
    prompts = [random_ids(n) for n in (1, 17, 30)]
    completions = llama_jax.generate(llama, prompts, max_new_tokens=20, logprobs=True)
    rows = [prompt + completion.tokens for prompt, completion in zip(prompts, completions, strict=True)]
    tokens_BT = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = row
    expected_BTV = np.asarray(jax.nn.log_softmax(llama_jax.logits(llama, tokens_BT)))
    for prompt, completion, expected_TV in zip(prompts, completions, expected_BTV, strict=True):
        before = np.arange(len(prompt) - 1, len(prompt) + 19)
        assert completion.tokens == expected_TV[before].argmax(-1).tolist()
        np.testing.assert_allclose(completion.logprobs, expected_TV[before, completion.tokens], rtol=1e-5, atol=1e-5)
