"""Named tensors that read only the requested bytes; every checkpoint reader returns them.

Tensors are in torch orientation, [out, in], outermost dimension first, whatever order the file states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from llama_jax.weights.nf4 import Blocks

Index = tuple[slice, ...]

DOWNLOAD_AGAIN = "the download or copy was interrupted or damaged: fetch the file again"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or fetched; the message names the file and the remedy."""


class UnreadableError(CheckpointError, OSError):
    """A file that exists and that the system does not let us read; its content is unknown."""


# The meaning of an error of the system, where its own message leaves that open.
_SYSTEM = {
    errno.EACCES: "no permission to read it; ask its owner, or `chmod -R u+rX` it",
    errno.EPERM: "no permission to read it; ask its owner, or `chmod -R u+rX` it",
    errno.ENOTDIR: "a file stands where this path needs a folder; check the path",
    errno.ELOOP: "its symbolic links lead round in a circle; check the path",
    errno.ENAMETOOLONG: "a name in this path is too long; check the path",
    errno.EIO: "the disk or network cannot read it (input/output error); check the device, then try again",
    errno.ESTALE: "the network file system has lost it (stale handle); mount it again",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
}


def unreadable(error: OSError, path: object = None) -> UnreadableError:
    """Returns an error of the system with a message that names the file."""
    path = error.filename if path is None else path
    named = "" if path is None else f"{os.fsdecode(path) if isinstance(path, bytes) else path}: "
    words = _SYSTEM.get(error.errno or 0, f"cannot be read ({error.strerror or error})")
    found = UnreadableError(f"{named}{words}")
    found.errno = error.errno
    return found


@contextlib.contextmanager
def system_errors(path: object = None) -> Iterator[None]:
    """Names the file in errors of the system; `path` is used where the error has none.

    Raises:
      UnreadableError: the system refused something.
    """
    try:
        yield
    except UnreadableError:
        raise
    except OSError as error:
        raise unreadable(error, error.filename or path) from error


def exists(path: Path) -> bool:
    """Returns whether there is such a file or folder.

    Raises:
      UnreadableError: the system does not say: a folder above it may not be searched, say.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(error, path) from error
    return True


def link_to_nothing(path: Path) -> str:
    """Returns where a broken link leads, as in a copy of the Hub's cache without its blobs; else ""."""
    return f": it is a link to {os.readlink(path)}, which is not there; copy what it means" if path.is_symlink() else ""


def listing(folder: Path) -> list[str]:
    """Returns the names in a folder, sorted; `Path.glob` finds nothing in a folder that may not be read.

    Raises:
      UnreadableError: it may not be read.
    """
    with system_errors(folder):
        return sorted(os.listdir(folder))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint file.

    Attributes:
      name: the file's own name for it.
      shape: elements, outermost dimension first.
      dtype: of what `read` returns: the stored dtype, or float32 where the file holds quantized blocks.
      nbytes: bytes in the file.
      reader: reads the part that an index selects.
      blocks: reads it as it is stored, where that is NF4.
      doubly: whether its magnitudes are quantized too.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    reader: Callable[[Index], np.ndarray] = dataclasses.field(repr=False)
    blocks: Callable[[], Blocks] | None = dataclasses.field(default=None, repr=False)
    doubly: bool = False

    def read(self, index: Index = ()) -> np.ndarray:
        """Reads a part of the tensor, touching only the pages of the file that hold it.

        Args:
          index: one slice for each leading dimension to be cut; any start, stop and step. () reads all.

        Returns:
          An array of `dtype`; a read-only view of the file where the numbers are stored as they are.
        """
        if len(index) > len(self.shape):
            raise IndexError(f"{self.name} has {len(self.shape)} dimensions, and the index {len(index)}")
        return self.reader(index)


def cast(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Returns `x` in `dtype`, rounded to nearest.

    Raises:
      CheckpointError: a finite number of `name` became infinite.
    """
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = x.astype(dtype)
    smaller = ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(x.dtype).max
    if smaller and (np.isinf(narrow) & np.isfinite(x)).any():
        raise CheckpointError(f"{name}: holds numbers beyond the range of {dtype}: use dtype bfloat16 or float32")
    return narrow


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Returns a dtype that holds the numbers of all: NumPy knows none for float16 and bfloat16."""
    different = set(dtypes)
    if len(different) == 1:
        return different.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in different else np.float32)


def plain_tensor(name: str, array: np.ndarray) -> Tensor:
    """Returns a tensor whose numbers are stored as they are: `array`, a view of the mapped file."""
    return Tensor(name, array.shape, array.dtype, array.nbytes, array.__getitem__)


def map_file(path: Path) -> np.ndarray:
    """Maps a whole file, read-only.

    Pages are read when they are touched and stay in the system's page cache, so that a mapping of any size
    adds nothing to the memory that the process itself holds.

    Returns:
      uint8 [bytes in the file].

    Raises:
      CheckpointError: no such file, not a file, not readable, empty, or a Git LFS pointer.
    """
    if not exists(path):
        raise CheckpointError(f"{path}: no such file{link_to_nothing(path)}")
    if not path.is_file():
        kind = "but a folder: give what is in it" if path.is_dir() else "but a pipe or device"
        raise CheckpointError(f"{path}: not a file, {kind}")
    with system_errors(path), path.open("rb") as file:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: the file is empty; {DOWNLOAD_AGAIN}")
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    if data[:40].tobytes().startswith(b"version https://git-lfs."):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    return data
