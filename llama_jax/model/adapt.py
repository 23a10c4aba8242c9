"""A model with an adapter: which of its weights become `ops.adapted.Adapted`, and the factors that they begin with."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from llama_jax.config.adapter import Adapter
from llama_jax.config.params import Place, place_of, sizes
from llama_jax.distributed import put
from llama_jax.model.llama import Llama
from llama_jax.ops.adapted import Adapted
from llama_jax.ops.weights import is_leaf, leaf_of, name_of
from llama_jax.typing import PyTree

TRAINED = ("a", "b")  # the parts of an adapted weight that train


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of one weight of the model: of a stack, those of all its layers.

    Attributes:
      place: of the weight in the model.
      modules: its name in Hugging Face's files, of each layer; None where the adapter leaves the layer out.
      ranks: of each layer, 0 where it is left out; a smaller one is filled up with zeros, which stay zero in training.
      a_shape: [*in, R], with L in front of a stack's.
      b_shape: [R, *out], likewise.
      gate: float32 [R] or [L, R]: the scales.
    """

    place: Place
    modules: tuple[str | None, ...]
    ranks: tuple[int, ...]
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    gate: np.ndarray

    @property
    def inputs(self) -> int:
        """How many numbers one of its columns multiplies."""
        return math.prod(self.a_shape[1 if self.place.stacked else 0 : -1])


def factors(model: Llama, adapter: Adapter) -> dict[str, Factors]:
    """Returns the factors of every weight that an adapter targets, by the weight's name in the model.

    Raises:
      ConfigError: the adapter does not fit the model.
    """
    config = model.config
    modules = {(spec.ours, layer): name for name, (spec, layer) in adapter.modules(config).items()}
    rank = max(adapter.rank_of(name) for name in modules.values())
    size, found = sizes(config), {}
    for path, _ in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_leaf)[0]:
        place = place_of(name_of(path), config.layers)
        if place.layers is None or place.spec.kind != "matrix":
            continue
        layers = place.layers if place.stacked else place.layers[:1]
        names = tuple(modules.get((place.spec.ours, layer)) for layer in layers)
        if not any(names):
            continue
        outer, inner = ([size[letter] for letter in group] for group in place.spec.stored)
        first = [len(names)] if place.stacked else []
        gate = np.array([[adapter.scale_of(name) if name else 0.0] * rank for name in names], np.float32)
        found[name_of(path)] = Factors(
            place, names, tuple(adapter.rank_of(name) if name else 0 for name in names), (*first, *inner, rank),
            (*first, rank, *outer), gate if place.stacked else gate[0],
        )  # fmt: skip
    return found


def adapt(model: Llama, adapter: Adapter, make: Callable[[Factors, str], tuple[PyTree, PyTree]] | None) -> Llama:
    """Returns the model with an adapter on each weight that it targets; its mesh must be in use.

    Args:
      model: its weights may be abstract.
      adapter: what it is.
      make: makes the factors of a weight of that name; None makes abstract ones.
    """
    return with_factors(model, factors(model, adapter), make)


def side_by_side(each: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """Returns the factors of several adapters of a model whose blocks are a list, by the weight's name.

    What makes their `a` and `b` puts those of the adapters one after the other along R. The gate has one row more than
    there are adapters: row 0 is no adapter, row i the one number i - 1.
    """
    found = {}
    for name in dict.fromkeys(name for one in each for name in one):
        has = [one.get(name) for one in each]
        first = next(one for one in has if one)
        ranks = [one.a_shape[-1] if one else 0 for one in has]
        gate, end = np.zeros((len(each) + 1, sum(ranks)), np.float32), 0
        for i, (one, rank) in enumerate(zip(has, ranks, strict=True), 1):
            if one:
                gate[i, end : end + rank] = one.gate
            end += rank
        a_shape, b_shape = (*first.a_shape[:-1], sum(ranks)), (sum(ranks), *first.b_shape[1:])
        found[name] = Factors(first.place, first.modules, tuple(ranks), a_shape, b_shape, gate)
    return found


def has_several_adapters(model: Llama) -> bool:
    """Whether there are adapters to choose from, as `side_by_side` makes them."""
    for w in jax.tree.leaves(model.blocks, is_leaf=is_leaf):
        if isinstance(w, Adapted):
            return w.gate.ndim > 1 and not model.stacked
    return False


def for_rows(model: Llama, adapter_B: jax.Array | None) -> Llama:
    """Returns the model whose several adapters are chosen by row of a batch; unchanged where there is no choice.

    Args:
      model: its weights may have several adapters.
      adapter_B: int32: 0 is none, i the one number i - 1.
    """
    if adapter_B is None:
        return model

    def choose(w):
        return dataclasses.replace(w, adapter_B=adapter_B) if isinstance(w, Adapted) else w

    return jax.tree.map(choose, model, is_leaf=is_leaf)


def with_factors(
    model: Llama, wanted: Mapping[str, Factors], make: Callable[[Factors, str], tuple[PyTree, PyTree]] | None
) -> Llama:
    """Returns the model with factors on the weights of those names; as `adapt`."""
    mesh = jax.sharding.get_abstract_mesh()

    def placed(w: PyTree, x: PyTree, part: P) -> jax.Array:
        first = jax.tree.leaves(w)[0]
        if isinstance(first, Tracer):
            return jax.reshard(x, part) if isinstance(x, jax.Array) else jnp.asarray(x)
        return put(np.asarray(x), jax.NamedSharding(first.sharding.mesh, part))

    def change(path, w):
        name = name_of(path)
        if name not in wanted:
            return w
        one = wanted[name]
        spec = (*leaf_of(w).spec, *(None for _ in range(len(leaf_of(w).shape) - len(leaf_of(w).spec))))
        n = len(one.a_shape) - 1
        first = (None,) if one.place.stacked else ()
        split = P(*spec[:n], None), P(*first, None, *spec[n:])
        if make is None:
            a, b, gate = (
                jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, part))
                for shape, part in ((one.a_shape, split[0]), (one.b_shape, split[1]), (one.gate.shape, P()))
            )
        else:
            a, b = (placed(w, x, part) for x, part in zip(make(one, name), split, strict=True))
            gate = placed(w, one.gate, P(*(None for _ in one.gate.shape)))
        parts: tuple[PyTree, ...] = a, b, gate
        return Adapted(w, *parts)

    return jax.tree_util.tree_map_with_path(change, model, is_leaf=is_leaf)


def new_factors(key: jax.Array) -> Callable[[Factors, str], tuple[jax.Array, jax.Array]]:
    """Returns what makes the factors that training begins with, as PEFT: A uniform within 1 / sqrt(inputs), B zero."""

    def make(one: Factors, name: str) -> tuple[jax.Array, jax.Array]:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        bound = 1 / math.sqrt(one.inputs)
        a = jax.random.uniform(own, one.a_shape, jnp.float32, -bound, bound)
        used = np.arange(one.a_shape[-1]) < np.array(one.ranks)[:, None]  # [L, R]
        used = used.reshape(len(one.ranks), *(1 for _ in one.a_shape[1:-1]), -1) if one.place.stacked else used[0]
        return jnp.where(used, a, 0), jnp.zeros(one.b_shape, jnp.float32)

    return make


def is_trained(model: Llama) -> Callable[[str], bool]:
    """Whether the parameter of a name trains where only the adapter does."""
    return lambda name: place_of(name, model.config.layers).part in TRAINED


def without_adapter(model: Llama) -> Llama:
    """The base alone, whose arrays it shares."""
    return jax.tree.map(lambda w: w.base if isinstance(w, Adapted) else w, model, is_leaf=is_leaf)
