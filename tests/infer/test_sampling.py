"""Filters against transformers' and Meta's, and what is drawn against the probabilities that they leave."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_jax import Sampling
from llama_jax.infer.generate import _samplings
from llama_jax.infer.sampling import keep, row_sampling, sample
from tests.builders import slow
from tests.infer import sorting

B, V = 16, 300


def random_logits(seed: int = 0) -> np.ndarray:
    """Rows from flat to sharp."""
    scale_B1 = np.linspace(0.1, 8, B)[:, None]
    return (scale_B1 * np.random.default_rng(seed).standard_normal((B, V))).astype(np.float32)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))):
        yield


def rows_of(samplings, seen=None, vocab_size: int = V):
    return row_sampling(samplings, seen or [()] * len(samplings), vocab_size, put=jnp.asarray)


def kept_of(logits_BV, samplings) -> np.ndarray:
    """The logits that the filters leave, each row's own; the others at -inf."""
    rows = rows_of(samplings, vocab_size=logits_BV.shape[-1])
    scaled_BV = jnp.asarray(logits_BV) / rows.temperature_B[:, None]
    _, kept_BV = KEEP(scaled_BV, rows, rows.temperature_B > 0)
    return np.where(kept_BV, scaled_BV, -np.inf)


KEEP, SAMPLE = jax.jit(keep), jax.jit(sample)


def kept(logits_BV: np.ndarray, **options) -> np.ndarray:
    return kept_of(logits_BV, [Sampling(**{"temperature": 1.0} | options)] * len(logits_BV))


def sampled(logits_BV, samplings, seen=None, position_B=None) -> np.ndarray:
    rows, count = rows_of(samplings, seen, logits_BV.shape[-1]), len(logits_BV)
    position_B = jnp.arange(count) if position_B is None else position_B
    return np.asarray(SAMPLE(jnp.asarray(logits_BV), rows, position_B, jnp.ones(count, bool)))


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
    asked = Sampling(temperature=temperature, repetition_penalty=penalty, top_k=1)
    token_B = sampled(logits_BV, [asked] * B, list(ids_BT))
    assert token_B.dtype == np.int32
    np.testing.assert_array_equal(token_B, scores_BV.argmax(-1))


def adversarial_logits() -> np.ndarray:
    """Rows of ties, -inf, one finite logit, equal logits, both zeros, and neighbours in float32."""
    random = np.random.default_rng(3)
    rows = [
        random.integers(-3, 3, V), random.integers(0, 2, V), np.zeros(V), np.full(V, -7.25),
        np.where(random.random(V) < 0.5, -np.inf, random.standard_normal(V)),
        np.where(random.random(V) < 0.99, -np.inf, random.integers(0, 3, V)),
        np.where(np.arange(V) == 17, 0.0, -np.inf), np.where(np.arange(V) == 299, 1e4, -1e4),
        np.where(random.random(V) < 0.5, 0.0, -0.0), np.linspace(-1e-38, 1e-38, V),
        np.nextafter(np.float32(1), np.float32(2) - np.arange(V) % 3), 1e-30 * random.standard_normal(V),
        -np.arange(V), 1e30 * random.standard_normal(V), np.sort(random.standard_normal(V)),
        np.log(np.r_[0.5, 0.25, 0.125, 0.125, np.full(V - 4, 1e-30)]),
    ]  # fmt: skip
    return np.asarray(rows, np.float32)


FILTERS = [
    {name: value for name, value in zip(("top_k", "top_p", "min_p"), values, strict=True) if value is not None}
    for values in itertools.product((None, 1, 2, 7, V - 1, V, 2**40), (None, 0.013, 0.317, 0.772, 0.9991, 1.0),
                                    (None, 0.0, 0.07, 1.0))
]  # fmt: skip


@pytest.mark.parametrize("which", ["random", "others", "adversarial"])
def test_the_threshold_keeps_what_sorting_keeps(which):
    """Every combination of filters on every row, one setting a row, in one program.

    Where tokens hold exactly p, the rounding of the sums decides: no p is a multiple of 1 / V.
    """
    logits_BV = adversarial_logits() if which == "adversarial" else random_logits(ord(which[0]))
    for temperature in (1.0, 0.7):
        asked = [Sampling(temperature, **options) for options in FILTERS]
        expected = [np.isfinite(sorting.keep(jnp.asarray(logits_BV) / temperature, sampling)) for sampling in asked]
        for first in range(len(FILTERS)):
            each = [(first + 11 * row) % len(FILTERS) for row in range(B)]
            found_BV = np.isfinite(kept_of(logits_BV, [asked[i] for i in each]))
            expected_BV = np.stack([expected[i][row] for row, i in enumerate(each)])
            wrong = [asked[i] for row, i in enumerate(each) if (found_BV != expected_BV)[row].any()]
            assert not wrong
    assert KEEP._cache_size() <= 3  # of all tests of this file


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
    token_B = sampled(jnp.tile(logits_V, (N, 1)), [Sampling(**options, seed=5)] * N)
    expected_V = np.asarray(jax.nn.softmax(kept(logits_V[None], **options)[0]))
    count_V = np.bincount(token_B, minlength=16)
    assert (count_V[expected_V == 0] == 0).all()
    common = N * expected_V >= 10  # counts of rarer ones are not normally distributed
    assert common.sum() >= 5
    deviation_V = (count_V - N * expected_V)[common]
    assert (np.abs(deviation_V) <= 4 * np.sqrt(N * expected_V * (1 - expected_V))[common]).all()


@pytest.mark.parametrize("seeds", ["one seed", slow("one position")])
@pytest.mark.parametrize("options", [{}, slow({"top_k": 400}), {"top_p": 0.95}], ids=str)
def test_chi_squared_of_draws(options, seeds):
    """40,000 draws from 1,000 tokens, four blocks, against the probabilities that sorting leaves.

    Draws by noise for the whole vocabulary, without the filter, pass only where there is none.
    """
    N, size = 40_000, 1000
    logits_V = np.random.default_rng(1).permutation(np.linspace(-3, 0.5, size)).astype(np.float32)
    asked = Sampling(temperature=0.8, **options)
    expected_V = N * np.asarray(jax.nn.softmax(sorting.keep(jnp.asarray(logits_V[None]) / 0.8, asked)[0]))

    def chi_squared(token_N):
        count_V = np.bincount(token_N, minlength=size)
        likely = expected_V >= 5
        if count_V[expected_V == 0].any():
            return 0
        statistic = ((count_V - expected_V)[likely] ** 2 / expected_V[likely]).sum()
        return scipy.stats.chi2.sf(statistic, likely.sum() - 1)

    rows = rows_of([asked] * 1000, vocab_size=size)
    tokens, free = [], []
    for i in range(0, N, 1000):
        vary, fixed = jnp.arange(i, i + 1000), jnp.full(1000, 11)
        seed_B, position_B = (fixed, vary) if seeds == "one seed" else (vary, fixed)
        rows = dataclasses.replace(rows, seed_B=seed_B.astype(jnp.uint32))
        batch = jnp.tile(logits_V, (1000, 1)), rows, position_B, jnp.ones(1000, bool)
        tokens.append(SAMPLE(*batch))
        free.append(sorting.sample(batch[0], Sampling(temperature=0.8), jax.random.key(i)))
    assert chi_squared(np.concatenate(tokens)) > 1e-3
    assert (chi_squared(np.concatenate(free)) > 1e-3) == (not options)


def test_a_row_alone_is_the_row_of_a_batch():
    """Whatever its place and its neighbours; rows at temperature 0 are greedy."""
    logits_BV = random_logits(4)
    samplings = [
        Sampling(0.8, seed=1), Sampling(1.0, top_k=20), Sampling(), Sampling(1.3, top_p=0.9, min_p=0.01, seed=9),
    ] * (B // 4)  # fmt: skip
    together_B = sampled(logits_BV, samplings)
    order = np.random.default_rng(0).permutation(B)
    moved_B = sampled(logits_BV[order], [samplings[i] for i in order], position_B=jnp.asarray(order))
    np.testing.assert_array_equal(moved_B, together_B[order])
    for i in range(B):
        alone = sampled(logits_BV[i : i + 1], [samplings[i]], position_B=jnp.asarray([i]))
        assert alone[0] == together_B[i]
    np.testing.assert_array_equal(together_B[2::4], logits_BV[2::4].argmax(-1))


def test_another_set_of_filters_is_not_another_program():
    program = jax.jit(lambda *args: sample(*args))
    logits_BV, some = jnp.asarray(random_logits()), jnp.arange(B)
    for options in ({"temperature": 0.3, "top_k": 5}, {"temperature": 1.7, "top_p": 0.9}, {"repetition_penalty": 1.2}):
        program(logits_BV, rows_of([Sampling(**options)] * B), some, jnp.ones(B, bool))
    assert program._cache_size() == 1


def test_neutral_values():
    """At temperature 0 the order does not change."""
    rows = rows_of([Sampling(top_k=5, top_p=0.9, min_p=0.1), Sampling(1.0)])
    for name, neutral in (("top_k", 2**31 - 1), ("top_p", 1), ("min_p", 0), ("penalty", 1)):
        assert getattr(rows, f"{name}_B").tolist() == [neutral] * 2
    assert Sampling(top_k=5, repetition_penalty=1.0).greedy
    assert not Sampling(repetition_penalty=1.1).greedy


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


def test_one_seed_counts_up_and_a_list_is_taken_as_it_is():
    """A NumPy number is a number too."""
    last = 2**32 - 1
    for seed, expected in ((7, [7, 8, 9]), (np.int64(7), [7, 8, 9]), (last, [last, 0, 1]), ([3, 4, 9], [3, 4, 9])):
        assert [x.seed for x in _samplings((0.5, None, None, None, None, seed), 3)] == expected
