"""What a training run is at one moment: parameters, optimizer state, counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llama_jax.model import Llama
from llama_jax.ops.weights import name_of
from llama_jax.train.trainable import join, split
from llama_jax.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, on the devices, and what it reads.

    Attributes:
      trainable: float32 parameters, stacked over layers: a whole `Llama`, or that half of one which trains.
      opt_state: of optax, sharded as the parameters.
      step: int32, steps so far, skipped ones included.
      skipped: int32, how many changed nothing, because loss or gradient were not finite.
      skipped_in_a_row: int32, of these the latest ones.
      frozen: the other half of the model; None where everything trains.
    """

    trainable: Llama
    opt_state: optax.OptState
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    frozen: Llama | None = None

    @property
    def model(self) -> Llama:
        """The whole model."""
        return join(self.trainable, self.frozen)


def new_state(
    model: Llama, optimizer: optax.GradientTransformation, trains: Callable[[str], bool] | None = None
) -> TrainState:
    """The state before the first step; call it in `jax.jit`, or in `jax.eval_shape` for an abstract one.

    Args:
      model: its parameters may be abstract; its mesh must be in use.
      optimizer: of `optim.adamw`.
      trains: whether the parameter of a name trains; None trains all.
    """
    zero = jnp.zeros((), jnp.int32)
    halves: tuple[PyTree, PyTree] = (model, None) if trains is None else split(model, trains)
    trainable, frozen = halves
    moments = optimizer.init(trainable)
    return TrainState(trainable, moments, zero, zero, zero, frozen)


def named_arrays(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """Returns the arrays of a state by item and name, as they are saved: `params` as in native checkpoints, those that
    train, and `optimizer`."""
    items: dict[str, dict[str, jax.Array]] = {"params": {}, "optimizer": {}}
    for path, leaf in jax.tree_util.tree_flatten_with_path(dataclasses.replace(state, frozen=None))[0]:
        item, name = _name(path)
        items[item][name] = leaf
    return items


def from_named_arrays(like: TrainState, items: dict[str, dict[str, jax.Array]]) -> TrainState:
    """Returns the state with the structure of `like`, its frozen parameters, and the arrays of `named_arrays`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(dataclasses.replace(like, frozen=None))
    found = [items[item][name] for item, name in (_name(path) for path, _ in paths)]
    return dataclasses.replace(jax.tree_util.tree_unflatten(treedef, found), frozen=like.frozen)


def _name(path: tuple) -> tuple[str, str]:
    name = name_of(path)
    return ("params", name.removeprefix("trainable.")) if name.startswith("trainable.") else ("optimizer", name)


def describe(mesh: Mesh) -> str:
    """The mesh in words, such as "8 devices (TPU v5 lite, fsdp=4,tensor_kv=2)"."""
    sizes = ",".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} devices ({kind}, {sizes})" if sizes else f"one device ({kind})"
