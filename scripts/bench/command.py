"""The options of scripts/bench.py, and what it prints and records."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import tyro

from llama_jax.cli import ModelArgs, ProcessArgs, import_jax

ROOT = Path(__file__).parents[2]
Say = Callable[[str], None]


@dataclasses.dataclass
class Args:
    batch: tuple[int, ...] = (1, 8)
    """Rows of each decode measurement."""
    new_tokens: int = 64
    """Tokens a row that a measurement decodes."""
    prefill_tokens: int = 512
    """Length of the prefilled prompt."""
    repeats: int = 5
    """How often each is timed; the median counts."""
    against: str | None = None
    """transformers (needs the test extra)."""
    training: bool = False
    """Time a training step of SmolLM2's shape, 4 x 256 tokens, instead."""
    adapter_rank: int = 0
    """Of --training: the rank of a LoRA adapter that alone trains, with PEFT's for --against (needs peft)."""
    remat: tuple[str, ...] = ("matmuls",)
    """Of --training: the policies that are timed, each in turn with --against."""
    training_memory: bool = False
    """Memory of such a step of 16 x 256 tokens, compiled for each remat policy and 1, 2 and 4 microbatches, instead."""
    loader: bool = False
    """Time the data loader on the standard library's corpus, and the tiny recipe that reads it, instead."""
    startup: bool = False
    """Time the start of chat.py and the imports instead."""
    convert: str | None = None
    """Time conversions of a synthetic bfloat16 checkpoint with the shapes of this preset instead."""
    folder: Path | None = None
    """Where --convert makes its files, which are removed at the end; default: the system's temporary folder."""
    json: bool = False
    """Print one JSON object."""
    record: tuple[Path, ...] | None = None
    """Append commit, machine, versions and figures as a line of JSON to this file, or without one to the cache's."""
    model: tyro.conf.OmitArgPrefixes[ModelArgs] = dataclasses.field(default_factory=ModelArgs)
    processes: tyro.conf.OmitArgPrefixes[ProcessArgs] = dataclasses.field(default_factory=ProcessArgs)


def main(args: Args) -> None:
    if args.record is not None and len(args.record) > 1:
        raise ValueError(f"--record takes one file, got {', '.join(map(str, args.record))}")
    args.processes.start()
    import_jax()
    from llama_jax.distributed import is_main

    def say(what: str) -> None:
        if is_main():
            print(f"timing {what} ...", file=sys.stderr)

    kinds = {
        startup: args.startup, conversions: args.convert, training: args.training,
        training_memory: args.training_memory, loader: args.loader,
    }  # fmt: skip
    measure = next((measure for measure, asked in kinds.items() if asked), inference)
    figures, text = measure(args, say)
    print(json.dumps(figures) if args.json else text)
    if args.record is not None and is_main():
        record(figures, args.record[0] if args.record else None)


def record(figures: Any, file: Path | None) -> None:
    """Appends one line of JSON to a history of measurements.

    Args:
      figures: of --json.
      file: default: bench.jsonl in the cache folder.
    """
    import jax

    from llama_jax.doctor.machine import versions
    from llama_jax.files import cache_folder

    file = file or cache_folder() / "bench.jsonl"
    others = {d.metadata["Name"]: d.version for d in metadata.distributions(name="torch")}
    others |= {d.metadata["Name"]: d.version for d in metadata.distributions(name="transformers")}
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": {
            "host": platform.node(), "cpu": processor(), "cores": os.cpu_count(),
            "devices": [d.device_kind for d in jax.devices()],
        },
        "versions": {"python": platform.python_version()} | versions() | others,
        "command": sys.argv[1:],
        "figures": figures,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as history:
        history.write(json.dumps(line) + "\n")
    print(f"recorded in {file}", file=sys.stderr)


def commit() -> str | None:
    """Returns the commit of this clone, with "-dirty" where files differ from it; None where git cannot say."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def processor() -> str:
    """Returns the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def startup(args: Args, say: Say) -> tuple[Any, str]:
    from scripts.bench import infer

    times = infer.startup(model=args.model.model, root=ROOT)
    return times, "\n".join(f"{name:12} {t:6.2f} s" for name, t in times.items())


def inference(args: Args, say: Say) -> tuple[Any, str]:
    from scripts.bench import infer

    llama = args.model.load()
    bandwidth = infer.read_bandwidth()
    results = infer.measure(
        llama, batches=args.batch, new_tokens=args.new_tokens, prefill_tokens=args.prefill_tokens,
        repeats=args.repeats, against=args.against, progress=say,
    )  # fmt: skip
    lines = [f"read bandwidth, all cores: {bandwidth / 1e9:.1f} GB/s"]
    for r in results:
        line = f"{r.what:8} batch {r.batch:<3} {r.tokens_per_second:8.1f} tokens/s"
        if r.weight_bytes_per_second:
            share = r.weight_bytes_per_second / bandwidth
            line += f"  weights at {r.weight_bytes_per_second / 1e9:5.1f} GB/s, {share:4.0%} of the bandwidth"
        if r.ratio and r.against_tokens_per_second:
            line += f"  {args.against} {r.against_tokens_per_second:8.1f}, ratio {r.ratio:.2f}"
        lines.append(line)
    rows = [dataclasses.asdict(r) | {"ratio": r.ratio} for r in results]
    return {"read_bandwidth": bandwidth, "measurements": rows}, "\n".join(lines)


def conversions(args: Args, say: Say) -> tuple[Any, str]:
    from llama_jax import PRESETS
    from scripts.bench import weights

    if args.convert not in PRESETS:
        raise ValueError(f"unknown preset {args.convert!r}: choose one of {', '.join(PRESETS)}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = weights.measure(Path(folder), args.convert, progress=say)
    lines = (
        f"{r.source} -> {r.to}: {r.nbytes / 1e9:.2f} GB at {r.copy_seconds / r.write_seconds:.2f}x the speed of cp"
        f" ({r.write_seconds:.1f} s and {r.copy_seconds:.1f} s), verified in {r.verify_seconds:.1f} s;"
        f" memory {r.peak / 1e9:.2f} GB in all, {(r.peak - r.before) / r.largest:.2f}x the largest tensor above jax"
        for r in results
    )
    return [dataclasses.asdict(r) for r in results], "\n".join(lines)


def training(args: Args, say: Say) -> tuple[Any, str]:
    from scripts.bench import train

    results = train.measure(
        args.remat, repeats=args.repeats, against=args.against, rank=args.adapter_rank, progress=say
    )
    lines = []
    for r in results:
        line = f"remat {r.what:10} {r.tokens_per_second:7.1f} tokens/s, {r.temporary_bytes / 1e9:.2f} GB of temporaries"
        if r.ratio and r.against_tokens_per_second:
            line += f"  {args.against} {r.against_tokens_per_second:7.1f}, ratio {r.ratio:.2f}"
        lines.append(line)
    return [dataclasses.asdict(r) | {"ratio": r.ratio} for r in results], "\n".join(lines)


def training_memory(args: Args, say: Say) -> tuple[Any, str]:
    from scripts.bench import train

    found = train.memory(progress=say)
    lines = ["GB of temporaries    " + "".join(f"{M:3} microbatches" for M in found["full"])]
    for policy, sizes in found.items():
        lines.append(f"remat {policy:14}" + "".join(f"{size / 1e9:16.2f}" for size in sizes.values()))
    return found, "\n".join(lines)


def loader(args: Args, say: Say) -> tuple[Any, str]:
    from llama_jax.train.corpora import open_corpora, row_plan
    from scripts.bench import data, train

    recipe = runpy.run_path(str(ROOT / "configs" / "pretrain_tiny_cpu.py"))["recipe"]()
    say("the tiny recipe's step")
    step = train.speed(recipe, repeats=max(args.repeats, 10))
    say("the loader")
    corpora = open_corpora(recipe, Path())
    read = data.loader_speed(row_plan(recipe, corpora), rows=recipe.batch.sequences)
    packing = {length: data.packing_efficiency(corpora.train[0], length) for length in (256, 2048, 8192)}
    text = (
        f"loader {read:,.0f} tokens/s, the recipe's step {step:,.0f}: {read / step:.0f} times as many\n"
        f"rows filled: {', '.join(f'{share:.3%} at {length}' for length, share in packing.items())}"
    )
    return {"loader": read, "step": step, "ratio": read / step, "packing_efficiency": packing}, text
