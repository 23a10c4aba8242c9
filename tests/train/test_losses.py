"""The loss against torch, and on every mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import llama_jax
from llama_jax.ops.weights import embed
from llama_jax.train import losses
from llama_jax.train.losses import cross_entropy
from tests.builders import slow, tiny_config
from tests.infer.helpers import random_llama

pytestmark = pytest.mark.unoptimized

UNTIED, TIED = tiny_config(num_kv_heads=2), tiny_config(num_kv_heads=2, tie_embeddings=True)
MESHES = ("fsdp=2,tensor=4", "tensor=8", "data=2,fsdp=2,tensor=2", "context=8", "fsdp=2,context=2,tensor=2")
B, T = 4, 48
Z = 1e-2


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def batch():
    """Tokens, targets, a mask with holes, and documents."""
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, 256, (2, B, T)).astype(np.int32)
    return tokens, targets, random.random((B, T)) < 0.7, np.sort(random.integers(1, 4, (B, T))).astype(np.int32)


def loss_and_gradients(config, mesh, batch, *, tokens: int, remat: str = "none"):
    llama = random_llama(config, mesh=mesh, stacked=True)
    llama.model.remat = remat
    with jax.set_mesh(llama.mesh):
        arrays = [jax.device_put(x, llama.model.rules.sharding(("batch", "seq"), x.shape)) for x in batch]

        def loss(model, tokens_BT, targets_BT, mask_BT, segments_BT):
            x_BTD, _ = model.hidden(tokens_BT, segment_ids_BT=segments_BT)
            return cross_entropy(model, x_BTD, targets_BT, mask_BT, z_weight=Z, tokens=tokens).mean

        value, gradients = jax.jit(jax.value_and_grad(loss))(llama.model, *arrays)
    return float(value), [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]


def test_the_loss_is_torchs(batch):
    """Sums, mean and the gradient of the residual stream; logits of our own model, as torch sees them."""
    llama = random_llama(UNTIED, stacked=True)
    random = np.random.default_rng(1)
    x = random.standard_normal((B, T, 64)).astype(np.float32)
    _, targets, mask, _ = batch
    with jax.set_mesh(llama.mesh):
        loss = cross_entropy(llama.model, jnp.asarray(x), targets, mask, z_weight=Z, tokens=64)
        gradient = jax.grad(lambda x: cross_entropy(llama.model, x, targets, mask, z_weight=Z, tokens=64).mean)(
            jnp.asarray(x)
        )
    x64 = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    norm, head = (torch.tensor(np.asarray(w.get_value()), dtype=torch.float64) for w in (
        llama.model.final_norm, llama.model.lm_head
    ))  # fmt: skip
    logits = x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + UNTIED.norm_eps) * norm @ head
    keep, labels = torch.tensor(mask), torch.tensor(targets, dtype=torch.long)
    nll = torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="sum")
    z = torch.logsumexp(logits[keep], dim=-1).pow(2).sum()
    mean = (nll + Z * z) / keep.sum()
    mean.backward()
    assert int(loss.tokens) == int(keep.sum())
    np.testing.assert_allclose([loss.nll, loss.z, loss.mean], [nll.item(), z.item(), mean.item()], rtol=1e-6)
    expected = x64.grad.numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-6 * np.abs(expected).max() * 10)


@pytest.fixture(scope="module")
def on_one_device(batch):
    return {config: loss_and_gradients(config, "tensor=1", batch, tokens=losses.TOKENS) for config in (UNTIED, TIED)}


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_same_loss_and_gradients(mesh, config, batch, on_one_device):
    """In one chunk on one device, and in chunks of 16 positions a device on eight, with everything computed again."""
    value, gradients = on_one_device[config]
    other, others = loss_and_gradients(config, mesh, batch, tokens=16, remat="full")
    assert other == pytest.approx(value, rel=1e-6)
    for ours, expected in zip(others, gradients, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_float32_logits_of_the_batch_never_exist():
    """In bfloat16, with a length that no power of two divides."""
    llama = random_llama(tiny_config(vocab_size=512), stacked=True)
    x, ids = jnp.zeros((2, 150, 64), "bfloat16"), jnp.zeros((2, 150), jnp.int32)
    with jax.set_mesh(llama.mesh):
        program = jax.jit(jax.grad(lambda x: cross_entropy(llama.model, x, ids, ids, tokens=64).mean))
        text = program.lower(x).compile().as_text()
    assert "f32[2,30,512]" in text  # 5 chunks
    assert not [shape for shape in ("[2,150,512]", "[300,512]", "[150,2,512]") if f"f32{shape}" in text]


@pytest.mark.parametrize("mesh", ["tensor=1", slow("fsdp=2,tensor=4"), slow("context=8")])
def test_ids_outside_the_vocabulary_are_loud(mesh, batch):
    """The same NaN on every mesh where they count, and nothing where they do not."""
    tokens, targets, mask, _ = (x.copy() for x in batch)
    llama = random_llama(UNTIED, mesh=mesh, stacked=True)
    with jax.set_mesh(llama.mesh):
        ids, spec = _put(llama, np.array([[-1, 256, 0, 300, 255, 1, 2, 3]] * 4))
        embedded = embed(llama.model.embed.get_value(), ids, out_sharding=spec)
        assert np.isnan(np.asarray(embedded)).any(-1)[0].tolist() == [True, True, False, True] + [False] * 4
        x_BTD, _ = llama.model.hidden(_put(llama, tokens)[0])
        mask[:, 0], targets[:, 0] = False, -100
        assert np.isfinite(float(cross_entropy(llama.model, x_BTD, targets, mask).mean))
        mask[1, 0] = True
        assert np.isnan(float(cross_entropy(llama.model, x_BTD, targets, mask).mean))


def _put(llama, tokens):
    tokens = tokens.astype(np.int32)
    spec = llama.model.rules.spec(("batch", "seq"), tokens.shape)
    return jax.device_put(tokens, jax.NamedSharding(llama.mesh, spec)), jax.P(*spec, None)


def test_weights_that_are_small(batch):
    """The mean does not depend on the size of the weights; a length of primes."""
    tokens, targets, mask, _ = (x[:, :47] for x in batch)
    llama = random_llama(UNTIED, stacked=True)
    with jax.set_mesh(llama.mesh):
        x_BTD, _ = llama.model.hidden(tokens)
        means = [
            float(cross_entropy(llama.model, x_BTD, targets, mask * weight, tokens=n).mean)
            for weight, n in ((1.0, 1024), (1e-4, 20))
        ]
    assert means[0] == pytest.approx(means[1], rel=1e-6)


def test_nothing_that_counts(batch):
    tokens, targets, mask, _ = batch
    llama = random_llama(UNTIED, stacked=True)
    with jax.set_mesh(llama.mesh):
        x_BTD, _ = llama.model.hidden(tokens)
        loss = cross_entropy(llama.model, x_BTD, targets, 0 * mask)
    assert (float(loss.mean), float(loss.tokens)) == (0, 0)


def test_the_mean_is_that_of_the_logits(batch):
    """Of the whole model, through the public `logits`."""
    tokens, targets, mask, _ = batch
    llama = random_llama(UNTIED, stacked=True)
    logprobs = np.asarray(jax.nn.log_softmax(llama_jax.logits(llama, tokens)), np.float64)
    expected = -np.take_along_axis(logprobs, targets[..., None], -1)[..., 0][mask].mean()
    with jax.set_mesh(llama.mesh):
        x_BTD, _ = llama.model.hidden(tokens)
        assert float(cross_entropy(llama.model, x_BTD, targets, mask).mean) == pytest.approx(expected, rel=1e-6)


def test_which_sums_have_a_gradient(batch):
    """Any multiple of what is minimised; another sum is loud. The head's products are three, not four."""
    _, targets, mask, _ = batch
    llama = random_llama(UNTIED, stacked=True)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((B, T, 64)), jnp.float32)
    with jax.set_mesh(llama.mesh):

        def gradient(of):
            return jax.grad(lambda x: of(cross_entropy(llama.model, x, targets, mask, z_weight=Z)))(x)

        expected = gradient(lambda loss: loss.mean)
        ours = gradient(lambda loss: loss.nll / mask.sum() + Z * (loss.z / mask.sum()))
        assert np.isnan(gradient(lambda loss: loss.nll)).all()
        loss = jax.grad(lambda model: cross_entropy(model, x, targets, mask).mean)
        text = jax.jit(loss).lower(llama.model).as_text()
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9)
    assert text.count("stablehlo.dot_general") == 3


def test_an_unknown_remat():
    with pytest.raises(
        ValueError, match="remat 'some' is unknown; there are none, matmuls, attention, full, groups, offload"
    ):
        llama_jax.model.Llama(UNTIED, dtype="float32", param_dtype="float32", remat="some", rngs=None)
