"""The kernel that writes one token a row, interpreted, against the writes of a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import sharding
from llama_jax.caches import full
from llama_jax.ops import put
from tests.builders import tiny_config

pytestmark = pytest.mark.unoptimized


@pytest.mark.parametrize("mesh", ["tensor=1", "data=2,tensor=4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("B", [4, 34])
def test_each_row_at_its_own_slot(B, dtype, mesh):
    """Slots past the end are dropped; 34 rows take more than one step of the kernel."""
    random, K, S, H = np.random.default_rng(0), 2, 48, 128
    rules = sharding.ShardingRules()
    slots = random.integers(0, S, (B, 1)).astype(np.int32)
    slots[:4, 0] = 0, S - 1, S, S + 100
    new = [random.standard_normal((B, 1, K, H)) for _ in range(2)]
    old = [random.standard_normal((B, K, S, H)) for _ in range(2)]
    with jax.set_mesh(sharding.make_mesh(tiny_config(num_kv_heads=K), **sharding.parse_mesh(mesh))):

        def place(x, axes):
            return jax.device_put(jnp.asarray(x), rules.sharding(axes, x.shape))

        layer = full.FullCache(*(place(x.astype(dtype), full.AXES) for x in old))
        assert put.fits(layer.k)
        k, v = (place(x.astype(dtype), ("batch", "seq", "kv_heads", "head_dim")) for x in new)
        at = place(slots, ("batch", "seq"))
        expected = jax.jit(full.FullCache.write)(layer, k, v, at)
        actual = jax.jit(lambda *x: full.FullCache.put_with_kernel(*x, interpret=True))(layer, k, v, at)
    for name in ("k", "v"):
        np.testing.assert_array_equal(*(np.asarray(getattr(x, name), np.float32) for x in (actual, expected)))
        assert not np.array_equal(
            np.asarray(getattr(actual, name), np.float32), np.asarray(getattr(layer, name), np.float32)
        )


def test_other_caches_do_not_fit():
    assert not put.fits(jnp.zeros((1, 1, 24, 128), jnp.bfloat16))
    assert not put.fits(jnp.zeros((1, 1, 32, 64), jnp.bfloat16))
    assert not put.fits(jnp.zeros((1, 1, 32, 128), jnp.float16))
