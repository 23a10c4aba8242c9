"""Every implementation of attention against the reference, which is tested against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import sharding
from llama_jax.ops import attention
from llama_jax.ops.attention import IMPLEMENTATIONS, dot_product_attention
from tests.builders import tiny_config

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
H = 16
SCALE = 0.3


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh(tiny_config())):
        yield


def inputs(B: int, T: int, S: int, *, K: int = 2, G: int = 3, dtype: str = "float32"):
    """Queries, keys and values: in float32 with sharp weights, whose rounding in bfloat16 would hide any error."""
    random, sharp = np.random.default_rng([B, T, S, K, G]), 2 if dtype == "float32" else 1
    q_BTKGH = sharp * random.standard_normal((B, T, K, G, H))
    k_BKSH, v_BKSH = sharp * random.standard_normal((B, K, S, H)), random.standard_normal((B, K, S, H))
    return [jnp.asarray(x, dtype) for x in (q_BTKGH, k_BKSH, v_BKSH)]


def assert_close(actual, expected, dtype: str = "float32") -> None:
    assert actual.dtype == expected.dtype == jnp.dtype(dtype)
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())


def attend(q, k, v, slots, segments, implementation, ordered):
    return dot_product_attention(
        q, k, v, slots_BT=slots, segment_ids_BT=segments, ordered=ordered, scale=SCALE, implementation=implementation
    )


compiled = jax.jit(attend, static_argnames=("implementation", "ordered"))


def run(implementation: str, q, k, v, slots, segments=None, *, ordered: bool = False):
    slots = slots if isinstance(slots, jax.Array) else jnp.asarray(slots, jnp.int32)
    segments = segments if segments is None else jnp.asarray(segments, jnp.int32)
    return compiled(q, k, v, slots, segments, implementation, ordered)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of eight queries; what is compiled depends on it."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    monkeypatch.setattr(attention, "SMALL_BLOCK", 8)
    compiled.clear_cache()
    yield
    compiled.clear_cache()


def test_the_reference_is_the_formula():
    """One query after the other in NumPy, in float64."""
    B, T, S, K, G = 2, 3, 9, 2, 3
    q, k, v = inputs(B, T, S, K=K, G=G)
    slots_BT = np.array([[0, 4, 8], [2, 3, 5]])
    out_BTKGH = run("reference", q, k, v, slots_BT)
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, t, kv, g in np.ndindex(B, T, K, G):
        seen = slots_BT[b, t] + 1
        scores_S = k64[b, kv, :seen] @ q64[b, t, kv, g] * SCALE
        weights_S = np.exp(scores_S - scores_S.max())
        expected_H = weights_S / weights_S.sum() @ v64[b, kv, :seen]
        np.testing.assert_allclose(out_BTKGH[b, t, kv, g], expected_H, atol=1e-5)


@pytest.mark.parametrize(("S", "dtype"), [*((S, "float32") for S in (1, 100, 256, 300, 1000)), (300, "bfloat16")])
@pytest.mark.parametrize("implementation", FAST)
def test_decode(implementation, S, dtype):
    """One query a row, anywhere in the cache: its ends, and both sides of a block's."""
    slots_B = sorted({min(slot, S - 1) for slot in (0, 1, 99, 254, 255, 256, 299, 511, 512, 767, 768, 998, 999)})
    q, k, v = inputs(len(slots_B), 1, S, dtype=dtype)
    slots_B1 = np.array(slots_B)[:, None]
    expected = run("reference", q, k, v, slots_B1)
    assert_close(run(implementation, q, k, v, slots_B1), expected, dtype)
    low = run(implementation, q, k, v, 0 * slots_B1)  # no other row makes the loop over blocks longer
    assert_close(low, run("reference", q, k, v, 0 * slots_B1), dtype)


@pytest.mark.parametrize("implementation", FAST)
def test_decode_never_reads_what_a_query_cannot_see(implementation):
    """Slots that are not written yet may hold anything finite."""
    q, k, v = inputs(3, 1, 300)
    slots_B1 = np.array([[0], [17], [256]])
    unseen_B1S1 = (np.arange(300) > slots_B1)[:, None, :, None]
    dirty = run(implementation, q, jnp.where(unseen_B1S1, 1e4, k), jnp.where(unseen_B1S1, -1e4, v), slots_B1)
    np.testing.assert_array_equal(dirty, run(implementation, q, k, v, slots_B1))


@pytest.mark.parametrize("implementation", FAST)
def test_scores_of_hundreds(implementation):
    """A softmax without the maximum subtracted overflows here."""
    q, k, v = inputs(2, 1, 300)
    slots_B1 = np.array([[299], [40]])
    out = run(implementation, 30 * q, k, v, slots_B1)
    assert_close(out, run("reference", 30 * q, k, v, slots_B1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("K", "G"), [(2, 3), (3, 1), (1, 4)], ids=["gqa", "mha", "mqa"])
@pytest.mark.parametrize("implementation", FAST)
def test_prefill_into_a_larger_cache(implementation, K, G, dtype):
    """Rows that start at different slots, as the second turn of a conversation."""
    q, k, v = inputs(3, 16, 100, K=K, G=G, dtype=dtype)
    slots_BT = np.array([[0], [37], [84]]) + np.arange(16)
    assert_close(run(implementation, q, k, v, slots_BT), run("reference", q, k, v, slots_BT), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_segments_equal_separate_runs(implementation):
    lengths = [5, 1, 10]
    q, k, v = inputs(2, 16, 16)
    segments_BT = np.repeat([1, 2, 3], lengths)[None].repeat(2, axis=0)
    packed = run(implementation, q, k, v, np.arange(16)[None].repeat(2, axis=0), segments_BT)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        slots_BT = np.arange(length)[None].repeat(2, axis=0)
        apart = run("reference", q[:, part], k[:, :, part], v[:, :, part], slots_BT)
        assert_close(packed[:, part], apart)
        start += length


@pytest.fixture(scope="module")
def twenty_tokens():
    """Queries, keys, values, slots and segments of two rows, and what the reference makes of them in one block."""
    slots_BT, segments_BT = np.arange(20)[None].repeat(2, axis=0), np.array([[1] * 7 + [2] * 13, [1] * 20])
    args = (*inputs(2, 20, 20), slots_BT, segments_BT)
    with jax.set_mesh(sharding.make_mesh(tiny_config())):
        return args, run("reference", *args[:4]), run("reference", *args)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_of_queries_change_nothing(implementation, twenty_tokens, small_blocks):
    """Two blocks of eight and one of four."""
    args, whole, packed = twenty_tokens
    for ordered in (False, True):
        assert_close(run(implementation, *args[:4], ordered=ordered), whole)
        assert_close(run(implementation, *args, ordered=ordered), packed)


@pytest.mark.parametrize("S", [15, 24, 40])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ordered_queries_skip_the_keys_after_their_block(implementation, S, small_blocks):
    """Prompts of 15, 3 and 0 tokens in a bucket of 24, with caches smaller, equal and larger."""
    q, k, v = inputs(3, 24, S)
    length_B1 = np.array([[15], [3], [0]])
    slots_BT = np.where(np.arange(24) < length_B1, np.arange(24), S + 24)
    expected = run("reference", q, k, v, slots_BT)
    actual = run(implementation, q, k, v, slots_BT, ordered=True)
    assert np.isfinite(actual).all()
    for b, (length,) in enumerate(length_B1):
        if length:
            assert_close(actual[b, :length], expected[b, :length])


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_gives_finite_numbers(implementation, T):
    """A slot past the end sees every key; what comes out is thrown away, but must not poison a sum."""
    q, k, v = inputs(2, T, 20)
    slots_BT = np.array([[20], [2**30]]).repeat(T, axis=1)
    assert np.isfinite(run(implementation, q, k, v, slots_BT)).all()


@pytest.mark.parametrize(("T", "S"), [(1, 300), (16, 100), (20, 20)], ids=["decode", "prefill", "no cache"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_on_a_mesh(implementation, T, S):
    """Rows over fsdp, kv heads and groups over tensor: no device needs another's."""
    q, k, v = inputs(4, T, S, K=2, G=2)
    slots_BT = np.array([[0], [7], [S - T], [S // 2 - T // 2]]) + np.arange(T)
    expected = run("reference", q, k, v, slots_BT)
    rules, config = sharding.ShardingRules(), tiny_config(num_heads=4, num_kv_heads=2)
    with jax.set_mesh(sharding.make_mesh(config, fsdp=2, tensor=4)):
        put = [
            jax.device_put(np.asarray(x), rules.sharding(axes, x.shape))
            for x, axes in (
                (q, ("batch", "seq", "kv_heads", "groups", "head_dim")),
                (k, ("batch", "kv_heads", "cache_seq", "head_dim")),
                (v, ("batch", "kv_heads", "cache_seq", "head_dim")),
                (slots_BT.astype(np.int32), ("batch", "seq")),
            )
        ]
        out = run(implementation, *put)
    assert out.sharding.spec == put[0].sharding.spec
    assert out.sharding.shard_shape(out.shape) == (2, T, 1, 1, H)
    assert_close(out, expected)


@pytest.mark.parametrize("implementation", FAST)
def test_gradients_of_training(implementation):
    """Sixteen queries, packed; decode alone has no gradient."""
    q, k, v = inputs(2, 16, 16)
    slots_BT = jnp.arange(16)[None].repeat(2, axis=0)
    segments_BT = jnp.array([[1] * 5 + [2] * 11, [1] * 16])
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(q.shape), jnp.float32)

    def gradients(name):
        def loss(q, k, v):
            return (weights * run(name, q, k, v, slots_BT, segments_BT)).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for ours, expected in zip(gradients(implementation), gradients("reference"), strict=True):
        assert_close(ours, expected)


def test_an_unknown_implementation():
    q, k, v = inputs(1, 1, 4)
    with pytest.raises(ValueError, match="'flash' is unknown; there are reference, xla, cpu"):
        run("flash", q, k, v, np.array([[3]]))
