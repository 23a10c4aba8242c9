"""Rows of the engine: what one row asks for, and when it comes or leaves, is nothing to the others.

Single calls of `generate` are the other side here; tests of decode hold them against the forward pass, and tests of
sampling against transformers.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax import Sampling
from llama_jax.infer.decode import LENGTH, RUNNING, STOP
from llama_jax.infer.engine import Engine, Request
from tests.builders import slow, tiny_config
from tests.infer.helpers import random_ids, random_llama

CONFIG = tiny_config(num_layers=1, num_kv_heads=2, num_heads=4)
MESHES = ["tensor=1", "data=2,fsdp=2,tensor=2"]
SLOTS = 32  # of every cache: tests share their programs
PROMPTS = [random_ids(n) for n in (1, 5, 16, 12, 15, 9)]
SETTINGS = [
    Sampling(1.0, seed=11),
    Sampling(0.0, top_k=3, seed=12),
    Sampling(0.8, top_k=20, seed=2**32 - 1),
    Sampling(1.3, top_p=0.9, min_p=0.02, seed=14),
    Sampling(0.0, repetition_penalty=3.0, seed=15),
    Sampling(0.7, top_k=50, top_p=0.8, repetition_penalty=1.3, seed=16),
]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of the time of these tests is XLA's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def fields(name: str) -> list:
    return [getattr(sampling, name) for sampling in SETTINGS]


def options_of(sampling: Sampling) -> dict:
    return {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MESHES[0], slow(MESHES[1])])
def test_six_settings_in_one_batch_are_six_single_calls(mesh):
    """Different budgets too; and every seed matters."""
    llama, budgets = random_llama(CONFIG, mesh=mesh, max_seq_len=SLOTS), [12, 7, 1, 12, 9, 12]
    options = {name: fields(name) for name in Sampling.__dataclass_fields__}
    together = llama_jax.generate(llama, PROMPTS, max_new_tokens=budgets, logprobs=True, **options)
    for prompt, sampling, budget, ours in zip(PROMPTS, SETTINGS, budgets, together, strict=True):
        (alone,) = llama_jax.generate(llama, [prompt], max_new_tokens=budget, logprobs=True, **options_of(sampling))
        assert ours.tokens == alone.tokens
        assert (len(ours.tokens), ours.finish_reason) == (budget, "length")
        np.testing.assert_allclose(ours.logprobs, alone.logprobs, atol=1e-4)
    reseeded = llama_jax.generate(
        llama, PROMPTS, max_new_tokens=budgets, **options | {"seed": [s.seed ^ 1 for s in SETTINGS]}
    )
    same = [i for i, (a, b) in enumerate(zip(together, reseeded, strict=True)) if a.tokens == b.tokens]
    assert same in ([1, 4], [1, 2, 4])  # greedy rows, and perhaps the one of one token


def served(llama, arrivals, *, rows: int = 8, chunk: int = 3, leaves=()) -> dict[int, tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of each row of a state whose rows come and leave between chunks.

    Args:
      llama: the model.
      arrivals: {turn: [(row, prompt, sampling, budget)]}.
      rows: of the state.
      chunk: steps a turn.
      leaves: (turn, row): released before that turn.
    """
    found: dict[int, tuple[list[int], list[float]]] = {}
    with jax.set_mesh(llama.mesh):
        engine = Engine.of(llama)
        state = engine.empty(rows, SLOTS)
        for turn in range(8):
            for row in (row for when, row in leaves if when == turn):
                state = engine.release(state, row)
            for row, prompt, sampling, budget in arrivals.get(turn, ()):
                request = Request(prompt, budget, sampling)
                prefilled = engine.prefill([request], size=16, rows=1)
                state, found[row] = engine.insert(state, row, prefilled), ([], [])
            state, new = engine.steps(state, chunk)
            for row, (tokens, logprobs) in found.items():
                tokens += new.tokens[row]
                logprobs += new.logprobs[row]
            assert all(not tokens for row, tokens in enumerate(new.tokens) if row not in found)
    return found


@pytest.mark.parametrize("mesh", [slow(MESHES[0]), MESHES[1]])
def test_rows_that_come_and_leave_change_no_other_row(mesh):
    """To the last bit; what a row gives is what `generate` gives, whenever it comes and wherever it is put."""
    llama = random_llama(CONFIG, mesh=mesh, max_seq_len=SLOTS)
    work = [(PROMPTS[i], SETTINGS[i], 12) for i in range(6)]
    alone = served(llama, {0: [(5, *work[0])]})[5]
    busy = served(
        llama,
        {0: [(5, *work[0]), (0, *work[1])], 1: [(7, *work[2])], 2: [(2, *work[3]), (1, *work[4])], 3: [(0, *work[5])]},
        leaves=[(2, 0), (3, 7)],
    )
    assert busy[5] == alone
    (expected,) = llama_jax.generate(llama, [PROMPTS[0]], max_new_tokens=12, **options_of(SETTINGS[0]))
    assert alone[0] == expected.tokens
    for row, i in ((2, 3), (1, 4), (0, 5)):
        (expected,) = llama_jax.generate(llama, [PROMPTS[i]], max_new_tokens=12, **options_of(SETTINGS[i]))
        assert busy[row][0] == expected.tokens
    assert len(busy[7][0]) == 6  # released after two turns


def test_a_greedy_state_samples_when_a_row_does():
    """Until then it runs the greedy program."""
    llama = random_llama(CONFIG, max_seq_len=SLOTS)
    found = served(llama, {0: [(0, PROMPTS[3], Sampling(), 12)], 2: [(1, PROMPTS[4], SETTINGS[3], 9)]}, rows=2)
    for row, prompt, sampling, budget in ((0, PROMPTS[3], Sampling(), 12), (1, PROMPTS[4], SETTINGS[3], 9)):
        (expected,) = llama_jax.generate(llama, [prompt], max_new_tokens=budget, **options_of(sampling))
        assert found[row][0] == expected.tokens


def test_a_step_gives_the_stop_id_and_its_probability():
    """`generate` leaves it out; more stop ids than the state has room for make room."""
    llama = random_llama(CONFIG, max_seq_len=SLOTS)
    (free,) = llama_jax.generate(llama, [PROMPTS[4]], max_new_tokens=12, logprobs=True)
    stop = free.tokens[5]
    end = free.tokens.index(stop)
    others = [token for token in range(256) if token not in free.tokens][:11]
    with jax.set_mesh(llama.mesh):
        engine = Engine.of(llama)
        state = engine.empty(2, SLOTS)
        request = Request(PROMPTS[4], 12, stop_ids=[*others, stop])
        state = engine.insert(state, 1, engine.prefill([request], size=SLOTS, rows=1))
        state, chunk = engine.steps(state, 11)
    assert chunk.tokens == [[], free.tokens[: end + 1]]
    np.testing.assert_allclose(chunk.logprobs[1], free.logprobs[: end + 1], atol=1e-5)
    assert chunk.finish.tolist() == [LENGTH, STOP]


def test_each_row_has_its_own_stop_ids():
    llama = random_llama(CONFIG, max_seq_len=SLOTS)
    (free,) = llama_jax.generate(llama, [PROMPTS[4]], max_new_tokens=12)
    with jax.set_mesh(llama.mesh):
        engine = Engine.of(llama)
        requests = [Request(PROMPTS[4], 12, stop_ids=stops) for stops in ((), free.tokens[3:4], free.tokens[6:7])]
        _, chunk = engine.steps(engine.prefill(requests, size=SLOTS), 8)
    ends = [8, *(free.tokens.index(free.tokens[i]) + 1 for i in (3, 6))]
    assert chunk.tokens == [free.tokens[:end] for end in ends]
    assert chunk.finish.tolist() == [RUNNING, STOP, STOP]


@pytest.fixture
def compilations():
    """Names of what JAX's own monitor says was compiled."""
    found = []

    def listen(event, _, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(about.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_after_the_first_calls(compilations):
    """One program for greedy batches, one for all others.

    Then 50 calls, each with another set of filters, and rows that come and leave.
    """
    config = dataclasses.replace(CONFIG, vocab_size=256 + 8)  # no other test has compiled it
    llama, random = random_llama(config, max_seq_len=SLOTS), np.random.default_rng(0)

    def ask(count: int = 3):
        settings = {
            "temperature": random.choice([0.0, 0.5, 1.2], count), "top_k": random.choice([None, 3, 40], count),
            "top_p": random.choice([None, 0.5, 0.9], count), "min_p": random.choice([None, 0.1], count),
            "repetition_penalty": random.choice([None, 1.2], count), "seed": random.integers(0, 2**32, count),
        }  # fmt: skip
        used = {name: values.tolist() for name, values in settings.items() if random.random() < 0.5}
        return llama_jax.generate(llama, PROMPTS[:count], max_new_tokens=random.integers(2, 6, count).tolist(), **used)

    def serve(i: int):
        sampling = Sampling(i % 3 / 2, top_k=3 + i, repetition_penalty=1 + i % 2)
        served(llama, {0: [(0, PROMPTS[1], sampling, 5)], 1: [(i % 2, PROMPTS[2], SETTINGS[i % 6], 4)]}, rows=2)

    llama_jax.generate(llama, PROMPTS[:3], max_new_tokens=5)
    llama_jax.generate(llama, PROMPTS[:3], max_new_tokens=5, temperature=1.0)
    assert compilations.count("jit(decode)") == 2
    serve(0)
    compilations.clear()
    for _ in range(50):
        ask()
    for i in range(6):
        serve(i)
    assert compilations == []
