"""The tuned table's figures, measured again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

from llama_jax.costs import machines, tuned
from llama_jax.files import write_whole
from llama_jax.plan import compiler
from llama_jax.plan.make import cost_plan
from llama_jax.plan.search import name

FIGURES = (
    "fits", "parameter_bytes", "optimizer_bytes", "cache_bytes", "argument_bytes", "temporary_bytes", "peak_bytes",
    "host_bytes", "available_bytes", "arithmetic_peak_bytes", "flops", "estimated_cycles", "floor_cycles",
    "roofline_seconds", "mfu_bound", "compiler",
)  # fmt: skip


def update(*, model: str, machine: str, say: Callable[[str], None]) -> None:
    """Compiles every row whose compiler is here, and writes the figures; after each row, so that nothing is lost.

    Args:
      model: only rows of it; empty is all.
      machine: likewise.
      say: is told what is done.
    """
    rows, done = list(tuned.table()), False
    where = machines.machine(machine).cloud_name if machine else None
    for i, row in enumerate(rows):
        if model not in ("", row.model) or where not in (None, row.job.machine.cloud_name):
            continue
        done = True
        what = f"{i + 1} of {len(rows)}: {row.model}, {row.mode}, {row.machine}, {name(row.job)}"
        if not compiler.is_installed(row.job.machine):
            say(f"{what}: its compiler is not here, the figures stay")
            continue
        say(what)
        found = cost_plan(row.job, say=say).as_json()
        rows = list(_read())  # which another process may have written meanwhile
        rows[i] = dataclasses.replace(rows[i], figures={key: found[key] for key in FIGURES})
        write(rows)
    if not done:
        raise ValueError(f"the tuned table has no row for model {model or 'any'!r} and machine {machine or 'any'!r}")


def _read() -> tuple[tuned.TunedEntry, ...]:
    tuned.table.cache_clear()
    return tuned.table()


def write(rows: list[tuned.TunedEntry]) -> None:
    """Writes the table."""
    text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
    write_whole(tuned.FILE, text + "\n")
