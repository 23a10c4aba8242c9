"""Documents of a window into rows of equal length: none is lost, none repeated, and one row at most has padding."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """A range of a document's pairs (token i, token i + 1): inputs [start, stop), targets [start + 1, stop + 1)."""

    document: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Packed:
    """The rows of a window: first those that one document fills, then those that several share.

    Full rows are counted, not listed, so that memory follows the number of documents, not their lengths.

    Attributes:
      documents: int64 [W], the documents of the window.
      full_ends: int64 [W], how many full rows the documents up to and with this one have.
      offsets: int64 [shared rows + 1], where the pieces of each shared row begin.
      index: int64 [pieces], which of `documents` a piece is from.
      starts: int64 [pieces].
      stops: int64 [pieces].
      seq_len: pairs a row.
    """

    documents: np.ndarray
    full_ends: np.ndarray
    offsets: np.ndarray
    index: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    seq_len: int

    def __len__(self) -> int:
        return self._num_full + len(self.offsets) - 1

    @property
    def _num_full(self) -> int:
        return int(self.full_ends[-1]) if len(self.full_ends) else 0

    def row(self, i: int) -> list[Span]:
        """The pieces of one row, in the order of its slots."""
        if i < self._num_full:
            owner = int(np.searchsorted(self.full_ends, i, side="right"))
            before = int(self.full_ends[owner - 1]) if owner else 0
            start = (i - before) * self.seq_len
            return [Span(int(self.documents[owner]), start, start + self.seq_len)]
        first, end = self.offsets[i - self._num_full : i - self._num_full + 2]
        documents = self.documents[self.index[first:end]].tolist()
        return [*map(Span, documents, self.starts[first:end].tolist(), self.stops[first:end].tolist())]


def count_rows(pairs: np.ndarray, seq_len: int) -> int:
    """How many rows `pack` makes: no fewer could hold the pairs."""
    return -(-int(pairs.sum()) // seq_len)


def pack(documents: np.ndarray, pairs: np.ndarray, seq_len: int) -> Packed:
    """Fills rows with documents.

    A document of `seq_len` pairs or more begins with rows of its own. What remains of it, and every shorter document,
    goes whole into the row that it fills best, the longest first. What then fits nowhere is cut to fill the holes.

    Args:
      documents: int64 [W].
      pairs: int64 [W], one less than the tokens of each document.
      seq_len: pairs a row.
    """
    full, rest = np.divmod(pairs, seq_len)
    items = np.flatnonzero(rest)
    items = items[np.argsort(-rest[items], kind="stable")]
    sizes = rest[items]
    num_rows = count_rows(sizes, seq_len)
    # The padding is taken from one row in advance: with the space as large as what goes in, no other keeps a hole.
    space = np.full(num_rows, seq_len)
    space[-1:] -= num_rows * seq_len - int(sizes.sum())
    row_of = np.array(_best_fit(sizes.tolist(), space.tolist()), np.int64)

    whole = row_of >= 0
    np.subtract.at(space, row_of[whole], sizes[whole])
    cut, holes = items[~whole], np.argsort(-space, kind="stable")
    owner, hole, starts, stops = _cut(rest[cut], space[holes])

    rows = np.concatenate([row_of[whole], holes[hole]])
    index = np.concatenate([items[whole], cut[owner]])
    starts = np.concatenate([np.zeros(whole.sum(), np.int64), starts])
    stops = np.concatenate([sizes[whole], stops])
    order = np.argsort(rows, kind="stable")
    index, after_full = index[order], (full * seq_len)[index[order]]
    return Packed(
        documents=documents,
        full_ends=np.cumsum(full),
        offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))]),
        index=index,
        starts=starts[order] + after_full,
        stops=stops[order] + after_full,
        seq_len=seq_len,
    )


def check_whole(pairs: np.ndarray, seq_len: int) -> None:
    """Raises ValueError where a document does not fit into a row of `seq_len` pairs."""
    if len(pairs) and (longest := int(pairs.max())) > seq_len:
        raise ValueError(
            f"{int((pairs > seq_len).sum())} documents are longer than a sequence of {seq_len} tokens, the longest has"
            f" {longest + 1}: prepare them again with --max-tokens {seq_len + 1}, or train with a larger batch.seq_len"
        )


def pack_whole(documents: np.ndarray, pairs: np.ndarray, seq_len: int) -> Packed:
    """Fills rows with whole documents, the longest first, each where it fills best; what is left of a row is padding.

    For what loses its meaning when it is cut: an answer without its question.

    Args:
      documents: int64 [W].
      pairs: int64 [W], at most `seq_len` each.
      seq_len: pairs a row.

    Raises:
      ValueError: a document is longer.
    """
    check_whole(pairs, seq_len)
    items = np.flatnonzero(pairs)
    items = items[np.argsort(-pairs[items], kind="stable")]
    row_of = np.array(_best_fit(pairs[items].tolist(), [], new=seq_len), np.int64)
    order = np.argsort(row_of, kind="stable")
    index = items[order]
    return Packed(
        documents=documents,
        full_ends=np.zeros(len(documents), np.int64),
        offsets=np.concatenate([[0], np.cumsum(np.bincount(row_of))]).astype(np.int64),
        index=index,
        starts=np.zeros(len(index), np.int64),
        stops=pairs[index],
        seq_len=seq_len,
    )


def _best_fit(sizes: Sequence[int], space: Sequence[int], *, new: int = 0) -> list[int]:
    """The row of each item: always that with the least space that is enough. Where there is none, a row with `new`
    space is added; without, the item's row is -1."""
    rows_with: dict[int, list[int]] = {}
    rows = len(space)
    for row, free in enumerate(space):
        rows_with.setdefault(free, []).append(row)
    levels = sorted(rows_with)
    found = []
    for size in sizes:
        at = bisect.bisect_left(levels, size)
        if at < len(levels):
            free = levels[at]
            row = rows_with[free].pop()
            if not rows_with[free]:
                del rows_with[free], levels[at]
        elif new:
            free, row, rows = new, rows, rows + 1
        else:
            found.append(-1)
            continue
        if left := free - size:
            if left not in rows_with:
                rows_with[left] = []
                bisect.insort(levels, left)
            rows_with[left].append(row)
        found.append(row)
    return found


def _cut(sizes: np.ndarray, holes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lays items end to end over holes end to end, of the same total: item, hole, start and stop of each piece."""
    item_ends, hole_ends = np.cumsum(sizes), np.cumsum(holes)
    stops = np.union1d(item_ends, hole_ends)
    stops = stops[stops > 0]
    starts = np.concatenate([np.zeros(min(len(stops), 1), np.int64), stops[:-1]])
    item, hole = np.searchsorted(item_ends, starts, side="right"), np.searchsorted(hole_ends, starts, side="right")
    before = (item_ends - sizes)[item]
    return item, hole, starts - before, stops - before
