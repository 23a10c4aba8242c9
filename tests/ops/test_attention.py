"""Every implementation of attention against the reference, which is tested against NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import sharding
from llama_jax.ops import attention
from llama_jax.ops.attention import KERNELS, MASKED, dot_product_attention, tpu
from tests.builders import slow, tiny_config

pytestmark = pytest.mark.unoptimized

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
FAST = [name for name in MASKED if name != "reference"]
H = 16
SCALE = 0.3


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
    monkeypatch.setattr(attention, "SMALL_BLOCK", dict.fromkeys(attention.SMALL_BLOCK, 8))
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", ["tensor=1", "data=2,tensor=4"])
def test_one_token_before_it_is_in_the_cache(mesh, dtype):
    """Its own slot, and those after it, hold anything."""
    q, k, v = inputs(4, 1, 40, dtype=dtype)
    slots = jnp.asarray([[0], [17], [39], [5]])
    expected = run("reference", q, k, v, slots)
    at = (jnp.arange(4), slice(None), slots[:, 0])
    own_k, own_v = k[at][:, None], v[at][:, None]
    unseen = (jnp.arange(40) >= slots)[:, None, :, None]
    k, v = (jnp.where(unseen, 1e4, x).astype(dtype) for x in (k, v))
    rules = sharding.ShardingRules()
    with jax.set_mesh(sharding.make_mesh(tiny_config(num_kv_heads=2), **sharding.parse_mesh(mesh))):
        cache = ("batch", "kv_heads", "cache_seq", "head_dim")
        arrays = [
            jax.device_put(x, rules.sharding(axes, x.shape))
            for x, axes in (
                (q, ("batch", "seq", "kv_heads", "groups", "head_dim")),
                *((x, ("batch", "seq", "kv_heads", "head_dim")) for x in (own_k, own_v)),
                *((x, cache) for x in (k, v)),
                (slots, ("batch", "seq")),
            )
        ]
        one = jax.jit(lambda *x: attention.attention_of_one(*x[:5], slots_B1=x[5], scale=SCALE))
        assert_close(one(*arrays), expected, dtype)


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


@pytest.mark.parametrize("implementation", MASKED)
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


@pytest.mark.parametrize("implementation", MASKED)
def test_blocks_of_queries_change_nothing(implementation, twenty_tokens, small_blocks):
    """Two blocks of eight and one of four."""
    args, whole, packed = twenty_tokens
    for ordered in (False, True):
        assert_close(run(implementation, *args[:4], ordered=ordered), whole)
        assert_close(run(implementation, *args, ordered=ordered), packed)


@pytest.mark.parametrize("S", [15, 24, 40])
@pytest.mark.parametrize("implementation", MASKED)
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
@pytest.mark.parametrize("implementation", MASKED)
def test_padding_gives_finite_numbers(implementation, T):
    """A slot past the end sees every key; what comes out is thrown away, but must not poison a sum."""
    q, k, v = inputs(2, T, 20)
    slots_BT = np.array([[20], [2**30]]).repeat(T, axis=1)
    assert np.isfinite(run(implementation, q, k, v, slots_BT)).all()


@pytest.mark.parametrize(("T", "S"), [(1, 300), (16, 100), (20, 20)], ids=["decode", "prefill", "no cache"])
@pytest.mark.parametrize("implementation", MASKED)
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


def packed(T: int, K: int, G: int, head_dim: int):
    """Two rows of ragged documents, padding at the end of one (segment 0); weights of a loss."""
    random = np.random.default_rng([T, K, G, head_dim])
    q = 2 * random.standard_normal((2, T, K, G, head_dim))
    k, v = random.standard_normal((2, 2, K, T, head_dim))
    lengths = (1, T // 3, T - T // 3 - 1), (T // 2 + 3, 2, T // 4, T - T // 2 - T // 4 - 5)
    segments = [np.repeat([1, 2, 3], lengths[0]), np.repeat([1, 2, 3, 0], lengths[1])]
    arrays = q, k, v, random.standard_normal(q.shape)
    return [x.astype(np.float32) for x in arrays], np.array(segments, np.int32)


ROW_AXES = {
    5: ("batch", "seq", "kv_heads", "groups", "head_dim"),
    4: ("batch", "kv_heads", "cache_seq", "head_dim"),
    2: ("batch", "seq"),
}


def outputs_and_gradients(implementation, mesh, arrays, segments=None):
    """Of a weighted sum of the outputs."""
    q, k, v, weights = arrays
    slots = np.arange(q.shape[1], dtype=np.int32)[None].repeat(len(q), axis=0)
    rules, config = sharding.ShardingRules(), tiny_config(num_heads=q.shape[2] * q.shape[3], num_kv_heads=q.shape[2])
    with jax.set_mesh(sharding.make_mesh(config, **sharding.parse_mesh(mesh))):
        put = [
            None if x is None else jax.device_put(x, rules.sharding(ROW_AXES[x.ndim], x.shape))
            for x in (q, k, v, slots, segments, weights)
        ]

        def loss(q, k, v, slots, segments, weights):
            out = attend(q, k, v, slots, segments, implementation, True)
            return (weights * out).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*put)
        assert [x.sharding.spec for x in (out, *gradients)] == [put[i].sharding.spec for i in (0, 0, 1, 2)]
        return [np.asarray(x) for x in (out, *gradients)]


@functools.cache
def of_reference(T: int, K: int, G: int, head_dim: int, segmented: bool):
    """What the reference gives on one device for `packed`: the same for every kernel and mesh."""
    arrays, segments = packed(T, K, G, head_dim)
    return outputs_and_gradients("reference", "tensor=1", arrays, segments if segmented else None)


@pytest.mark.parametrize("segmented", [True, False], ids=["packed", "causal"])
@pytest.mark.parametrize(("K", "G"), [(4, 1), (2, 4), (1, 8)], ids=["mha", "gqa 4", "mqa 8"])
@pytest.mark.parametrize("head_dim", [slow(64), 128])
@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels(implementation, head_dim, K, G, segmented):
    """Splash interpreted, and what stands for cuDNN on a CPU; three blocks, the last one padded."""
    arrays, segments = packed(300, K, G, head_dim)
    segments = segments if segmented else None
    expected = of_reference(300, K, G, head_dim, segmented)
    for ours, reference in zip(
        outputs_and_gradients(implementation, "tensor=1", arrays, segments), expected, strict=True
    ):
        assert_close(ours, reference)


@pytest.mark.parametrize("segmented", [True, False], ids=["packed", "causal"])
@pytest.mark.parametrize("mesh", ["context=8", "fsdp=2,context=2,tensor=2", "context=2,tensor=4"])
@pytest.mark.parametrize("implementation", [*MASKED, *KERNELS])
def test_context_parallelism(implementation, mesh, segmented):
    """A sequence over devices, documents across their borders; with splash each device computes two chunks."""
    arrays, segments = packed(256, 2, 2, 64)
    segments = segments if segmented else None
    expected = of_reference(256, 2, 2, 64, segmented)
    for ours, reference in zip(outputs_and_gradients(implementation, mesh, arrays, segments), expected, strict=True):
        assert_close(ours, reference)


@pytest.mark.parametrize("implementation", [*MASKED, *KERNELS])
def test_segments_as_they_come(implementation):
    """Plain arrays are split as the queries are."""
    (q, k, v, _), segments = packed(64, 2, 2, 64)
    slots = np.arange(64)[None].repeat(2, axis=0)
    expected = run("reference", q, k, v, slots, segments, ordered=True)
    rules = sharding.ShardingRules()
    with jax.set_mesh(sharding.make_mesh(tiny_config(), fsdp=2, context=4)):
        q, k, v = (jax.device_put(x, rules.sharding(ROW_AXES[x.ndim], x.shape)) for x in (q, k, v))
        assert_close(run(implementation, q, k, v, slots, segments, ordered=True), expected)


@pytest.mark.parametrize("implementation", ["cpu", "reference", "splash"])
def test_float16_scores_beyond_its_range(implementation):
    """60 * 60 * 64 is 230,400; the greatest float16 is 65,504."""
    q, k = (jnp.full(shape, 60, "float16") for shape in ((1, 4, 1, 1, 64), (1, 1, 4, 64)))
    v = jnp.arange(4.0, dtype="float16")[None, None, :, None] * jnp.ones((64,), "float16")
    out = run(implementation, q, k, v, np.arange(4)[None], ordered=True)
    np.testing.assert_allclose(out[0, :, 0, 0, 0], [0, 0.5, 1, 1.5], atol=1e-2)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_each_query_is_computed_once_and_work_is_even(devices):
    T = 12
    rows = [attention.context.rows(i, T, devices) for i in range(devices)]
    assert sorted(np.concatenate(rows)) == list(range(T * devices))
    assert len({int(x.sum()) for x in rows}) == 1


@pytest.mark.parametrize("by_column", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_kernel_computes_what_jax_would(devices, by_column):
    """Block by block as JAX's own function that looks at every element of the mask."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos

    block, S = 4, 64
    T = S // devices
    rows = [attention.context.rows(i, T, devices) for i in range(devices)]
    mask = masks.CausalMask((S, S))
    mask.q_sequence = np.concatenate(rows)
    process = infos.process_mask_dkv if by_column else infos.process_mask
    expected, _ = process(masks.MultiHeadMask([mask]), (block, block), q_seq_shards=devices, shrink_grid=False)
    for i in range(devices):
        ours = tpu._mask_info(rows, S, block, i, by_column=by_column)
        part = slice(i * T // block, (i + 1) * T // block)
        np.testing.assert_array_equal(ours.block_mask, expected.block_mask[:, part])
        np.testing.assert_array_equal(ours.data_next, expected.data_next[:, part])
        np.testing.assert_array_equal(ours.q_sequence, rows[i])


@pytest.mark.parametrize(
    ("platform", "kind", "dtype", "T", "causal", "name"),
    [
        ("cpu", "cpu", "float32", 4096, True, "cpu"),
        ("tpu", "TPU v5p", "bfloat16", 4096, True, "splash"),
        ("tpu", "TPU v5p", "float32", 4096, True, "xla"),
        ("tpu", "TPU v5p", "bfloat16", 64, True, "xla"),
        ("tpu", "TPU v5p", "bfloat16", 1, False, "xla"),
        ("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 4096, True, "cudnn"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "float16", 4096, True, "cudnn"),
        ("gpu", "NVIDIA H100 80GB HBM3", "float32", 4096, True, "xla"),
        ("gpu", "Tesla V100-SXM2-16GB", "float16", 4096, True, "xla"),
        ("gpu", "Tesla T4", "float16", 4096, True, "xla"),
        ("gpu", "NVIDIA L4", "bfloat16", 4096, True, "cudnn"),
        ("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 4096, False, "xla"),
    ],
)
def test_the_platform_chooses(platform, kind, dtype, T, causal, name, monkeypatch):
    monkeypatch.setattr(attention, "device", lambda: (platform, kind))
    q = jax.ShapeDtypeStruct((1, T, 2, 2, 128), dtype)
    assert attention._choose(None, q, causal=causal) == name


def test_a_kernel_that_cannot_compute_this(monkeypatch):
    monkeypatch.setattr(attention, "device", lambda: ("gpu", "NVIDIA H100 80GB HBM3"))
    q = jax.ShapeDtypeStruct((1, 256, 2, 2, 128), "float32")
    with pytest.raises(ValueError, match="'cudnn' computes in bfloat16 or float16.*not in float32 with 128.*'xla'"):
        attention._choose("cudnn", q, causal=True)


def test_an_unknown_implementation():
    q, k, v = inputs(1, 1, 4)
    with pytest.raises(ValueError, match="'flash' is unknown; there are reference, xla, cpu, splash, cudnn"):
        run("flash", q, k, v, np.array([[3]]))
