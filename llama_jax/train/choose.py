"""What a recipe leaves open: mesh, remat policy, microbatches. By the tuned table, else by arithmetic."""

from __future__ import annotations

import dataclasses

from llama_jax import sharding
from llama_jax.config import ModelConfig
from llama_jax.costs import choose as costs_choose
from llama_jax.costs import tuned
from llama_jax.costs.estimate import Workload
from llama_jax.costs.machines import Machine
from llama_jax.train.recipe import Recipe


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
    batch = recipe.batch
    workload = Workload(
        config, machine, "train", batch.sequences, batch.seq_len, {}, attention=recipe.attention,
        compiler_options=recipe.compiler_options, adapter=recipe.adapter, quantize=recipe.quantize,
    )  # fmt: skip
    given = None if recipe.mesh == "auto" else sharding.parse_mesh(recipe.mesh)
    found = costs_choose.choose(
        workload,
        mesh=given,
        remat=None if recipe.remat == "auto" else recipe.remat,
        microbatches=batch.microbatches or None,
    )
    if found is None:
        if why := sharding.undivided_batch(
            given or {}, rows=batch.sequences, seq_len=batch.seq_len, microbatches=batch.microbatches or 1
        ):
            raise ValueError(why)
        parts = f" in {batch.microbatches} microbatches" if batch.microbatches else ""
        raise ValueError(
            f"a batch of {batch.sequences} x {batch.seq_len}{parts} does not divide on the {machine.devices} devices of"
            f" {machine.name}, mesh {recipe.mesh}: change batch.sequences, batch.microbatches or --mesh"
        )
    chosen, _ = found
    return dataclasses.replace(
        recipe,
        mesh=sharding.mesh_text(chosen.mesh, "fsdp=1"),
        remat=chosen.remat,
        batch=dataclasses.replace(batch, microbatches=chosen.microbatches),
        attention=chosen.attention,
        compiler_options=dict(chosen.compiler_options),
    )


def chosen_by(recipe: Recipe, config: ModelConfig, machine: Machine) -> str:
    """Where the choice comes from."""
    row = None if recipe.adapter else tuned.find(config, machine, "train", recipe.batch.seq_len)
    if row and (sharding.mesh_text(row.mesh, "fsdp=1"), row.remat) == (recipe.mesh, recipe.remat):
        return f"as in the tuned table for {machine.name}"
    return "by arithmetic, or as given"
