"""Names for the values that a type checker cannot see into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Fields: TypeAlias = Mapping[str, Any]  # names and values: a configuration, metadata of a GGUF file, metrics of a step
JsonObject: TypeAlias = dict[str, Any]  # as json.loads makes it, or json.dumps takes it
PyTree: TypeAlias = Any  # of arrays: a model, its gradients, one half of either
Foreign: TypeAlias = Any  # an object of a library without types, or of one that is imported in functions only
