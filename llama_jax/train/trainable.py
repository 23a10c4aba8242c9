"""Which parameters a run trains: a model is split into those that change and those that are frozen, and joined for use.

Both halves have the structure of the model, with None where the other one has the array. A frozen parameter has no
gradient and no moments, and a checkpoint of the run does not hold it: it is read from where it came from.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from llama_jax.ops.weights import name_of
from llama_jax.typing import PyTree


def split(model: PyTree, trains: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Returns the parameters that train and those that are frozen.

    Args:
      model: parameters, abstract or not.
      trains: whether the parameter of that name (`ops.weights.name_of`) trains.
    """

    def half(kept: bool) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, w: w if trains(name_of(path)) == kept else None, model)

    return half(True), half(False)


def join(trainable: PyTree, frozen: PyTree) -> PyTree:
    """Returns the model of both halves; `frozen` is None where everything trains."""
    if frozen is None:
        return trainable
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None)
