"""Which meshes, remat policies and microbatches a step can have on a machine, and which of them fit and are fast, by
arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from llama_jax.costs.estimate import Workload, memory, roofline, work
from llama_jax.costs.machines import Chip, Machine, available_bytes, sizes_of
from llama_jax.sharding import undivided_batch

REMATS = ("matmuls", "none", "attention", "full", "groups", "offload")  # of equals the first
MOST_TENSOR = 16  # devices on tensor that a search considers
SHARE = 0.9  # of the memory that a choice by arithmetic takes: the formula is within 15 % of the compilers


def enumerate(
    job: Workload, *, mesh: Mapping[str, int] | None = None, remat: str | None = None, microbatches: int | None = None
) -> list[Workload]:
    """Jobs like `job` on every sensible mesh, with every remat policy and number of microbatches; what is given stays.

    Sensible: slices on `data`, the rest on fsdp and tensor in powers of two, on context from 32,768 tokens on or where
    there are fewer sequences than devices; microbatches of 1, 2, 4, ... sequences for each device that has its own.
    """
    meshes = [mesh] if mesh is not None else _meshes(job)
    found = []
    for sizes in meshes:
        rows = sizes.get("data", 1) * sizes.get("fsdp", 1)
        if undivided_batch(sizes, rows=job.batch, seq_len=job.seq_len):
            continue
        each = job.batch // rows
        parts = [1] if job.mode != "train" else [each // n for n in _powers(each) if each % n == 0]
        for M in [microbatches] if microbatches else parts:
            if undivided_batch(sizes, rows=job.batch, seq_len=job.seq_len, microbatches=M):
                continue
            for policy in [remat] if remat else REMATS if job.mode == "train" else ("full",):
                if policy == "offload" and not job.machine.chip.host:
                    continue
                found.append(dataclasses.replace(job, mesh=sizes, remat=policy, microbatches=M))
    return found


def ranked(jobs: list[Workload], share: float = 1.0) -> list[Workload]:
    """Jobs that fit by arithmetic, the fastest first, then those that do not, the smallest first.

    By the bound of the roofline and the time of what is waited for, which nothing hides; of equals those without the
    host's memory, and with the least to do besides.

    Args:
      jobs: of one machine.
      share: of the memory that they may take.
    """

    def key(job: Workload) -> tuple[bool, float, bool, float]:
        bound, size = roofline(job, work(job)), memory(job)
        others = bound.compute + bound.memory + bound.interconnect + bound.network
        return (False, bound.expected, size.host > 0, others) if fits(job, share) else (True, size.peak, False, others)

    return sorted(jobs, key=key)


def fits(job: Workload, share: float = 1.0) -> bool:
    """Whether a job takes no more than a share of the memory of its devices, and of their host."""
    chip, size = job.machine.chip, memory(job)
    return size.peak <= share * available_bytes(job.machine) and size.host <= share * (chip.host or size.host)


def machines_that_fit(job: Workload, chips: Iterable[Chip]) -> list[Machine]:
    """The smallest machine of each kind on which some mesh and policy fits, by arithmetic; none for some kinds."""
    found = []
    for chip in chips:
        for other in sizes_of(chip):
            jobs = enumerate(dataclasses.replace(job, machine=other))
            if jobs and fits(ranked(jobs, SHARE)[0], SHARE):
                found.append(other)
                break
    return found


def _meshes(job: Workload) -> list[dict[str, int]]:
    slices = job.machine.slices if job.machine.chip.platform == "tpu" else 1
    devices = job.machine.devices // slices
    most = min(job.machine.devices_per_slice, MOST_TENSOR if job.mode == "train" else devices)  # no network between
    found = []
    for tensor in _powers(most):
        if devices % tensor:
            continue
        for context in _powers(devices // tensor):
            rest = devices // tensor
            if rest % context or (context > 1 and job.seq_len < 32_768 and job.batch >= rest * slices):
                continue
            sizes = {"data": slices, "fsdp": rest // context, "context": context, "tensor": tensor}
            found.append({axis: size for axis, size in sizes.items() if size > 1})
    return found


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})
