"""The recipes say what the papers say, and trace on sixteen devices."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

from llama_jax.train import build, checks
from llama_jax.train.recipe import Recipe
from tests.processes import ROOT
from tests.test_sharding import abstract_mesh

M, B, T = 1_000_000, 1_000_000_000, 1_000_000_000_000
FILES = sorted((ROOT / "configs").glob("*.py"))

# Of the papers: learning rate, its end as a share, warm-up, tokens of a step, length, tokens of the run, epsilon.
PAPERS = {
    "llama1_7b": (3e-4, 0.1, 2000, 4 * M, 2048, 1.0 * T, None),
    "llama1_13b": (3e-4, 0.1, 2000, 4 * M, 2048, 1.0 * T, None),
    "llama1_33b": (1.5e-4, 0.1, 2000, 4 * M, 2048, 1.4 * T, None),
    "llama1_65b": (1.5e-4, 0.1, 2000, 4 * M, 2048, 1.4 * T, None),
    "llama2_7b": (3e-4, 0.1, 2000, 4 * M, 4096, 2.0 * T, 1e-5),
    "llama2_70b": (1.5e-4, 0.1, 2000, 4 * M, 4096, 2.0 * T, 1e-5),
    "llama3_8b": (3e-4, 0.1, 8000, 16 * M, 8192, 15.0 * T, None),
    "llama3_70b": (1.5e-4, 0.1, 8000, 16 * M, 8192, 15.0 * T, None),
    "llama3_405b": (8e-5, 8e-7 / 8e-5, 8000, 16 * M, 8192, None, None),
}
PARAMETERS = {
    "llama1_7b": 6_738_415_616, "llama1_13b": 13_015_864_320, "llama1_33b": 32_528_943_616,
    "llama1_65b": 65_285_660_672, "llama2_7b": 6_738_415_616, "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "llama3_405b": 405_853_388_800,
}  # fmt: skip


def read(name: str) -> Recipe:
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["recipe"]()


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_are_those_of_the_papers(name):
    recipe = read(f"pretrain_{name}")
    peak, final, warmup, tokens, seq_len, total, eps = PAPERS[name]
    schedule, optimizer, batch = recipe.optimizer.schedule, recipe.optimizer, recipe.batch
    assert (schedule.kind, schedule.peak, schedule.warmup_steps) == ("cosine", peak, warmup)
    assert schedule.final == pytest.approx(final)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert optimizer.eps == (eps or 1e-8)
    assert batch.seq_len == seq_len == recipe.model.max_seq_len
    assert batch.sequences * seq_len == pytest.approx(tokens, rel=0.05)
    assert recipe.model.param_count() == PARAMETERS[name]
    if total:
        assert schedule.steps * batch.sequences * seq_len == pytest.approx(total, rel=1e-3)
    if name.startswith("llama1"):
        assert dict(zip(recipe.data.train, recipe.data.weights, strict=True))["data/commoncrawl"] == 0.67
        assert sum(recipe.data.weights) == pytest.approx(1)


def test_the_stages_of_405b():
    """4M tokens at 4096 up to 252M, 8M at 8192 up to 2.87T, then 16M; 15.6T tokens in 1,200,000 steps."""
    batches = checks.batch_schedule(read("pretrain_llama3_405b").batch)
    sizes = [(stage.from_tokens, *batches.shape(stage)[1:]) for stage in batches.stages]
    assert sizes == [(0, 1024, 4096), (252 * M, 1024, 8192), (2_870 * B, 2048, 8192)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_says_its_command(path):
    text = runpy.run_path(str(path))["__doc__"]
    assert f"python scripts/train.py configs/{path.name}" in text


def test_fields_are_overridden_on_the_command_line():
    command = ["scripts/train.py", "configs/pretrain_llama3_405b.py", "--print-config", "--steps", "7"]
    command += ["--optimizer.schedule.peak", "1e-5", "--data.train", "a", "b", "--data.weights", "1", "2"]
    command += ["--batch.stages.0.sequences", "256", "--remat", "full"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["steps"], found["optimizer"]["schedule"]["peak"], found["remat"]) == (7, 1e-5, "full")
    assert (found["data"]["train"], found["data"]["weights"]) == (["a", "b"], [1.0, 2.0])
    assert [stage["sequences"] for stage in found["batch"]["stages"]] == [256, 1024]


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_70b", "llama3_405b"])
@pytest.mark.parametrize("mesh", ["fsdp=16", "fsdp=2,tensor=8", "data=2,fsdp=2,context=2,tensor=2"])
def test_large_recipes_trace_on_sixteen_devices(name, mesh):
    """Two microbatches of 16 sequences; what a device holds is a sixteenth of the state, replicas over `data` apart."""
    recipe = read(f"pretrain_{name}")
    batch = dataclasses.replace(recipe.batch, sequences=32, microbatches=2, stages=())
    recipe = dataclasses.replace(recipe, batch=batch, dtype="bfloat16", attention="splash")
    with abstract_mesh(recipe.model, mesh):
        program, args = build.abstract_step(recipe)
        traced = program.trace(*args)
    state, _ = traced.out_info
    held = 0
    for before, after in zip(jax.tree.leaves(args[0]), jax.tree.leaves(state), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        if before.ndim:  # donated, so that both lie in the same place
            assert before.sharding.spec == after.sharding.spec
        held += int(np.prod(before.sharding.shard_shape(before.shape))) * before.dtype.itemsize
    replicas = 2 if mesh.startswith("data") else 1
    assert held == pytest.approx(12 * recipe.model.param_count() * replicas / 16, rel=0.01)
