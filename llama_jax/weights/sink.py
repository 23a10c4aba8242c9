"""Tensors that are made piece by piece while a checkpoint is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor to be written.

    Attributes:
      name: in the file.
      shape: elements, outermost dimension first.
      dtype: of the stored numbers.
      pieces: makes the content: C-contiguous arrays that follow each other in the file, `nbytes` bytes in all. A
        piece may be freed once the next is asked for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_pieces(file: IO[bytes], entry: Entry, advance: Callable[[int], None]) -> None:
    """Appends an entry's content to an open file.

    Args:
      file: open for writing, unbuffered or not.
      entry: what to write.
      advance: called with the number of bytes just written.

    Raises:
      RuntimeError: the pieces are more or fewer bytes than the entry says: a defect of this library.
    """
    written = 0
    for piece in entry.pieces():
        rest = as_bytes(piece)
        while rest:  # the system may write less than it is given: at most 2 GiB, or what the disk has room for
            rest = rest[file.write(rest) :]
        written += piece.nbytes
        advance(piece.nbytes)
    if written != entry.nbytes:
        raise RuntimeError(f"{entry.name}: {written} bytes were made, {entry.nbytes} expected")


def as_bytes(array: np.ndarray) -> memoryview:
    """Returns the bytes of a C-contiguous array, without a copy (memoryview alone refuses bfloat16)."""
    return array.reshape(-1).view(np.uint8).data
