"""Logits against Hugging Face transformers, in float32, for every variant of the architecture.

One sequence of 8704 tokens, longer than the 8192 of Llama 3.1's RoPE scaling: RoPE is relative, so that a
short sequence at a large offset would test nothing. Weights have a deviation of 0.15, which makes attention
sharp: with the usual 0.02 a wrong frequency moves logits by less than the tolerance. Embeddings are smaller
(0.02) where they are not also the output head, so that eps counts. Measured, with logits up to 8: largest
difference 2.6e-5, smallest negative control 0.7.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

import llama_jax
from llama_jax.config import ModelConfig
from tests.builders import LLAMA31, LLAMA32, hf_model, one_device, rebuild, slow, tiny_config, write_hf

LENGTH, LAST = 8704, 64
TOLERANCE = 1e-4

_SIZES = {
    "vocab_size": 512, "embed_dim": 128, "mlp_dim": 256, "head_dim": 32, "num_heads": 4, "num_kv_heads": 2,
    "max_seq_len": 131072,
}  # fmt: skip
VARIANTS = {
    "MHA, theta 1e4": tiny_config(**_SIZES | {"num_heads": 2}, rope_theta=1e4),
    "GQA, theta 1e6": tiny_config(**_SIZES | {"embed_dim": 96, "num_heads": 6}, rope_theta=1e6),
    "GQA, theta 5e5, factor 8": tiny_config(**_SIZES, rope_theta=5e5, rope_scaling=LLAMA31),
    "GQA, theta 5e5, factor 32, head_dim 64, tied": tiny_config(
        **_SIZES | {"head_dim": 64}, rope_theta=5e5, rope_scaling=LLAMA32, tie_embeddings=True
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A variant: its model as loaded, and the last logits of transformers and of ours."""

    llama: llama_jax.LoadedLlama
    tokens: np.ndarray
    expected: np.ndarray
    actual: np.ndarray


@pytest.fixture(scope="module")
def case_of(tmp_path_factory):
    @functools.cache
    def make(name: str) -> Case:
        config = VARIANTS[name]
        folder = tmp_path_factory.mktemp("variant")
        hf = write_hf(folder, config, std=0.15, embed_std=None if config.tie_embeddings else 0.02)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, LENGTH), np.int32)
        with torch.no_grad():
            output = hf(torch.from_numpy(tokens).long(), logits_to_keep=LAST, use_cache=False)
        llama = llama_jax.load(folder, mesh=one_device(), dtype="float32")
        assert llama.config == config
        return Case(llama, tokens, output.logits.numpy(), last_logits(llama, tokens))

    return make


def last_logits(llama, tokens, *, config: ModelConfig | None = None, leaves=None) -> np.ndarray:
    """Logits at the last positions, perhaps of the same weights under another configuration or of others."""
    with jax.set_mesh(llama.mesh):
        model = rebuild(llama.model, config or llama.config, leaves)
        return np.asarray(_last_logits(model, tokens))


@jax.jit
def _last_logits(model, tokens_BT):
    return model.logits(model.hidden(tokens_BT)[0][:, -LAST:])


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(case_of, name):
    case = case_of(name)
    assert case.actual.shape == case.expected.shape == (1, LAST, 512)
    assert np.abs(case.expected).max() > 4  # not equal because they are all small
    np.testing.assert_allclose(case.actual, case.expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        slow("MHA, theta 1e4", {"norm_eps": 1e-6}),
        slow("GQA, theta 5e5, factor 8", {"rope_theta": 1e4}),
        ("GQA, theta 5e5, factor 8", {"rope_scaling": None}),
        slow("GQA, theta 5e5, factor 32, head_dim 64, tied", {"rope_scaling": LLAMA31}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else ",".join(value),
)
def test_a_wrong_number_shows(case_of, name, changes):
    case = case_of(name)
    wrong = last_logits(case.llama, case.tokens, config=case.llama.config.replace(**changes))
    assert np.abs(wrong - case.actual).max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["MHA, theta 1e4", "GQA, theta 5e5, factor 32, head_dim 64, tied"])
def test_interleaved_pairs_show(case_of, name):
    """wq and wk in Meta's order, (2i, 2i + 1) a pair, as if the permutation had been forgotten."""
    case = case_of(name)
    half = case.llama.config.head_dim // 2

    def interleave(path, leaf):
        if "wq" not in jax.tree_util.keystr(path) and "wk" not in jax.tree_util.keystr(path):
            return leaf
        w = np.asarray(leaf)
        w = w.reshape(*w.shape[:-1], 2, half).swapaxes(-1, -2).reshape(w.shape)
        return jax.device_put(w, leaf.sharding)

    leaves = jax.tree.leaves(jax.tree_util.tree_map_with_path(interleave, case.llama.model))
    wrong = last_logits(case.llama, case.tokens, leaves=leaves)
    assert np.abs(wrong - case.actual).max() > 10 * TOLERANCE


def test_bfloat16(tmp_path):
    """Rounding in bfloat16 costs us no more than it costs transformers."""
    config = tiny_config(num_kv_heads=2, rope_theta=5e5, rope_scaling=LLAMA32, max_seq_len=131072)
    hf = hf_model(config)
    write_hf(tmp_path, hf)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 128), np.int32)
    with torch.no_grad():
        exact = hf(torch.from_numpy(tokens).long()).logits.numpy()
        rounded = hf.to(torch.bfloat16)(torch.from_numpy(tokens).long()).logits.float().numpy()
    llama = llama_jax.load(tmp_path, mesh=one_device(), dtype="bfloat16")
    ours = np.asarray(llama_jax.logits(llama, tokens))
    assert ours.dtype == np.float32

    def error(logits):
        return np.linalg.norm(logits - exact) / np.linalg.norm(exact)

    assert 1e-3 < error(ours) < 1.2 * error(rounded)
    assert error(rounded) < 0.05
