"""Caches: rows put in, and a kind that only this file knows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax import caches, sharding
from llama_jax.caches.full import FullCache
from llama_jax.model import Llama
from tests.builders import slow, tiny_config
from tests.infer.helpers import random_ids, random_llama

CONFIG = tiny_config(num_kv_heads=2, num_heads=4)
MESHES = ["tensor=1", "fsdp=2,tensor=4", "data=4,tensor=2", "context=4,tensor=2"]


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_row_put_in(mesh, stacked):
    """The row holds what the other cache held, all other rows what they held; the row's later slots do not count."""
    random = np.random.default_rng(0)
    with jax.set_mesh(sharding.make_mesh(CONFIG, **sharding.parse_mesh(mesh))):
        model = Llama(CONFIG, dtype="float32", param_dtype="float32", stacked=stacked, rngs=None)

        def filled(batch, size):
            leaves, treedef = jax.tree.flatten(model.init_cache(batch, size))
            values = [random.standard_normal(x.shape).astype(np.float32) for x in leaves]
            placed = [jax.device_put(v, x.sharding) for v, x in zip(values, leaves, strict=True)]
            return jax.tree.unflatten(treedef, placed), values

        cache, before = filled(4, 16)
        other, new = filled(1, 8)
        inserted = jax.jit(caches.insert_row)(cache, 2, other)
        for old, x in zip(jax.tree.leaves(cache), jax.tree.leaves(inserted), strict=True):
            assert jax.typeof(x).sharding == jax.typeof(old).sharding
    for x, expected, row in zip(jax.tree.leaves(inserted), before, new, strict=True):
        expected[..., 2, :, :8, :] = row[..., 0, :, :, :]
        x = np.array(x)
        x[..., 2, :, 8:, :] = expected[..., 2, :, 8:, :]
        np.testing.assert_array_equal(x, expected)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned:
    """A toy kind: slots before heads, doubled when written, and attention spelt out."""

    kv: jax.Array  # [2, ..., B, S, K, H]

    @classmethod
    def init(cls, rules, *, batch, size, num_kv_heads, head_dim, dtype, layers=None):
        front = (2,) if layers is None else (layers, 2)
        spec = rules.spec(("batch", "cache_seq", "kv_heads", "head_dim"), (batch, size, num_kv_heads, head_dim))
        shape = (*front, batch, size, num_kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype, out_sharding=jax.P(*(None for _ in front), *spec)))

    @property
    def num_slots(self):
        return self.kv.shape[-3]

    @property
    def nbytes(self):
        return self.kv.nbytes

    def attend(
        self, q_BTKGH, k_BTKH, v_BTKH, *, positions_BT, order_BT, segment_ids_BT, span, ordered, scale, way
    ):  # fmt: skip
        slots_S = jnp.arange(self.num_slots)
        written_BTS = positions_BT[:, :, None] == slots_S
        new = [jnp.einsum("BTS,BTKH->BSKH", written_BTS.astype(x.dtype), x) for x in (k_BTKH, v_BTKH)]
        kv = jnp.where(written_BTS.any(axis=1)[None, :, :, None, None], 2 * jnp.stack(new), self.kv)
        k_BSKH, v_BSKH = kv / 2
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * scale
        seen_BTS = slots_S <= positions_BT[:, :, None]
        weights = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH), Turned(kv)

    def settle(self, x_BTD):
        return x_BTD, self

    def insert_row(self, row, other):
        start = (*(0 for _ in self.kv.shape[:-4]), row, 0, 0, 0)
        return Turned(jax.lax.dynamic_update_slice(self.kv, other.kv, start))

    def rewind(self, length_B):
        return self

    def grow(self, rules, size):
        extra = [(0, 0)] * self.kv.ndim
        extra[-3] = (0, size - self.num_slots)
        return Turned(jnp.pad(self.kv, extra))


@pytest.mark.parametrize("stacked", [False, slow(True)], ids=["list", "stacked"])
def test_a_kind_from_outside(stacked):
    """Prefill, decode, growth and rows put in, in a model that mixes it with the full cache: the same tokens."""
    prompts = [random_ids(n) for n in (3, 17)]
    plain, llama = (random_llama(CONFIG, stacked=stacked) for _ in range(2))
    for block in [llama.model.blocks] if stacked else llama.model.blocks[::2]:
        block.attn.cache = Turned
    with jax.set_mesh(llama.mesh):
        kinds = {type(layer) for layer in caches.layers_of(llama.model.init_cache(1, 8))}
    assert kinds == ({Turned} if stacked else {Turned, FullCache})
    expected = llama_jax.generate(plain, prompts, max_new_tokens=12, logprobs=True)
    for ours, theirs in zip(
        llama_jax.generate(llama, prompts, max_new_tokens=12, logprobs=True), expected, strict=True
    ):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)

    def logits_of(llama):
        """Of the next token after a prompt in a row put in, in a cache that has grown."""
        ids = jnp.asarray([prompts[1]])

        @jax.jit
        def logits(model):
            order = jnp.arange(17)[None]
            _, one = model.hidden(ids, positions_BT=order, cache=model.init_cache(1, 32), ordered=True)
            cache = caches.grow(caches.insert_row(model.init_cache(3, 32), jnp.int32(1), one), model.rules, 40)
            assert caches.num_slots(cache) == 40
            positions = jnp.array([[40], [17], [40]])
            x_B1D, _ = model.hidden(jnp.full((3, 1), 5), positions_BT=positions, cache=caches.rewind(cache, positions))
            return model.logits(x_B1D)[1, 0]

        with jax.set_mesh(llama.mesh):
            return logits(llama.model)

    np.testing.assert_allclose(logits_of(llama), logits_of(plain), atol=1e-4)
