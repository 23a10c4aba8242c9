"""Are this machine, or these machines, ready? If not: the problems and their remedies.

    python scripts/doctor.py                                       # one machine
    python scripts/doctor.py --checkpoint-dir gs://bucket/run1     # and a folder that must be writable
    python scripts/doctor.py --coordinator 10.0.0.2:8482 --num-processes 2 --process-id 0    # on each, with its own id

On Cloud TPU, GKE, SLURM and Open MPI the same command on every machine needs no options. Process 0 prints all
findings; another one prints only findings that process 0 has not received. Exit code 1: a problem, not a warning.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama_jax.cli import ProcessArgs
from llama_jax.doctor.examine import MachineReport, examine
from llama_jax.doctor.finding import OK, rows


@dataclasses.dataclass
class Args:
    checkpoint_dir: str | None = None
    """A folder, or gs://..., that must be writable."""
    timeout: float = 120
    """Seconds that any step may take, such as waiting for the other processes."""
    json: bool = False
    """Print one JSON object."""
    processes: tyro.conf.OmitArgPrefixes[ProcessArgs] = dataclasses.field(default_factory=ProcessArgs)


def main(args: Args) -> int:
    report = examine(
        **dataclasses.asdict(args.processes), checkpoint_dir=args.checkpoint_dir, timeout=args.timeout,
        say=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    if report.shared and report.process:
        pass  # process 0 prints the same
    elif args.json:
        print(json.dumps({"ok": report.ok, **dataclasses.asdict(report)}))
    else:
        show(report)
    return int(not report.ok)


def show(report: MachineReport) -> None:
    colours = {"ok": "green", "warning": "yellow", "problem": "red"}
    table = Table("check", "process", "result", "found")
    for who, f in rows(report.findings):
        table.add_row(f.check, who, f"[{colours[f.status]}]{f.status}[/]", escape(f.value))
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    for who, f in rows([f for f in report.findings if f.status != OK]):
        text = (
            f"[{colours[f.status]}]{f.status}[/] {f.check}, process {who}: {escape(f.value)}\n  -> {escape(f.remedy)}"
        )
        console.print(text, soft_wrap=True, highlight=False)
    console.print("[green]all is well[/]" if report.ok else "[red]something is wrong: see above[/]")
