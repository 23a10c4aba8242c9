"""`make_plan`: what a step needs on a machine, by its compiler where that is installed, and by arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from llama_jax import sharding
from llama_jax.costs import estimate
from llama_jax.costs.estimate import Memory, Roofline, Work, Workload
from llama_jax.costs.machines import available_bytes
from llama_jax.ops.attention import check_implementation
from llama_jax.plan import compiler, hlo, program
from llama_jax.plan.compiler import Compiled
from llama_jax.plan.floor import lower_floor
from llama_jax.sharding import mesh_text
from llama_jax.typing import JsonObject


@dataclasses.dataclass(frozen=True)
class CostPlan:
    """A plan; bytes of each device.

    Attributes:
      job: what was planned.
      arithmetic: its memory by arithmetic.
      work: what it has to do, by arithmetic.
      roofline: the least time of that, with the FLOPs of the compiled program.
      available_bytes: what a program may use of a device.
      compiled: what the compiler says; None where it was not asked.
      sizes: bytes of parameters, optimizer and cache among the arguments, as the program has them; None likewise.
      flops: of each device, counted in the compiled program, kernels by arithmetic.
      traffic_bytes: that the compiled program's operations read and write in the device's memory; 0 where not known.
      estimated_cycles: the compiler's, of TPUs; 0 where not known.
      floor_cycles: of the products alone; 0 where not asked for.
      versions: of what was used.
      why_not: why the compiler was not asked.
    """

    job: Workload
    arithmetic: Memory
    work: Work
    roofline: Roofline
    available_bytes: int
    compiled: Compiled | None = None
    sizes: tuple[int, int, int] | None = None
    flops: float = 0
    traffic_bytes: int = 0
    estimated_cycles: int = 0
    floor_cycles: int = 0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    why_not: str = ""

    @property
    def fits(self) -> bool:
        """As the compiler says, else by arithmetic; and whether the host's memory holds its part, where it is known."""
        enough = self.host_bytes <= (self.job.machine.chip.host or self.host_bytes)
        return enough and (self.compiled.fits if self.compiled else self.peak_bytes <= self.available_bytes)

    @property
    def host_bytes(self) -> int:
        """As the compiler says, else by arithmetic."""
        return self.compiled.host_bytes if self.compiled else self.arithmetic.host

    @property
    def peak_bytes(self) -> int:
        """As the compiler says, else by arithmetic."""
        return self.compiled.peak_bytes if self.compiled else self.arithmetic.peak

    def as_json(self) -> JsonObject:
        """The figures under the names that scripts/plan.py --json documents."""
        job, compiled, memory = self.job, self.compiled, self.arithmetic
        parameters, optimizer, cache = self.sizes or (memory.parameters, memory.optimizer, memory.cache)
        return {
            "machine": job.machine.cloud_name,
            "mode": job.mode,
            "batch": job.batch,
            "seq_len": job.seq_len,
            "remat": job.remat if job.mode == "train" else None,
            "microbatches": job.microbatches,
            "mesh": dict(job.mesh) or {"tensor": 1},
            "devices": job.machine.devices,
            "fits": self.fits,
            "said_by": "compiler" if compiled else "arithmetic",
            "parameter_bytes": parameters,
            "optimizer_bytes": optimizer,
            "gradient_bytes": memory.gradients,
            "cache_bytes": cache,
            "argument_bytes": compiled.argument_bytes if compiled else memory.arguments,
            "temporary_bytes": compiled.temporary_bytes if compiled else memory.temporaries,
            "peak_bytes": self.peak_bytes,
            "host_bytes": self.host_bytes,
            "available_bytes": self.available_bytes,
            "arithmetic_peak_bytes": memory.peak,
            "flops": self.flops or self.work.flops,
            "traffic_bytes": self.traffic_bytes or self.work.memory_bytes,
            "link_bytes": self.work.link_bytes,
            "waited_bytes": self.work.waited_bytes,
            "network_bytes": self.work.network_bytes,
            "attention": job.attention,
            "compiler_options": dict(job.compiler_options),
            "why_not": self.why_not or None,
            "undivided": sharding.ShardingRules().undivided(job.config, job.ways),
            "estimated_cycles": self.estimated_cycles or None,
            "floor_cycles": self.floor_cycles or None,
            "roofline_seconds": self.roofline.seconds,
            "seconds": {
                name: getattr(self.roofline, name)
                for name in ("compute", "memory", "interconnect", "network", "waited")
            },
            "bound_by": self.roofline.bound_by,
            "mfu_bound": self.roofline.mfu,
            "tokens_per_second_bound": self.roofline.tokens_per_second,
            "compile_seconds": compiled.seconds if compiled else None,
            "compiler": self.versions,
        }


def by_arithmetic(job: Workload, why_not: str = "") -> CostPlan:
    """A plan without a compiler."""
    check(job)
    work = estimate.work(job)
    return CostPlan(
        job,
        estimate.memory(job),
        work,
        estimate.roofline(job, work),
        available_bytes(job.machine),
        why_not=why_not,
    )


def cost_plan(job: Workload, *, floor: bool = True, say: Callable[[str], None] = lambda text: None) -> CostPlan:
    """A plan by the compiler of the machine; by arithmetic where that is not installed.

    Args:
      job: what to plan.
      floor: whether to compile the floor program too, on TPUs.
      say: is told what is done, and what is waited for.

    Raises:
      ValueError: the job does not go together, or the compiler refuses it for another reason than memory.
    """
    plan = by_arithmetic(job)
    try:
        devices = compiler.devices(job.machine, say=say)
    except compiler.NoCompiler as error:
        return dataclasses.replace(plan, why_not=str(error))
    mesh = program.mesh_of_workload(job, devices)
    say(f"Tracing and compiling {job.mode} for {job.machine.cloud_name} (half a minute to three)")
    lowered = program.lower(job, mesh)
    compiled = compiler.compile(lowered, job.machine, job.compiler_options)
    tpu = job.machine.chip.platform == "tpu"
    sizes = (lowered.parameter_bytes, lowered.optimizer_bytes, lowered.cache_bytes)
    plan = dataclasses.replace(plan, compiled=compiled, sizes=sizes, versions=compiler.versions(job.machine))
    if not compiled.fits or not compiled.text:
        return plan
    kernels = [(name, times) for name, _, times in hlo.kernels(compiled.text)]
    flops = hlo.flops(compiled.text) + estimate.kernel_flops(job, kernels)
    plan = dataclasses.replace(
        plan,
        flops=flops,
        # Compilers that run out of memory compute more again than the policy says.
        roofline=estimate.roofline(job, dataclasses.replace(plan.work, flops=max(flops, plan.work.flops))),
        traffic_bytes=hlo.bytes_moved(compiled.text),
        estimated_cycles=hlo.estimated_cycles(compiled.text),
    )
    if floor and tpu:
        say("Compiling the floor program: the same products and nothing else")
        text = compiler.compile(lower_floor(job, mesh), job.machine, job.compiler_options).text
        plan = dataclasses.replace(plan, floor_cycles=job.microbatches * hlo.estimated_cycles(text) if text else 0)
    return plan


def check(job: Workload, *, batch: bool = True) -> None:
    """Raises ValueError for an inconsistent workload and suggests a consistent one; `batch=False` skips the batch."""
    config, machine, ways = job.config, job.machine, job.ways
    for name in ("batch", "seq_len", "microbatches"):
        if not 1 <= getattr(job, name) < 2**31:
            raise ValueError(f"{name} must be at least 1 and below 2**31, got {str(getattr(job, name))[:20]}")
    check_implementation(None if job.attention == "auto" else job.attention)
    kernel = job.attention.partition(":")[0]
    if (kernel, machine.chip.platform) in (("splash", "cuda"), ("cudnn", "tpu")):
        raise ValueError(f"attention {job.attention!r} is not for {machine.name}: leave it out, or give xla")
    if job.mode != "train" and job.microbatches > 1:
        raise ValueError(f"microbatches are of training: leave them out with --mode {job.mode}")
    if job.seq_len > config.max_seq_len:
        raise ValueError(f"seq ({job.seq_len}) is more than the model's context, {config.max_seq_len}")
    product = math.prod(job.mesh.values())
    if product != machine.devices:
        text = mesh_text(job.mesh)
        raise ValueError(
            f"mesh {text} multiplies to {product}, but {machine.name} has {machine.devices} devices; for example"
            f" {mesh_text(mesh_of_machine(job))}"
        )
    if machine.chip.platform == "tpu" and ways["data"] % machine.slices:
        raise ValueError(
            f"{machine.name} has {machine.slices} slices, which only data may span: make data a multiple of"
            f" {machine.slices}"
        )
    rows, parts = (job.batch, job.microbatches) if batch else (0, 1)
    if why := sharding.undivided_batch(ways, rows=rows, seq_len=job.seq_len, microbatches=parts):
        raise ValueError(why)


def mesh_of_machine(job: Workload) -> dict[str, int]:
    """All devices on fsdp for training, on tensor otherwise; slices on data."""
    slices = job.machine.slices if job.machine.chip.platform == "tpu" else 1
    axis = "fsdp" if job.mode == "train" else "tensor"
    return {name: size for name, size in (("data", slices), (axis, job.machine.devices // slices)) if size > 1}
