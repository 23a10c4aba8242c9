"""The loss of next-token prediction, in chunks: float32 logits [B, T, V] never exist at once.

For Llama 3 8B they would be 4.2 GB for each row of 8192 tokens. A chunk's logits are computed, used for the loss and
its gradient at once, and dropped: three products with the head, where computing them again would cost four.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.costs.estimate import LOSS_TOKENS
from llama_jax.model import Llama
from llama_jax.typing import PyTree

TOKENS = LOSS_TOKENS  # of one device in a chunk: 525 MB of logits at a vocabulary of 128,256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """Sums over the tokens that count, float32 scalars; of all rows of all processes.

    Attributes:
      nll: negative log-likelihood, in nats.
      z: squared logarithm of the softmax's denominator.
      tokens: how many, or the sum of their weights.
      z_weight: how much `z` counts.
    """

    nll: jax.Array
    z: jax.Array
    tokens: jax.Array
    z_weight: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def mean(self) -> jax.Array:
        """What is minimised, per token; 0 without tokens."""
        total = self.nll + self.z_weight * self.z if self.z_weight else self.nll
        return jnp.where(self.tokens > 0, total / jnp.where(self.tokens > 0, self.tokens, 1), 0)


def cross_entropy(
    model: Llama,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    z_weight: float = 0.0,
    tokens: int = TOKENS,
    head_trains: bool = True,
) -> Loss:
    """Masked cross-entropy of the next token, in float32.

    Args:
      model: whose final norm and head are used; its mesh must be in use.
      x_BTD: the residual stream after the last block, of `model.hidden`.
      targets_BT: int: the token that follows each position. One outside the vocabulary gives NaN where it counts.
      mask_BT: bool, or weights that are not negative: which positions count.
      z_weight: of the z-loss, which keeps the softmax's denominator near 1 (PaLM uses 1e-4).
      tokens: most positions of one device in a chunk.
      head_trains: whether norm and head have gradients; without, one product in three is saved, and [V, D] in float32.

    Returns:
      Sums and their number; `.mean` is the loss. Gradients pass from it, and from any other multiple of
      `nll + z_weight * z`; of another sum of the two they are NaN.

    Raises:
      ValueError: `tokens` is not positive.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    split = _Chunks(x_BTD, tokens).split

    def chunk(x_BtD, weights, targets_Bt, mask_Bt):
        """What is minimised, and the sums that are reported."""
        nll_Bt, lse_Bt = _of_tokens(logits(x_BtD, *weights), targets_Bt)
        nll, z = (jnp.sum(jnp.where(mask_Bt != 0, x, 0) * mask_Bt) for x in (nll_Bt, lse_Bt**2))
        return nll + z_weight * z, (nll, z, jnp.sum(mask_Bt))

    no_sums = (jnp.float32(0),) * 3

    @jax.custom_vjp
    def sums(x_nBtD, weights, *rest) -> PyTree:
        def step(total, parts):
            return jax.tree.map(jnp.add, total, chunk(parts[0], weights, *parts[1:])[1]), None

        return jax.lax.scan(step, no_sums, (x_nBtD, *rest))[0]

    def sums_and_gradients(x_nBtD, weights, *rest):
        gradient = jax.value_and_grad(chunk, argnums=(0, 1), has_aux=True)

        def step(carry, parts):
            (_, new), (dx_BtD, dw) = gradient(parts[0], weights, *parts[1:])
            return jax.tree.map(jnp.add, carry, (new, [d.astype(jnp.float32) for d in dw])), dx_BtD

        start = (no_sums, [jnp.zeros_like(w, jnp.float32) for w in weights])
        (total, dw), dx_nBtD = jax.lax.scan(step, start, (x_nBtD, *rest))
        return total, (dx_nBtD, dw)

    def scaled(gradients, cotangents):
        d_nll, d_z, _ = cotangents
        known = jnp.abs(d_z - z_weight * d_nll) <= 1e-5 * jnp.abs(d_z)
        scale = jnp.where(known, d_nll, jnp.nan)
        dx_nBtD, dw = gradients
        dw = [(scale * d).astype(w.dtype) for d, w in zip(dw, weights, strict=True)]
        return (scale * dx_nBtD).astype(x_BTD.dtype), dw, None, None

    sums.defvjp(sums_and_gradients, scaled)
    x_nBtD, *rest = split(x_BTD), split(targets_BT), split(jnp.asarray(mask_BT, jnp.float32))
    logits, weights = model.logits, []
    if head_trains:
        logits, weights = jax.closure_convert(model.logits, x_nBtD[0])  # its weights as arguments, to have gradients
    nll, z, count = sums(x_nBtD, weights, *rest)
    return Loss(nll, z, count, z_weight)


def token_nll(model: Llama, x_BTD: jax.Array, targets_BT: jax.Array, *, tokens: int = TOKENS) -> jax.Array:
    """The negative log-likelihood of each target, float32 [B, T] in nats, for losses that weigh them one by one.

    In chunks too, whose logits the gradient computes again: four products with the head instead of three.

    Args:
      model: its norm and head make the logits.
      x_BTD: the residual stream after the last block.
      targets_BT: int32; what lies outside of the vocabulary gives NaN.
      tokens: of one device in a chunk.
    """
    chunks = _Chunks(x_BTD, tokens)

    @jax.checkpoint
    def of_chunk(x_BtD, targets_Bt):
        return _of_tokens(model.logits(x_BtD), targets_Bt)[0]

    _, nll_nBt = jax.lax.scan(
        lambda _, parts: (None, of_chunk(*parts)), None, (chunks.split(x_BTD), chunks.split(targets_BT))
    )
    return chunks.join(nll_nBt)


def _of_tokens(logits_BtV: jax.Array, targets_Bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood, and the logarithm of the softmax's denominator, of each target."""
    lse_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
    # A comparison instead of a gather: the vocabulary may be split over the mesh.
    V = logits_BtV.shape[-1]
    chosen_BtV = jnp.arange(V, out_sharding=jax.P(_vocab(logits_BtV))) == targets_Bt[..., None]
    nll_Bt = lse_Bt - jnp.sum(jnp.where(chosen_BtV, logits_BtV, 0), axis=-1)
    return nll_Bt + jnp.where((targets_Bt >= 0) & (targets_Bt < V), 0, jnp.nan), lse_Bt


class _Chunks:
    """A cut of [B, T, ...] along T: each chunk has `size` positions of each of the devices that share a row."""

    def __init__(self, x_BTD: jax.Array, tokens: int):
        self.batch, self.seq, self.embed = jax.typeof(x_BTD).sharding.spec
        rows, self.length = jax.typeof(x_BTD).sharding.shard_shape(x_BTD.shape)[:2]
        self.devices = x_BTD.shape[1] // self.length  # that share a row
        self.chunks = -(-self.length // max(1, tokens // rows))
        self.size = -(-self.length // self.chunks)

    def split(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, B, devices * size, ...], filled up with zeros."""
        B, _, *inner = x.shape
        rest = [self.embed] * len(inner)
        batch, seq, devices, chunks, size = self.batch, self.seq, self.devices, self.chunks, self.size
        x = jax.reshard(jnp.asarray(x), jax.P(batch, seq, *rest))
        x = x.reshape(B, devices, self.length, *inner, out_sharding=jax.P(batch, seq, None, *rest))
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * size - self.length), *((0, 0) for _ in inner)])
        x = x.reshape(B, devices, chunks, size, *inner, out_sharding=jax.P(batch, seq, None, None, *rest))
        x = jnp.moveaxis(x, 2, 0)
        return x.reshape(chunks, B, devices * size, *inner, out_sharding=jax.P(None, batch, seq, *rest))

    def join(self, x: jax.Array) -> jax.Array:
        """[chunks, B, devices * size] -> [B, T]."""
        B = x.shape[1]
        batch, seq, devices, chunks, size = self.batch, self.seq, self.devices, self.chunks, self.size
        x = x.reshape(chunks, B, devices, size, out_sharding=jax.P(None, batch, seq, None))
        x = jnp.moveaxis(x, 0, 2)
        x = x.reshape(B, devices, chunks * size, out_sharding=jax.P(batch, seq, None))[:, :, : self.length]
        return x.reshape(B, devices * self.length, out_sharding=jax.P(batch, seq))


def _vocab(logits_BtV: jax.Array) -> str | tuple[str, ...] | None:
    return jax.typeof(logits_BtV).sharding.spec[2]
