"""Opens a checkpoint of any format, without reading its weights."""

from __future__ import annotations

import logging
from pathlib import Path

from llama_jax.config import ConfigError
from llama_jax.weights import foreign, hub
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.formats import FORMATS
from llama_jax.weights.source import CheckpointError, exists, listing, system_errors

log = logging.getLogger("llama_jax")


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Opens a checkpoint of any format that is read, fetching it if need be.

    Reads no weights, but for the head and the embedding table of a tied model that stores both (see `verdict.settle`).

    Args:
      name: a built-in name, a path or a hub id, as for `load`.

    Raises:
      CheckpointError: no such checkpoint, or not one that can be read.
      ConfigError: its configuration is not supported.
    """
    with system_errors(name):
        path = _inner(hub.resolve(str(name)))
        checkpoint = _open(path)
    tokenizer = checkpoint.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > checkpoint.config.vocab_size:
        log.warning(
            "%s: the tokenizer has %d tokens, the model only %d: texts with the last ones will be refused",
            path, tokenizer.vocab_size, checkpoint.config.vocab_size,
        )  # fmt: skip
    return checkpoint


def _open(path: Path) -> Checkpoint:
    """Opens what is there; every error but those of the system names it."""
    try:
        return _find_and_open(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the tokenizer libraries raise plain ones
        raise CheckpointError(
            f"{path}: a value in its configuration or tokenizer files has the wrong type"
            f" ({type(error).__name__}: {error}): compare them with those of a model of the same kind"
        ) from error


def _inner(path: Path) -> Path:
    """Returns the newest checkpoint of a training run's folder, the snapshot of a cached repository; else `path`."""
    if not path.is_dir() or "params" in (present := listing(path)):
        return path
    if "snapshots" in present and "config.json" not in present:
        return foreign.snapshot(path)
    for folder in (path / "checkpoints", path):
        steps = [name for name in listing(folder) if name.isdecimal()] if exists(folder) else []
        if saved := [int(name) for name in steps if exists(folder / name / "params" / "_METADATA")]:
            return folder / str(max(saved))
    return path


def _find_and_open(path: Path) -> Checkpoint:
    """Opens a file or folder of the first format that finds itself there.

    Raises:
      CheckpointError: it is not a checkpoint; names its real kind.
    """
    if not path.is_dir():
        foreign.check_file(path)
        return FORMATS["gguf"].open(path)
    present = listing(path)
    for format in FORMATS.values():
        if found := format.find(path, present):
            return format.open(found)
    if "config.json" not in present and (answer := foreign.folder(path)):
        raise CheckpointError(f"{path}: {answer}")
    return FORMATS["hf"].open(path)  # which says what is missing
