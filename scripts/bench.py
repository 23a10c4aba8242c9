"""How fast a model runs on this machine.

    python scripts/bench.py                                  # decode at batch 1 and 8, prefill of 512 tokens
    python scripts/bench.py --against transformers           # the same weights in transformers, timed in turn
    python scripts/bench.py --startup                        # seconds from the command to the first character
    python scripts/bench.py --training --against transformers  # a training step; 3 minutes
    python scripts/bench.py --training-memory                # what remat and microbatches save, as the compiler says
    python scripts/bench.py --loader                         # tokens a second of the data loader alone
    python scripts/bench.py --convert llama3.2-3b            # conversion HF <-> Meta against cp; needs 26 GB of disk

Times vary with what else the machine does: compare ratios of one run. --json prints one object.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import tyro

from llama_jax.cli import ModelArgs, ProcessArgs, fail_clearly, import_jax


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
    """transformers (needs the test extra), or nothing."""
    training: bool = False
    """Time a training step of SmolLM2's shape, 4 x 256 tokens, instead."""
    remat: tuple[str, ...] = ("matmuls",)
    """Of --training: the policies that are timed, each in turn with --against."""
    training_memory: bool = False
    """Compile such a step of 16 x 256 tokens for each remat policy and 1, 2 and 4 microbatches instead: its memory."""
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
    model: tyro.conf.OmitArgPrefixes[ModelArgs] = dataclasses.field(default_factory=ModelArgs)
    processes: tyro.conf.OmitArgPrefixes[ProcessArgs] = dataclasses.field(default_factory=ProcessArgs)


def main(args: Args) -> None:
    args.processes.start()
    from llama_jax.distributed import is_main
    from llama_jax.infer import bench

    def say(what: str) -> None:
        if is_main():
            print(f"timing {what} ...", file=sys.stderr)

    if args.startup:
        times = bench.startup(model=args.model.model, root=Path(__file__).parents[1])
        print(json.dumps(times) if args.json else "\n".join(f"{name:12} {t:6.2f} s" for name, t in times.items()))
        return
    if args.convert:
        conversions(args, say)
        return
    if args.training:
        training(args, say)
        return
    if args.training_memory:
        training_memory(args, say)
        return
    if args.loader:
        loader(args, say)
        return
    llama = args.model.load()
    bandwidth = bench.read_bandwidth()
    results = bench.measure(
        llama, batches=args.batch, new_tokens=args.new_tokens, prefill_tokens=args.prefill_tokens,
        repeats=args.repeats, against=args.against, progress=say,
    )  # fmt: skip
    if args.json:
        rows = [dataclasses.asdict(r) | {"ratio": r.ratio} for r in results]
        print(json.dumps({"read_bandwidth": bandwidth, "measurements": rows}))
        return
    print(f"read bandwidth, all cores: {bandwidth / 1e9:.1f} GB/s")
    for r in results:
        line = f"{r.what:8} batch {r.batch:<3} {r.tokens_per_second:8.1f} tokens/s"
        if r.weight_bytes_per_second:
            share = r.weight_bytes_per_second / bandwidth
            line += f"  weights at {r.weight_bytes_per_second / 1e9:5.1f} GB/s, {share:4.0%} of the bandwidth"
        if r.ratio and r.against_tokens_per_second:
            line += f"  {args.against} {r.against_tokens_per_second:8.1f}, ratio {r.ratio:.2f}"
        print(line)


def conversions(args: Args, say: Callable[[str], None]) -> None:
    from llama_jax import PRESETS
    from llama_jax.weights import bench

    if args.convert not in PRESETS:
        raise ValueError(f"unknown preset {args.convert!r}: choose one of {', '.join(PRESETS)}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = bench.measure(Path(folder), args.convert, progress=say)
    if args.json:
        print(json.dumps([dataclasses.asdict(r) for r in results]))
        return
    for r in results:
        print(
            f"{r.source} -> {r.to}: {r.nbytes / 1e9:.2f} GB at {r.copy_seconds / r.write_seconds:.2f}x the speed of cp"
            f" ({r.write_seconds:.1f} s and {r.copy_seconds:.1f} s), verified in {r.verify_seconds:.1f} s;"
            f" memory {r.peak / 1e9:.2f} GB in all, {(r.peak - r.before) / r.largest:.2f}x the largest tensor above jax"
        )


def training(args: Args, say: Callable[[str], None]) -> None:
    import_jax()
    from llama_jax.train import bench

    results = bench.measure(args.remat, repeats=args.repeats, against=args.against, progress=say)
    if args.json:
        print(json.dumps([dataclasses.asdict(r) | {"ratio": r.ratio} for r in results]))
        return
    for r in results:
        line = f"remat {r.what:10} {r.tokens_per_second:7.1f} tokens/s, {r.temporary_bytes / 1e9:.2f} GB of temporaries"
        if r.ratio and r.against_tokens_per_second:
            line += f"  {args.against} {r.against_tokens_per_second:7.1f}, ratio {r.ratio:.2f}"
        print(line)


def training_memory(args: Args, say: Callable[[str], None]) -> None:
    import_jax()
    from llama_jax.train import bench

    found = bench.memory(progress=say)
    if args.json:
        print(json.dumps(found))
        return
    print("GB of temporaries    " + "".join(f"{M:3} microbatches" for M in found["full"]))
    for policy, sizes in found.items():
        print(f"remat {policy:14}" + "".join(f"{size / 1e9:16.2f}" for size in sizes.values()))


def loader(args: Args, say: Callable[[str], None]) -> None:
    import_jax()
    from llama_jax.data.bench import loader_speed, packing_efficiency
    from llama_jax.train import bench, setup

    recipe = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "pretrain_tiny_cpu.py"))["recipe"]()
    say("the tiny recipe's step")
    step = bench.speed(recipe, repeats=max(args.repeats, 10))
    say("the loader")
    corpora = setup.open_corpora(recipe)
    read = loader_speed(setup.row_plan(recipe, corpora), rows=recipe.batch.sequences)
    packing = {length: packing_efficiency(corpora.train[0], length) for length in (256, 2048, 8192)}
    if args.json:
        print(json.dumps({"loader": read, "step": step, "ratio": read / step, "packing_efficiency": packing}))
        return
    print(f"loader {read:,.0f} tokens/s, the recipe's step {step:,.0f}: {read / step:.0f} times as many")
    print("rows filled: " + ", ".join(f"{share:.3%} at {length}" for length, share in packing.items()))


if __name__ == "__main__":
    with fail_clearly():
        main(tyro.cli(Args, description=__doc__))
