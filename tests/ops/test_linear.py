"""The product of every weight: equal to `jnp.einsum`, one two-dimensional matmul on one device."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax import sharding
from llama_jax.ops.weights import Flattened, einsum, flatten
from tests.builders import tiny_config

pytestmark = pytest.mark.unoptimized

SIZES = {"B": 4, "T": 6, "D": 48, "K": 2, "G": 4, "H": 16, "F": 32, "V": 40}
AXES = {"B": "batch", "T": "seq", "K": "kv_heads", "G": "groups", "H": "head_dim", "F": "mlp", "V": "vocab"}
# Every equation of the model.
EQUATIONS = (
    "BTD,DKGH->BTKGH", "BTD,DKH->BTKH", "BTKGH,KGHD->BTD", "BTD,DF->BTF", "BTF,FD->BTD", "BTD,VD->BTV", "BTD,DV->BTV",
)  # fmt: skip
MESHES = ("tensor=1", "tensor=2", "tensor=8", "fsdp=2,tensor=4", "fsdp=8", "data=2,fsdp=2,tensor=2")


def operands(equation: str):
    x_axes, w_axes, out_axes = re.split("->|,", equation)
    random = np.random.default_rng(0)
    x, w = (
        random.standard_normal([SIZES[a] for a in axes]).astype(np.float32) / scale
        for axes, scale in ((x_axes, 1), (w_axes, 8))
    )
    return x, x_axes, w, w_axes, out_axes


def names(axes: str, width: str) -> tuple[str, ...]:
    return tuple(width if axis == "D" else AXES[axis] for axis in axes)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_every_equation_on_every_mesh(equation, mesh):
    x, x_axes, w, w_axes, out_axes = operands(equation)
    rules = sharding.ShardingRules()
    with jax.set_mesh(sharding.make_mesh(tiny_config(num_kv_heads=2), **sharding.parse_mesh(mesh))):
        spec = rules.spec(names(out_axes, "act_embed"), [SIZES[a] for a in out_axes])
        out = jax.jit(lambda x, w: einsum(equation, x, w, out_sharding=spec))(
            jax.device_put(x, rules.sharding(names(x_axes, "act_embed"), x.shape)),
            jax.device_put(w, rules.sharding(names(w_axes, "embed"), w.shape)),
        )
        assert out.sharding.spec == spec
    expected = np.einsum(equation, x.astype(np.float64), w.astype(np.float64))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_one_matmul_of_two_dimensions(equation):
    """XLA on CPU runs a contraction of three dimensions ten times slower."""
    x, _, w, _, _ = operands(equation)
    with jax.set_mesh(sharding.make_mesh(tiny_config())):
        text = jax.jit(lambda x, w: einsum(equation, x, w, out_sharding=jax.P())).lower(x, w).as_text()
    dots = re.findall(r"dot_general.*: \((.*)\) -> (.*)", text)
    assert len(dots) == 1
    for tensor in re.findall(r"tensor<(.*?)>", " ".join(dots[0])):
        assert re.fullmatch(r"\d+x\d+xf32", tensor)
    assert "HIGHEST" in text


def test_the_activation_decides_the_dtype():
    x, _, w, _, _ = operands("BTD,DF->BTF")
    with jax.set_mesh(sharding.make_mesh(tiny_config())):
        out = einsum("BTD,DF->BTF", jnp.asarray(x, jnp.bfloat16), nnx.Param(jnp.asarray(w)), out_sharding=jax.P())
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), np.einsum("BTD,DF->BTF", x, w), atol=0.05)


@pytest.mark.parametrize(
    "equation",
    ["BTD,FD->BFT", "BDT,DF->BTF", "BTD,KDH->BTKH", "BTKGH,GKHD->BTD", "BTKGH,HDKG->BTD"],
    ids=["result transposed", "contracts the middle of x", "middle of w", "other order in w", "apart in w"],
)
def test_other_equations_are_refused(equation):
    x_axes, w_axes, _ = re.split("->|,", equation)
    x, w = (jnp.ones([SIZES[a] for a in axes]) for axes in (x_axes, w_axes))
    with (
        jax.set_mesh(sharding.make_mesh(tiny_config())),
        pytest.raises(ValueError, match=f"einsum '{equation}': contract the last dimensions of x"),
    ):
        einsum(equation, x, w, out_sharding=jax.P())


@pytest.mark.parametrize("mesh", [*MESHES, "context=8", "fsdp=2,context=2,tensor=2", "tensor=3"])
@pytest.mark.parametrize("T", [6, 1])
@pytest.mark.parametrize("equation", ["BTD,DKGH->BTKGH", "BTD,DKH->BTKH"])
def test_a_flattened_weight_is_the_same(mesh, T, equation):
    """[D, K, G, H] as [D, K * G * H], wherever the part of each device is one of both."""
    x, _, w, w_axes, out_axes = operands(equation)
    x = x[:, :T]
    rules = sharding.ShardingRules()
    with jax.set_mesh(sharding.make_mesh(tiny_config(num_kv_heads=2), **sharding.parse_mesh(mesh))):
        whole = jax.device_put(w, rules.sharding(names(w_axes, "embed"), w.shape))
        placed = jax.device_put(x, rules.sharding(("batch", "seq", "act_embed"), x.shape))
        flat = flatten(whole)
        assert isinstance(flat, Flattened)
        assert flat.matrix.shape == (48, w[0].size)
        spec = rules.spec(names(out_axes, "act_embed"), (4, T, *w.shape[1:]))
        out = jax.jit(lambda x, w: einsum(equation, x, w, out_sharding=spec))(placed, flat)
        assert out.sharding.spec == spec
        np.testing.assert_array_equal(flat.dense(), w)
        assert flat.dense().sharding == whole.sharding
    np.testing.assert_allclose(out, np.einsum(equation, x.astype(np.float64), w.astype(np.float64)), atol=1e-5)


def test_what_would_not_lie_together_stays():
    """Six devices on tensor, four kv heads: two of them on each half, their groups in three."""
    w = jnp.zeros((48, 4, 3, 16))
    rules = sharding.ShardingRules()
    with jax.set_mesh(sharding.make_mesh(tiny_config(num_heads=12, num_kv_heads=4), tensor=6)):
        w = jax.device_put(w, rules.sharding(("embed", "kv_heads", "groups", "head_dim"), w.shape))
        assert flatten(w) is w
