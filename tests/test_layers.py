"""A kind of layers that only this file knows, mixed with the plain one: stacked by periods, listed, sharded, saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax import sharding
from llama_jax.checkpoint.arrays import save_arrays
from llama_jax.config import ConfigError, ModelConfig, params
from llama_jax.config.params import ParamSpec, Source
from llama_jax.model import Llama, layers
from llama_jax.model.blocks import Block
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.weights import einsum, name_of
from llama_jax.train.losses import cross_entropy
from llama_jax.train.optim import matrices
from llama_jax.weights.formats import base
from llama_jax.weights.formats.native import read_native
from llama_jax.weights.load import LoadedLlama, read_model
from llama_jax.weights.open import Checkpoint
from tests.builders import tiny_config
from tests.infer.helpers import random_ids

pytestmark = pytest.mark.unoptimized

KIND = "gated"


class Gated(Block):
    """A plain block with one branch more: tanh(gate) * (x W)."""

    def __init__(self, params, implementation):
        super().__init__(params, implementation)
        self.branch, self.gate = params("branch"), params("gate")

    def __call__(self, x_BTD, layer, **where):
        x_BTD, layer = super().__call__(x_BTD, layer, **where)
        normed_BTD = rms_norm(x_BTD, self.mlp_norm.get_value(), eps=self.eps)
        spec = jax.typeof(x_BTD).sharding.spec
        gate_D = jax.reshard(jnp.tanh(self.gate.get_value()), jax.P(spec[2])).astype(x_BTD.dtype)
        return x_BTD + gate_D * einsum("BTD,DE->BTE", normed_BTD, self.branch, out_sharding=spec), layer


@dataclasses.dataclass(frozen=True)
class Mixed(ModelConfig):
    """Plain, plain, gated, and so on."""

    @property
    def layers(self) -> tuple[str, ...]:
        return ("plain", "plain", KIND) * (self.num_layers // 3)


SPECS = [
    *(dataclasses.replace(spec, layers=(KIND,)) for spec in params.TABLE if spec.in_layers),
    ParamSpec("blocks.{}.branch", "DD", ("D", "D"), "model.layers.{}.branch.weight", None, None,
              logical=("embed", "act_embed"), layers=(KIND,)),
    ParamSpec("blocks.{}.gate", "D", ("D",), "model.layers.{}.gate", None, None, kind="gate", logical=("norm",),
              layers=(KIND,)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def kind(monkeypatch):
    monkeypatch.setattr(params, "_OTHERS", [])
    monkeypatch.setitem(layers.BLOCKS, KIND, Gated)
    params.register(SPECS)
    yield
    params.specs_of.cache_clear()


def config(**changes) -> Mixed:
    return Mixed(**dataclasses.asdict(tiny_config(num_layers=6, **changes)))


def value_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(sum(name.encode()))
    return (random.standard_normal(shape) * 0.2 + ("norm" in name)).astype(np.float32)


def mixed(mesh: str = "tensor=1", *, stacked: bool, **options) -> LoadedLlama:
    """Each layer's parameters by its number, however they are stored."""
    devices = sharding.make_mesh(config(), **sharding.parse_mesh(mesh))
    with jax.set_mesh(devices):
        model = Llama(config(), dtype="float32", param_dtype="float32", stacked=stacked, rngs=None, **options)

    def filled(path, leaf):
        place = params.place_of(name_of(path), config().layers)
        names = [place.spec.ours.format(i) for i in place.layers or [None]]
        if not place.stacked:
            names, shape = names[:1], leaf.shape
        else:
            shape = leaf.shape[1:]
        array = np.stack([value_of(name, shape) for name in names])
        return jax.device_put(array if place.stacked else array[0], jax.NamedSharding(devices, leaf.sharding.spec))

    return LoadedLlama(config(), jax.tree_util.tree_map_with_path(filled, model), None, devices, None)


TOKENS = np.random.default_rng(0).integers(0, 256, (4, 24)).astype(np.int32)


def loss_and_gradient(llama: LoadedLlama):
    """The gradient by layers, however they are stored."""

    def loss(model, tokens_BT):
        x_BTD, _ = model.hidden(tokens_BT)
        return cross_entropy(model, x_BTD, jnp.roll(tokens_BT, -1, axis=1), tokens_BT >= 0).mean

    with jax.set_mesh(llama.mesh):
        placed = jax.device_put(TOKENS, llama.model.rules.sharding(("batch", "seq"), TOKENS.shape))
        value, gradient = jax.jit(jax.value_and_grad(loss))(llama.model, placed)
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        place = params.place_of(name_of(path), config().layers)
        for n, layer in enumerate(place.layers or [None]):
            if place.stacked or n == 0:
                found[place.spec.ours.format(layer)] = np.asarray(x[n] if place.stacked else x)
    return float(value), found


def assert_close(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    assert {"blocks.2.branch", "blocks.5.gate"} <= found[1].keys()
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][name], gradient, atol=2e-5 * np.abs(gradient).max(), err_msg=name)


def test_periods_lists_remat_and_meshes():
    """Each way to store, compute again and split the model gives loss and gradients of the list on one device."""
    expected = loss_and_gradient(mixed(stacked=False))
    llama = mixed(stacked=True)
    assert {name_of(p) for p, _ in jax.tree_util.tree_flatten_with_path(llama.model)[0]} >= {
        "blocks.period.0.attn.wq", "blocks.period.2.branch", "blocks.period.2.gate", "embed",
    }  # fmt: skip
    assert_close(loss_and_gradient(llama), expected)
    for remat in ("attention", "full", "groups"):
        assert_close(loss_and_gradient(mixed(stacked=True, remat=remat)), expected)
    assert_close(loss_and_gradient(mixed("fsdp=2,tensor=4", stacked=True)), expected)
    plain = loss_and_gradient(dataclasses.replace(llama, model=without_gates(llama.model)))
    assert abs(plain[0] - expected[0]) > 1e-2  # the branch counts


def without_gates(model: Llama) -> Llama:
    return jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if "gate" in name_of(path)[-5:] else x, model)


def test_kinds_of_parameters():
    """Gates and norms do not decay; random gates are 0."""
    with jax.set_mesh(sharding.make_mesh(config())):
        options = {"dtype": "float32", "param_dtype": "float32", "stacked": True}
        model = Llama(config(), rngs=llama_jax.model.random_keys(0), **options)
        decay = {name_of(p): x for p, x in jax.tree_util.tree_flatten_with_path(matrices(model))[0]}
    assert not decay["blocks.period.2.gate"]
    assert not decay["blocks.period.1.attn_norm"]
    assert decay["blocks.period.2.branch"]
    assert decay["embed"]
    assert not model.blocks.period[2].gate.get_value().any()


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "periods"])
@pytest.mark.parametrize("mesh", ["tensor=1", "fsdp=2,tensor=4"])
def test_decoding_with_a_cache(mesh, stacked):
    """Prefill and decode give the tokens of whole forward passes."""
    llama, ids = mixed(mesh, stacked=stacked), random_ids(9)
    expected = list(ids)
    for _ in range(5):
        expected.append(int(np.argmax(llama_jax.logits(mixed(stacked=False), [expected])[0, -1])))
    assert llama_jax.generate(llama, [ids], max_new_tokens=5)[0].tokens == expected[9:]


def test_saved_and_loaded(tmp_path: Path):
    llama = mixed("fsdp=2,tensor=4", stacked=True)
    arrays = {name_of(path): x for path, x in jax.tree_util.tree_flatten_with_path(llama.model)[0]}
    save_arrays(tmp_path / "params", arrays, stacked=lambda name: name.startswith("blocks."))
    tensors = read_native(tmp_path, config())
    assert tensors["blocks.5.branch"].shape == (64, 64)
    checkpoint = Checkpoint(tmp_path, "native", config(), tensors, None)
    for mesh, stacked in (("tensor=1", False), ("tensor=8", True)):
        devices = sharding.make_mesh(config(), **sharding.parse_mesh(mesh))
        read = read_model(checkpoint, devices, dtype=None, stacked=stacked, advance=lambda done: None)
        expected = mixed(mesh, stacked=stacked).model
        for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_parameters_that_share_a_tensor(monkeypatch):
    """Gate and up in one tensor [2F, D], queries, keys, values in another: read in parts and written, bit for bit."""
    from llama_jax.weights import params as io
    from llama_jax.weights.source import plain_tensor

    fused = {"mlp.w_gate": ("gate_up", ()), "mlp.w_up": ("gate_up", ("F",)),
             "attn.wq": ("qkv", ()), "attn.wk": ("qkv", ("KGH",)), "attn.wv": ("qkv", ("KGH", "KH"))}  # fmt: skip

    def change(spec: ParamSpec) -> ParamSpec:
        name, before = fused.get(spec.ours.removeprefix("blocks.{}."), (None, ()))
        return spec if name is None else dataclasses.replace(spec, hf=Source(f"model.layers.{{}}.{name}", before))

    plain = tiny_config()
    random = np.random.default_rng(0)
    monkeypatch.setattr(params, "TABLE", tuple(change(spec) for spec in params.TABLE))
    params.specs_of.cache_clear()
    expected = params.expected(plain, "hf")
    assert expected["model.layers.1.gate_up"] == (320, 64)
    assert expected["model.layers.0.qkv"] == (256, 64)
    assert len(expected) == 3 + 2 * 6
    tensors = {
        name: plain_tensor(name, random.standard_normal(shape).astype(np.float32)) for name, shape in expected.items()
    }
    checkpoint = Checkpoint(Path("x"), "hf", plain, tensors, None)
    for spec, layer in params.parameters(plain):
        if layer is None:
            continue
        tensor, shape = checkpoint.tensor(spec, layer), spec.shape(plain)
        whole = io.read(tensor, spec, plain, "hf", (slice(None),) * len(shape))
        part = (slice(0, shape[0] // 2), *(slice(1, 2) if i == 0 else slice(None) for i in range(len(shape) - 1)))
        np.testing.assert_array_equal(io.read(tensor, spec, plain, "hf", part), whole[part])
        np.testing.assert_array_equal(io.to_stored(whole, spec, plain, "hf"), tensor.read())
    entries = {entry.name: entry for _, entry in base.tensor_entries(checkpoint, "hf", base.Options())}
    assert entries.keys() == tensors.keys()
    for name, entry in entries.items():
        assert entry.shape == tensors[name].shape
        np.testing.assert_array_equal(np.concatenate(list(entry.pieces())), tensors[name].read())


def test_a_format_without_a_place_for_a_parameter_is_named(tmp_path):
    llama = mixed(stacked=False)
    with pytest.raises(ConfigError, match="gguf has no place for blocks.{}.branch: write the model as native"):
        llama_jax.save(llama, tmp_path / "x.gguf", format="gguf")
    assert not list(tmp_path.iterdir())
