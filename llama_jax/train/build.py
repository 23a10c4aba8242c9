"""What a run makes before its first step: a mesh, a model, an abstract step."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from llama_jax import distributed, sharding
from llama_jax.config import ModelConfig
from llama_jax.costs import machines
from llama_jax.costs.machines import Machine
from llama_jax.data.manifest import LOSS_MASK
from llama_jax.data.rows.loader import ARRAYS
from llama_jax.model import Llama, random_keys
from llama_jax.model.adapt import adapt, is_trained, new_factors
from llama_jax.model.quantize import quantized
from llama_jax.ops.weights import is_leaf
from llama_jax.text.differences import differences
from llama_jax.train.checks import batch_schedule, check_divides
from llama_jax.train.corpora import Corpora
from llama_jax.train.markers import check_markers
from llama_jax.train.objective import objective_of
from llama_jax.train.optim import adamw, learning_rate
from llama_jax.train.recipe import Recipe
from llama_jax.train.state import TrainState, new_state
from llama_jax.train.step import compiled
from llama_jax.typing import PyTree

if TYPE_CHECKING:
    from llama_jax.weights.checkpoint import Checkpoint

log = logging.getLogger("llama_jax")


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
    param_dtype = dtype if recipe.adapter else "float32"
    model = Llama(
        config, dtype=dtype, param_dtype=param_dtype, stacked=True, remat=remat, attention=attention, rngs=rngs
    )
    return quantized(model, lambda place: recipe.quantize) if recipe.quantize else model


def state_of(recipe: Recipe, model: Llama, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, of a whole model or, in `jax.eval_shape`, an abstract one.

    With an adapter, its factors alone train; the model's own weights are the frozen half.
    """
    if not recipe.adapter:
        return new_state(model, optimizer)
    key = jax.random.key(recipe.seed)
    adapted = adapt(model, recipe.adapter, new_factors(key))
    return new_state(adapted, optimizer, is_trained(adapted))


def abstract_state(recipe: Recipe, config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of a state on the mesh in use, which may be of machines that are not there."""
    mesh = _mesh_in_use()

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding else jax.P()  # counts
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    state = jax.eval_shape(lambda model: state_of(recipe, model, optimizer), make_model(recipe, config))
    return jax.tree.map(placed, state)


def abstract_step(recipe: Recipe) -> tuple[PyTree, tuple[PyTree, ...]]:
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
    from llama_jax.weights.peft import adapter_folder

    if adapter_folder(recipe.init_from):
        raise ValueError(
            f"{recipe.init_from}: is an adapter, and a run begins with a whole model: merge it first, by"
            f" scripts/convert.py {recipe.init_from} MERGED --to hf, and give --init-from MERGED"
        )
    checkpoint = open_checkpoint(recipe.init_from)
    if found := differences(checkpoint.tokenizer, corpora.train[0].tokenizer()):
        raise ValueError(
            f"{corpora.train[0].path} was not prepared with the tokenizer of {recipe.init_from}: {found[0]}. Prepare it"
            f" again: scripts/prepare_data.py ... --tokenizer {recipe.init_from}"
        )
    if LOSS_MASK in objective_of(recipe).columns:
        check_markers(recipe, checkpoint, corpora.train[0])
    return checkpoint


def read_initial(recipe: Recipe, checkpoint: Checkpoint, mesh: jax.sharding.Mesh) -> Llama:
    """Its weights, stacked, on the mesh: in float32; where an adapter alone trains, in the dtype of the computation, or
    quantized."""
    from llama_jax.weights.load import read_model

    with jax.set_mesh(mesh):
        like = make_model(dataclasses.replace(recipe, quantize=None), checkpoint.config)
    dtype = like.dtype if recipe.adapter else "float32"
    read = read_model(checkpoint, mesh, dtype=dtype, stacked=True, quantize=recipe.quantize)
    parameters = jax.tree.leaves(read, is_leaf=is_leaf)
    return jax.tree.unflatten(jax.tree.structure(like), parameters)


def initial_state(
    recipe: Recipe, checkpoint: Checkpoint, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state before the first step of a run from a checkpoint's weights; the mesh must be in use."""
    model = read_initial(recipe, checkpoint, mesh)
    init = jax.jit(lambda model: state_of(recipe, model, optimizer), donate_argnums=0)
    return distributed.compile_together(init.lower(model))(model)


def weights_id(checkpoint: Checkpoint) -> str:
    """Tells the weights of a model from others: a hash of its configuration and of a part of each tensor."""
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        first = tensor.read((slice(0, 1),))
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode() + first.tobytes()[:1024])
    return digest.hexdigest()


def with_frozen(state: TrainState, recipe: Recipe, checkpoint: Checkpoint, mesh: jax.sharding.Mesh) -> TrainState:
    """A restored state with the weights that do not train, which its checkpoint does not hold."""
    with jax.set_mesh(mesh):
        model = read_initial(recipe, checkpoint, mesh)
        optimizer = optax.identity()  # the moments are not asked for
        frozen = jax.jit(lambda model: state_of(recipe, model, optimizer).frozen, donate_argnums=0)
        return dataclasses.replace(state, frozen=distributed.compile_together(frozen.lower(model))(model))


def adapter_files(recipe: Recipe, model: Llama) -> dict[str, bytes]:
    """What makes a checkpoint of a run the folder of an adapter, as PEFT has it; none where there is no adapter."""
    if not recipe.adapter:
        return {}
    from llama_jax.weights.peft import host_factors, peft_files

    return peft_files(model, recipe.adapter, host_factors(model), recipe.init_from)
