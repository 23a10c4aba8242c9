"""Filters against transformers' and Meta's, and what is drawn against the probabilities that they leave."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_jax import Sampling
from llama_jax.infer.sampling import keep, sample

B, V = 16, 300


def random_logits(seed: int = 0) -> np.ndarray:
    """Rows from flat to sharp."""
    scale_B1 = np.linspace(0.1, 8, B)[:, None]
    return (scale_B1 * np.random.default_rng(seed).standard_normal((B, V))).astype(np.float32)


def kept(logits_BV: np.ndarray, **options) -> np.ndarray:
    values = Sampling(**{"temperature": 1.0} | options).values()
    return np.asarray(jax.jit(keep)(jnp.asarray(logits_BV) / values["temperature"], values))


def warped(logits_BV: np.ndarray, *warpers) -> np.ndarray:
    scores = torch.tensor(logits_BV)
    for warper in warpers:
        scores = warper(torch.zeros((len(logits_BV), 0), dtype=torch.long), scores)
    return scores.numpy()


def assert_same(ours_BV: np.ndarray, theirs_BV: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isfinite(ours_BV), np.isfinite(theirs_BV))
    np.testing.assert_allclose(ours_BV, theirs_BV, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"top_k": 1}, [TopKLogitsWarper(1)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_k": V + 5}, []),
        ({"top_p": 0.1}, [TopPLogitsWarper(0.1)]),
        ({"top_p": 0.9}, [TopPLogitsWarper(0.9)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"temperature": 0.3}, [TemperatureLogitsWarper(0.3)]),
        (
            {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.1},
            [TemperatureLogitsWarper(0.6), TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_filters_of_transformers(options, warpers):
    logits_BV = random_logits()
    assert_same(kept(logits_BV, **options), warped(logits_BV, *warpers))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_is_metas_rule(p):
    """llama/generation.py: `mask = probs_sum - probs_sort > p`: the token that crosses p is kept."""
    logits_BV = random_logits(1)
    expected_BV = np.zeros((B, V), bool)
    for row, logits_V in enumerate(logits_BV):
        probs_V = np.exp(logits_V - logits_V.max())
        probs_V /= probs_V.sum()
        order_V = np.argsort(-probs_V)
        sorted_V = probs_V[order_V]
        mask_V = np.cumsum(sorted_V) - sorted_V > p
        expected_BV[row, order_V[~mask_V]] = True
        assert probs_V[expected_BV[row]].sum() > p  # and without the last one it is not
        assert np.cumsum(sorted_V)[expected_BV[row].sum() - 2] <= p or expected_BV[row].sum() == 1
    np.testing.assert_array_equal(np.isfinite(kept(logits_BV, top_p=p)), expected_BV)


def test_top_p_of_what_top_k_left():
    """0.5 of the two most likely tokens' probability, not of all: the first token has 0.6 of it."""
    logits_BV = np.log(np.array([[0.3, 0.2, 0.25, 0.15, 0.1]], np.float32))
    assert np.isfinite(kept(logits_BV, top_p=0.5))[0].tolist() == [True, False, True, False, False]
    assert np.isfinite(kept(logits_BV, top_k=2, top_p=0.5))[0].tolist() == [True, False, False, False, False]


def test_equally_likely_tokens_are_kept_together():
    """As in transformers' top-k; a cut among equals would depend on the order of the vocabulary."""
    logits_BV = np.array([[2.0, 1.0, 2.0, 1.0, 1.0]], np.float32)
    for options in ({"top_k": 3}, {"top_p": 0.75}):
        assert np.isfinite(kept(logits_BV, **options)).all()
    assert np.isfinite(kept(logits_BV, top_k=2))[0].tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_repetition_penalty_of_transformers(penalty, temperature):
    logits_BV, random = random_logits(2), np.random.default_rng(2)
    ids_BT = random.integers(0, V, (B, 40))
    seen_BV = np.zeros((B, V), bool)
    seen_BV[np.arange(B)[:, None], ids_BT] = True
    scores_BV = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids_BT), torch.tensor(logits_BV))
    # With top_k 1 at temperature 1 the most likely token again, by the other way.
    values = Sampling(temperature=temperature, repetition_penalty=penalty, top_k=1).values()
    key_B = jax.random.split(jax.random.key(0), B)
    token_B = sample(jnp.asarray(logits_BV), values, key_B, jnp.asarray(seen_BV))
    assert token_B.dtype == jnp.int32
    np.testing.assert_array_equal(token_B, scores_BV.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.2},
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(options):
    """20,000 draws over 16 tokens, each count within 4 standard deviations."""
    N = 20_000
    logits_V = jnp.linspace(-1, 2, 16)
    values = Sampling(**options).values()
    key_B = jax.random.split(jax.random.key(5), N)
    token_B = np.asarray(jax.jit(sample)(jnp.tile(logits_V, (N, 1)), values, key_B, None))
    expected_V = np.asarray(jax.nn.softmax(kept(logits_V[None], **options)[0]))
    count_V = np.bincount(token_B, minlength=16)
    assert (count_V[expected_V == 0] == 0).all()
    common = N * expected_V >= 10  # counts of rarer ones are not normally distributed
    assert common.sum() >= 5
    deviation_V = (count_V - N * expected_V)[common]
    assert (np.abs(deviation_V) <= 4 * np.sqrt(N * expected_V * (1 - expected_V))[common]).all()


def test_a_row_alone_is_the_row_of_a_batch():
    """Under jit and vmap alike."""
    logits_BV = jnp.asarray(random_logits(4))
    key_B = jax.random.split(jax.random.key(1), B)
    values = Sampling(temperature=0.8, top_k=20, min_p=0.01).values()
    together_B = jax.jit(sample)(logits_BV, values, key_B, None)
    alone = jax.jit(lambda row_V, key: sample(row_V[None], values, key[None], None)[0])
    np.testing.assert_array_equal(together_B, jax.vmap(alone)(logits_BV, key_B))
    assert alone(logits_BV[5], key_B[5]) == together_B[5]


def test_another_value_is_not_another_program():
    program = jax.jit(lambda *args: sample(*args))
    logits_BV, key_B = jnp.asarray(random_logits()), jax.random.split(jax.random.key(1), B)
    for options in ({"temperature": 0.3, "top_k": 5}, {"temperature": 1.7, "top_k": 90}):
        program(logits_BV, Sampling(**options).values(), key_B, None)
    assert program._cache_size() == 1
    program(logits_BV, Sampling(temperature=0.3).values(), key_B, None)
    assert program._cache_size() == 2


def test_filters_that_change_nothing_cost_nothing():
    assert Sampling(top_k=5, top_p=0.9, min_p=0.1).values() == {}  # temperature 0: the order does not change
    neutral = Sampling(temperature=1.0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert list(neutral.values()) == ["temperature"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0, or a finite number of at least 1e-6, got -0.1"),
        ({"temperature": float("nan")}, "temperature.*nan"),
        ({"temperature": float("inf")}, "temperature.*inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p.*1.1"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": 1.5}, "min_p.*1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive number"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty.*inf"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**32}, "seed must be from 0"),
    ],
    ids=str,
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
