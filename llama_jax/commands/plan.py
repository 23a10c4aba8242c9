"""Before you pay: does a model fit on a machine, how fast could it be, and on which mesh.

    python scripts/plan.py --model llama3.1-8b --machine v5litepod-16                           # a training step
    python scripts/plan.py --model llama3.1-70b --machine v5p-128 --batch 64 --seq 8192 --mesh fsdp=64 --remat attention
    python scripts/plan.py --model llama3.1-70b --machine v5litepod-16 --mode decode --batch 8 --seq 2048
    python scripts/plan.py --model llama2-70b --machine v6e-64 --search --plot plan.png         # compiles the best four
    python scripts/plan.py --model llama3.1-8b --machine 8xh100 --json

The very step that train.py or generate.py would run is compiled by the machine's own compiler, on any Linux host and
without the machine: pip install -e ".[tpu]" for TPUs, ".[cuda]" for GPUs. Without it the plan is arithmetic, within
15 % of the compilers on the programs of docs/planning.md, which explains each line.
Machines: v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N as on Cloud TPU (v5p-128 has 64 chips), v5e:4x4 by topology,
2xv6e-256 for two slices; a100, h100, h200, b200, 8xh100, 2x8xh100.
Exit code 0: it fits; 3: it does not; 1: an error.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from llama_jax.cli import import_jax
from llama_jax.config.adapter import Adapter
from llama_jax.config.quantization import Quantize
from llama_jax.plan import environment
from llama_jax.progress import working


@dataclasses.dataclass
class Args:
    model: str = ""
    """A release, such as llama3.1-70b, or a folder with a config.json."""
    machine: str = ""
    """Such as v5p-128, v5e:4x4, 2xv6e-256, h100, 8xh100."""
    mode: Literal["train", "prefill", "decode"] = "train"
    """train: packed rows, AdamW, float32 parameters, bfloat16 computation. prefill and decode: bfloat16."""
    batch: int | None = None
    """Sequences in the whole step; default: the tuned table's, else one a device (train) or 8."""
    seq: int | None = None
    """Tokens of a sequence, of decode slots of the cache; default: the tuned table's, else 4096."""
    mesh: str | None = None
    """Such as fsdp=8,tensor=2 (axes data, fsdp, context, tensor); default: the tuned table's, else by arithmetic."""
    remat: Literal["none", "matmuls", "attention", "full", "groups", "offload"] | None = None
    """What training keeps of a block: all, outputs of products, of attention, its input, that of every few blocks, that
    in the host's memory; default as of mesh."""
    microbatches: int | None = None
    """Parts of the batch of training, one after the other; default as of mesh."""
    attention: str = "auto"
    """Its implementation, such as splash:512 (blocks of 512)."""
    adapters: int = 0
    """Of training: the rank of a LoRA adapter on every matrix of the layers, which alone trains; 0 trains all."""
    quantize: Quantize | None = None
    """With --adapters: the form of the weights that do not train, nf4 (4.13 bits a number) or nf4-single (4.5)."""
    search: bool = False
    """Rank all meshes, remat policies and microbatches that are not given, compile the best, and print the table."""
    compile: int = 4
    """How many a search compiles; 0 is arithmetic alone, for a plan too."""
    floor: bool = True
    """Compile on TPUs the products alone too, to compare the cycles with."""
    plot: Path | None = None
    """Draw the memory of a device as bars: a .png or .svg file."""
    json: bool = False
    """Print one JSON object; of a search a list of them, the best first."""
    update_table: bool = False
    """Compile every row of the tuned table whose compiler is here (of --model and --machine alone, where given), and
    write the figures into llama_jax/costs/tuned.json."""


def main(args: Args) -> int:
    environment.prepare()
    import_jax()
    from llama_jax import sharding
    from llama_jax.plan import report, request
    from llama_jax.plan.make import by_arithmetic, cost_plan
    from llama_jax.plan.search import search
    from llama_jax.plan.table import update

    if args.update_table:
        with working() as say:
            update(model=args.model, machine=args.machine, say=say)
        return 0
    if not (args.model and args.machine):
        raise ValueError("give --model and --machine, such as --model llama3.1-8b --machine v5litepod-16")
    if args.compile < 0:
        raise ValueError(f"compile must be at least 0, got {args.compile}")
    if args.plot and (args.plot.suffix not in (".png", ".svg") or not args.plot.parent.is_dir()):
        raise ValueError(f"plot {args.plot}: give a .png or .svg file in a folder that exists")
    config = request.model(args.model)
    given = {
        "mesh": None if args.mesh is None else sharding.parse_mesh(args.mesh),
        "remat": args.remat, "microbatches": args.microbatches,
    }  # fmt: skip
    job, chosen_by = request.job(
        config,
        args.machine,
        args.mode,
        batch=args.batch,
        seq_len=args.seq,
        attention=args.attention,
        adapter=Adapter(rank=args.adapters, alpha=2 * args.adapters) if args.adapters else None,
        quantize=args.quantize,
        **given,
    )
    with working() as say:
        if args.search:
            found = search(job, **given, compile=args.compile, say=say)
            plans = found.compiled + found.rest
        else:
            plan = cost_plan(job, floor=args.floor, say=say) if args.compile else by_arithmetic(job, "--compile 0")
            found, plans = None, [plan]
    if args.json:
        objects = [{"model": args.model, **plan.as_json()} for plan in plans]
        print(json.dumps(objects if found else objects[0]))
    elif found:
        print(report.table(found))
        print("\n" + (report.plan_text(found.best, model=args.model) if found.best else report.verdict(plans[0])))
    else:
        print(report.plan_text(plans[0], model=args.model, chosen_by=chosen_by))
    if args.plot:
        shown = plans[:8]
        report.plot(shown, args.plot, title=f"{args.model}, {args.mode}, on {job.machine.cloud_name}")
    return 0 if any(plan.fits for plan in plans) else 3
