"""Arithmetic against the compilers, and against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from llama_jax.config.presets import PRESETS
from llama_jax.costs import candidates, estimate, tuned
from llama_jax.costs.estimate import Workload
from llama_jax.costs.machines import machine
from llama_jax.costs.mfu import training_flops
from llama_jax.sharding import parse_mesh

ROWS = tuned.table()


def job(model: str, on: str, mode: estimate.Mode, batch: int, seq_len: int, mesh: str, **rest) -> Workload:
    return Workload(PRESETS[model], machine(on), mode, batch, seq_len, parse_mesh(mesh), **rest)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.mode}-{row.machine}")
def test_the_table_against_its_compilers(row):
    assert row.figures["fits"]
    assert row.figures["peak_bytes"] <= row.figures["available_bytes"]
    assert row.figures["compiler"]
    found = estimate.memory(row.job)
    assert found.peak == pytest.approx(row.figures["peak_bytes"], rel=0.15)
    for name, size in (("parameter", found.parameters), ("optimizer", found.optimizer), ("cache", found.cache)):
        assert size == pytest.approx(row.figures[f"{name}_bytes"], rel=0.01)
    work = estimate.work(row.job)
    assert work.flops == pytest.approx(row.figures["flops"], rel=0.15)


def test_the_rows_that_were_asked_for():
    rows = {(row.model, row.mode, row.machine) for row in ROWS}
    assert rows >= {
        ("llama3.1-8b", "train", "v5litepod-16"), ("llama3.1-8b", "train", "v6e-8"),
        ("llama3.1-70b", "train", "v5p-128"), ("llama2-70b", "train", "v6e-64"),
        ("llama3.1-405b", "train", "v6e-256"), ("llama3.1-8b", "train", "v5p-128"),
        ("llama3.1-8b", "train", "8xh100"), ("llama3.1-8b", "decode", "v5litepod-8"),
        ("llama3.1-8b", "decode", "h100"), ("llama3.1-70b", "decode", "v5litepod-16"),
        ("llama3.1-70b", "decode", "v5p-8"), ("llama3.1-70b", "decode", "8xh100"),
    }  # fmt: skip


def test_decoding_by_hand():
    """70B on 16 v5e: what each chip reads of 141 GB of weights, and the cache, at 819 GB/s."""
    found = job("llama3.1-70b", "v5litepod-16", "decode", 8, 2048, "tensor=16")
    memory, work = estimate.memory(found), estimate.work(found)
    assert memory.parameters == pytest.approx(2 * 70_553_706_496 / 16, rel=0.02)  # k and v are on two devices each
    assert memory.cache == 2 * 2 * 80 * 8 * 2048 * 1024 / 8  # each of the 8 heads on two devices
    used = memory.parameters - 2 * 128_256 * 8192 / 16 + memory.cache  # one row of the embedding
    assert work.memory_bytes == pytest.approx(used, rel=0.02)
    bound = estimate.roofline(found, work)
    assert bound.bound_by == "memory"
    assert bound.seconds == pytest.approx(used / 819e9, rel=0.02)
    assert bound.tokens_per_second == pytest.approx(8 / bound.seconds)


def test_training_by_hand():
    """8B on 16 v5e. Nothing computed again: MFU's own FLOPs, and three products of attention's kernels, which keep no
    scores. With full, a forward pass more but for the last product of each block and the head."""
    config = PRESETS["llama3.1-8b"]
    plain = job("llama3.1-8b", "v5litepod-16", "train", 16, 4096, "fsdp=16", remat="none")
    kernels = 3 * 4096 * 4096 * 4096 * 32  # two FLOPs, half of the keys
    assert estimate.work(plain).model_flops == pytest.approx(4096 * training_flops(config, 4096), rel=1e-3)
    assert estimate.work(plain).flops == pytest.approx(4096 * training_flops(config, 4096) + kernels, rel=1e-3)
    full = estimate.work(dataclasses.replace(plain, remat="full"))
    down = 2 * 4096 * 32 * 14336 * 4096
    head = 2 * 4096 * 4096 * 128_256
    forward = 4096 * training_flops(config, 4096) / 3
    assert full.flops - estimate.work(plain).flops == pytest.approx(forward - down - head, rel=1e-3)
    memory = estimate.memory(plain)
    assert memory.parameters == 4 * config.param_count() / 16
    # Every weight in bfloat16 to each chip, forward and backward, and its gradient back; the head in four chunks.
    blocks = 2 * (config.param_count() - 2 * 128_256 * 4096) * 15 / 16
    assert full.link_bytes == pytest.approx(3 * blocks + 4 * 2 * 2 * 128_256 * 4096 * 15 / 16, rel=0.01)


def test_slices_and_context():
    two = job("llama3.1-8b", "2xv5p-128", "train", 128, 4096, "data=2,fsdp=64")
    assert estimate.work(two).network_bytes == pytest.approx(2 * 8.03e9 / 64, rel=0.01)  # an all-reduce of halves
    long = job("llama3.1-8b", "v5p-128", "train", 8, 131_072, "fsdp=8,context=8")
    one = job("llama3.1-8b", "v5p-128", "train", 64, 16_384, "fsdp=64")
    assert estimate.memory(long).saved == estimate.memory(one).saved


def test_candidates_and_their_order():
    asked = job("llama2-70b", "v6e-64", "train", 64, 4096, "")
    jobs = candidates.enumerate(asked)
    assert {tuple(found.mesh.items()) for found in jobs} == {
        (("fsdp", 64),), (("fsdp", 32), ("tensor", 2)), (("fsdp", 16), ("tensor", 4)), (("fsdp", 8), ("tensor", 8)),
        (("fsdp", 4), ("tensor", 16)),
    }  # fmt: skip
    ranked = candidates.ranked(jobs)
    fitting = [found for found in ranked if candidates.fits(found)]
    assert ranked[: len(fitting)] == fitting
    times = [estimate.roofline(found, estimate.work(found)).expected for found in fitting]
    assert times == sorted(times)
    assert all(found.remat == "groups" for found in candidates.enumerate(asked, remat="groups"))


def test_what_would_fit():
    asked = job("llama3.1-405b", "v5litepod-16", "train", 16, 4096, "fsdp=16")
    found = {other.chip.name: other for other in candidates.machines_that_fit(asked, [machine("v6e-8").chip])}
    assert found["v6e"].cloud_name == "v6e-256"
    assert not candidates.machines_that_fit(asked, [asked.machine.chip])  # 405B is 19 GB of state on each of 256
