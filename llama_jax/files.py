"""Files that are whole or not there, locks, a full disk, and the cache folder. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """Returns the folder of fetched checkpoints and compiled programs: $LLAMA_JAX_CACHE, or else ~/.cache/llama_jax."""
    return Path(os.path.expanduser(os.environ.get("LLAMA_JAX_CACHE") or "~/.cache/llama_jax"))


def sync(paths: Iterable[Path]) -> None:
    """Waits until files and folders are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file in one step: after a crash, `path` holds the old content or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    sync([partial])
    partial.replace(path)
    sync([path.parent])


def is_full(error: Exception) -> bool:
    """Returns whether an error means that the disk is full; tensorstore and Riegeli say so in the text only."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(os.strerror(number) in str(error) for number in FULL)


def disk_full(path: Path, remedy: str) -> OSError:
    """Returns the error that says so.

    Args:
      path: what was written; its parent, or the folder itself, must exist.
      remedy: what to do, after "make room".
    """
    free = shutil.disk_usage(path if path.exists() else path.parent).free
    return OSError(
        f"{path}: the disk is full ({free / 1e9:.1f} GB free): make room {remedy}. If there is room, it is a quota or a"
        " limit on the size of files (`ulimit -f`): raise it"
    )


@contextlib.contextmanager
def locked(path: Path, busy: Exception | None = None, *, seconds: float = 0, waiting: str = "") -> Iterator[None]:
    """Holds a file lock; the system drops the lock of a process that dies.

    Args:
      path: the lock file, made in an existing folder.
      busy: raised where another process holds the lock; None waits for as long as it does.
      seconds: how long to wait before `busy` is raised.
      waiting: printed on stderr before a wait; "" says nothing.
    """
    import filelock

    lock = filelock.FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if waiting:
                print(waiting, file=sys.stderr, flush=True)
            lock.acquire(timeout=seconds if busy else -1)
    except filelock.Timeout as error:
        raise busy or error from error
    try:
        yield
    finally:
        lock.release()
