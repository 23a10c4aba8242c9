"""The two ways to rotate give the same numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import sharding
from llama_jax.ops.rope import apply_rope, apply_rope_by_product, inverse_frequencies, rope_angles
from tests.builders import tiny_config

pytestmark = pytest.mark.unoptimized


@pytest.mark.parametrize("mesh", ["tensor=1", "data=2,tensor=2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 1, 2, 64), (4, 1, 2, 4, 16)])
def test_by_product_as_by_halves(shape, dtype, mesh):
    frequencies = inverse_frequencies(shape[-1], 500000.0, None)
    with jax.set_mesh(sharding.make_mesh(tiny_config(num_kv_heads=2), **sharding.parse_mesh(mesh))):
        x = jax.random.normal(jax.random.key(0), shape, dtype, out_sharding=jax.P("data", None, "tensor_kv"))
        positions_BT = jax.device_put(jnp.array([[0], [7], [250], [4095]], jnp.int32), jax.P("data"))
        angles = rope_angles(positions_BT, frequencies)
        expected, found = (np.asarray(f(x, angles), np.float32) for f in (apply_rope, apply_rope_by_product))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
