"""What a run that is resumed may do differently, and what a checkpoint remembers for the decisions after it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llama_jax.checkpoint.arrays import DamagedError
from llama_jax.config import ModelConfig
from llama_jax.distributed.agreement import differences, shown
from llama_jax.train.recipe import Recipe
from llama_jax.typing import Fields, JsonObject

# Fields, and all below them, that may differ from the run that is resumed. Everything else is refused, unless
# `allow_changes` names it: what is not in this list is what the run is.
MAY_CHANGE = (
    # The length of the run; the learning rate and the batch, which are said and recorded.
    "steps", "optimizer.schedule", "batch.sequences", "batch.stages",
    # How the same numbers are computed: on other devices, with less memory, by another implementation.
    "mesh", "remat", "attention", "compiler_options", "batch.microbatches", "data.threads", "data.prefetch",
    # What is saved, measured and shown, and when.
    "checkpoints", "validation", "data.validation", "samples", "tensorboard", "wandb", "profile", "output", "resume",
    "non_finite_limit", "allow_changes",
    # Compared by what the corpora hold, not by where they are; never allowed to differ (`corpora.what_is_read`).
    "data.train", "data.weights", "seed", "batch.seq_len",
)  # fmt: skip
SAID = ("optimizer.schedule", "batch.sequences", "batch.stages")
# Of each process alone, or compared by content: what processes that train together may have differently.
OF_EACH_PROCESS = (
    "data.threads", "data.prefetch", "tensorboard", "wandb", "profile", "output", "data.train", "data.validation",
    "init_from",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Change:
    """One field that differs from the run that is resumed."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} = {shown(self.now)}, it was {shown(self.before)}"


def check_allowed(recipe: Recipe) -> None:
    """Raises ValueError where `allow_changes` names what no recipe has."""
    fields = dataclasses.asdict(recipe)
    for name in recipe.allow_changes:
        found: Any = fields
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise ValueError(f"allow_changes: there is no field {name!r}; --print-config shows all")
            found = found[part]


def check_adapter(file: Path, recipe: Recipe) -> None:
    """Raises ValueError where a run of an adapter would resume as one of all parameters, or the other way round.

    Args:
      file: the recipe that its checkpoint was saved with; what cannot be read is left to `recorded`.
      recipe: of this run.
    """
    try:
        before = json.loads(file.read_text(encoding="utf-8")).get("adapter")
    except (OSError, ValueError, AttributeError):
        return
    if bool(before) != bool(recipe.adapter):
        rank = before["rank"] if before else 0
        what = f"an adapter of rank {rank}" if rank else "all parameters"
        raise ValueError(
            f"{file.parent}: this run trains {what}: resume it so (--adapter.rank {rank}), or begin a new one in"
            " another --output"
        )


def recorded(folder: Path, name: str) -> JsonObject:
    """Returns the recipe that a checkpoint was saved with; of one that has none, the model of its configuration.

    Args:
      folder: of the checkpoint.
      name: of the file with the recipe.

    Raises:
      DamagedError: the file cannot be read.
    """
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found
    except FileNotFoundError:
        from llama_jax.weights.open import open_checkpoint

        return {"model": dataclasses.asdict(open_checkpoint(folder).config)}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{folder / name}: cannot be read ({error})") from error


def changes(before: Fields, recipe: Recipe, config: ModelConfig) -> list[Change]:
    """Returns the fields that were recorded, are there still, and have other values now.

    Args:
      before: of `recorded`.
      recipe: of this run.
      config: of its model.
    """
    now = dataclasses.asdict(recipe) | {"model": dataclasses.asdict(config)}
    if before.get("init_from"):  # its model is that of the checkpoint, which this run reads too
        before = {key: value for key, value in before.items() if key != "model"}
    found = [Change(name, old, new) for name, new, old in differences(*_common(now, before))]
    return [change for change in found if not _same(change, on_cpu=jax.default_backend() == "cpu")]


def _same(change: Change, *, on_cpu: bool) -> bool:
    """Whether two values mean the same."""
    pair = (change.before, change.now)
    if change.field == "dtype":
        return len({("float32" if on_cpu else "bfloat16") if value == "auto" else value for value in pair}) == 1
    if change.field == "init_from":
        # Its weights were read when the run began: where the folder is now, or whether it is, makes no difference.
        before, now = (os.path.realpath(os.path.expanduser(value)) for value in pair)
        return all(pair) and (before == now or (os.path.exists(now) and not os.path.exists(before)))
    return False


def refuse(found: list[Change], recipe: Recipe) -> None:
    """Raises ValueError for a change that may not be."""
    refused = [change for change in found if not _within(change.field, (*MAY_CHANGE, *recipe.allow_changes))]
    if refused:
        names = " ".join(change.field for change in refused)
        raise ValueError(
            f"{recipe.output or 'the run'} cannot go on as another: {'; '.join(map(str, refused))}. Give the values it"
            f" was begun with, allow it deliberately (--allow-changes {names}), or begin a new run from its weights"
            " (--output NEW --init-from ITS_FOLDER)"
        )


def to_say(found: list[Change], recipe: Recipe) -> list[Change]:
    """Returns the changes that make other numbers: those that are said and recorded."""
    return [change for change in found if _within(change.field, (*SAID, *recipe.allow_changes))]


def of_all_processes(recipe: Recipe) -> JsonObject:
    """Returns the fields of a recipe that processes must have alike, nested as in the recipe."""

    def kept(fields: Fields, prefix: str) -> JsonObject:
        found = {}
        for key, value in fields.items():
            name = f"{prefix}{key}"
            if name not in OF_EACH_PROCESS:
                found[key] = kept(value, f"{name}.") if isinstance(value, dict) else value
        return found

    return kept(dataclasses.asdict(recipe), "")


def _within(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _common(a: Any, b: Any) -> tuple[Any, Any]:
    """Both without the keys that only one of them has, at any depth."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return a, b
    pairs = {key: _common(a[key], b[key]) for key in a.keys() & b.keys()}
    return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}
