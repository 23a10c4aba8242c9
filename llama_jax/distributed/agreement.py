"""What all processes must have alike: found on each, compared with process 0's, named with both values."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

SHOWN = 8  # differences that a message names
LONGEST = 200  # characters of a value in a message
SAMPLED_FILES, BLOCK = 64, 4096  # files of a folder that are read, and bytes at their start, middle and end

ENVIRONMENT = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_ALGO",
    "NCCL_PROTO",
)
# Flags within XLA_FLAGS and LIBTPU_INIT_ARGS, and settings of JAX, that may differ: they change no number, or only
# which devices a process has.
_FREE_FLAGS = re.compile(r"--?(xla_dump|xla_force_host_platform_device_count|xla_\w*(_dir|_file|_path|cache|log)\b).*")
_FREE_SETTINGS = re.compile(
    r"jax_(\w*(cache|log|trac|dump|pprint|warn|report|guard|timeout|address|visible_devices|profil|pgle|source)\w*"
    r"|debug_\w+|num_cpu_devices|platforms|platform_name|xla_backend|backend_target|default_device|enable_checks"
    r"|cpu_collectives_implementation|enable_preemption_service|mock_\w+|distributed_debug|check_\w+|enable_recoverability"
    r"|pallas_verbose_errors|pjrt_client_create_options|cpu_enable_async_dispatch|captured_\w+|array_garbage_collection_guard|thread_guard)|mock_\w+"
)


class DisagreementError(ValueError):
    """Processes differ in what must be the same; each of them raises the same error."""


def settings() -> dict[str, str]:
    """Returns the flags of this process's environment and of JAX that may change numbers; not those that are free."""
    found = {name: value for name in ENVIRONMENT if (value := _without_free_flags(os.environ.get(name, "")))}
    for name, value in jax.config.values.items():
        if not _FREE_SETTINGS.fullmatch(name):
            found[name] = str(value)
    return found


def _without_free_flags(value: str) -> str:
    return " ".join(sorted(flag for flag in value.split() if not _FREE_FLAGS.fullmatch(flag)))


def differences(mine: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, mine, other) for each leaf that differs; a name is the path through the mappings, with dots.

    A key that only one of them has counts as None in the other.

    Args:
      mine: what JSON can hold; tuples count as lists.
      other: to compare with.
      name: of the whole.
    """
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        for key in sorted(mine.keys() | other.keys()):
            yield from differences(mine.get(key), other.get(key), f"{name}.{key}" if name else str(key))
    elif not _equal(mine, other):
        yield name, mine, other


def _equal(a: Any, b: Any) -> bool:
    """Whether two values of JSON are the same: 1 and 1.0 are, 1 and true are not, nor is text a number."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return not any(differences(a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return a == b or (a != a and b != b)  # NaN is NaN


def shown(value: Any) -> str:
    """A value as messages show it, cut where it is long."""
    text = "nothing" if value is None else value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def message(process: int, host: str, found: list[tuple[str, Any, Any]]) -> str:
    """Says what a process has, and what process 0 has."""
    one, *rest = [(name, shown(mine), shown(other)) for name, mine, other in found]
    text = f"process {process} has {one[0]} = {one[1]}, process 0 has {one[2]}"
    text += "".join(f"; {name} = {mine}, process 0: {other}" for name, mine, other in rest)
    return f"{text}. All must have the same: start one command everywhere (process {process} is on {host})"


def fingerprint(path: Path) -> dict[str, str]:
    """Returns size and a hash of samples of a file, or of the files in a folder, by their names inside.

    Copies on different machines have the same fingerprint. Reads little: the names and sizes of all files, and three
    blocks of at most `SAMPLED_FILES` of them.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.suffix != ".lock" and file.name != "lock"]
    step = max(1, -(-len(files) // SAMPLED_FILES))
    found = {}
    for i, file in enumerate(files):
        name = "file" if file == path else file.relative_to(path).as_posix()
        found[name] = f"{file.stat().st_size} bytes" + (f", {_sample(file)}" if i % step == 0 else "")
    return found


def _sample(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as data:
        for start in sorted({0, max(0, size // 2), max(0, size - BLOCK)}):
            data.seek(start)
            digest.update(data.read(BLOCK))
    return digest.hexdigest()[:12]
