"""Output that appears under its name in one step, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from llama_jax.files import disk_full, is_full, sync
from llama_jax.libc import exchange

# What a folder must hold, one of each, and all that it may hold besides files, to be replaced as a checkpoint.
DESCRIPTIONS, WEIGHTS = ("config.json", "params.json"), ("*.safetensors", "*.bin", "*.pth", "params")
FOLDERS = {"params"}
_NUMBERS = itertools.count()  # one for each call of this process


@contextlib.contextmanager
def replacing(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a path beside `destination` to write to, and moves the result to `destination` at the end.

    If the block raises, the output is removed and the destination stays as it was. If the process is killed,
    a `.llama_jax-...` stays behind, which the next call for this destination on this machine removes.

    Args:
      destination: a file or folder; its parent folder is made.
      overwrite: whether it may be there already.

    Yields:
      A path at which nothing is.

    Raises:
      FileExistsError: it is there and must not be replaced.
      OSError: as writing raises; the message says when the disk is full.
    """
    destination = Path(os.path.abspath(destination))
    destination.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(destination)
    check_replaceable(destination, overwrite=overwrite)
    partial = destination.with_name(f"{_prefix(destination)}{os.getpid()}-{next(_NUMBERS)}")
    try:
        yield partial
        sync([*(p for p in partial.rglob("*")), partial] if partial.is_dir() else [partial])
        _put(partial, destination, overwrite=overwrite)
        sync([destination.parent])
    except Exception as error:  # of the system, of Orbax
        if is_full(error):
            raise disk_full(destination, "or write elsewhere; what was there before is as it was") from error
        raise
    finally:
        remove(partial)


def check_replaceable(destination: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError where `destination` is there and must not be replaced."""
    if not destination.exists() and not destination.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(
            f"{destination}: already exists; give another destination, or replace it (--overwrite, overwrite=True)"
        )
    if destination.is_symlink():
        raise FileExistsError(f"{destination}: is a link; remove it, or give the path it leads to")
    if Path.cwd().is_relative_to(destination.resolve()):
        raise FileExistsError(f"{destination}: is the folder you are in; give another one")
    if not (_is_checkpoint(destination) if destination.is_dir() else _is_gguf(destination)):
        raise FileExistsError(f"{destination}: is not, or not only, a checkpoint, and is not overwritten; remove it")


def _is_checkpoint(folder: Path) -> bool:
    """Returns whether a folder is empty, or a checkpoint without any other files of the user."""
    names = {path.name for path in folder.iterdir()}
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    described = any(name in names for name in DESCRIPTIONS) and any(any(folder.glob(kind)) for kind in WEIGHTS)
    return not names or (described and folders <= FOLDERS)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) in (b"GGUF", b"")


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put(partial: Path, destination: Path, *, overwrite: bool) -> None:
    check_replaceable(destination, overwrite=overwrite)  # it may have come meanwhile
    if not destination.exists() or (partial.is_file() and destination.is_file()):
        partial.rename(destination)
    elif exchange(partial, destination):
        pass  # `partial` is the old one now, and is removed
    else:  # not Linux, or a file system that cannot exchange: for an instant, nothing is there
        old = partial.with_name(f"{partial.name}-old")
        destination.rename(old)
        try:
            partial.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
        remove(old)


def _prefix(destination: Path) -> str:
    """Returns the beginning of partial names for a destination on this machine: short, without its odd characters."""
    name = f"{socket.gethostname()}/{destination.name}"
    return f".llama_jax-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}-"


def _remove_abandoned(destination: Path) -> None:
    """Clears up after a killed process, putting back what it had moved away; one that still runs keeps its own."""
    for path in sorted(destination.parent.glob(f"{_prefix(destination)}*"), reverse=True):
        match = re.fullmatch(r"(\d+)-\d+(-old)?", path.name.removeprefix(_prefix(destination)))
        if match is None or _runs(int(match[1])):
            continue
        if match[2] and not destination.exists():
            path.rename(destination)
        else:
            remove(path)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
