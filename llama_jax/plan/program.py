"""The programs that a plan compiles: the library's own steps, on a mesh of devices that need not be there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax import sharding
from llama_jax.costs.estimate import Workload
from llama_jax.infer.decode import DecodeState
from llama_jax.infer.engine import STOPS, Engine
from llama_jax.model import Llama, flatten_heads
from llama_jax.train import build
from llama_jax.train.recipe import Batch, Data, Optimizer, Recipe, Schedule
from llama_jax.typing import Foreign, PyTree


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step before it is compiled.

    Attributes:
      lowered: of `jax.jit(...).lower`.
      parameter_bytes: of each device, as the following ones.
      optimizer_bytes: of Adam's means.
      cache_bytes: of keys and values.
      argument_bytes: of all arguments.
    """

    lowered: Foreign
    parameter_bytes: int
    optimizer_bytes: int
    cache_bytes: int
    argument_bytes: int


def recipe_of(job: Workload) -> Recipe:
    """The recipe of a training job: packed rows, AdamW, float32 parameters, bfloat16 computation."""
    return Recipe(
        model=job.config,
        data=Data(train=()),
        batch=Batch(seq_len=job.seq_len, sequences=job.batch, microbatches=job.microbatches),
        optimizer=Optimizer(Schedule(peak=1e-4, steps=1000)),
        dtype="bfloat16",
        remat=job.remat,  # pyright: ignore[reportArgumentType]
        attention=job.attention,
        adapter=job.adapter,
        quantize=job.quantize,  # pyright: ignore[reportArgumentType]
    )


def mesh_of_workload(job: Workload, devices: Sequence[Foreign]) -> jax.sharding.Mesh:
    """The mesh of a job on devices of its machine."""
    return sharding.make_mesh(job.config, **job.mesh, devices=devices)


def lower(job: Workload, mesh: jax.sharding.Mesh) -> Lowered:
    """The step of a job: what `train.py` or `generate.py` would run."""
    with jax.set_mesh(mesh):
        if job.mode == "train":
            return _training(job)
        return _decoding(job) if job.mode == "decode" else _prefilling(job)


def _training(job: Workload) -> Lowered:
    program, args = build.abstract_step(recipe_of(job))
    state = args[0]
    return lowered(program.lower(*args), args, state.model, optimizer=state.opt_state)


def _decoding(job: Workload) -> Lowered:
    model = serving_model(job)
    cache = abstract_cache(model, job)
    state = DecodeState(
        cache=cache,
        x_B1D=_placed(model, ("batch", "seq", "act_embed"), (job.batch, 1, job.config.embed_dim), model.dtype),
        position_B=_rows(model, job, jnp.int32),
        remaining_B=_rows(model, job, jnp.int32),
        finish_B=_rows(model, job, jnp.int32),
        stop_BN=_placed(model, ("batch", "sampled"), (job.batch, STOPS), jnp.int32),
        sampling=None,
    )
    args = (state, _rows(model, job, jnp.bool_), jax.ShapeDtypeStruct((), jnp.int32))
    return lowered(Engine(model).lower_decode(*args), (model, args), model, cache=cache)


def _prefilling(job: Workload) -> Lowered:
    model = serving_model(job)
    row = _rows(model, job, jnp.int32)
    tokens = _placed(model, ("batch", "seq"), (job.batch, job.seq_len), jnp.int32)
    stop_BN = _placed(model, ("batch", "sampled"), (job.batch, STOPS), jnp.int32)
    args = (tokens, row, row, row, stop_BN, None)
    step = Engine(model).lower_prefill(*args, size=job.seq_len, span=job.seq_len)
    return lowered(step, (model, args), model, cache=abstract_cache(model, job))


def serving_model(job: Workload) -> Llama:
    """The abstract model of prefill and decode; its mesh must be in use."""
    attention = None if job.attention == "auto" else job.attention
    model = Llama(job.config, dtype="bfloat16", param_dtype="bfloat16", attention=attention, rngs=None)
    return flatten_heads(model) if job.machine.chip.platform == "tpu" else model


def abstract_cache(model: Llama, job: Workload) -> PyTree:
    """The cache of a job, without data; its mesh must be in use."""
    mesh = jax.sharding.get_mesh()
    cache = jax.eval_shape(lambda: model.init_cache(job.batch, job.seq_len))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec)), cache
    )


def _placed(model: Llama, axes: tuple[str, ...], shape: tuple[int, ...], dtype: DTypeLike) -> PyTree:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=model.rules.sharding(axes, shape))


def _rows(model: Llama, job: Workload, dtype: DTypeLike) -> PyTree:
    return _placed(model, ("batch",), (job.batch,), dtype)


def lowered(program: Foreign, args: PyTree, model: Llama, *, optimizer: PyTree = None, cache: PyTree = None) -> Lowered:
    """A lowered program with the bytes of its arguments."""
    return Lowered(program, bytes_held(model), bytes_held(optimizer), bytes_held(cache), bytes_held(args))


def bytes_held(tree: PyTree) -> int:
    """Bytes that each device holds of a tree of abstract arrays."""
    held = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else jnp.shape(x)
        size = 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        held += math.prod(shape) * size
    return held
