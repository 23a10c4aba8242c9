"""One rule for what divides: planning, training, loading and generating say the same of the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest

import llama_jax
from llama_jax import sharding
from llama_jax.costs import candidates
from llama_jax.costs.estimate import Workload
from llama_jax.costs.machines import machine
from llama_jax.plan import report
from llama_jax.plan.make import by_arithmetic, check
from llama_jax.plan.request import of_recipe
from llama_jax.sharding import undivided_batch, whole_sequences
from llama_jax.train import build, loop
from llama_jax.train.loop import train
from llama_jax.train.optim import learning_rate
from llama_jax.train.recipe import Batch, Data, Optimizer, Recipe, Schedule, Stage
from tests.builders import tiny_config, write_hf
from tests.train.corpora import random_documents, write_corpus

UNEVEN = tiny_config(num_layers=1, num_heads=6, num_kv_heads=3, embed_dim=66, mlp_dim=161)
WHOLE = (
    "each device holds and computes all of some weights, because embed (66) does not divide by 4; mlp (161) does not"
    " divide by 2"
)


def recipe(mesh: str, **batch: Any) -> Recipe:
    return Recipe(
        model=tiny_config(), data=Data(train=()),
        batch=dataclasses.replace(Batch(seq_len=64, sequences=8, microbatches=1), **batch),
        optimizer=Optimizer(Schedule(peak=1e-3, steps=1)), mesh=mesh,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "batch", "words"),
    [
        ("context=8", {"seq_len": 63}, "a sequence of 63 tokens does not divide by context=8: make it 56 or 64 tokens"),
        ("context=8", {"seq_len": 7}, "a sequence of 7 tokens does not divide by context=8: make it 8 tokens long"),
        ("fsdp=4,context=2", {"seq_len": 33}, "a sequence of 33 tokens does not divide by context=2: make it 32 or 34"),
        ("fsdp=8", {"sequences": 12}, "a microbatch of 12 sequences does not divide among 8 devices (data x fsdp): make"
         " the batch 8 or 16, or put"),
        ("data=2,fsdp=4", {"sequences": 8, "microbatches": 2}, "a microbatch of 4 sequences does not divide among 8"
         " devices (data x fsdp): make the batch 16 (in 2 microbatches), or put"),
        ("tensor=8", {"seq_len": 63, "sequences": 3}, ""),
        ("fsdp=2,context=4", {"seq_len": 68, "sequences": 6}, ""),
    ],
)  # fmt: skip
def test_batches_and_lengths(mesh, batch, words):
    """The planner, a search and training have one verdict, in the same words."""
    sizes = sharding.parse_mesh(mesh)
    wanted = recipe(mesh, **batch)
    rows, T, M = wanted.batch.sequences, wanted.batch.seq_len, wanted.batch.microbatches
    job = Workload(wanted.model, machine("v5litepod-8"), "train", rows, T, sizes, microbatches=M)
    assert undivided_batch(sizes, rows=rows, seq_len=T, microbatches=M).startswith(words)
    assert bool(candidates.enumerate(job, mesh=sizes, remat="full", microbatches=M)) == (not words)
    if not words:
        check(job)
        assert build.mesh_of_recipe(wanted, wanted.model).size == 8
        return
    refusals = []
    for refuse in (lambda: check(job), lambda: build.mesh_of_recipe(wanted, wanted.model)):
        with pytest.raises(ValueError, match="does not divide") as refused:
            refuse()
        refusals.append(str(refused.value))
    assert refusals[0] == refusals[1] == undivided_batch(sizes, rows=rows, seq_len=T, microbatches=M)


def test_every_stage_of_a_run_divides():
    """The stage at half the length has 4 x 2 rows of 33."""
    stages = (Stage(1000, 4, split=2),)
    wanted = recipe("fsdp=4,context=2", seq_len=66, stages=stages)
    for refuse in (lambda: build.mesh_of_recipe(wanted, wanted.model), lambda: of_recipe(wanted, "v5litepod-8")):
        with pytest.raises(ValueError, match="a sequence of 33 tokens does not divide by context=2: make it 32 or 34"):
            refuse()


def test_weights_stay_whole_and_all_say_so(tmp_path, capsys, monkeypatch):
    """Loading (in tests/weights/test_load.py), planning and training: the same words."""
    job = Workload(UNEVEN, machine("v5litepod-8"), "train", 8, 32, sharding.parse_mesh("fsdp=4,tensor=2"))
    plan = by_arithmetic(job)
    assert plan.as_json()["undivided"] == ["embed (66) does not divide by 4", "mlp (161) does not divide by 2"]
    assert WHOLE[1:] in report.plan_text(plan, model="uneven")
    even = dataclasses.replace(job, config=tiny_config())
    assert "each device holds" not in report.plan_text(by_arithmetic(even), model="even").lower()

    write_corpus(tmp_path / "corpus", random_documents(40))
    options = {"data": Data(train=(str(tmp_path / "corpus"),)), "model": UNEVEN, "tensorboard": False}
    wanted = recipe("fsdp=4,tensor=2", seq_len=32)
    monkeypatch.setattr(loop.TrainingRun, "go", loop.TrainingRun._introduce)  # what comes after would only take time
    train(dataclasses.replace(wanted, **options, output=str(tmp_path / "run")))
    assert capsys.readouterr().err.count(WHOLE) == 1


def test_generation_says_what_it_computes_whole(tmp_path, caplog):
    """63 tokens on context=2: right all the same, and said once."""
    write_hf(tmp_path, tiny_config())
    llama = llama_jax.load(tmp_path, mesh="context=2,tensor=4", dtype="float32")
    whole_sequences.cache_clear()
    tokens = np.arange(63)[None] % 200
    found = [np.asarray(llama_jax.logits(llama, tokens)) for _ in range(2)][1]
    assert [record.getMessage() for record in caplog.records] == [
        "each device holds and computes all of a sequence, because its 63 tokens do not divide by context=2"
    ]
    split = np.asarray(llama_jax.logits(llama, np.pad(tokens, ((0, 0), (0, 1)))))[:, :63]
    np.testing.assert_allclose(found, split, rtol=0, atol=1e-5)
    assert len(caplog.records) == 1


def test_the_last_learning_rate_is_as_optax_counts():
    """Twelve updates, 0 to 11, linear to a tenth: 1 - 0.9 * 11 / 12 = 0.175 at the last, 0.1 only at number 12."""
    rate = learning_rate(Schedule(peak=1.0, steps=12, kind="linear", final=0.1))
    optimizer = optax.sgd(optax.linear_schedule(1.0, 0.1, 12))  # what it subtracts is its rate
    state, last = optimizer.init(jax.numpy.zeros(())), []
    for _ in range(13):
        updates, state = optimizer.update(jax.numpy.ones(()), state)
        last.append(-np.asarray(updates))
    np.testing.assert_allclose([np.asarray(rate(i)) for i in range(13)], last, rtol=1e-6)
    np.testing.assert_allclose(last[11:], [0.175, 0.1], rtol=1e-6)
