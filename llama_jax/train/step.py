"""One step of training, and one of validation: pure functions of the state and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from llama_jax.config.params import place_of
from llama_jax.model import Llama
from llama_jax.ops.weights import Narrowed, name_of
from llama_jax.train.losses import Loss, cross_entropy
from llama_jax.train.state import TrainState

BatchArrays = Mapping[str, jax.Array]
MULTIPLIED = ("matrix", "expert")  # the kinds of parameters that large products are with
BATCH_ARRAYS = ("tokens", "targets", "positions", "segment_ids")


def train_step(
    state: TrainState,
    batch: BatchArrays,
    stop: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    z_weight: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the mean loss over all tokens of the batch, microbatch after microbatch.

    Args:
      state: donate it.
      batch: int32 [M, B, T] each: `tokens`, `targets`, `positions`, `segment_ids` (0 is padding, which does not count).
      stop: bool, one number a device: whether its process has been asked to stop.
      optimizer: of `optim.adamw`.
      schedule: of `optim.learning_rate`; reported only.
      z_weight: of the z-loss.

    Returns:
      The new state, and float32 and bool scalars: `loss` (nats a token, without the z-loss), `grad_norm` (before
      clipping), `param_norm` (after the update), `learning_rate`, `tokens`, `finite` (loss and gradient; else nothing
      has changed), `skipped`, `skipped_in_a_row` and `stop` (of any process, so that all know it after the same step).
    """
    M = batch["tokens"].shape[0]
    count = jnp.maximum((batch["segment_ids"] > 0).sum(dtype=jnp.float32), 1)

    def loss_of(stand_ins: Llama, part: BatchArrays) -> tuple[jax.Array, Loss]:
        loss = _loss(attached(state.model, stand_ins), part, z_weight)
        return (loss.nll + z_weight * loss.z) / count, loss

    gradient_of = jax.grad(loss_of, has_aux=True)

    def accumulate(carry, part):
        return jax.tree.map(jnp.add, carry, gradient_of(handles(state.model), part)), None

    if M == 1:  # without sums, which would be a second copy of the gradient
        gradient, loss = gradient_of(handles(state.model), {name: x[0] for name, x in batch.items()})
    else:
        zero = jnp.float32(0)
        start = jax.tree.map(jnp.zeros_like, state.model), Loss(zero, zero, zero, z_weight)
        (gradient, loss), _ = jax.lax.scan(accumulate, start, dict(batch))

    def widened(gradient):
        return jax.tree.map(lambda d, w: d.astype(w.dtype), gradient, state.model)

    def update(model, opt_state, gradient):
        gradient = widened(gradient)  # in here, so that the whole of it never lies there in float32
        updates, opt_state = optimizer.update(gradient, opt_state, model)  # pyright: ignore
        return optax.apply_updates(model, updates), opt_state  # pyright: ignore[reportArgumentType]

    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(widened(gradient))
        finite = jnp.isfinite(norm) & jnp.isfinite(loss.nll)
        # Not `where`, which keeps the old state beside the new: for SmolLM2 on a CPU 0.44 s and 1.0 GB, against 0.27
        # and 0.5.
        model, opt_state = jax.lax.cond(
            finite, update, lambda model, opt_state, _: (model, opt_state), state.model, state.opt_state, gradient
        )
        param_norm = optax.tree.norm(model)
    skipped = state.skipped + ~finite
    new = TrainState(model, opt_state, state.step + 1, skipped, jnp.where(finite, 0, state.skipped_in_a_row + 1))  # pyright: ignore
    return new, {
        "loss": loss.nll / count,
        "grad_norm": norm,
        "param_norm": param_norm,
        "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
        "tokens": loss.tokens,
        "finite": finite,
        "skipped": new.skipped,
        "skipped_in_a_row": new.skipped_in_a_row,
        "stop": jnp.any(stop),
    }


def validation_step(model: Llama, batch: BatchArrays) -> Loss:
    """The loss of one batch, [B, T] each of the arrays of `train_step`."""
    return _loss(model, batch, 0.0)


def compiled(
    optimizer: optax.GradientTransformation, schedule: optax.Schedule, z_weight: float = 0.0
) -> Callable[[TrainState, BatchArrays, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step` as one jitted program, its state donated."""

    def step(state: TrainState, batch: BatchArrays, stop: jax.Array):
        return train_step(state, batch, stop, optimizer=optimizer, schedule=schedule, z_weight=z_weight)

    return jax.jit(step, donate_argnums=0)


def handles(model: Llama) -> Llama:
    """What is differentiated: the parameters, but of the blocks' matrices stand-ins in the dtype of the computation."""

    def handle(path, w):
        place = place_of(name_of(path), model.config.layers)
        # A leaf of several arrays has the gradients that it wants; norms are small; the head's are summed in chunks.
        narrow = place.layers and not place.part and place.spec.kind in MULTIPLIED and w.dtype != model.dtype
        return jnp.zeros_like(w, model.dtype) if narrow else w

    return jax.tree_util.tree_map_with_path(handle, model)


def attached(model: Llama, stand_ins: Llama) -> Llama:
    """The model that computes with its parameters and passes their gradients on to `stand_ins`, of `handles`."""
    return jax.tree.map(lambda w, other: other if other.dtype == w.dtype else Narrowed(w, other), model, stand_ins)


def _loss(model: Llama, batch: BatchArrays, z_weight: float) -> Loss:
    segments_BT = batch["segment_ids"]
    x_BTD, _ = model.hidden(batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=segments_BT)
    return cross_entropy(model, x_BTD, batch["targets"], segments_BT > 0, z_weight=z_weight)
