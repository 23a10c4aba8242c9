"""What a run minimises: an objective turns a model and a batch into sums. There are pretraining,
supervised fine-tuning, and those of `train.preferences`.

Another objective is a class with the methods of `Objective` and an entry in OBJECTIVES; recipes name it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from llama_jax.data.manifest import LOSS_MASK
from llama_jax.model import Llama
from llama_jax.train.losses import Loss, cross_entropy
from llama_jax.train.preferences import COMPARED, REFERENCE, WITHOUT_REFERENCE, PreferenceObjective
from llama_jax.train.recipe import Recipe
from llama_jax.typing import PyTree

BatchArrays = Mapping[str, jax.Array]  # `data.rows.loader.ARRAYS`, and the columns that the objective asks for


class Objective(Protocol):
    """A loss over batches, in sums, so that microbatches and devices add up."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the corpora that its batches have beside the tokens."""
        ...

    @property
    def whole(self) -> bool:
        """Whether no document may be cut to fill a sequence."""
        ...

    def count(self, batch: BatchArrays) -> PyTree:
        """Returns what the sums of a whole step are divided by, float32, from its arrays [M, B, T]."""
        ...

    def sums(self, model: Llama, batch: BatchArrays) -> PyTree:
        """Returns the sums of one microbatch, its arrays [B, T]; `nll` and `tokens` among them, for validation."""
        ...

    def minimised(self, sums: PyTree, count: PyTree) -> jax.Array:
        """Returns what the sums of a microbatch add to the loss of its step, whose gradient is taken.

        Args:
          sums: of the microbatch.
          count: of the whole step, at least 1.
        """
        ...

    def metrics(self, sums: PyTree, count: PyTree) -> dict[str, jax.Array]:
        """Returns what a step reports of its sums: at least `loss`, and `tokens` that counted."""
        ...


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """The mean loss of every token that follows another in its document.

    Attributes:
      z_weight: of the z-loss.
      head_trains: whether the final norm and the head do.
    """

    z_weight: float = 0.0
    head_trains: bool = True
    columns: tuple[str, ...] = ()
    whole: bool = False

    def count(self, batch: BatchArrays) -> jax.Array:
        """Tokens that are predicted: all but padding."""
        return (batch["segment_ids"] > 0).sum(dtype=jnp.float32)

    def sums(self, model: Llama, batch: BatchArrays) -> Loss:
        """The cross-entropy of each document by itself."""
        segments_BT = batch["segment_ids"]
        x_BTD, _ = model.hidden(batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=segments_BT)
        return self._loss(model, x_BTD, batch["targets"], segments_BT > 0)

    def _loss(self, model: Llama, x_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array) -> Loss:
        return cross_entropy(model, x_BTD, targets_BT, mask_BT, z_weight=self.z_weight, head_trains=self.head_trains)

    def minimised(self, sums: Loss, count: jax.Array) -> jax.Array:
        """Negative log-likelihood and z-loss."""
        return (sums.nll + self.z_weight * sums.z) / count

    def metrics(self, sums: Loss, count: jax.Array) -> dict[str, jax.Array]:
        """`loss` in nats a token, without the z-loss, and `tokens`."""
        return {"loss": sums.nll / count, "tokens": sums.tokens}


@dataclasses.dataclass(frozen=True)
class SupervisedFineTuning(Pretrain):
    """The mean loss of the tokens that a corpus's `loss_mask` has: the answers, each with the token that ends it.

    The mean is over all learned tokens of a step, so that it does not depend on how the step is cut into microbatches
    or over devices.
    """

    columns: tuple[str, ...] = (LOSS_MASK,)
    whole: bool = True

    def count(self, batch: BatchArrays) -> jax.Array:
        """Tokens that are learned."""
        return batch[LOSS_MASK].sum(dtype=jnp.float32)

    def sums(self, model: Llama, batch: BatchArrays) -> Loss:
        """The cross-entropy of each conversation by itself."""
        segments_BT = batch["segment_ids"]
        x_BTD, _ = model.hidden(batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=segments_BT)
        mask_BT = jnp.where(segments_BT > 0, batch[LOSS_MASK].astype(jnp.float32), 0)
        return self._loss(model, x_BTD, batch["targets"], mask_BT)


OBJECTIVES: dict[str, Callable[[Recipe], Objective]] = {
    "pretrain": lambda recipe: Pretrain(recipe.optimizer.z_weight, not recipe.adapter),
    **{
        name: lambda recipe, name=name: PreferenceObjective(
            name,
            recipe.preference,
            reference="" if recipe.adapter or name in WITHOUT_REFERENCE else REFERENCE,
        )
        for name in COMPARED
    },
    "sft": lambda recipe: SupervisedFineTuning(recipe.optimizer.z_weight, not recipe.adapter),
}


def objective_of(recipe: Recipe) -> Objective:
    """Returns the objective that a recipe names.

    Raises:
      ValueError: there is none of that name.
    """
    if recipe.objective not in OBJECTIVES:
        raise ValueError(f"objective {recipe.objective!r} is unknown; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[recipe.objective](recipe)
