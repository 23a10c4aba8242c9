"""Train a Llama as a recipe says. Killed or preempted, it goes on with --resume auto as if nothing had happened.

    python scripts/train.py configs/pretrain_tiny_cpu.py                     # 10 minutes on a laptop, no download
    python scripts/train.py configs/pretrain_tiny_cpu.py --steps 100 --output runs/short --optimizer.schedule.peak 1e-3
    python scripts/train.py configs/pretrain_llama3_8b.py --print-config     # the recipe, nothing else
    python scripts/train.py RECIPE --resume auto                             # go on, on any number of devices
    python scripts/train.py RECIPE --help                                    # every field that can be given

A recipe is a Python file with a function `recipe()`; its docstring gives the command and what to expect. Every field
can be overridden. --steps stops early and leaves the schedule as it is; --optimizer.schedule.steps changes it.
OUTPUT (default: runs/NAME) gets metrics.jsonl (one object a step), curves.png, samples.jsonl, tensorboard/, and
checkpoints/STEP, each of which `load`, generate.py and convert.py take. SIGTERM and Ctrl-C save first.
Several processes: the same command on each machine, see --processes.help; checkpoints and data on storage that all see.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import tyro

from llama_jax.cli import ProcessArgs, fail_clearly, import_jax
from llama_jax.train.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Args(Recipe):
    print_config: bool = False
    """Print the recipe with everything given here, and stop."""
    json: bool = False
    """Print how the run ended as one JSON object."""
    processes: tyro.conf.OmitArgPrefixes[ProcessArgs] = dataclasses.field(default_factory=ProcessArgs)


def read_recipe(path: str) -> tuple[Recipe, str]:
    """The recipe of a file, and what it says about it."""
    if not Path(path).is_file():
        known = ", ".join(sorted(str(file) for file in Path("configs").glob("*.py")))
        raise FileNotFoundError(f"{path}: no such recipe; there are {known or 'those of the folder configs/'}")
    found = runpy.run_path(path)
    if not callable(found.get("recipe")):
        raise ValueError(f"{path}: a recipe is a Python file with a function recipe() that returns a Recipe")
    return found["recipe"](), found.get("__doc__") or ""


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:2] in (["--help"], ["-h"]) else 2
    path = sys.argv[1]
    recipe, text = read_recipe(path)
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    args = tyro.cli(Args, default=Args(**fields), args=sys.argv[2:], prog=f"train.py {path}", description=text)
    recipe = Recipe(**{name: getattr(args, name) for name in fields})
    if args.print_config:
        print(json.dumps(dataclasses.asdict(recipe), indent=2))
        return 0
    args.processes.start()
    import_jax()
    from llama_jax.distributed import is_main
    from llama_jax.train.loop import train

    outcome = train(recipe, name=Path(path).stem)
    if args.json and is_main():
        print(json.dumps(dataclasses.asdict(outcome)))
    elif is_main():
        print(outcome)
    return 130 if outcome.signal == 2 else 0


if __name__ == "__main__":
    with fail_clearly():
        sys.exit(main())
