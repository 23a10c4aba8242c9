"""What a recipe leaves open: mesh, remat policy, microbatches. By the tuned table, else by arithmetic."""

from __future__ import annotations

import dataclasses
import math

from llama_jax import sharding
from llama_jax.config import ModelConfig
from llama_jax.costs import candidates, tuned
from llama_jax.costs.estimate import Workload
from llama_jax.costs.machines import Machine
from llama_jax.train.recipe import Batch, Recipe


def choose(recipe: Recipe, config: ModelConfig, machine: Machine | None) -> Recipe:
    """The recipe with nothing left open.

    Args:
      recipe: what it gives is kept.
      config: of the model.
      machine: that it runs on, or is planned for; None is another one, such as a CPU: all devices on fsdp, the batch in
        one piece, and remat full.

    Raises:
      ValueError: the mesh has an unknown axis.
    """
    open_ = "auto" in (recipe.mesh, recipe.remat) or not recipe.batch.microbatches
    if not open_:
        return recipe
    if machine is None:
        batch = dataclasses.replace(recipe.batch, microbatches=recipe.batch.microbatches or 1)
        return dataclasses.replace(recipe, batch=batch, remat="full" if recipe.remat == "auto" else recipe.remat)
    row = tuned.find(config, machine, "train", recipe.batch.seq_len)
    if row and recipe.mesh in ("auto", sharding.mesh_text(row.mesh, "fsdp=1")) and recipe.remat in ("auto", row.remat):
        ways = math.prod(row.mesh.get(axis, 1) for axis in ("data", "fsdp"))
        microbatches = recipe.batch.microbatches or _microbatches(recipe.batch, ways, row.rows)
        if microbatches:
            return dataclasses.replace(
                recipe,
                mesh=sharding.mesh_text(row.mesh, "fsdp=1"),
                remat=row.remat,
                batch=dataclasses.replace(recipe.batch, microbatches=microbatches),
                attention=row.attention if recipe.attention == "auto" else recipe.attention,
                compiler_options=recipe.compiler_options or dict(row.compiler_options),
            )
    job = by_arithmetic(recipe, config, machine)
    return dataclasses.replace(
        recipe,
        mesh=sharding.mesh_text(job.mesh, "fsdp=1"),
        remat=job.remat,
        batch=dataclasses.replace(recipe.batch, microbatches=job.microbatches),
    )


def by_arithmetic(recipe: Recipe, config: ModelConfig, machine: Machine) -> Workload:
    """The fastest job by its roofline of those that fit; where none does, the smallest."""
    batch = recipe.batch
    jobs = candidates.enumerate(
        Workload(config, machine, "train", batch.sequences, batch.seq_len, {}),
        mesh=None if recipe.mesh == "auto" else sharding.parse_mesh(recipe.mesh),
        remat=None if recipe.remat == "auto" else recipe.remat,
        microbatches=batch.microbatches or None,
    )
    if not jobs:
        given = {} if recipe.mesh == "auto" else sharding.parse_mesh(recipe.mesh)
        if why := sharding.undivided_batch(
            given, rows=batch.sequences, seq_len=batch.seq_len, microbatches=batch.microbatches or 1
        ):
            raise ValueError(why)
        parts = f" in {batch.microbatches} microbatches" if batch.microbatches else ""
        raise ValueError(
            f"a batch of {batch.sequences} x {batch.seq_len}{parts} does not divide on the {machine.devices} devices of"
            f" {machine.name}, mesh {recipe.mesh}: change batch.sequences, batch.microbatches or --mesh"
        )
    return candidates.ranked(jobs, candidates.SHARE)[0]


def chosen_by(recipe: Recipe, config: ModelConfig, machine: Machine) -> str:
    """Where the choice comes from."""
    row = tuned.find(config, machine, "train", recipe.batch.seq_len)
    if row and (sharding.mesh_text(row.mesh, "fsdp=1"), row.remat) == (recipe.mesh, recipe.remat):
        return f"as in the tuned table for {machine.name}"
    return "by arithmetic, or as given"


def _microbatches(batch: Batch, ways: int, rows: int) -> int:
    """The least number of parts with at most `rows` sequences for each of `ways` devices; 0 where none divides."""
    if batch.sequences % ways:
        return 0
    each = batch.sequences // ways
    return each // max(n for n in range(1, min(rows, each) + 1) if each % n == 0)
