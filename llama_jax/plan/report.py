"""A plan in words, as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_jax.costs import candidates, tuned
from llama_jax.costs.estimate import Workload
from llama_jax.costs.machines import CHIPS
from llama_jax.plan.make import CostPlan
from llama_jax.plan.search import Found, name
from llama_jax.sharding import ShardingRules, mesh_text, whole_weights

COMPILER, ARITHMETIC, SHEET, LIMIT = "compiler", "arithmetic", "data sheet", "libtpu's limit"


def plan_text(plan: CostPlan, *, model: str, chosen_by: str = "", recipe: bool = False) -> str:
    """The whole plan; every line says who said it.

    Args:
      plan: what was found.
      model: its name.
      chosen_by: who chose mesh, remat and microbatches.
      recipe: whether options are named as `train.py` has them.
    """
    job, compiled, memory = plan.job, plan.compiled, plan.arithmetic
    parameters, optimizer, cache = plan.sizes or (memory.parameters, memory.optimizer, memory.cache)
    exact = COMPILER if compiled else ARITHMETIC
    what = {"train": "training step", "prefill": "prefill", "decode": "decode step"}[job.mode]
    sizes = f"{job.batch} x {job.seq_len} tokens" if job.mode != "decode" else f"batch {job.batch}, cache {job.seq_len}"
    count = job.machine.devices
    lines = [
        f"{model}, {what}, {sizes}, on {job.machine.cloud_name} ({count} device{'s' * (count > 1)}): {name(job)}",
        *([f"Mesh, remat and microbatches: {chosen_by}"] if chosen_by else []),
        "",
        "Memory of each device",
        _line("parameters", _gb(parameters), exact),
    ]
    if job.mode == "train":
        lines += [
            _line("optimizer state", _gb(optimizer), exact),
            _line("gradients", _gb(memory.gradients), ARITHMETIC, "among the temporaries"),
        ]
    if job.mode != "train":
        lines.append(_line("KV cache", _gb(cache), exact))
    temporary = compiled.temporary_bytes if compiled else memory.temporaries
    lines += [
        _line("temporaries", _gb(temporary), exact),
        _line("peak", _gb(plan.peak_bytes), exact, f"by arithmetic {_gb(memory.peak)}" if compiled else ""),
        _line("available", _gb(plan.available_bytes), LIMIT if job.machine.chip.platform == "tpu" else SHEET),
    ]
    if host := plan.host_bytes:
        note = f"of about {_gb(job.machine.chip.host)} a device" if job.machine.chip.host else ""
        lines.append(_line("host memory", _gb(host), exact, note))
    if whole := whole_weights(ShardingRules().undivided(job.config, job.ways)):
        lines += ["", whole[0].upper() + whole[1:]]
    lines += ["", verdict(plan, recipe=recipe), "", "Time of a step, at least"]
    lines += _times(plan)
    if plan.why_not:
        lines += ["", f"Arithmetic alone, within 15 % of the compilers where it was compared: {plan.why_not}"]
        if row := next((row for row in tuned.table() if row.job == job), None):
            said = ", ".join(f"{key} {value}" for key, value in row.figures["compiler"].items())
            lines.append(
                f"The compiler said of this row of the tuned table: peak {_gb(row.figures['peak_bytes'])} ({said})"
            )
    elif compiled:
        versions = ", ".join(f"{key} {value}" for key, value in plan.versions.items())
        lines += ["", f"Compiled in {compiled.seconds:.0f} s ({versions})"]
    return "\n".join(lines)


def _times(plan: CostPlan) -> list[str]:
    work, roofline, job = plan.work, plan.roofline, plan.job
    exact = COMPILER if plan.flops else ARITHMETIC
    again = ", what is computed again included" if job.mode == "train" else ""
    avoidable, received = (f"of {_gb(size)} (arithmetic)" for size in (work.memory_bytes, work.link_bytes))
    lines = [
        _line("FLOPs", _count(plan.flops or work.flops), exact, f"of each device{again}"),
        _line("memory traffic", _gb(plan.traffic_bytes or work.memory_bytes), exact),
        _line("compute", _seconds(roofline.compute), SHEET, "of these FLOPs at its rate, as the next ones"),
        _line("memory", _seconds(roofline.memory), SHEET, f"{avoidable} that cannot be avoided"),
        _line("interconnect", _seconds(roofline.interconnect), SHEET, f"{received} received"),
    ]
    if job.machine.slices > 1:
        known = job.machine.chip.network
        lines.append(_line("network", _seconds(roofline.network) if known else "not known", SHEET))
    if roofline.waited:
        lines.append(_line("waited for", _seconds(roofline.waited), SHEET, "communication not overlapped with compute"))
    lines.append(_line("bound", _seconds(roofline.seconds), ARITHMETIC, f"by {roofline.bound_by}"))
    share = "MFU at most" if job.mode != "decode" else "FLOPs used at most"
    lines.append(_line(share, f"{100 * roofline.mfu:.1f} %", ARITHMETIC))
    lines.append(_line("tokens/s at most", f"{roofline.tokens_per_second:,.0f}", ARITHMETIC, "of the whole machine"))
    if plan.estimated_cycles:
        note = "without kernels and asynchronous copies"
        if plan.floor_cycles:
            ratio = plan.estimated_cycles / plan.floor_cycles
            note = f"{ratio:.2f} x the {plan.floor_cycles / 1e6:.2f} M of the products alone"
        lines.append(_line("cycles", f"{plan.estimated_cycles / 1e6:.2f} M", COMPILER, note))
    return lines


def verdict(plan: CostPlan, *, recipe: bool = False) -> str:
    """Whether it fits; if not, what would, in the options of `plan.py` or of a recipe."""
    if plan.fits:
        free = plan.available_bytes - plan.peak_bytes
        return f"FITS, with {_gb(free)} to spare a device" + ("" if plan.compiled else " (arithmetic)")
    need = f"{_gb(plan.peak_bytes)} are needed, {_gb(plan.available_bytes)} available"
    if plan.peak_bytes <= plan.available_bytes:
        need = (
            f"{_gb(plan.host_bytes)} of the host's memory are needed, about {_gb(plan.job.machine.chip.host)} available"
        )
    largest = "".join(f"\n    {text}" for text in (plan.compiled.largest[:4] if plan.compiled else ()))
    largest = f"\n  The largest buffers:{largest}" if largest else ""
    return f"DOES NOT FIT: {need}.{largest}\n  {remedy(plan.job, recipe=recipe)}"


def remedy(job: Workload, *, recipe: bool = False) -> str:
    """What would fit, by arithmetic: on this machine, else on more of it."""
    for share in (0.95, 1.0):
        fitting = [other for other in candidates.ranked(candidates.enumerate(job))[:1] if candidates.fits(other, share)]
        if fitting:
            other = fitting[0]
            options = f"--mesh {_mesh(other)}"
            if job.mode == "train":
                options += f" --remat {other.remat} --{'batch.' * recipe}microbatches {other.microbatches}"
            return f"This would, by arithmetic: {options}" + ("" if recipe else " (--search compiles the best few)")
    kinds = [job.machine.chip, *(chip for chip in CHIPS.values() if chip is not job.machine.chip)]
    larger = [other.cloud_name for other in candidates.machines_that_fit(job, kinds)]
    if not larger:
        return "No mesh, no remat policy and no machine would, by arithmetic: lower --batch or --seq"
    nothing = "No mesh and no remat policy" if job.mode == "train" else "No mesh"
    return f"{nothing} would, by arithmetic. The smallest machines that would: {', '.join(larger)}"


def table(found: Found, *, rows: int = 12) -> str:
    """The candidates of a search, the best first."""
    head = ("", "mesh", "remat", "microb.", "peak", "said by", "fits", "bound", "waits", "by", "MFU <=", "Mcycles")
    lines: list[tuple[str, ...]] = [head]
    for plan in (found.compiled + found.rest)[:rows]:
        job, r = plan.job, plan.roofline
        lines.append(
            (
                "*" if plan is found.best else "",
                _mesh(job),
                job.remat if job.mode == "train" else "",
                str(job.microbatches),
                _gb(plan.peak_bytes),
                COMPILER if plan.compiled else ARITHMETIC,
                "yes" if plan.fits else "no",
                _seconds(r.seconds),
                _seconds(r.waited) if r.waited else "",
                r.bound_by,
                f"{100 * r.mfu:.1f} %",
                f"{plan.estimated_cycles / 1e6:.1f}" if plan.estimated_cycles else "",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    more = len(found.compiled) + len(found.rest) - rows
    return text + (f"\n({more} more)" if more > 0 else "")


def plot(plans: Sequence[CostPlan], path: Path, *, title: str) -> None:
    """A stacked bar of each plan's memory, and a line for what is available."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.5 * len(plans)), constrained_layout=True)
    names = [name(plan.job) + ("" if plan.compiled else " (arithmetic)") for plan in plans]
    left = [0.0] * len(plans)
    for part in ("parameters", "optimizer", "cache", "gradients", "other temporaries"):
        sizes = [parts(plan)[part] / 1e9 for plan in plans]
        if any(sizes):
            axes.barh(names, sizes, left=left, label=part)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.axvline(plans[0].available_bytes / 1e9, color="black", linestyle="--", label="available")
    axes.invert_yaxis()
    axes.set_xlabel("GB of each device")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parts(plan: CostPlan) -> dict[str, int]:
    """The peak in parts."""
    memory = plan.arithmetic
    parameters, optimizer, cache = plan.sizes or (memory.parameters, memory.optimizer, memory.cache)
    if plan.job.mode == "prefill" and plan.compiled:
        cache = min(cache, plan.compiled.output_bytes)
    rest = plan.peak_bytes - parameters - optimizer - cache
    gradients = min(memory.gradients, max(0, rest))
    return {
        "parameters": parameters, "optimizer": optimizer, "cache": cache, "gradients": gradients,
        "other temporaries": max(0, rest - gradients),
    }  # fmt: skip


def _line(what: str, value: str, who: str, note: str = "") -> str:
    return f"  {what:20} {value:>14}   {who:14} {note}".rstrip()


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _count(number: float) -> str:
    return f"{number / 1e12:.2f} T" if number >= 1e12 else f"{number / 1e9:.3g} G"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def _mesh(job: Workload) -> str:
    return mesh_text(job.mesh)
