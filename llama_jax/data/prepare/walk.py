"""The files that the given paths mean, each once, and what is left out of them, with the reason."""

from __future__ import annotations

import errno
import fnmatch
import glob as patterns
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_jax.data.manifest import MANIFEST, UNFINISHED
from llama_jax.data.prepare.streams import STDIN_NAMES
from llama_jax.data.prepare.system import exists, naming

HIDDEN = "hidden files and folders"
UNMATCHED = "files that --glob does not match"
BROKEN = "symbolic links that lead nowhere"
SPECIAL = "pipes, sockets and devices"
TWICE = "files and folders that are given twice or that links lead to again (each is read once)"
CORPUS = "prepared corpora"
OUTPUT = "folders that the corpus is written to"
HARD_LINKS = "files that are hard links to others (each name is read)"
EMPTY = "files without a byte"
NOT_PACKED = "files whose names say that they are compressed, which they are not (they are read as they are)"
RENAMED = "files that are not what their names say (they are read as what they are)"
READ = (HARD_LINKS, NOT_PACKED, RENAMED)  # said, but not left out


class Notes:
    """What is to be said of the input: names under each reason, of which a line each is made."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, reason: str, name: str) -> None:
        """Adds a name under a reason."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        self._names.setdefault(reason, [])
        if len(self._names[reason]) < 3:
            self._names[reason].append(name)

    def lines(self, since: dict[str, int] | None = None) -> list[str]:
        """Writes a line for each reason; `since` is an earlier `counts`, after which something must have come."""
        return [
            f"{'note' if reason in READ else 'left out'}: {reason}: {count}, {_some(self._names[reason], count)}"
            for reason, count in self._counts.items()
            if count > (since or {}).get(reason, 0)
        ]

    def counts(self) -> dict[str, int]:
        """How many names each reason has."""
        return dict(self._counts)


class Walk:
    """Finds the files of inputs, in the order of their names, through symbolic links.

    A file is read once, whatever the number of its paths: the first path counts. Hard links are files of their own.

    Args:
      glob: which files of a folder, by their names.
      out: the folder of the corpus, which is no input.
      notes: where to say what is left out.
    """

    def __init__(self, glob: str, out: str | os.PathLike[str] | None, notes: Notes):
        self._glob, self._notes = glob, notes
        self._out = None if out is None or "://" in str(out) else os.path.realpath(os.path.expanduser(out))
        self._folders: set[str] = set()
        self._files: set[str] = set()
        self._inodes: dict[tuple[int, int], str] = {}

    def files(self, item: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yields path and status of the files of an input.

        Raises:
          FileNotFoundError: it is not there, or has no file.
          PermissionError: a folder or a file may not be read.
          ValueError: it is the folder of the corpus, a socket or a device.
        """
        path = os.path.expanduser(item)
        status = self._status(item, path)
        if self._out is not None and os.path.realpath(path) == self._out:
            raise ValueError(f"{item}: is both an input and the folder of the corpus: the last path is a new folder")
        if not stat.S_ISDIR(status.st_mode):
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{item}: is a socket or a device, not a file: write its content to a file first")
            yield from self._file(path, os.path.realpath(path), status)
            return
        before = self._notes.counts()
        found = list(self._folder(path))
        again = self._notes.counts().get(TWICE, 0) > before.get(TWICE, 0)
        if not found and not again:
            why = "".join(f"; {line}" for line in self._notes.lines(before))
            raise FileNotFoundError(f"{item}: has no file that --glob {self._glob!r} matches{why}: check the path")
        yield from found

    @staticmethod
    def _status(item: str, path: str) -> os.stat_result:
        try:
            with naming(path):
                return os.stat(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            if os.path.islink(path):
                words = f"is a symbolic link to {os.readlink(path)}, which is not there: correct the link"
            elif patterns.has_magic(item) and patterns.glob(path):
                words = "no such file; it is a pattern, which the shell completes without quotes (or give --glob)"
            else:
                words = "no such file or folder: check the path (a dataset is hf:NAME:SPLIT)"
            raise FileNotFoundError(f"{item}: {words}") from error

    def _folder(self, top: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yields the files below a folder, those of each folder before those of the folders in it."""
        waiting = [(top, os.path.realpath(top))]
        while waiting:
            folder, real = waiting.pop()
            if real == self._out or real in self._folders:
                self._notes.add(OUTPUT if real == self._out else TWICE, folder)
                continue
            with naming(folder):
                names = sorted(os.listdir(folder))
            if _is_corpus(folder, names):
                self._notes.add(CORPUS, folder)
                continue
            self._folders.add(real)
            folders = []
            for name in names:
                path = os.path.join(folder, name)
                if name.startswith("."):
                    self._notes.add(HIDDEN, path)
                elif (status := self._found(path)) is not None:
                    real_path = os.path.realpath(path) if os.path.islink(path) else os.path.join(real, name)
                    if stat.S_ISDIR(status.st_mode):
                        folders.append((path, real_path))
                    elif not fnmatch.fnmatch(name, self._glob):
                        self._notes.add(UNMATCHED, path)
                    elif not stat.S_ISREG(status.st_mode):
                        self._notes.add(SPECIAL, path)
                    else:
                        yield from self._file(path, real_path, status)
            waiting += reversed(folders)

    def _found(self, path: str) -> os.stat_result | None:
        """Returns the status of what is in a folder; None for a link that leads nowhere."""
        try:
            with naming(path):
                return os.stat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
        self._notes.add(BROKEN, path)
        return None

    def _file(self, path: str, real: str, status: os.stat_result) -> Iterator[tuple[str, os.stat_result]]:
        if real in self._files:
            self._notes.add(TWICE, path)
            return
        self._files.add(real)
        linked = status.st_nlink > 1 and status.st_ino
        if linked and self._inodes.setdefault((status.st_dev, status.st_ino), path) != path:
            self._notes.add(HARD_LINKS, path)
        yield path, status


def is_stream(item: str) -> bool:
    """Tells whether an input can be read only once: standard input, a pipe, what `<(...)` gives."""
    if item in STDIN_NAMES or item.startswith(("/dev/fd/", "/proc/self/fd/")):
        return True
    path = os.path.expanduser(item)
    return exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)


def _is_corpus(folder: str, names: Sequence[str]) -> bool:
    """Tells whether a folder holds a prepared corpus, or one that is being prepared."""
    if MANIFEST in names:
        return any(name.endswith(".array_record") for name in names)
    return UNFINISHED in names and exists(Path(folder, UNFINISHED, "lock"))


def _some(names: Sequence[str], count: int) -> str:
    return ", ".join(names) + (", ..." if count > len(names) else "")
