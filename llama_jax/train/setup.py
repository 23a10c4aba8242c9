"""What a run needs before its first step: corpora, the order of their rows, a mesh, a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from llama_jax import sharding
from llama_jax.config import ModelConfig
from llama_jax.costs import machines
from llama_jax.costs.machines import Machine
from llama_jax.data.corpus import Corpus, changed_facts, check_tokenizer, open_corpus
from llama_jax.data.rows.loader import ARRAYS, BatchSchedule, BatchStage
from llama_jax.data.rows.plan import WINDOW, RowPlan
from llama_jax.model import Llama, random_keys
from llama_jax.text.differences import differences
from llama_jax.train.objective import objective_of
from llama_jax.train.optim import adamw, learning_rate
from llama_jax.train.recipe import Batch, Recipe
from llama_jax.train.state import TrainState, new_state
from llama_jax.train.step import compiled

if TYPE_CHECKING:
    from llama_jax.weights.checkpoint import Checkpoint

log = logging.getLogger("llama_jax")

STDLIB = "stdlib:"  # and the size of its vocabulary


@dataclasses.dataclass(frozen=True)
class Corpora:
    """What a run reads.

    Attributes:
      train: the corpora that it trains on.
      validation: those that are held out.
    """

    train: list[Corpus]
    validation: list[Corpus]

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, the same in all corpora."""
        from llama_jax.text.tokenizer import read_files

        return read_files(self.train[0].path)


def open_corpora(recipe: Recipe) -> Corpora:
    """Opens the corpora of a recipe, and checks that they are of one tokenizer.

    Raises:
      FileNotFoundError: one is not there.
      ValueError: one is damaged, or they do not go together.
    """
    if not recipe.data.train:
        raise ValueError("data.train is empty: give folders that scripts/prepare_data.py wrote")
    train = [open_corpus(_folder(name, 0)) for name in recipe.data.train]
    validation = [open_corpus(_folder(name, 1)) for name in recipe.data.validation]
    for corpus in (*train, *validation):
        check_tokenizer(corpus, sha256=train[0].manifest.tokenizer_sha256)
        if not corpus.manifest.documents:
            raise ValueError(f"{corpus.path}: holds no document: prepare it from files that are not empty")
    return Corpora(train, validation)


def _folder(name: str, which: int) -> Path:
    if not name.startswith(STDLIB):
        return Path(os.path.expanduser(name))
    from llama_jax.data.prepare.stdlib import stdlib_corpus
    from llama_jax.files import cache_folder

    size = name.removeprefix(STDLIB)
    if not size.isdecimal():
        raise ValueError(f"{name!r}: write stdlib: and the size of its vocabulary, such as stdlib:2048")
    return stdlib_corpus(cache_folder() / "data", int(size))[which]


def check_numbers(recipe: Recipe) -> None:
    """Raises ValueError for a number that is too small, by its option's name."""
    batch, schedule = recipe.batch, recipe.optimizer.schedule
    least = {
        "steps": (recipe.steps, 0),
        "non_finite_limit": (recipe.non_finite_limit, 1),
        "batch.seq_len": (batch.seq_len, 1),
        "batch.sequences": (batch.sequences, 1),
        "batch.microbatches": (batch.microbatches, 0),
        **{f"batch.stages.{i}.sequences": (stage.sequences, 1) for i, stage in enumerate(batch.stages)},
        **{f"batch.stages.{i}.split": (stage.split, 1) for i, stage in enumerate(batch.stages)},
        "optimizer.schedule.decay_steps": (schedule.decay_steps, 0),
        "data.threads": (recipe.data.threads, 1),
        "data.prefetch": (recipe.data.prefetch, 1),
        "checkpoints.every": (recipe.checkpoints.every, 0),
        "checkpoints.keep_last": (recipe.checkpoints.keep_last, 1),
        "checkpoints.keep_every": (recipe.checkpoints.keep_every, 0),
        "checkpoints.keep_best": (recipe.checkpoints.keep_best, 0),
        "validation.every": (recipe.validation.every, 0),
        "validation.documents": (recipe.validation.documents, 0),
        "samples.every": (recipe.samples.every, 0),
        "samples.new_tokens": (recipe.samples.new_tokens, 1),
    }
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")


def check_sizes(recipe: Recipe, config: ModelConfig, corpora: Corpora) -> None:
    """Raises ValueError where model, corpora and batch do not fit each other."""
    check_tokenizer(corpora.train[0], vocab_size=config.vocab_size)
    if recipe.batch.seq_len > config.max_seq_len:
        raise ValueError(
            f"batch.seq_len ({recipe.batch.seq_len}) is more than the model's max_seq_len ({config.max_seq_len}): lower"
            " it, or raise --model.max-seq-len"
        )


def row_plan(recipe: Recipe, corpora: Corpora) -> RowPlan:
    """The order of all rows.

    Raises:
      ValueError: the weights do not fit.
    """
    weights = recipe.data.weights or [float(corpus.manifest.tokens) for corpus in corpora.train]
    if len(weights) != len(corpora.train):
        raise ValueError(
            f"data.weights has {len(weights)} numbers for {len(corpora.train)} corpora: give one each, or none"
        )
    return RowPlan(corpora.train, seq_len=recipe.batch.seq_len, seed=recipe.seed, weights=weights)


def what_is_read(recipe: Recipe, corpora: Corpora) -> dict[str, Any]:
    """What the order of the rows depends on: a run that goes on must have the same."""
    return {
        "seed": recipe.seed,
        "seq_len": recipe.batch.seq_len,
        "window": WINDOW,
        "weights": [weight / sum(recipe.data.weights) for weight in recipe.data.weights],
        "corpora": facts_of(corpora.train),
    }


def facts_of(corpora: list[Corpus]) -> list[dict[str, Any]]:
    """What identifies each corpus, wherever it is stored."""
    names = ("documents", "tokens", "tokenizer_sha256", "fingerprint", "content")
    return [{name: getattr(corpus.manifest, name) for name in names} for corpus in corpora]


def measured_on(recipe: Recipe, corpora: Corpora) -> str:
    """A name of what validation measures: losses of the same can be compared."""
    texts = [corpus.manifest.content or corpus.manifest.fingerprint for corpus in corpora.validation]
    tokenizers = [corpus.manifest.tokenizer_sha256 for corpus in corpora.validation]
    facts = [texts, tokenizers, recipe.validation.documents, recipe.batch.seq_len]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12] if corpora.validation else ""


def batch_schedule(batch: Batch) -> BatchSchedule:
    """How many rows each step takes.

    Raises:
      ValueError: sizes do not divide.
    """
    start, stages = 0, []
    for stage in batch.stages:  # as many of the plan's rows in a microbatch as later
        microbatches = max(1, batch.microbatches * stage.sequences // batch.sequences)
        stages.append(BatchStage(start, stage.sequences, stage.split, microbatches))
        start = stage.until_tokens
    stages.append(BatchStage(start, batch.sequences, 1, max(1, batch.microbatches)))
    return BatchSchedule(batch.seq_len, tuple(stages))


def machine_here() -> Machine | None:
    """The machine that this runs on; None where it is none of those that are known, such as a CPU."""
    devices = jax.devices()
    return machines.of_devices(devices[0].device_kind, len(devices), sharding.num_slices(devices))


def mesh_of_recipe(recipe: Recipe, config: ModelConfig) -> jax.sharding.Mesh:
    """The mesh of a recipe; "auto" puts all devices on fsdp, slices of TPUs on data.

    Raises:
      ValueError: it does not fit the devices or the batch.
    """
    if recipe.mesh == "auto":
        devices = jax.devices()
        slices = sharding.num_slices(devices)
        mesh = sharding.make_mesh(config, data=slices, fsdp=len(devices) // slices)
    else:
        mesh = sharding.mesh_of(config, recipe.mesh)
    check_divides(recipe, mesh.shape)
    return mesh


def check_divides(recipe: Recipe, sizes: Mapping[str, int]) -> None:
    """Raises ValueError where a stage of the run does not divide on a mesh of these sizes."""
    for stage in batch_schedule(recipe.batch).stages:
        rows, seq_len = stage.rows * stage.split, recipe.batch.seq_len // stage.split
        if why := sharding.undivided_batch(sizes, rows=rows, seq_len=seq_len, microbatches=stage.microbatches):
            raise ValueError(why)


def make_model(recipe: Recipe, config: ModelConfig, *, seed: int | None = None) -> Llama:
    """The model of a recipe, abstract without a seed of its weights; its mesh must be in use."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_cpu = (device.platform if device else jax.default_backend()) == "cpu"
    dtype, attention = recipe.dtype, recipe.attention
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    if attention == "auto":  # "cpu" is for generation; a step of SmolLM2, 4 x 256 tokens: 5.5 s against 5.8
        attention = "reference" if on_cpu else None
    rngs = None if seed is None else random_keys(seed)
    remat = "full" if recipe.remat == "auto" else recipe.remat
    return Llama(config, dtype=dtype, param_dtype="float32", stacked=True, remat=remat, attention=attention, rngs=rngs)


def abstract_state(recipe: Recipe, config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of a state on the mesh in use, which may be of machines that are not there."""
    mesh = _mesh_in_use()

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding else jax.P()  # counts
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    state = jax.eval_shape(lambda model: new_state(model, optimizer), make_model(recipe, config))
    return jax.tree.map(placed, state)


def abstract_step(recipe: Recipe) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step of a recipe's last stage on the mesh in use, and its abstract arguments.

    To trace, to lower, and to compile for machines that are not there.
    """
    optimizer, mesh = adamw(recipe.optimizer), _mesh_in_use()
    state = abstract_state(recipe, recipe.model, optimizer)
    schedule = batch_schedule(recipe.batch)
    shape = schedule.shape(schedule.stages[-1])
    spec = state.model.rules.spec(("batch", "seq"), shape[1:])
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, jax.P(None, *spec)))
    stop = jax.ShapeDtypeStruct((mesh.size,), jnp.bool_, sharding=jax.NamedSharding(mesh, jax.P(mesh.axis_names)))
    objective = objective_of(recipe)
    program = compiled(optimizer, learning_rate(recipe.optimizer.schedule), objective)
    return program, (state, dict.fromkeys((*ARRAYS, *objective.columns), batch), stop)


def _mesh_in_use() -> Any:
    mesh = jax.sharding.get_mesh()
    return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def open_initial(recipe: Recipe, corpora: Corpora) -> Checkpoint | None:
    """The checkpoint whose weights the run begins with, if there is one.

    Raises:
      CheckpointError: it cannot be read.
      ValueError: its tokenizer is not that of the corpora.
    """
    if not recipe.init_from:
        return None
    from llama_jax.weights.open import open_checkpoint

    checkpoint = open_checkpoint(recipe.init_from)
    if found := differences(checkpoint.tokenizer, corpora.train[0].tokenizer()):
        raise ValueError(
            f"{corpora.train[0].path} was not prepared with the tokenizer of {recipe.init_from}: {found[0]}. Prepare it"
            f" again: scripts/prepare_data.py ... --tokenizer {recipe.init_from}"
        )
    return checkpoint


def read_initial(recipe: Recipe, checkpoint: Checkpoint, mesh: jax.sharding.Mesh) -> Llama:
    """Its weights in float32, stacked, on the mesh."""
    from llama_jax.weights.load import read_model

    leaves = jax.tree.leaves(read_model(checkpoint, mesh, dtype="float32", stacked=True))
    with jax.set_mesh(mesh):
        like = make_model(recipe, checkpoint.config)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def changed_reads(before: dict[str, Any], recipe: Recipe, corpora: Corpora) -> list[str]:
    """Says what the order of the rows depended on and now is something else, a phrase for each.

    Args:
      before: what `what_is_read` returned when the rows were counted.
      recipe: what is asked for now.
      corpora: of the recipe.
    """
    now = what_is_read(recipe, corpora)
    if _same_weights(before.get("weights") or [], now["weights"], len(corpora.train)):
        before = before | {"weights": now["weights"]}
    found = [f"{key} = {before.get(key)}, and now it is {now[key]}" for key in now if before.get(key) != now[key]]
    if before.get("corpora") == now["corpora"]:
        return found
    found = [phrase for phrase in found if not phrase.startswith("corpora = ")]
    then = before.get("corpora") or []
    if len(then) != len(corpora.train):
        return [*found, f"corpora: {len(then)}, and now {len(corpora.train)}"]
    changed = [
        (corpus.path, changed_facts(a, b)) for corpus, a, b in zip(corpora.train, then, now["corpora"], strict=True)
    ]
    return found + [f"corpora of other content: {path} has {why}" for path, why in changed if why]


def _same_weights(before: list[float], now: list[float], corpora: int) -> bool:
    """Whether weights of a mixture, each the sum's share, mix alike: those of one corpus always do."""
    alike = len(before) == len(now) and all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(before, now, strict=True))
    return alike or corpora == 1
