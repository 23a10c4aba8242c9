"""Train a Llama as a recipe says. Killed or preempted, it resumes with --resume auto as if nothing had happened.

    python scripts/train.py configs/pretrain_tiny_cpu.py                     # 10 minutes on two cores, no download
    python scripts/train.py configs/pretrain_tiny_cpu.py --steps 100 --output runs/short --optimizer.schedule.peak 1e-3
    python scripts/train.py configs/pretrain_llama3_8b.py --print-config     # the recipe, nothing else
    python scripts/train.py configs/pretrain_llama3_8b.py --dry-run          # does it fit, how fast could it be
    python scripts/train.py RECIPE --resume auto                             # continue, on any number of devices
    python scripts/train.py RECIPE --help                                    # every field that can be given

A recipe is a Python file with a function `recipe()`; its docstring gives the command and what to expect. Every field
can be overridden. --steps stops early and leaves the schedule as it is; --optimizer.schedule.steps changes it.
OUTPUT (default: runs/NAME) gets metrics.jsonl (one object a step), curves.png, samples.jsonl, tensorboard/, and
checkpoints/STEP, each of which `load`, generate.py and convert.py take. SIGTERM and Ctrl-C save first.
Several processes: the same command on each machine, with --coordinator, --num-processes and --process-id where no
launcher says them; output and data on storage that all see.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
import traceback
from pathlib import Path

import tyro

from llama_jax.cli import ProcessArgs, import_jax
from llama_jax.commands import CommandLine
from llama_jax.config.adapter import Adapter
from llama_jax.plan import environment
from llama_jax.progress import working
from llama_jax.train.recipe import Recipe
from llama_jax.train.report import count
from llama_jax.typing import JsonObject

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclasses.dataclass(frozen=True)
class Args(Recipe):
    print_config: bool = False
    """Print the recipe with everything given here, and stop."""
    dry_run: bool = False
    """Print what scripts/plan.py says of the step, compiled for `machine` and not run, and stop."""
    machine: str = ""
    """Of --dry-run, such as v5p-128; empty: that of the tuned table, else the smallest TPU that fits by arithmetic."""
    json: bool = False
    """Print how the run ended, or what the dry run found, as one JSON object."""
    processes: tyro.conf.OmitArgPrefixes[ProcessArgs] = dataclasses.field(default_factory=ProcessArgs)
    recipe: tyro.conf.Fixed[tyro.conf.Suppress[str]] = ""


def read_recipe(name: str) -> tuple[Recipe, str]:
    """Returns the recipe of a file, or of that name in configs/, and its docstring."""
    path = next((p for p in (Path(name), CONFIGS / name, CONFIGS / f"{name}.py") if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.py")))
        known = known or "those in a clone of the repository, folder configs/ (they are not installed with the package)"
        raise FileNotFoundError(f"{name}: no such recipe; give a Python file, or one of {known}")
    try:
        found = runpy.run_path(str(path))
        recipe = found["recipe"]() if callable(found.get("recipe")) else None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"{path}: {type(error).__name__}: {error} ({where.filename}, line {where.lineno})") from error
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{path}: a recipe is a Python file with a function recipe() that returns a Recipe")
    return recipe, found.get("__doc__") or ""


def in_words(recipe: Recipe) -> str:
    """Returns parameters, tokens a step and steps of a recipe as one line."""
    batch, tokens = recipe.batch, recipe.batch.sequences * recipe.batch.seq_len
    early = "".join(
        f"{count(stage.sequences * batch.seq_len)} tokens a step at {batch.seq_len // stage.split} until"
        f" {count(stage.until_tokens)}, then " for stage in batch.stages
    )  # fmt: skip
    return (
        f"{count(recipe.model.param_count())} parameters; {early}{count(tokens)} tokens a step at {batch.seq_len};"
        f" {recipe.total_steps:,} steps"
    )


def dry_run(recipe: Recipe, args: Args, name: str) -> int:
    """Plans the step of a recipe, as scripts/plan.py does; returns the exit code."""
    environment.prepare()
    import_jax()
    from llama_jax.plan import report, request
    from llama_jax.plan.make import cost_plan
    from llama_jax.train import choose

    chosen, job = request.of_recipe(recipe, args.machine)
    with working() as say:
        plan = cost_plan(job, say=say)
    if args.json:
        print(json.dumps({"model": name, **plan.as_json()}))
    else:
        by = choose.chosen_by(chosen, recipe.model, job.machine)
        print(report.plan_text(plan, model=name, chosen_by=by, recipe=True))
    return 0 if plan.fits else 3


def options(line: CommandLine) -> Args:
    """Returns the recipe that comes first, with the options that follow it."""
    argv, text = list(line.argv), None
    if argv[:1] in (["--help"], ["-h"]):  # every option, with the smallest recipe's values
        argv, text = ["pretrain_tiny_cpu", *argv], __doc__
    program = line.program or "train.py"
    if not argv or argv[0].startswith("-"):
        raise ValueError(f"the recipe comes first: {program} configs/NAME.py --option ... (--help says more)")
    recipe, says = read_recipe(argv[0])
    default = Args(**_fields(recipe), recipe=argv[0])
    return line.parse(
        Args, text or says, default=default, args=argv[1:], prog=f"{program} {argv[0]}",
        config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip


def main(args: Args) -> int:
    recipe, name = Recipe(**{name: getattr(args, name) for name in _fields(args)}), Path(args.recipe).stem
    if args.print_config:
        print(json.dumps(dataclasses.asdict(recipe), indent=2))
        print(in_words(recipe), file=sys.stderr)
        return 0
    if args.dry_run:
        return dry_run(recipe, args, name)
    args.processes.start()
    import_jax()
    from llama_jax.distributed import is_main
    from llama_jax.train.loop import train

    outcome = train(recipe, name=name)
    if is_main():
        print(json.dumps(dataclasses.asdict(outcome)) if args.json else outcome)
    return 130 if outcome.signal == 2 else 0


def _fields(recipe: Recipe) -> JsonObject:
    found = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    return found | {"adapter": found["adapter"] or Adapter(rank=0)}  # its options are there all the same
