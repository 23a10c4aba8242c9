"""What a workload leaves open, mesh, remat policy and microbatches: as in the tuned table, else by arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llama_jax.costs import candidates, tuned
from llama_jax.costs.estimate import Workload
from llama_jax.costs.tuned import TunedEntry


def choose(
    asked: Workload, *, mesh: Mapping[str, int] | None, remat: str | None, microbatches: int | None
) -> tuple[Workload, TunedEntry | None] | None:
    """Returns the workload with nothing left open, and the row of the tuned table that it is from.

    Without a row for it: the fastest by its roofline of those that fit; where none does, the smallest.

    Args:
      asked: its mesh, remat and microbatches are not read.
      mesh: as given; None leaves it open, as the following ones.
      remat: policy.
      microbatches: parts of the batch.

    Returns:
      None where no mesh divides the batch as asked.
    """
    row = None if asked.adapter else tuned.find(asked.config, asked.machine, asked.mode, asked.seq_len)
    as_row = row and (mesh is None or _sizes(mesh) == _sizes(row.mesh)) and remat in (None, row.remat)
    if row and as_row and (parts := _microbatches(asked, row, microbatches)):
        chosen = dataclasses.replace(
            asked, mesh=dict(row.mesh), remat=row.remat, microbatches=parts,
            attention=row.attention if asked.attention == "auto" else asked.attention,
            compiler_options=asked.compiler_options or dict(row.compiler_options),
        )  # fmt: skip
        return chosen, row
    workloads = candidates.enumerate(asked, mesh=mesh, remat=remat, microbatches=microbatches)
    return (candidates.ranked(workloads, candidates.SHARE)[0], None) if workloads else None


def _sizes(mesh: Mapping[str, int]) -> dict[str, int]:
    return {axis: size for axis, size in mesh.items() if size > 1}


def _microbatches(asked: Workload, row: TunedEntry, given: int | None) -> int:
    """The given parts, else the least that have at most the row's sequences a device; 0 where none divide."""
    ways = row.mesh.get("data", 1) * row.mesh.get("fsdp", 1)
    each = asked.batch // ways
    if asked.batch % (ways * (given or 1)):
        return 0
    if given or asked.mode != "train":
        return given or 1
    return each // max(n for n in range(1, min(row.rows, each) + 1) if each % n == 0)
