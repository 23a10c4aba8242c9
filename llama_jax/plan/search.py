"""The fastest configuration that fits: all by arithmetic, the best few by the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from llama_jax.costs import candidates
from llama_jax.costs.estimate import Workload
from llama_jax.plan.make import CostPlan, by_arithmetic, cost_plan
from llama_jax.sharding import mesh_text


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      compiled: plans by the compiler, the best first; empty without one.
      rest: plans by arithmetic of the others, the best first.
      best: the fastest that fits; None where none does.
    """

    compiled: list[CostPlan]
    rest: list[CostPlan]
    best: CostPlan | None


def search(
    job: Workload,
    *,
    mesh: dict[str, int] | None,
    remat: str | None,
    microbatches: int | None,
    compile: int,
    say: Callable[[str], None] = lambda text: None,
) -> Found:
    """Ranks meshes, remat policies and microbatches, and compiles the best of them.

    Args:
      job: what to plan; its mesh, remat and microbatches are open where the next three are None.
      mesh: as of `candidates.of`, like the next two.
      remat: see `mesh`.
      microbatches: see `mesh`.
      compile: how many to compile; 0 is none.
      say: is told what is done.

    Raises:
      ValueError: nothing divides the batch.
    """
    jobs = candidates.enumerate(job, mesh=mesh, remat=remat, microbatches=microbatches)
    if not jobs:
        raise ValueError(
            f"a batch of {job.batch} x {job.seq_len} divides on no mesh of {job.machine.devices} devices: give another"
            " --batch"
        )
    ranked = candidates.ranked(jobs)
    say(f"{len(ranked)} configurations ranked by arithmetic")
    compiled: list[CostPlan] = []
    for number, candidate in enumerate(ranked[:compile], start=1):
        say(f"{number} of {min(compile, len(ranked))}: {name(candidate)}")
        plan = cost_plan(candidate, floor=False, say=say)
        if plan.compiled is None:  # no compiler is here
            say(plan.why_not)
            break
        compiled.append(plan)
    compiled.sort(key=lambda plan: (not plan.fits, plan.roofline.expected, plan.estimated_cycles))
    rest = [by_arithmetic(candidate) for candidate in ranked[len(compiled) :]]
    best = next((plan for plan in (compiled or rest) if plan.fits), None)
    return Found(compiled, rest, best)


def name(job: Workload) -> str:
    """ "fsdp=16, full, 4 microbatches"."""
    mesh = mesh_text(job.mesh, "one device")
    if job.mode != "train":
        return mesh
    parts = f", {job.microbatches} microbatches" if job.microbatches > 1 else ""
    return f"{mesh}, {job.remat}{parts}"
