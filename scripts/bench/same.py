"""Whether two checkouts compute the same, bit for bit: before and after a change that must change nothing.

    git worktree add --detach ../before v0.1
    python scripts/bench/same.py ../before                      # against this checkout
    python scripts/bench/same.py ../before ../after --only 'train*'
    python scripts/bench/same.py ../before --list

Each run (same_runs.py) goes through the public interface and the scripts alone: greedy tokens, log-probabilities and
logits, files that conversions write, losses and checkpoints of training, also resumed from a checkpoint that BEFORE
wrote, corpora, plans. Seeded sampling is left out: it may change from one version to another.
Results of a commit are kept in --work, so that BEFORE is computed once. Exit code 0: all the same; 1: not.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from same_runs import RUNS  # noqa: E402


def identity(checkout: Path) -> str:
    """The commit of a checkout; "-dirty" and a time where files differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", checkout, *args], capture_output=True, text=True, check=True).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit if not git("status", "--porcelain", "-uno") else f"{commit}-dirty-{os.getpid()}"


def compute(checkout: Path, work: Path, inputs: Path, names: list[str]) -> Path:
    """Runs what is not there yet in a checkout, one process for each number of devices; returns the results' folder."""
    results = work / identity(checkout)
    results.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (results / f"{name}.json").exists()]
    for devices in sorted({RUNS[name].devices for name in missing}):
        mine = [name for name in missing if RUNS[name].devices == devices]
        variables = os.environ | {
            "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
            "HF_HUB_OFFLINE": "1", "LLAMA_JAX_CACHE": str(work / "cache"), "SAME_CHECKOUT": str(checkout),
        }  # fmt: skip
        command = [sys.executable, HERE / "same_runs.py", inputs, results, *mine]
        subprocess.run(command, env=variables, cwd=checkout, check=True)
    return results


def first_difference(before: Any, after: Any, where: str = "") -> str | None:
    """Where two JSON values differ first; None where they do not."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            inner = f"{where}.{key}".strip(".")
            if key not in before or key not in after:
                return f"{inner} is in {'one' if key in before else 'the other'} alone"
            if found := first_difference(before[key], after[key], inner):
                return found
        return None
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        found = (first_difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(before, after, strict=True)))
        return next((text for text in found if text), None)
    return None if before == after else f"{where}: {str(before)[:80]!r} -> {str(after)[:80]!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="a checkout")
    parser.add_argument("after", type=Path, nargs="?", default=HERE.parents[1], help="another; default: this one")
    parser.add_argument("--only", default="*", help="runs whose name matches this pattern")
    parser.add_argument("--list", action="store_true", help="print the runs, and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--work", type=Path, help="a folder that keeps results; default: a temporary one")
    args = parser.parse_args()
    names = [name for name in RUNS if fnmatch.fnmatch(name, args.only)]
    if args.list:
        print("\n".join(f"{name:28} {RUNS[name].devices} devices  {RUNS[name].what}" for name in names))
        return 0
    if args.before is None or not names:
        parser.error("give the checkout BEFORE, and a pattern that some run matches (--list)")
    work = (args.work or Path(tempfile.mkdtemp(prefix="same-"))).resolve()
    inputs = work / "inputs"
    before = compute(args.before.resolve(), work, inputs, names)
    after = compute(args.after.resolve(), work, inputs, names)
    outcome = {}
    for name in names:
        one, other = (json.loads((folder / f"{name}.json").read_text()) for folder in (before, after))
        outcome[name] = first_difference(one, other)
        if not args.json:
            print(f"{'same' if outcome[name] is None else 'DIFFERENT':10} {name:28} {outcome[name] or RUNS[name].what}")
    different = [name for name, why in outcome.items() if why is not None]
    if args.json:
        print(json.dumps({"before": before.name, "after": after.name, "runs": outcome}))
    else:
        print(f"{len(names) - len(different)} of {len(names)} runs are the same ({before.name} and {after.name})")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
