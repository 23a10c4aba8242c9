"""Reads single values of a configuration; what the readers of the formats share."""

from __future__ import annotations

from typing import Any

from llama_jax.config import ConfigError
from llama_jax.typing import Fields


def need(mapping: Fields, key: str, where: str) -> Any:
    """Returns the value of a key that must be said.

    Raises:
      ConfigError: it is not.
    """
    if mapping.get(key) is None:
        raise ConfigError(f"{where} does not say {key}")
    return mapping[key]


def number(mapping: Fields, key: str, where: str, *default: float | None) -> Any:
    """Returns the value of a key, a number that may be spelt as text; `default`, if one is given, where it is not said.

    Raises:
      ConfigError: it is no number, or is not said.
    """
    value = mapping.get(key)
    if value is None and default:
        return default[0]
    if isinstance(need(mapping, key, where), bool) or not isinstance(value, (int, float, str)):
        raise ConfigError(f"{where}: {key} must be a number, got {value!r}")
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{where}: {key} must be a number, got {value!r}") from None


def either(value: Any, default: Any) -> Any:
    """`value`, or `default` for None."""
    return default if value is None else value


def divide(dim: int, heads: int) -> int:
    """Returns the size of a head where nothing says it.

    Raises:
      ConfigError: not numbers that can be divided.
    """
    if not isinstance(dim, int) or not isinstance(heads, int) or heads < 1:
        raise ConfigError(f"width {dim!r} and number of heads {heads!r} must be positive integers")
    return dim // heads
