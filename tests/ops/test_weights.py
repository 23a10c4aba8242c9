"""A leaf that only this file knows goes through model, loss, scan, sharding, saving and decoding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint.arrays import open_arrays, save_arrays
from llama_jax.ops import linear
from llama_jax.ops.weights import Stored, is_leaf, leaf_of, name_of
from llama_jax.train.losses import cross_entropy
from llama_jax.train.optim import adamw
from llama_jax.train.recipe import Optimizer, Schedule
from llama_jax.train.state import from_named_arrays, named_arrays, new_state
from llama_jax.train.step import attached, handles
from tests.builders import slow, tiny_config
from tests.infer.helpers import random_ids, random_llama

pytestmark = pytest.mark.unoptimized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eighth(Stored):
    """A weight as int8 numbers, each of which counts `step`, one number a matrix."""

    whole: jax.Array
    step: jax.Array

    @property
    def shape(self):
        return self.whole.shape

    @property
    def dtype(self):
        return self.step.dtype

    @property
    def spec(self):
        return jax.typeof(self.whole).sharding.spec

    def dense(self):
        step = self.step.reshape(self.step.shape + (1,) * (self.whole.ndim - self.step.ndim))
        return self.whole.astype(self.dtype) * step

    def product(self, equation, x, out_sharding):
        whole = linear.gather(self.whole, linear.axes_of_rows(equation, x))  # int8 moves, not its expansion
        return self.step.astype(x.dtype) * linear.multiply(equation, x, whole.astype(x.dtype), out_sharding)


def eighth(w: jax.Array, *, stacked: bool) -> Eighth:
    axes = tuple(range(1 if stacked else 0, w.ndim))
    step = jnp.abs(w).max(axis=axes, keepdims=True) / 127
    whole = jax.reshard(jnp.round(w / step).astype(jnp.int8), jax.typeof(w).sharding.spec)
    return Eighth(whole, jax.reshard(step.reshape(-1) if stacked else step.reshape(()), jax.P()))


def pair(mesh: str, *, stacked: bool, tied: bool):
    """A model whose matrices are such leaves, table and tied head too, and one with the same numbers as arrays."""
    config = tiny_config(tie_embeddings=tied)
    models = []
    for kind in ("leaf", "dense"):
        llama = random_llama(config, mesh=mesh, stacked=stacked)
        with jax.set_mesh(llama.mesh):

            def change(path, w, kind=kind):
                name = name_of(path)
                if "norm" in name:
                    return w
                leaf = eighth(w, stacked=stacked and name.startswith("blocks"))
                return leaf if kind == "leaf" else jax.reshard(leaf.dense(), jax.typeof(w).sharding.spec)

            model = jax.tree_util.tree_map_with_path(change, llama.model)
        models.append(dataclasses.replace(llama, model=model))
    return models


@pytest.mark.parametrize(
    ("mesh", "tied"), [slow("tensor=1", True), ("fsdp=2,tensor=4", True), slow("context=8", False)]
)
def test_decoding(mesh, tied):
    leaf, dense = pair(mesh, stacked=False, tied=tied)
    assert is_leaf(leaf.model.embed.get_value())
    prompts = [random_ids(n) for n in (3, 17)]
    found, expected = (llama_jax.generate(x, prompts, max_new_tokens=12, logprobs=True) for x in (leaf, dense))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


@pytest.mark.parametrize("mesh", [slow("tensor=1"), "fsdp=2,tensor=4"])
def test_loss_and_gradient_of_stacked_blocks(mesh):
    """The gradient of a step size is that of its matrix along the whole numbers."""
    leaf, dense = pair(mesh, stacked=True, tied=False)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 32)).astype(np.int32)

    def loss(model, tokens_BT):
        x_BTD, _ = model.hidden(tokens_BT)
        return cross_entropy(model, x_BTD, jnp.roll(tokens_BT, -1, axis=1), tokens_BT >= 0).mean

    def differentiate(llama):
        model = llama.model
        floats, rest = [], []
        leaves, treedef = jax.tree.flatten(model)
        for x in leaves:
            (floats if jnp.issubdtype(x.dtype, jnp.floating) else rest).append(x)

        def of(floats, tokens_BT):
            left, other = iter(floats), iter(rest)
            both = [next(left) if jnp.issubdtype(x.dtype, jnp.floating) else next(other) for x in leaves]
            changed = jax.tree.unflatten(treedef, both)
            return loss(attached(changed, handles(changed)), tokens_BT)

        with jax.set_mesh(llama.mesh):
            placed = jax.device_put(tokens, model.rules.sharding(("batch", "seq"), tokens.shape))
            value, gradient = jax.jit(jax.value_and_grad(of))(floats, placed)
        paths = jax.tree_util.tree_flatten_with_path(model)[0]
        names = [name_of(path) for path, x in paths if jnp.issubdtype(x.dtype, jnp.floating)]
        return value, dict(zip(names, gradient, strict=True))

    (value, found), (expected, of_arrays) = differentiate(leaf), differentiate(dense)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    weights = {name_of(p): x for p, x in jax.tree_util.tree_flatten_with_path(leaf.model, is_leaf=is_leaf)[0]}
    for name, weight in weights.items():
        if not is_leaf(weight):
            np.testing.assert_allclose(found[name], of_arrays[name], rtol=1e-4, atol=1e-6)
            continue
        whole, gradient = (np.asarray(x, np.float64) for x in (weight.whole, of_arrays[name]))
        axes = tuple(range(1 if name.startswith("blocks") else 0, whole.ndim))
        scale = np.abs(gradient).sum(axis=axes) * 127
        np.testing.assert_array_less(np.abs(found[f"{name}.step"] - (whole * gradient).sum(axis=axes)), 1e-5 * scale)


def test_saved_as_it_is_stored(tmp_path):
    """By a checkpoint of training in its parts, by `save` as the array that it means."""
    leaf, dense = pair("fsdp=2,tensor=4", stacked=True, tied=True)
    with jax.set_mesh(leaf.mesh):
        state = new_state(leaf.model, adamw(Optimizer(Schedule(peak=1e-3, steps=3))))
    arrays = named_arrays(state)["params"]
    assert {"embed.whole", "embed.step", "blocks.attn.wq.whole", "blocks.attn.wq.step", "final_norm"} <= set(arrays)
    assert arrays["blocks.attn.wq.whole"].dtype == jnp.int8
    assert set(leaf_of(leaf.model.embed).parts()) == {"whole", "step"}
    save_arrays(tmp_path / "params", arrays, stacked=lambda name: name.startswith("blocks."))
    opened = open_arrays(tmp_path / "params")
    read = {name: jnp.asarray(x.read((slice(None),) * len(x.shape))) for name, x in opened.items()}
    again = from_named_arrays(state, {**named_arrays(state), "params": read})
    for ours, theirs in zip(jax.tree.leaves(again.model), jax.tree.leaves(leaf.model), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    llama_jax.save(leaf, tmp_path / "leaf", format="hf")
    llama_jax.save(dense, tmp_path / "dense", format="hf")
    leaf_file, dense_file = (tmp_path / name / "model.safetensors" for name in ("leaf", "dense"))
    assert leaf_file.read_bytes() == dense_file.read_bytes()
