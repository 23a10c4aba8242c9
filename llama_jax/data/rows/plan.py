"""Which documents make up row r of a run: a pure function of the seed and r, planned from document lengths alone.

A document of n tokens has n - 1 pairs of an input and its target. A row has `seq_len` of them, from one document or
several. An epoch of a corpus is all its documents in a random order of its own, packed into rows a window at a time: no
pair is lost or repeated, and memory is that of a few windows, whatever the corpus. A run mixes corpora by rows.
"""

from __future__ import annotations

import array
import bisect
import collections
import dataclasses
import fractions
import itertools
import math
import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np

from llama_jax.data.rows.pack import Packed, Span, check_whole, count_rows, pack, pack_whole
from llama_jax.data.rows.shuffle import Permutation

WINDOW = 65_536  # documents packed together: enough for rows without holes, 0.1 s to pack
COUNTED_TOGETHER = 256  # windows, by all cores
BLOCK = 4096  # rows within which the shares of a mixture are exact
SMALLEST_SHARE = 1e-6  # a block has two rows of each corpus


class Lengths(Protocol):
    """The tokens of each document: a NumPy array, or what is indexed like one."""

    def __len__(self) -> int: ...
    def __getitem__(self, documents: np.ndarray, /) -> np.ndarray: ...


class Corpus(Protocol):
    """What a plan and its reader need of `data.corpus.Corpus`."""

    @property
    def path(self) -> str | os.PathLike[str]:
        """Its folder, for messages."""
        ...

    @property
    def lengths(self) -> Lengths:
        """Tokens of each document."""
        ...

    @property
    def columns(self) -> Mapping[str, np.dtype]:
        """What it has of each token beside its id: name -> dtype."""
        ...

    def read(self, documents: Sequence[int], column: str | None = None, /) -> list[np.ndarray]:
        """The token ids of documents, int32 [tokens] each, or the numbers of a column."""
        ...

    def source(self, document: int, /) -> str:
        """Where a document came from."""
        ...


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """One row: pieces of documents of one corpus, in the order of the row's slots."""

    corpus: int
    pieces: Sequence[Span]


class _Recent:
    """Remembers the last few results of a function; one thread computes, the others wait for it."""

    def __init__(self, function: Callable[[Any], Any], size: int) -> None:
        self._function, self._size = function, size
        self._results: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: Hashable) -> Any:
        with self._lock:
            if key not in self._results:
                self._results[key] = self._function(key)
                if len(self._results) > self._size:
                    self._results.popitem(last=False)
            self._results.move_to_end(key)
            return self._results[key]


class CorpusRows:
    """The rows of one corpus, epoch after epoch without end; safe to use from several threads.

    Args:
      lengths: tokens of each document.
      seq_len: pairs a row.
      seed: of the run.
      corpus: its number in the run, so that two corpora of one size are not in the same order.
      window: documents that are packed together.
      whole: whether no document is cut, see `pack_whole`.

    Raises:
      ValueError: no document has two tokens; or one is longer than a row, and none may be cut.
    """

    def __init__(
        self, lengths: Lengths, seq_len: int, *, seed: int, corpus: int = 0, window: int = WINDOW, whole: bool = False
    ) -> None:
        self._lengths, self._seq_len, self._window, self._whole = lengths, seq_len, window, whole
        self._key = (seed, corpus)
        self._num_documents = self._count()
        if whole:  # now, not when the first of them comes
            for first in range(0, self._num_documents, window):
                numbers = np.arange(first, min(first + window, self._num_documents))
                check_whole(self._lengths[self._numbers(numbers)].astype(np.int64) - 1, seq_len)
        self._windows = max(1, -(-self._num_documents // window))  # an epoch
        self._ends = array.array("q")  # rows up to the end of each window, as far as anybody asked
        self._lock = threading.Lock()
        self._packed = _Recent(self._pack, 2)
        self._orders = _Recent(self._order, 2)
        self._reach(0)

    def pieces(self, k: int) -> list[Span]:
        """What the k-th row is made of."""
        number, first = self._locate(k)
        packed, order = self._packed(number)
        return packed.row(order(k - first))

    def epoch(self, k: int) -> int:
        """The epoch of the k-th row, from 0."""
        return self._locate(k)[0] // self._windows

    def _count(self) -> int:
        return len(self._lengths)

    def _numbers(self, places: np.ndarray) -> np.ndarray:
        """Documents of the corpus at some places of what is read."""
        return places

    def _order(self, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        """Position in the epoch -> document, for many."""
        return Permutation(self._num_documents, *self._key, "documents", epoch).many

    def _row_order(self, number: int, rows: int) -> Callable[[int], int]:
        return Permutation(rows, *self._key, "rows", number)

    def _documents(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of a window, counted over all epochs, and how many pairs each has; int64 [W]."""
        epoch, window = divmod(number, self._windows)
        first = window * self._window
        documents = self._orders(epoch)(np.arange(first, min(first + self._window, self._num_documents)))
        return documents, np.maximum(self._lengths[documents].astype(np.int64) - 1, 0)

    def _pack(self, number: int) -> tuple[Packed, Callable[[int], int]]:
        packed = (pack_whole if self._whole else pack)(*self._documents(number), self._seq_len)
        return packed, self._row_order(number, len(packed))

    def _reach(self, k: int) -> None:
        """Counts rows until the k-th is among them."""
        ends = self._ends
        if ends and ends[-1] > k:
            return
        with self._lock, futures.ThreadPoolExecutor() as pool:
            while not ends or ends[-1] <= k:
                # Ever more at a time: a run that resumes far on has millions of documents to count, a new one has not.
                numbers = range(len(ends), len(ends) + min(len(ends) + 1, COUNTED_TOGETHER))
                for rows in pool.map(self._count_rows, numbers):
                    ends.append(rows + (ends[-1] if ends else 0))
                if len(ends) >= self._windows and not ends[-1]:
                    raise ValueError("no document has two tokens, so there is nothing to predict: prepare other texts")

    def _count_rows(self, number: int) -> int:
        documents, pairs = self._documents(number)
        return len(pack_whole(documents, pairs, self._seq_len)) if self._whole else count_rows(pairs, self._seq_len)

    def _locate(self, k: int) -> tuple[int, int]:
        """The window of a row and the window's first row."""
        self._reach(k)
        number = bisect.bisect_right(self._ends, k)
        return number, self._ends[number - 1] if number else 0


class Mixture:
    """How the rows of a run are dealt to its corpora.

    Rows come in blocks. A corpus has its share of the rows up to the end of every block, to one row, and its rows
    appear in order; their places within the block are random.

    Args:
      weights: shares of rows, and so of tokens, of each corpus; they need not sum to 1. 0 leaves a corpus out.
      seed: of the run.
      names: of the corpora, for errors.

    Raises:
      ValueError: a weight below 0, not finite, or below a millionth of the sum; or all are 0.
    """

    def __init__(self, weights: Sequence[float], *, seed: int, names: Sequence[str] = ()) -> None:
        named = [*zip(names or [f"corpus {i}" for i in range(len(weights))], weights, strict=True)]
        for name, weight in named:
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"mixing weight {weight} of {name}: it must be 0 (left out) or a positive number")
        # Exact, so that no sum of rounded numbers can lose a row.
        sums = [*itertools.accumulate(map(fractions.Fraction, map(float, weights)), initial=fractions.Fraction(0))]
        total = sums[-1]
        for name, weight in named:
            if 0 < weight < SMALLEST_SHARE * total:
                raise ValueError(
                    f"mixing weight {weight} of {name} is less than a millionth of all weights: make it 0 or larger"
                )
        if not total:
            raise ValueError("all mixing weights are 0: give one corpus a weight above 0")
        self._seed, self._bounds = seed, [part / total for part in sums]
        used = [i for i, weight in enumerate(weights) if weight]
        self._only = used[0] if len(used) == 1 else None
        # A quota is the difference of two differences, each rounded down: it may be almost two rows short.
        self.block = max(BLOCK, math.ceil(2 * total / fractions.Fraction(float(min(weights[i] for i in used)))))
        self._dealt = _Recent(self._deal, 2)

    def locate(self, row: int) -> tuple[int, int]:
        """The corpus of a row, and which of that corpus's rows it is."""
        if self._only is not None:
            return self._only, row
        block, slot = divmod(row, self.block)
        corpora, rows = self._dealt(block)
        return corpora.item(slot), rows.item(slot)

    def before(self, row: int) -> list[int]:
        """How many rows of each corpus come before a row of the run."""
        if self._only is not None:
            return [row if i == self._only else 0 for i in range(len(self._bounds) - 1)]
        block, slot = divmod(row, self.block)
        here = np.bincount(self._dealt(block)[0][:slot], minlength=len(self._bounds) - 1)
        return [a + b for a, b in zip(self.used(block * self.block), here.tolist(), strict=True)]

    def used(self, rows: int) -> list[int]:
        """How many of the first rows, whole blocks of them, are of each corpus."""
        bounds = [math.floor(bound * rows) for bound in self._bounds]
        return [b - a for a, b in itertools.pairwise(bounds)]

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = self.used(block * self.block), self.used((block + 1) * self.block)
        quotas = np.array(after, np.int64) - np.array(before, np.int64)
        sorted_corpora = np.repeat(np.arange(len(quotas)), quotas)
        corpora = sorted_corpora[Permutation(self.block, self._seed, "mixture", block).many(np.arange(self.block))]
        rows = np.empty(self.block, np.int64)
        rows[np.argsort(corpora, kind="stable")] = np.concatenate(
            [first + np.arange(quota) for first, quota in zip(before, quotas, strict=True)]
        )
        return corpora, rows


class RowPlan:
    """All rows of a run, without end.

    Args:
      corpora: what is read; a corpus may be given twice.
      seq_len: slots a row.
      seed: of the run; another seed is another order.
      weights: shares of rows, as `Mixture`; may be left out where there is one corpus.
      window: documents that are packed together.
      whole: whether no document is cut.

    Raises:
      ValueError: no corpus, weights that do not match, as `Mixture`, or a corpus without a pair of tokens.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        seq_len: int,
        seed: int,
        weights: Sequence[float] | None = None,
        window: int = WINDOW,
        whole: bool = False,
    ) -> None:
        if weights is None and len(corpora) == 1:
            weights = [1.0]
        if not corpora or weights is None or len(weights) != len(corpora):
            raise ValueError(f"{len(corpora)} corpora and {len(weights or ())} mixing weights: give each corpus one")
        self.corpora, self.seq_len = corpora, seq_len
        self.mixture = Mixture(weights, seed=seed, names=[str(corpus.path) for corpus in corpora])
        self._rows: list[CorpusRows | None] = []
        for i, (corpus, weight) in enumerate(zip(corpora, weights, strict=True)):
            try:
                rows = None
                if weight:
                    rows = CorpusRows(corpus.lengths, seq_len, seed=seed, corpus=i, window=window, whole=whole)
            except ValueError as error:
                raise ValueError(f"{corpus.path}: {error}") from None
            self._rows.append(rows)

    def row(self, r: int) -> PackedRow:
        """What row r of the run is made of."""
        corpus, k = self.mixture.locate(r)
        rows = self._rows[corpus]
        assert rows is not None  # a corpus of weight 0 has no rows
        return PackedRow(corpus, rows.pieces(k))

    def epoch(self, r: int) -> int:
        """How often every document of every corpus has been read when row r begins: that of the slowest corpus.

        It never falls. A small corpus with a large share may be much further than this.
        """
        before = self.mixture.before(r)
        return min(rows.epoch(k) for rows, k in zip(self._rows, before, strict=True) if rows is not None)


class SequentialPlan(CorpusRows):
    """Every document once and in order, for evaluation: the same rows in every run. After the last, rows are empty.

    Args:
      corpus: what is read.
      seq_len: slots a row.
      documents: which ones; default: all.
      window: documents that are packed together.
      whole: whether no document is cut.

    Raises:
      ValueError: no document has two tokens; or one is longer than a row, and none may be cut.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        documents: Sequence[int] | None = None,
        window: int = WINDOW,
        whole: bool = False,
    ) -> None:
        self.corpora, self.seq_len = [corpus], seq_len
        self.documents = np.arange(len(corpus.lengths)) if documents is None else np.asarray(documents, np.int64)
        super().__init__(corpus.lengths, seq_len, seed=0, window=window, whole=whole)
        while len(self._ends) < self._windows:
            self._reach(self._ends[-1])

    def __len__(self) -> int:
        return self._ends[self._windows - 1]

    def row(self, r: int) -> PackedRow:
        """What row r is made of; nothing after the last."""
        return PackedRow(0, self.pieces(r) if r < len(self) else ())

    def _count(self) -> int:
        return len(self.documents)

    def _numbers(self, places: np.ndarray) -> np.ndarray:
        return self.documents[places]

    def _order(self, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        return self.documents.__getitem__

    def _row_order(self, number: int, rows: int) -> Callable[[int], int]:
        return int


def sources(plan: RowPlan | SequentialPlan, rows: Sequence[int]) -> list[str]:
    """Where the pieces of some rows came from, as `path/of/document [tokens a:b]`."""
    found = []
    for row in map(plan.row, rows):
        source = plan.corpora[row.corpus].source
        found += [f"{source(piece.document)} [tokens {piece.start}:{piece.stop + 1}]" for piece in row.pieces]
    return found
