"""From what was asked for to a job: names looked up, what was left open chosen."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from pathlib import Path

from llama_jax import sharding
from llama_jax.config import ModelConfig
from llama_jax.config.adapter import Adapter
from llama_jax.config.hf import from_hf_config
from llama_jax.config.presets import PRESETS
from llama_jax.costs import candidates, tuned
from llama_jax.costs.choose import choose
from llama_jax.costs.estimate import Mode, Workload
from llama_jax.costs.machines import CHIPS, Machine, machine
from llama_jax.costs.tuned import TunedEntry
from llama_jax.plan.make import check, mesh_of_machine
from llama_jax.train import choose as train_choose
from llama_jax.train.checks import check_divides, check_numbers
from llama_jax.train.recipe import Recipe

BATCH = 8  # of decode and prefill
LENGTH = 4096  # of a sequence or a cache, if the model has so many


def model(name: str) -> ModelConfig:
    """A preset, or the architecture of a folder with a config.json or params.json.

    Raises:
      ValueError: there is none of that name; the message has the nearest ones.
    """
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    if (path := Path(os.path.expanduser(name))).exists():
        file = path / "config.json" if path.is_dir() else path
        if file.name == "config.json" and file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ValueError(f"{file} is no JSON: {error}") from None
            if not isinstance(found, dict):
                raise ValueError(f"{file} is no JSON object")
            try:
                return from_hf_config(found)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
        from llama_jax.weights.open import open_checkpoint

        return open_checkpoint(name).config
    near = difflib.get_close_matches(name.lower(), PRESETS, n=4, cutoff=0.4)
    raise ValueError(
        f"model {name!r} is not known; the nearest are {', '.join(near or ['llama3.1-8b', 'llama2-70b'])}. Names are"
        " those of the releases, in lower case; a folder with a config.json does too"
    )


def job(
    config: ModelConfig,
    on: str,
    mode: Mode,
    *,
    batch: int | None = None,
    seq_len: int | None = None,
    mesh: dict[str, int] | None = None,
    remat: str | None = None,
    microbatches: int | None = None,
    attention: str = "auto",
    adapter: Adapter | None = None,
    quantize: str | None = None,
) -> tuple[Workload, str]:
    """The job that was asked for, and who chose what was left open, in words.

    Args:
      config: the model.
      on: name of the machine.
      mode: of `Job`, as the following ones; None leaves it open: to the tuned table, else to arithmetic.
      batch: see `mode`.
      seq_len: see `mode`.
      mesh: see `mode`.
      remat: see `mode`.
      microbatches: see `mode`.
      attention: see `mode`.
      adapter: of training; it alone trains.
      quantize: form of the weights that do not train.

    Raises:
      ValueError: a name is not known, or the parts do not go together.
    """
    where = machine(on)
    row = None if adapter else tuned.find(config, where, mode, seq_len)
    size, length = _sizes(config, where, mode, row, batch, seq_len)
    parts = 1 if microbatches is None else microbatches
    _check_mode(mode, remat, adapter)
    if quantize and not adapter:
        raise ValueError("quantized weights do not train: give an adapter (--adapters 16), or leave quantize out")
    asked = Workload(
        config, where, mode, size, length, mesh or {}, remat or "full", parts, attention, adapter=adapter,
        quantize=quantize,
    )  # fmt: skip
    if mesh is None:
        check(dataclasses.replace(asked, mesh=mesh_of_machine(asked)), batch=False)
    else:
        check(asked)
    found = choose(asked, mesh=mesh, remat=remat, microbatches=microbatches)
    if found and found[1]:
        return found[0], f"the tuned table, {found[1].machine}"
    if mesh is not None and (mode != "train" or (remat and microbatches)):
        return asked, "as given"
    if found is None:
        check(dataclasses.replace(asked, mesh=mesh or mesh_of_machine(asked)))
        raise ValueError(f"nothing divides a batch of {size} x {length} on {where.name}")
    nothing_given = mesh is None and remat is None and microbatches is None
    return found[0], "arithmetic" if nothing_given else "arithmetic, and as given"


def _check_mode(mode: Mode, remat: str | None, adapter: Adapter | None) -> None:
    if mode != "train" and (remat or adapter):
        what = "remat" if remat else "an adapter"
        raise ValueError(f"{what} is of training: leave it out with --mode {mode}")


def _sizes(
    config: ModelConfig, where: Machine, mode: Mode, row: TunedEntry | None, batch: int | None, seq_len: int | None
) -> tuple[int, int]:
    """Sequences and their length: as given, as in the table, or by default."""
    length = min(LENGTH, config.max_seq_len) if row is None else row.seq_len
    length = length if seq_len is None else seq_len
    size = row.batch if row and row.seq_len == length else where.devices if mode == "train" else BATCH
    return size if batch is None else batch, length


def of_recipe(recipe: Recipe, on: str) -> tuple[Recipe, Workload]:
    """A recipe with nothing left open, and the job of its last stage.

    Args:
      recipe: of `configs/`.
      on: name of a machine; empty is that of the tuned table, or the smallest TPU that fits by arithmetic.

    Raises:
      ValueError: the machine is not known, or the batch does not divide on it.
    """
    config, batch = recipe.model, recipe.batch
    check_numbers(recipe)
    asked = Workload(
        config, machine(on or "v5e"), "train", batch.sequences, batch.seq_len, {}, adapter=recipe.adapter,
        quantize=recipe.quantize,
    )  # fmt: skip
    if not on:
        rows = [machine(row.machine) for row in tuned.rows_of(config, "train") if row.seq_len >= batch.seq_len]
        rows = [] if recipe.adapter else rows
        tpus = [chip for chip in CHIPS.values() if chip.dimensions]
        choices = [*rows, *sorted(candidates.machines_that_fit(asked, tpus), key=lambda m: m.devices)]
        jobs = (_job(train_choose.choose(recipe, config, where), where) for where in choices)
        asked = next((job for job in jobs if candidates.fits(job)), asked)
    chosen = train_choose.choose(recipe, config, asked.machine)
    check_divides(chosen, sharding.parse_mesh(chosen.mesh))
    return chosen, _job(chosen, asked.machine)


def _job(recipe: Recipe, on: Machine) -> Workload:
    batch = recipe.batch
    return Workload(
        recipe.model, on, "train", batch.sequences, batch.seq_len, sharding.parse_mesh(recipe.mesh), recipe.remat,
        max(1, batch.microbatches), recipe.attention, recipe.compiler_options, recipe.adapter, recipe.quantize,
    )  # fmt: skip
