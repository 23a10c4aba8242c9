"""What the estimate says that each device holds is what the model and its optimizer are, byte for byte."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from llama_jax import sharding
from llama_jax.config.adapter import Adapter
from llama_jax.config.presets import PRESETS
from llama_jax.costs import estimate, machines
from llama_jax.model import Llama
from llama_jax.model.adapt import adapt, is_trained
from llama_jax.train.optim import adamw
from llama_jax.train.recipe import Optimizer, Schedule
from llama_jax.train.state import new_state

MESHES = ["fsdp=8", "tensor=8", "fsdp=2,tensor=4", "data=2,fsdp=2,context=2", "context=4,tensor=16", "fsdp=64,tensor=2"]
BATCH, SEQ = 128, 4096


def held(tree) -> int:
    """Bytes of each device."""
    leaves = [x for x in jax.tree.leaves(tree) if x.ndim]  # a count is not a moment
    mesh = jax.sharding.get_abstract_mesh()
    shapes = [jax.NamedSharding(mesh, x.sharding.spec).shard_shape(x.shape) for x in leaves]
    return sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, leaves, strict=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_moments_and_cache(mesh):
    optimizer = adamw(Optimizer(Schedule(peak=1e-3, steps=10)))
    axes = ("data", "fsdp", "context", "tensor_kv", "tensor_q")
    for name, config in PRESETS.items():
        facts = {"batch": BATCH, "seq_len": SEQ, "mesh": sharding.parse_mesh(mesh)}
        training = estimate.Workload(config, machines.machine("v5p-256"), "train", **facts)
        ways = training.ways
        device_mesh = AbstractMesh(tuple(ways[axis] for axis in axes), axes, axis_types=(AxisType.Explicit,) * 5)
        with jax.sharding.use_abstract_mesh(device_mesh):
            model = Llama(config, dtype="bfloat16", param_dtype="float32", stacked=True, rngs=None)
            state = jax.eval_shape(lambda model: new_state(model, optimizer), model)
            serving = Llama(config, dtype="bfloat16", param_dtype="bfloat16", stacked=True, rngs=None)
            cache = jax.eval_shape(lambda serving=serving: serving.init_cache(BATCH, SEQ))
            found = estimate.memory(training)
            assert found.parameters == held(state.model), name
            assert found.optimizer == held(state.opt_state), name
            if config.embed_dim < 5000:  # the largest say no more
                for adapter in (Adapter(), Adapter(rank=8, targets=("q_proj", "down_proj"))):
                    adapted = jax.eval_shape(lambda model=serving, adapter=adapter: adapt(model, adapter, None))
                    state = jax.eval_shape(lambda model: new_state(model, optimizer, is_trained(model)), adapted)
                    found = estimate.memory(dataclasses.replace(training, adapter=adapter))
                    assert found.parameters == held(state.trainable) + held(state.frozen), name
                    assert found.optimizer == held(state.opt_state), name
            found = estimate.memory(dataclasses.replace(training, mode="decode"))
            assert found.parameters == held(serving), name
            assert found.cache == held(cache), name
