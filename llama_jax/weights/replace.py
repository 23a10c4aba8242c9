"""Output that appears under its name in one step, whole, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from llama_jax.weights.sink import sync

# A folder may be replaced only if it looks like a checkpoint: one of these lies in it.
MARKS = ("config.json", "params.json", "params")
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fs.h


@contextlib.contextmanager
def replacing(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a path beside `destination` to write to, and puts what is there in its place at the end.

    If the block raises, what was written is removed and the destination stays as it was. If the process is killed,
    `.NAME.partial-PID` stays behind, which the next call removes.

    Args:
      destination: a file or folder; its parent folder is made.
      overwrite: whether it may be there already.

    Yields:
      A path at which nothing is.

    Raises:
      FileExistsError: it is there and must not be replaced.
      OSError: as writing raises; a full disk is said in words.
    """
    destination = Path(os.path.abspath(destination.expanduser()))
    check_replaceable(destination, overwrite=overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(destination)
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        yield partial
        sync([*(p for p in partial.rglob("*")), partial] if partial.is_dir() else [partial])
        _put(partial, destination, overwrite=overwrite)
        sync([destination.parent])
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(destination.parent).free
            raise OSError(
                f"{destination}: the disk is full ({free / 1e9:.1f} GB free): make room or write elsewhere;"
                " what was there before is as it was"
            ) from error
        raise
    finally:
        remove(partial)


def check_replaceable(destination: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError where `destination` is there and must not be replaced."""
    if not destination.exists() and not destination.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(f"{destination}: already exists; give another destination, or --overwrite")
    if destination.is_symlink():
        raise FileExistsError(f"{destination}: is a link; remove it, or give the path it leads to")
    known = not destination.is_dir() or any((destination / mark).exists() for mark in MARKS)
    if not known and any(destination.iterdir()):
        raise FileExistsError(f"{destination}: is a folder that is no checkpoint, and is not overwritten; remove it")


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put(partial: Path, destination: Path, *, overwrite: bool) -> None:
    check_replaceable(destination, overwrite=overwrite)  # it may have come meanwhile
    if not destination.is_dir():
        if overwrite or partial.is_dir():
            partial.rename(destination)
        else:
            os.link(partial, destination)  # unlike rename, refuses a file that came meanwhile
    elif _exchange(partial, destination):
        pass  # `partial` is the old one now, and is removed
    else:  # not Linux, or a file system that cannot exchange: for an instant, nothing is there
        old = destination.with_name(f".{destination.name}.partial-{os.getpid()}-old")
        destination.rename(old)
        try:
            partial.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
        remove(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step, where the system can."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def _remove_abandoned(destination: Path) -> None:
    """Removes what a killed process left behind; one that still runs keeps its own."""
    for path in destination.parent.glob(f".{_escaped(destination.name)}.partial-*"):
        pid = re.match(r"\d+", path.name.rpartition(".partial-")[2])
        if pid and not _runs(int(pid[0])):
            remove(path)


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return pid != os.getpid()
