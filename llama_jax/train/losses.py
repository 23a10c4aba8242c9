"""The loss of next-token prediction, in chunks: float32 logits [B, T, V] never exist at once.

For Llama 3 8B they would be 4.2 GB for each row of 8192 tokens. A chunk's logits are computed, used and dropped, and
computed again for the gradient.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.model import Llama

TOKENS = 1024  # of one device in a chunk: 525 MB of logits at a vocabulary of 128,256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """Sums over the tokens that count, float32 scalars; of all rows of all processes.

    Attributes:
      nll: negative log-likelihood, in nats.
      z: squared logarithm of the softmax's denominator.
      tokens: how many.
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
        return total / jnp.maximum(self.tokens, 1)


def cross_entropy(
    model: Llama,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    z_weight: float = 0.0,
    tokens: int = TOKENS,
) -> Loss:
    """Masked cross-entropy of the next token, in float32.

    Args:
      model: whose final norm and head are used; its mesh must be in use.
      x_BTD: the residual stream after the last block, of `model.hidden`.
      targets_BT: int: the token that follows each position.
      mask_BT: bool, or weights: which positions count.
      z_weight: of the z-loss, which keeps the softmax's denominator near 1 (PaLM uses 1e-4).
      tokens: most positions of one device in a chunk.

    Returns:
      Sums and their number; `.mean` is the loss.
    """
    rows, length = jax.typeof(x_BTD).sharding.shard_shape(x_BTD.shape)[:2]
    chunks = _divisor(length, -(-rows * length // tokens))
    batch, seq, embed = jax.typeof(x_BTD).sharding.spec

    def split(x: jax.Array, *rest: str | None) -> jax.Array:
        """[B, T, ...] -> [chunks, B, T / chunks, ...]: of each device's positions every chunk takes some."""
        B, T, *inner = x.shape
        x = jax.reshard(jnp.asarray(x), jax.P(batch, seq, *rest))
        x = x.reshape(B, T // chunks, chunks, *inner, out_sharding=jax.P(batch, seq, None, *rest))
        return jnp.moveaxis(x, 2, 0)

    @jax.checkpoint
    def chunk(model: Llama, x_BtD, targets_Bt, mask_Bt):
        logits_BtV = model.logits(x_BtD)
        lse_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
        # A comparison instead of a gather: the vocabulary may be split over the mesh.
        chosen_BtV = jnp.arange(logits_BtV.shape[-1], out_sharding=jax.P(_vocab(logits_BtV))) == targets_Bt[..., None]
        nll_Bt = lse_Bt - jnp.sum(jnp.where(chosen_BtV, logits_BtV, 0), axis=-1)
        return jnp.sum(nll_Bt * mask_Bt), jnp.sum(lse_Bt**2 * mask_Bt), jnp.sum(mask_Bt)

    def step(sums, parts):
        return jax.tree.map(jnp.add, sums, chunk(model, *parts)), None

    parts = (split(x_BTD, embed), split(targets_BT), split(jnp.asarray(mask_BT, jnp.float32)))
    zero = jnp.float32(0)
    (nll, z, count), _ = jax.lax.scan(step, (zero, zero, zero), parts)
    return Loss(nll, z, count, z_weight)


def _vocab(logits_BtV: jax.Array) -> str | tuple[str, ...] | None:
    return jax.typeof(logits_BtV).sharding.spec[2]


def _divisor(length: int, least: int) -> int:
    """The smallest divisor of `length` that is at least `least`."""
    return next(n for n in range(min(least, length), length + 1) if length % n == 0)
