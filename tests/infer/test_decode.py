"""Prefill and decode against the forward pass without a cache, on one device and on many."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax import caches, sharding
from llama_jax.caches import full
from llama_jax.caches.full import FullCache
from llama_jax.config import RopeScaling
from llama_jax.infer.decode import CHUNK
from llama_jax.infer.engine import Request
from llama_jax.infer.generate import Generation
from llama_jax.model import Llama, blocks, flatten_heads
from llama_jax.ops.attention import attention_of_one, way_of
from tests.builders import slow, tiny_config
from tests.infer.helpers import random_ids, random_llama

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)
VARIANTS = {
    "mha, untied": tiny_config(num_kv_heads=8),
    "gqa, tied": tiny_config(num_kv_heads=2, tie_embeddings=True),
    "head_dim 64": tiny_config(num_heads=4, num_kv_heads=2, head_dim=64, rope_theta=1e6),
    "llama3 scaling": tiny_config(num_kv_heads=4, rope_theta=500000.0, rope_scaling=SCALING),
}
LENGTHS = (1, 5, 16, 17, 30)
MESHES = ("fsdp=2,tensor=4", "tensor=8", "data=8", "data=2,fsdp=2,tensor=2", "context=8", "fsdp=2,context=2,tensor=2")
SPLIT = tiny_config(num_kv_heads=2)  # on tensor=8: two kv heads, each with four groups of query heads
WHOLE = tiny_config(vocab_size=251, embed_dim=63, mlp_dim=97, num_heads=9, num_kv_heads=3)  # nothing divides
CONFIGS = {"2 kv heads": SPLIT, "nothing divides": WHOLE}
SAMPLING = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 7}


def next_logprobs(llama, rows: list[list[int]]) -> np.ndarray:
    """Log-probabilities [B, T, V] of the next token at every position of right-padded rows, without a cache."""
    tokens_BT = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = row
    return np.asarray(jax.nn.log_softmax(llama_jax.logits(llama, tokens_BT)))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of the time of these tests is XLA's; the tests of SmolLM2 run what users run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


LAYOUTS = [*((variant, False) for variant in VARIANTS), ("mha, untied", True), slow("gqa, tied", True)]


@pytest.mark.parametrize(("variant", "stacked"), LAYOUTS, ids=lambda x: {False: "list", True: "stacked"}.get(x, x))
def test_ragged_batch_equals_the_growing_sequence(variant, stacked):
    llama = random_llama(VARIANTS[variant], stacked=stacked)
    prompts = [random_ids(n) for n in LENGTHS]
    completions = llama_jax.generate(llama, prompts, max_new_tokens=20, logprobs=True)
    rows = [prompt + completion.tokens for prompt, completion in zip(prompts, completions, strict=True)]
    expected_BTV = next_logprobs(llama, rows)
    for prompt, completion, expected_TV in zip(prompts, completions, expected_BTV, strict=True):
        assert completion.finish_reason == "length"
        before = np.arange(len(prompt) - 1, len(prompt) + 19)
        assert completion.tokens == expected_TV[before].argmax(-1).tolist()
        logprobs = expected_TV[before, completion.tokens]
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
def test_a_prompt_in_parts_gives_the_logits_of_the_whole(stacked):
    """All V logits at every position: 16 tokens, then 5 of a padded bucket, then one at a time."""
    llama = random_llama(VARIANTS["llama3 scaling"], stacked=stacked)
    tokens_BT = np.stack([random_ids(40, seed=i) for i in range(3)]).astype(np.int32)
    expected_BTV = llama_jax.logits(llama, tokens_BT)

    @jax.jit
    def part(tokens_BT, positions_BT, cache):
        return llama.model(tokens_BT, positions_BT=positions_BT, cache=cache)

    with jax.set_mesh(llama.mesh):
        cache, pieces = llama.model.init_cache(3, 64), []
        for start, end, width in [(0, 16, 16), (16, 21, 16), *((i, i + 1, 1) for i in range(21, 40))]:
            padded_BT, positions_BT = np.zeros((3, width), np.int32), np.full((3, width), 64 + width, np.int32)
            padded_BT[:, : end - start] = tokens_BT[:, start:end]
            positions_BT[:, : end - start] = np.arange(start, end)
            logits_BTV, cache = part(padded_BT, positions_BT, cache)
            pieces.append(logits_BTV[:, : end - start])
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected_BTV, atol=1e-5 * np.abs(expected_BTV).max())


@pytest.fixture(scope="module")
def on_one_device():
    """For each configuration: the model, three prompts, what is sampled, and logits."""
    found = {}
    for name, config in CONFIGS.items():
        llama = random_llama(config)
        prompts = [random_ids(n, vocab_size=config.vocab_size) for n in (1, 16, 30)]
        sampled = llama_jax.generate(llama, prompts, max_new_tokens=24, logprobs=True, **SAMPLING)
        found[name] = prompts, sampled, llama_jax.logits(llama, [prompts[2]])
    return found


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("2 kv heads", MESHES[0]),
        ("2 kv heads", MESHES[-1]),
        ("nothing divides", MESHES[0]),
        *(slow("2 kv heads", mesh) for mesh in MESHES[1:-1]),
        slow("nothing divides", MESHES[1]),
    ],
)
def test_every_mesh_gives_the_tokens_of_one_device(name, mesh, on_one_device):
    """Dead rows fill the batch of three up; a seed gives the same tokens everywhere."""
    prompts, sampled, logits_BTV = on_one_device[name]
    llama = random_llama(CONFIGS[name], mesh=mesh)
    many = llama_jax.generate(llama, prompts, max_new_tokens=24, logprobs=True, **SAMPLING)
    assert [c.tokens for c in many] == [c.tokens for c in sampled]
    for ours, expected in zip(many, sampled, strict=True):
        np.testing.assert_allclose(ours.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(llama_jax.logits(llama, [prompts[2]]), logits_BTV, atol=1e-4)


def test_a_batch_of_eight_on_a_mesh():
    """Greedy; no row is padding."""
    prompts = [random_ids(n) for n in (1, 2, 5, 9, 16, 17, 30, 31)]
    one, many = (
        llama_jax.generate(random_llama(SPLIT, mesh=mesh), prompts, max_new_tokens=24)
        for mesh in ("tensor=1", "fsdp=2,tensor=4")
    )
    assert [c.tokens for c in many] == [c.tokens for c in one]


def test_a_mesh_of_eight_devices_splits_what_divides():
    """The tests above would pass if nothing were sharded at all."""
    llama = random_llama(SPLIT, mesh="tensor=8")
    attn = llama.model.blocks[0].attn
    assert attn.wq.get_value().sharding.shard_shape(attn.wq.shape) == (64, 1, 1, 16)
    assert attn.wk.get_value().sharding.shard_shape(attn.wk.shape) == (64, 1, 16)
    llama = random_llama(SPLIT, mesh="fsdp=2,tensor=4")
    w_up = llama.model.blocks[0].mlp.w_up.get_value()
    assert w_up.sharding.shard_shape(w_up.shape) == (32, 40)
    with jax.set_mesh(llama.mesh):
        k = llama.model.init_cache(4, 32)[0].k
    assert k.sharding.shard_shape(k.shape) == (2, 1, 32, 16)
    whole = random_llama(WHOLE, mesh="tensor=8")
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(whole.model))


@pytest.fixture(scope="module")
def gqa():
    return random_llama(VARIANTS["gqa, tied"])


@pytest.fixture(scope="module")
def gqa100(gqa):
    """The same with a cache of 100 slots in every call."""
    return dataclasses.replace(gqa, max_seq_len=100)


def test_a_cache_smaller_than_the_bucket_of_its_prompt(gqa, gqa100):
    prompt = random_ids(90)  # bucket 128
    (free,) = llama_jax.generate(gqa, [prompt], max_new_tokens=20)
    (full,) = llama_jax.generate(gqa100, [prompt], max_new_tokens=20)
    # Slots for ten more tokens; the last one need not be stored.
    assert full.tokens == free.tokens[:11]
    assert full.finish_reason == "cache"
    assert free.finish_reason == "length"


def test_a_prompt_that_fills_the_cache(gqa, gqa100):
    prompt = random_ids(100)
    (full,) = llama_jax.generate(gqa100, [prompt], max_new_tokens=20)
    (free,) = llama_jax.generate(gqa, [prompt], max_new_tokens=1)
    assert (full.tokens, full.finish_reason) == (free.tokens, "cache")


def test_the_last_token_may_fall_on_the_last_slot(gqa100):
    """Both limits at once: the caller's own is the reason."""
    (completion,) = llama_jax.generate(gqa100, [random_ids(90)], max_new_tokens=11)
    assert (len(completion.tokens), completion.finish_reason) == (11, "length")


def test_the_context_of_the_model_bounds_the_cache():
    llama = random_llama(tiny_config(num_kv_heads=2, tie_embeddings=True, max_seq_len=40))
    short, long = llama_jax.generate(llama, [random_ids(5), random_ids(30)], max_new_tokens=20)
    assert (len(short.tokens), short.finish_reason) == (20, "length")
    assert (len(long.tokens), long.finish_reason) == (11, "cache")


def test_a_sampled_row_does_not_depend_on_the_other_rows(gqa):
    prompts = [random_ids(n) for n in LENGTHS]
    together = llama_jax.generate(gqa, prompts, max_new_tokens=12, **SAMPLING)
    others = [prompts[0], random_ids(7, seed=5), prompts[2], random_ids(29, seed=5), prompts[4]]
    apart = llama_jax.generate(gqa, others, max_new_tokens=12, **SAMPLING)
    for i in (0, 2, 4):
        assert together[i].tokens == apart[i].tokens


def test_the_seed_and_the_position_decide_what_is_sampled(gqa):
    """One seed for a call counts up over its prompts; the place in the batch does not matter."""
    prompts = [random_ids(30)] * 5  # and filters that remove next to nothing
    options = SAMPLING | {"repetition_penalty": 1.001, "top_k": 256, "min_p": 1e-6, "top_p": 0.9999}

    def sampled(seed):
        return [c.tokens for c in llama_jax.generate(gqa, prompts, max_new_tokens=12, **options | {"seed": seed})]

    first = sampled(1)
    assert sampled(1) == first
    assert len({tuple(row) for row in first}) == 5
    assert sampled(2)[:4] == first[1:]
    assert sampled([5, 4, 3, 2, 1]) == first[::-1]
    longer = [prompts[0] + first[0][:3]]  # what was sampled before does not count
    assert llama_jax.generate(gqa, longer, max_new_tokens=9, **options | {"seed": 1})[0].tokens == first[0][3:]


def test_more_tokens_than_a_chunk(gqa):
    """The loop on the device starts again; what was said before must not change."""
    prompt, counts = random_ids(5), []
    (long,) = llama_jax.generate(gqa, [prompt], max_new_tokens=2 * CHUNK + 10, on_tokens=counts.append)
    (short,) = llama_jax.generate(gqa, [prompt], max_new_tokens=7)
    assert len(long.tokens) == 2 * CHUNK + 10
    assert long.tokens[:7] == short.tokens
    assert counts == [CHUNK, CHUNK, 9, 1]
    assert long.tokens == np.argmax(next_logprobs(gqa, [prompt + long.tokens])[0, 4:-1], axis=-1).tolist()


def test_logprobs_are_the_models_own_whatever_the_filters(gqa):
    prompts = [random_ids(n) for n in LENGTHS]
    completions = llama_jax.generate(gqa, prompts, max_new_tokens=12, logprobs=True, **SAMPLING)
    rows = [prompt + completion.tokens for prompt, completion in zip(prompts, completions, strict=True)]
    expected_BTV = next_logprobs(gqa, rows)
    for prompt, completion, expected_TV in zip(prompts, completions, expected_BTV, strict=True):
        before = np.arange(len(prompt) - 1, len(prompt) + 11)
        np.testing.assert_allclose(completion.logprobs, expected_TV[before, completion.tokens], rtol=1e-5, atol=1e-5)


def test_repetition_penalty_sees_prompt_and_answer(gqa):
    """With top_k 1 the most likely token, against the rule in NumPy on the growing sequence."""
    prompts = [random_ids(n) for n in LENGTHS]
    options = SAMPLING | {"top_k": 1, "repetition_penalty": 3.0}
    completions = llama_jax.generate(gqa, prompts, max_new_tokens=12, **options)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = prompt + completion.tokens
        logits_TV = np.asarray(llama_jax.logits(gqa, [[*ids, *[0] * (42 - len(ids))]]))[0]
        for i, token in enumerate(completion.tokens, start=len(prompt)):
            row = logits_TV[i - 1].copy()
            seen = np.unique(ids[:i])
            row[seen] = np.where(row[seen] > 0, row[seen] / 3, row[seen] * 3)
            assert token == row.argmax()


def test_nothing_to_do(gqa):
    assert llama_jax.generate(gqa, []) == []
    (one,) = llama_jax.generate(gqa, [[3]], max_new_tokens=1)
    assert (len(one.tokens), one.finish_reason, one.text, one.logprobs) == (1, "length", "", None)


@pytest.mark.parametrize("mesh", ["tensor=1", "fsdp=2,tensor=4"])
@pytest.mark.parametrize("slots", [[[0], [5], [7], [8]], [[3], [99], [0], [2**30]]], ids=["at the end", "far past it"])
def test_writes_of_one_token_past_the_end_are_dropped(mesh, slots):
    check_write(mesh, np.array(slots, np.int32))


@pytest.mark.parametrize("mesh", ["tensor=1", "fsdp=2,tensor=4"])
def test_writes_of_many_tokens_past_the_end_are_dropped(mesh):
    check_write(mesh, np.array([[0, 1, 2], [6, 7, 8], [8, 9, 10], [5, 2**30, 4]], np.int32))


def check_write(mesh: str, slots_BT: np.ndarray) -> None:
    config = tiny_config(num_layers=1)
    (B, T), S = slots_BT.shape, 8
    shape = (B, T, config.num_kv_heads, config.head_dim)
    random = np.random.default_rng(0)
    k_BTKH, v_BTKH = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
    rules = sharding.ShardingRules()
    with jax.set_mesh(sharding.make_mesh(config, **sharding.parse_mesh(mesh))):
        sizes = {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        layer = FullCache.init(rules, batch=B, size=S, dtype="float32", **sizes)
        layer = jax.tree.map(lambda x: x + 1, layer)
        axes = ("batch", "seq", "kv_heads", "head_dim")
        new = [jax.device_put(x, rules.sharding(axes, x.shape)) for x in (k_BTKH, v_BTKH)]
        slots = jax.device_put(slots_BT, rules.sharding(("batch", "seq"), (B, T)))
        written = jax.jit(FullCache.write)(layer, *new, slots)
        assert jax.typeof(written.k).sharding == jax.typeof(layer.k).sharding
    for cache, values in ((written.k, k_BTKH), (written.v, v_BTKH)):
        expected_BKSH = np.ones((B, config.num_kv_heads, S, config.head_dim), np.float32)
        for b in range(B):
            for t in range(T):
                if slots_BT[b, t] < S:
                    expected_BKSH[b, :, slots_BT[b, t]] = values[b, t]
        np.testing.assert_array_equal(cache, expected_BKSH)


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
def test_grow_keeps_what_the_cache_holds(stacked):
    config, rules = tiny_config(), sharding.ShardingRules()
    with jax.set_mesh(sharding.make_mesh(config, fsdp=2, context=2, tensor=2)):
        model = Llama(config, dtype="float32", param_dtype="float32", stacked=stacked, rngs=None)
        cache = model.init_cache(2, 6)
        leaves, treedef = jax.tree.flatten(cache)
        leaves = [x + 1 + i for i, x in enumerate(leaves)]
        grown = caches.grow(jax.tree.unflatten(treedef, leaves), rules, 10)
        fresh = model.init_cache(2, 10)
    assert caches.num_slots(grown) == 10
    for old, new, like in zip(leaves, jax.tree.leaves(grown), jax.tree.leaves(fresh), strict=True):
        assert new.shape == like.shape
        assert new.sharding == like.sharding
        np.testing.assert_array_equal(np.asarray(new)[..., :6, :], old)
        np.testing.assert_array_equal(np.asarray(new)[..., 6:, :], 0)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(fresh))
    assert caches.nbytes(fresh) == nbytes == 2 * config.num_layers * 2 * 10 * config.num_kv_heads * config.head_dim * 4


def two_turns(mesh: str, size: int, larger: int | None, *, stacked: bool = False) -> list[int]:
    """Tokens of a prompt, and of another one after them in the same cache, which may have grown."""
    llama, tokens = random_llama(SPLIT, mesh=mesh, stacked=stacked), []
    with jax.set_mesh(llama.mesh):
        run = Generation(llama, [Request(random_ids(21), 6)], size=size)
        for (new,), _ in run:
            tokens += new
        cache = run.state.cache if larger is None else caches.grow(run.state.cache, llama.model.rules, larger)
        later = Request(random_ids(19), 8, held=[0] * 26)
        for (new,), _ in Generation(llama, [later], cache=cache):
            tokens += new
    return tokens


@pytest.mark.parametrize(
    ("size", "larger", "stacked"),
    [
        (64, None, False),
        slow(60, 68, True),
        slow(64, None, True),
        slow(64, 128, False),
        slow(60, None, False),
        slow(60, 64, False),
    ],
)
def test_a_cache_that_lies_on_many_devices(size, larger, stacked):
    """Over its length, where that divides by eight; tokens and slots are not split alike."""
    assert two_turns("context=8", size, larger, stacked=stacked) == two_turns("tensor=1", size, larger)


BAD = {
    "empty prompt": (([[1], []],), {}, "prompt 1 is empty"),
    "text without a tokenizer": ((["Hi"],), {}, "no tokenizer"),
    "one string": (("Hi",), {}, "list of prompts"),
    "id too large": (([[1], [5, 256]],), {}, r"prompt 1 has the id 256.*256 tokens"),
    "negative id": (([[-1]],), {}, "prompt 0 has the id -1"),
    "prompt longer than the context": (([[1] * 513],), {}, "513 tokens.*512 slots"),
    "no new tokens": (([[1]],), {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "temperature": (([[1]],), {"temperature": -0.1}, "temperature.*-0.1"),
    "top_p": (([[1]],), {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    "top_k": (([[1]],), {"top_k": 0}, "top_k must be at least 1, got 0"),
    "too few temperatures": (([[1], [2]],), {"temperature": [1.0]}, "temperature has 1 values for 2 prompts"),
    "one bad seed": (([[1], [2]],), {"seed": [1, -1]}, "seed must be from 0"),
    "stop without a tokenizer": (([[1]],), {"stop": "x"}, "no tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_of_generate(case, gqa):
    args, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        llama_jax.generate(gqa, *args, **options)


def test_a_prompt_longer_than_the_cache_names_both_numbers(gqa100):
    with pytest.raises(ValueError, match="101 tokens.*100 slots.*max_seq_len"):
        llama_jax.generate(gqa100, [random_ids(101)])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], r"\[batch, length\].*\(3,\)"),
        ([[[1]]], r"\(1, 1, 1\)"),
        ([[]], r"\(1, 0\)"),
        ([[1.0]], "float64"),
        ([[1, 256]], "id 256.*256 tokens"),
        ([[-1]], "id -1"),
        (np.zeros((1, 513), np.int32), "513 positions.*512"),
    ],
    ids=["1-D", "3-D", "no tokens", "floats", "id too large", "negative id", "too long"],
)
def test_bad_arguments_of_logits(tokens, message, gqa):
    with pytest.raises(ValueError, match=message):
        llama_jax.logits(gqa, tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "unknown axis 'model'.*data, fsdp, context, tensor"),
        ("tensor", "tensor needs a positive integer"),
        ("tensor=0", "positive integer, got '0'"),
        ("tensor=-2", "positive integer"),
        ("fsdp=2,fsdp=2", "given twice"),
    ],
)
def test_bad_meshes(text, message):
    with pytest.raises(ValueError, match=message):
        sharding.parse_mesh(text)


def test_a_mesh_larger_than_the_machine():
    with pytest.raises(ValueError, match="needs 16 devices, but there are 8.*JAX_NUM_CPU_DEVICES=16"):
        sharding.make_mesh(tiny_config(), tensor=16)
    assert sharding.parse_mesh(" fsdp=2, tensor=4 ") == {"fsdp": 2, "tensor": 4}


def test_the_cache_of_a_finished_row_is_not_written(gqa):
    """A row that has ended writes nowhere: later turns of a conversation read its slots."""
    requests = [Request(random_ids(5), 12), Request(random_ids(16), 12)]
    with jax.set_mesh(gqa.mesh):
        run = Generation(gqa, requests, size=32, first_chunk=1)
        chunks = iter(run)
        next(chunks)
        run.halt(0)
        before = jnp.copy(run.state.cache[0].k[0])
        for _ in chunks:
            pass
        np.testing.assert_array_equal(run.state.cache[0].k[0], before)
        assert run.finish_reasons() == ["stop", "length"]
        assert int(run.state.position_B[0]) == 5


@pytest.mark.parametrize("mesh", ["tensor=8", slow("fsdp=2,tensor=4"), slow("context=8")])
def test_flattened_heads_change_nothing(mesh, tmp_path):
    """As `load` leaves them on a TPU: the same tokens, and the same weights when they are saved."""
    llama = random_llama(SPLIT, mesh=mesh)
    prompts = [random_ids(n) for n in (3, 17)]
    expected = llama_jax.generate(llama, prompts, max_new_tokens=8)
    llama_jax.save(llama, tmp_path / "before", format="hf")
    with jax.set_mesh(llama.mesh):
        flat = dataclasses.replace(llama, model=flatten_heads(llama.model))
    assert llama_jax.generate(flat, prompts, max_new_tokens=8) == expected
    llama_jax.save(flat, tmp_path / "after", format="hf")
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after


@pytest.mark.parametrize(("mesh", "stacked"), [("tensor=1", False), slow("tensor=1", True), ("fsdp=2,tensor=4", False)])
def test_a_cache_that_is_read_before_it_is_written(mesh, stacked, monkeypatch):
    """As on TPU and GPU, where a block writes after its MLP: the same tokens as where it writes first."""
    prompts = [random_ids(n) for n in (3, 17)]
    expected = llama_jax.generate(random_llama(SPLIT, mesh=mesh), prompts, max_new_tokens=12, logprobs=True)
    used = []
    monkeypatch.setattr(full, "attention_of_one", lambda *x, **y: used.append(1) or attention_of_one(*x, **y))
    monkeypatch.setattr(blocks, "way_of", lambda name: dataclasses.replace(way_of(name), reads_first=True))
    llama = random_llama(SPLIT, mesh=mesh, stacked=stacked)
    found = llama_jax.generate(llama, prompts, max_new_tokens=12, logprobs=True)
    assert 1 in used
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
