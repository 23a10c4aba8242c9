"""Errors of the operating system in words: which file, what is wrong, what to do. Type and number stay as they were."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

WORDS = {
    errno.EACCES: "no permission to {do} it: ask its owner, or change it with chmod",
    errno.EPERM: "no permission to {do} it: ask its owner, or change it with chmod",
    errno.ENOSPC: "its disk is full: make room and run the same again",
    errno.EDQUOT: "your quota on its disk is used up: make room and run the same again",
    errno.EFBIG: "is larger than a file may be here (`ulimit -f`): raise the limit, or give another folder",
    errno.EROFS: "is on a file system that is read-only: give another folder, or mount it for writing",
    errno.ENOTDIR: "part of this path is a file, not a folder: check the path",
    errno.EEXIST: "something with this name is there already: give another name",
    errno.EMFILE: "cannot be opened, this process has too many files open: raise `ulimit -n`, or take fewer --workers",
    errno.ENFILE: "cannot be opened, this machine has too many files open: close some, or take fewer --workers",
    errno.ELOOP: "is a symbolic link that leads back to itself: correct the link",
    errno.ENAMETOOLONG: "has a name that is too long for its file system: give a shorter one",
    errno.EIO: "the device failed to {do} it (input/output error): check the disk or the network share",
    errno.ESTALE: "is gone from its network share (stale file handle): mount the share again",
}  # fmt: skip


def told(error: OSError, path: object, do: str = "read") -> OSError:
    """Returns the error with words that name the file; one that says enough already is returned itself.

    Args:
      error: what the system said.
      path: the file or folder, where the error names none.
      do: what was tried: read or write.
    """
    if error.errno is None or error.strerror is None:  # not the system's, or in words already
        return error
    name = error.filename if isinstance(error.filename, str) else path
    words = WORDS.get(error.errno)
    if words is None:
        if error.filename is not None:
            return error
        words = error.strerror.lower()
    named = type(error)(f"{name}: {words.format(do=do)}")
    named.errno = error.errno
    return named


@contextlib.contextmanager
def naming(path: object, do: str = "read") -> Iterator[None]:
    """Names the file in errors of the system that are raised inside."""
    try:
        yield
    except OSError as error:
        if (found := told(error, path, do)) is error:
            raise
        raise found from error


def exists(path: str | os.PathLike[str]) -> bool:
    """Tells whether a path is there; raises PermissionError where the system does not say."""
    try:
        with naming(path):
            os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
