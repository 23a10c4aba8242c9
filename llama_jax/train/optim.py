"""AdamW and its learning rate, of optax."""

from __future__ import annotations

import math

import jax
import optax

from llama_jax.config.params import DECAYED, place_of
from llama_jax.ops.weights import name_of
from llama_jax.train.recipe import Optimizer, Schedule
from llama_jax.typing import PyTree


def learning_rate(schedule: Schedule) -> optax.Schedule:
    """The learning rate as a function of the number of updates so far: 0, 1, 2, ...

    Raises:
      ValueError: the parts do not fit into its steps, or a number is out of range.
    """
    warmup, steps = schedule.warmup_steps, schedule.steps
    if not 0 <= warmup < steps:
        raise ValueError(
            f"optimizer.schedule: warmup_steps ({warmup}) must be from 0 to less than steps ({steps}); lower it, or"
            " give --optimizer.schedule.steps more"
        )
    if not (0 < schedule.peak < math.inf and 0 <= schedule.final <= 1):
        raise ValueError(
            f"optimizer.schedule: peak must be a number above 0 and final (a share of it) from 0 to 1, got"
            f" {schedule.peak} and {schedule.final}"
        )
    peak, end = schedule.peak, schedule.peak * schedule.final
    if schedule.kind == "cosine":
        parts = [optax.cosine_decay_schedule(peak, steps - warmup, alpha=schedule.final)]
        starts = []
    elif schedule.kind == "linear":
        parts, starts = [optax.linear_schedule(peak, end, steps - warmup)], []
    elif schedule.kind == "constant":
        parts, starts = [optax.constant_schedule(peak)], []
    else:
        decay = schedule.decay_steps or max(1, steps // 10)
        if decay > steps - warmup:
            raise ValueError(
                f"optimizer.schedule: warmup_steps ({warmup}) and decay_steps ({decay}) are more than steps ({steps})"
            )
        parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)]
        starts = [steps - decay]
    if warmup:  # update 0 has the first rate above 0
        rising = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else optax.constant_schedule(peak)
        parts, starts = [rising, *parts], [warmup, *starts]
    return optax.join_schedules(parts, starts)


def adamw(options: Optimizer) -> optax.GradientTransformation:
    """Clipping, Adam, decay of the matrices, and the learning rate; on parameters of `Llama`.

    Raises:
      ValueError: a number is out of range.
    """
    for name in ("b1", "b2"):
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"optimizer.{name} must be from 0 to less than 1, got {getattr(options, name)}")
    for name in ("eps", "weight_decay", "clip_norm", "z_weight"):
        if not 0 <= getattr(options, name) < math.inf:
            raise ValueError(f"optimizer.{name} must be a number that is not negative, got {getattr(options, name)}")
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate(options.schedule),
            b1=options.b1,
            b2=options.b2,
            eps=options.eps,
            weight_decay=options.weight_decay,
            mask=matrices,
        ),
    )


def matrices(model: PyTree) -> PyTree:
    """Which parameters decay, by their kind: a tree of bools like `model`, or like its gradient."""
    layers = model.config.layers
    return jax.tree_util.tree_map_with_path(lambda path, _: place_of(name_of(path), layers).spec.kind in DECAYED, model)
