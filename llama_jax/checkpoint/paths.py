"""Paths for Orbax and tensorstore, which read more into some names than a file system does.

Orbax joins folders with patterns and globs the whole, so that `[1]` in a folder's name matches a folder named `1`.
Other characters mean something in a URL. A folder with such a name is given to them as a symbolic link of a plain name.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import re
import shutil
import tempfile
from pathlib import Path

PLAIN = re.compile(r"[A-Za-z0-9/._@+=,~-]*")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")  # "gs://", also after pathlib has made it "gs:/"
_NUMBERS = itertools.count()
TEMPORARY = ("/dev/shm", "/tmp", "/var/tmp")  # where the usual one has no plain name


def plain(path: Path) -> Path:
    """Returns the absolute path, by a name without special characters; what it names need not exist, its parent must.

    Raises:
      OSError: there is no folder for the symbolic link that this may need.
    """
    path = Path(os.path.abspath(path))
    if PLAIN.fullmatch(str(path)):
        return path
    # The shortest part of the path with all the special names, which exists: the rest is the library's to make.
    folder = next(p for p in (*reversed(path.parents), path) if PLAIN.fullmatch(str(path.relative_to(p))))
    return _link(folder, os.getpid()) / path.relative_to(folder)


@functools.cache
def _link(folder: Path, process: int) -> Path:
    link = _links(process) / str(next(_NUMBERS))
    link.symlink_to(folder, target_is_directory=True)
    return link


@functools.cache
def _links(process: int) -> Path:
    """A folder of this process, removed at its end."""
    for parent in (tempfile.gettempdir(), *TEMPORARY):
        if PLAIN.fullmatch(parent) and os.access(parent, os.W_OK | os.X_OK):
            made = Path(tempfile.mkdtemp(prefix="llama_jax-", dir=parent))
            atexit.register(_remove, made, process)
            return made
    raise OSError("no folder for temporary files is writable: set TMPDIR to one with a plain name")


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def local_folder(name: str) -> Path:
    """Returns the folder that a user names, `~` replaced by the home folder.

    Raises:
      ValueError: it is a URL, or names the home of a user that does not exist.
    """
    if (scheme := SCHEME.match(name)) and "://" in name:
        raise ValueError(
            f"{name}: the output is a folder of a file system, and {scheme[0]} is none: mount the bucket (gcsfuse,"
            " s3fs) and give the folder that it is mounted on; a folder of that very name is given as ./" + name[:40]
        )
    if (path := os.path.expanduser(name)).startswith("~"):
        user = path.split("/")[0]
        raise ValueError(f"{name}: there is no home folder of {user}; a folder named so is given as ./{name}")
    return Path(path)
