"""One step of training: a pure function of the state and a batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llama_jax.config.params import place_of
from llama_jax.model import Llama
from llama_jax.ops.weights import Narrowed, name_of
from llama_jax.train.objective import BatchArrays, Objective
from llama_jax.train.state import TrainState
from llama_jax.train.trainable import join
from llama_jax.typing import PyTree

MULTIPLIED = ("matrix", "expert")  # the kinds of parameters that large products are with


def train_step(
    state: TrainState,
    batch: BatchArrays,
    stop: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: Objective,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the objective's mean over the batch, microbatch after microbatch.

    Args:
      state: donate it.
      batch: [M, B, T] each: `data.rows.loader.ARRAYS`, and the objective's columns.
      stop: bool, one number a device: whether its process has been asked to stop.
      optimizer: of `optim.adamw`.
      schedule: of `optim.learning_rate`; reported only.
      objective: what is minimised.

    Returns:
      The new state, and float32, int32 and bool scalars: the objective's metrics, such as `loss` and `tokens`;
      `grad_norm` (before clipping), `param_norm` (after the update), both of what trains; `learning_rate`, `finite`
      (loss and gradient; else nothing has changed), `positions` (all but padding), `skipped`, `skipped_in_a_row` and
      `stop` (of any process, so that all know it after the same step).
    """
    M = batch["tokens"].shape[0]
    count = jax.tree.map(lambda x: jnp.maximum(x, 1), objective.count(batch))

    def loss_of(stand_ins: Llama, part: BatchArrays) -> tuple[jax.Array, PyTree]:
        loss = objective.sums(join(attached(state.trainable, stand_ins), state.frozen), part)
        return objective.minimised(loss, count), loss

    gradient_of = jax.grad(loss_of, has_aux=True)

    def accumulate(carry, part):
        return jax.tree.map(jnp.add, carry, gradient_of(handles(state.trainable), part)), None

    if M == 1:  # without sums, which would be a second copy of the gradient
        gradient, loss = gradient_of(handles(state.trainable), {name: x[0] for name, x in batch.items()})
    else:
        first = {name: x[0] for name, x in batch.items()}
        _, sums = jax.eval_shape(gradient_of, handles(state.trainable), first)
        start = jax.tree.map(jnp.zeros_like, (state.trainable, sums))
        (gradient, loss), _ = jax.lax.scan(accumulate, start, dict(batch))

    def widened(gradient):
        return jax.tree.map(lambda d, w: d.astype(w.dtype), gradient, state.trainable)

    def update(model: PyTree, opt_state: PyTree, gradient: PyTree) -> tuple[PyTree, PyTree]:
        gradient = widened(gradient)  # in here, so that it is never whole in float32
        updates, opt_state = optimizer.update(gradient, opt_state, model)
        return optax.apply_updates(model, updates), opt_state

    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(widened(gradient))
        finite = jnp.isfinite(norm) & jnp.isfinite(objective.minimised(loss, count))
        # Not `where`, which keeps the old state beside the new: for SmolLM2 on a CPU 0.44 s and 1.0 GB, against 0.27
        # and 0.5.
        model, opt_state = jax.lax.cond(
            finite, update, lambda model, opt_state, _: (model, opt_state), state.trainable, state.opt_state, gradient
        )
        param_norm = optax.tree.norm(model)
    skipped = state.skipped + ~finite
    in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    new = TrainState(model, opt_state, state.step + 1, skipped, in_a_row, state.frozen)  # pyright: ignore
    return new, {
        **objective.metrics(loss, count),
        "grad_norm": norm,
        "param_norm": param_norm,
        "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
        "finite": finite,
        "positions": (batch["segment_ids"] > 0).sum(),
        "skipped": new.skipped,
        "skipped_in_a_row": new.skipped_in_a_row,
        "stop": jnp.any(stop),
    }


def compiled(
    optimizer: optax.GradientTransformation, schedule: optax.Schedule, objective: Objective
) -> Callable[[TrainState, BatchArrays, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns `train_step` as one jitted program, its state donated."""

    def step(state: TrainState, batch: BatchArrays, stop: jax.Array):
        return train_step(state, batch, stop, optimizer=optimizer, schedule=schedule, objective=objective)

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
