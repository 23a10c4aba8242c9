"""Training against torch: the same losses and gradient norms as transformers' Llama with torch's AdamW."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from llama_jax import sharding
from llama_jax.model import Llama
from llama_jax.model.layers import REMAT
from llama_jax.train.losses import cross_entropy
from llama_jax.train.objective import Pretrain
from llama_jax.train.optim import adamw, learning_rate
from llama_jax.train.recipe import Optimizer, Schedule
from llama_jax.train.state import TrainState, new_state
from llama_jax.train.step import attached, compiled, handles, train_step
from llama_jax.weights.load import read_model
from llama_jax.weights.open import open_checkpoint
from tests.builders import hf_model, one_device, slow, tiny_config

pytestmark = pytest.mark.unoptimized

STEPS, B, T = 50, 4, 32
OPTIONS = Optimizer(Schedule(peak=1e-2, steps=STEPS, warmup_steps=10, final=0.1), b2=0.95, weight_decay=0.1)


def packed_batch(step: int, *, vocab: int = 12) -> dict[str, np.ndarray]:
    """[B, T]: two documents of a pattern in each row, and some padding."""
    rng = np.random.default_rng(step)
    tokens_BT = np.zeros((B, T + 2), np.int32)
    segments_BT = np.zeros((B, T + 2), np.int32)
    for row in range(B):
        cut, end = rng.integers(8, 16), rng.integers(20, T + 1)
        for number, (a, b) in enumerate(((0, cut), (cut, end)), start=1):
            tokens_BT[row, a:b] = np.resize(rng.integers(0, vocab, 4), b - a)
            segments_BT[row, a:b] = number
    same = segments_BT[:, :-1] == segments_BT[:, 1:]
    segments = np.where(same, segments_BT[:, :-1], 0)[:, :T]  # a document's last token has no target
    positions = np.stack([_positions(row) for row in segments_BT])[:, :T]
    return {
        "tokens": tokens_BT[:, :T], "targets": tokens_BT[:, 1 : T + 1], "positions": positions, "segment_ids": segments
    }  # fmt: skip


def _positions(segments: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    return (np.arange(len(segments)) - np.repeat(starts, np.diff(starts, append=len(segments)))).astype(np.int32)


def torch_losses(model: torch.nn.Module) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, with a mask of its own for the packed rows."""
    decay = [p for name, p in model.named_parameters() if "norm" not in name]
    rest = [p for name, p in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": OPTIONS.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=OPTIONS.schedule.peak, betas=(OPTIONS.b1, OPTIONS.b2), eps=OPTIONS.eps,
    )  # fmt: skip
    warmup, peak = OPTIONS.schedule.warmup_steps, OPTIONS.schedule.peak
    found = []
    for step in range(STEPS):
        done = (step - warmup) / (STEPS - warmup)
        cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * ((step + 1) / warmup if step < warmup else cosine)
        batch = {name: torch.from_numpy(np.array(x)).long() for name, x in packed_batch(step).items()}
        segments = batch["segment_ids"]
        seen = (segments[:, :, None] == segments[:, None, :]) & torch.ones(T, T, dtype=torch.bool).tril()
        logits = model(
            input_ids=batch["tokens"], position_ids=batch["positions"], attention_mask=seen[:, None], use_cache=False
        ).logits
        targets = torch.where(segments > 0, batch["targets"], -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.clip_norm)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def our_losses(model: Llama, mesh: jax.sharding.Mesh, *, M: int) -> tuple[list[tuple[float, float]], TrainState]:
    optimizer = adamw(OPTIONS)
    program = compiled(optimizer, learning_rate(OPTIONS.schedule), Pretrain())
    found = []
    with jax.set_mesh(mesh):
        state = jax.jit(lambda model: new_state(model, optimizer))(model)
        for step in range(STEPS):
            state, results = program(state, placed(packed_batch(step), model, mesh, M=M), np.zeros(1, bool))
            found.append((float(results["loss"]), float(results["grad_norm"])))
    return found, state


def placed(batch: dict[str, np.ndarray], model: Llama, mesh: jax.sharding.Mesh, *, M: int) -> dict[str, jax.Array]:
    spec = model.rules.spec(("batch", "seq"), (B // M, T))
    where = jax.NamedSharding(mesh, jax.P(None, *spec))
    return {name: jax.device_put(x.reshape(M, B // M, T), where) for name, x in batch.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch_model = hf_model(tiny_config(tie_embeddings=True), std=0.05)
    torch_model.save_pretrained(folder)
    return open_checkpoint(folder), torch_losses(torch_model)


@pytest.mark.parametrize(
    ("mesh", "M"),
    [
        ("tensor=1", 1),
        slow("tensor=1", 2),
        ("fsdp=2,context=2,tensor=2", 2),
        slow("data=2,fsdp=2,tensor=2", 1),
    ],
)
def test_fifty_steps_equal_torch(checkpoint, mesh, M):
    opened, expected = checkpoint
    on = one_device() if mesh == "tensor=1" else sharding.mesh_of(opened.config, mesh)
    read = read_model(opened, on, dtype="float32", stacked=True)
    with jax.set_mesh(on):
        like = Llama(opened.config, dtype="float32", param_dtype="float32", stacked=True, remat="full", rngs=None)
    model = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(read))
    found, state = our_losses(model, on, M=M)
    assert expected[-1][0] < 0.7 * expected[0][0]  # it learns
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for before, after in zip(jax.tree.leaves(model), jax.tree.leaves(state.model), strict=True):
        assert before.sharding == after.sharding


@pytest.mark.parametrize("attention", ["reference", slow("cpu"), slow("xla"), slow("splash"), slow("cudnn")])
def test_documents_of_a_row_do_not_see_each_other(checkpoint, attention):
    """Another first document changes nothing of the second one, to the last bit; without segments it does."""
    opened, _ = checkpoint
    mesh = one_device()
    batch = packed_batch(0)
    first, second = (batch["segment_ids"] == number for number in (1, 2))
    other = batch["tokens"].copy()
    other[first] = (other[first] + 7) % 256
    with jax.set_mesh(mesh):
        model = read_model(opened, mesh, dtype="float32", stacked=True, attention=attention)

        def hidden(tokens: np.ndarray, segments: np.ndarray | None) -> np.ndarray:
            where = {name: jax.numpy.asarray(x) for name, x in (("positions_BT", batch["positions"]),)}
            segments = None if segments is None else jax.numpy.asarray(segments)
            return np.asarray(model.hidden(jax.numpy.asarray(tokens), segment_ids_BT=segments, **where)[0])

        a, b = (hidden(tokens, batch["segment_ids"]) for tokens in (batch["tokens"], other))
        np.testing.assert_array_equal(a[second], b[second])
        assert np.abs(a[first] - b[first]).max() > 0.1
        a, b = (hidden(tokens, None) for tokens in (batch["tokens"], other))
        assert np.abs(a[second] - b[second]).max() > 1e-3


def test_what_is_not_finite_changes_nothing(checkpoint):
    opened, _ = checkpoint
    mesh = one_device()
    model = read_model(opened, mesh, dtype="float32", stacked=True)
    optimizer, schedule = adamw(OPTIONS), learning_rate(OPTIONS.schedule)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda model: new_state(model, optimizer))(model)
        options = {"optimizer": optimizer, "schedule": schedule, "objective": Pretrain()}
        program = jax.jit(lambda s, b: train_step(s, b, np.zeros(1, bool), **options))
        good = placed(packed_batch(0), model, mesh, M=1)
        bad = good | {"tokens": good["tokens"] + 10_000}  # outside the vocabulary: NaN
        state, first = program(state, good)
        before = jax.tree.leaves((state.model, state.opt_state))
        for count in (1, 2):
            state, results = program(state, bad)
            assert not results["finite"]
            assert int(results["skipped"]) == int(results["skipped_in_a_row"]) == count
        for old, new in zip(before, jax.tree.leaves((state.model, state.opt_state)), strict=True):
            np.testing.assert_array_equal(old, new)
        state, results = program(state, placed(packed_batch(1), model, mesh, M=1))
        assert results["finite"]
        assert (int(results["skipped"]), int(results["skipped_in_a_row"]), int(state.step)) == (2, 0, 4)
        assert float(results["learning_rate"]) == pytest.approx(2 * float(first["learning_rate"]))  # of updates


def test_gradients_kept_in_bfloat16_are_the_same_numbers(checkpoint):
    """Float32 parameters, products in bfloat16: what JAX gives in float32 holds no more than bfloat16 does."""
    opened, _ = checkpoint
    mesh = sharding.mesh_of(opened.config, "fsdp=2,context=2,tensor=2")
    leaves = jax.tree.leaves(read_model(opened, mesh, dtype="float32", stacked=True))
    with jax.set_mesh(mesh):
        like = Llama(opened.config, dtype="bfloat16", param_dtype="float32", stacked=True, remat="full", rngs=None)
        model = jax.tree.unflatten(jax.tree.structure(like), leaves)
        batch = {name: x[0] for name, x in placed(packed_batch(0), model, mesh, M=1).items()}

        def loss(stand_ins, model):
            where = {"positions_BT": batch["positions"], "segment_ids_BT": batch["segment_ids"]}
            x_BTD, _ = attached(model, stand_ins).hidden(batch["tokens"], **where)
            return cross_entropy(model, x_BTD, batch["targets"], batch["segment_ids"] > 0).mean

        narrow = jax.jit(lambda model: jax.grad(loss)(handles(model), model).blocks)(model)
        plain = jax.jit(lambda model: jax.grad(lambda model: loss(model, model))(model).blocks)(model)
    for ours, theirs in zip(*map(jax.tree.leaves, (narrow, plain)), strict=True):
        assert ours.dtype == (jax.numpy.bfloat16 if ours.ndim > 2 else jax.numpy.float32)  # matrices, not norms
        assert ours.sharding == theirs.sharding
        np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs)


def test_every_remat_policy_gives_the_plain_gradient(checkpoint):
    opened, _ = checkpoint
    mesh = sharding.mesh_of(opened.config, "fsdp=2,context=2,tensor=2")
    read = read_model(opened, mesh, dtype="float32", stacked=True)

    @jax.jit
    @jax.value_and_grad
    def loss(model, batch):
        x_BTD, _ = model.hidden(batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"])
        return cross_entropy(model, x_BTD, batch["targets"], batch["segment_ids"] > 0).mean

    found, memory = {}, {}
    with jax.set_mesh(mesh):
        batch = {name: x[0] for name, x in placed(packed_batch(0), read, mesh, M=1).items()}
        for remat in REMAT:
            like = Llama(opened.config, dtype="float32", param_dtype="float32", stacked=True, remat=remat, rngs=None)
            model = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(read))
            program = loss.lower(model, batch).compile()
            found[remat], memory[remat] = jax.tree.leaves(program(model, batch)), program.memory_analysis()
    for remat, leaves in found.items():
        for leaf, expected in zip(leaves, found["none"], strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(), err_msg=remat)
    sizes = [memory[remat].temp_size_in_bytes for remat in ("none", "matmuls", "attention", "full")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
