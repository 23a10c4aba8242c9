"""From planned rows to batches on the mesh, read ahead by Grain: each process reads the rows that its devices hold.

    tokens         int32 [M, B, T]    inputs: M microbatches of B sequences
    targets        int32 [M, B, T]    the token after each input
    positions      int32 [M, B, T]    from 0 in each piece of a document
    segment_ids    int32 [M, B, T]    from 1, one a piece; a query sees its own segment only; 0 is padding, without loss

A column of the corpora, such as `loss_mask`, is one more array, of its own dtype: its number for each target, 0 for
padding.

The state of a run is the number of rows it has consumed: a loader that starts there, with any number of processes and
any mesh, continues with the same rows.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from llama_jax.data.rows.plan import PackedRow, RowPlan, SequentialPlan

ARRAYS = ("tokens", "targets", "positions", "segment_ids")  # of every batch; columns come beside them
Document = tuple[np.ndarray, ...]  # tokens, and the columns that are asked for
CACHED_TOKENS = 2**25  # of long documents, 128 MB


@dataclasses.dataclass(frozen=True)
class BatchStage:
    """How large the steps are from some point of a run.

    Attributes:
      from_tokens: the first step that begins when so many tokens have been consumed is of this stage.
      rows: of the plan, consumed by one step.
      split: sequences that a row is cut into: Llama 3 begins with half of the final length. A document cut at
        a sequence end continues in the next one, positions counting on, but does not attend across the cut.
      microbatches: the sequences are computed in so many parts, one after the other.
    """

    from_tokens: int
    rows: int
    split: int = 1
    microbatches: int = 1


class StepRange(NamedTuple):
    """Steps of one stage: the number of the first, the row that it starts at, and the stage."""

    step: int
    row: int
    stage: BatchStage


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """The stages of a run; which one a step belongs to depends on where it starts, and on nothing else.

    Attributes:
      seq_len: slots of a row of the plan.
      stages: in order.

    Raises:
      ValueError: no stage, stages that do not ascend from 0 tokens, or sizes that do not divide.
    """

    seq_len: int
    stages: tuple[BatchStage, ...]

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"batch schedule: seq_len must be at least 1, got {self.seq_len}")
        starts = [stage.from_tokens for stage in self.stages]
        if not starts or starts[0] or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"batch schedule: stages must begin at 0 tokens and ascend, they begin at {starts}")
        for stage in self.stages:
            what = f"batch schedule, stage from {stage.from_tokens} tokens"
            if min(stage.rows, stage.split, stage.microbatches) < 1:
                raise ValueError(f"{what}: rows, split and microbatches must be 1 or more: {stage}")
            if self.seq_len % stage.split:
                raise ValueError(f"{what}: rows of {self.seq_len} tokens do not divide into {stage.split} sequences")
            if stage.rows * stage.split % stage.microbatches:
                raise ValueError(
                    f"{what}: {stage.rows * stage.split} sequences do not divide into {stage.microbatches} microbatches"
                )

    def stage_at(self, row: int) -> BatchStage:
        """The stage of a step that starts at a row."""
        starts = [stage.from_tokens for stage in self.stages]
        return self.stages[bisect.bisect_right(starts, row * self.seq_len) - 1]

    def shape(self, stage: BatchStage) -> tuple[int, int, int]:
        """Of a step's arrays: microbatches, sequences of each, tokens of a sequence."""
        return stage.microbatches, stage.rows * stage.split // stage.microbatches, self.seq_len // stage.split

    def runs(self, first_row: int) -> list[StepRange]:
        """The steps of a run that begins at a row, by stages; a stage that no step falls into has none."""
        at = self.stages.index(self.stage_at(first_row))
        runs = [StepRange(0, first_row, self.stages[at])]
        for stage in self.stages[at + 1 :]:
            step, row, before = runs[-1]
            steps = max(0, -((row * self.seq_len - stage.from_tokens) // (before.rows * self.seq_len)))
            runs.append(StepRange(step + steps, row + steps * before.rows, stage))
        return runs


class Step(NamedTuple):
    """What one training step consumes.

    Attributes:
      first_row: of the plan.
      rows: how many; the next step starts at `first_row + rows`.
      batch: ARRAYS and columns, [M, B, T] each, on the mesh.
      wait_seconds: how long the caller was kept waiting for data.
    """

    first_row: int
    rows: int
    batch: dict[str, jax.Array]
    wait_seconds: float


class RowReader:
    """Reads rows into arrays; safe to use from several threads.

    It keeps documents that are longer than a row, in the order of their use: many rows are pieces of them.
    """

    def __init__(
        self, plan: RowPlan | SequentialPlan, columns: Sequence[str] = (), *, cached_tokens: int = CACHED_TOKENS
    ) -> None:
        self._plan, self._room = plan, cached_tokens
        self._dtypes = {name: _dtype_of(plan, name) for name in columns}
        self._long: collections.OrderedDict[tuple[int, int], Document] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, rows: Iterable[int]) -> dict[str, np.ndarray]:
        """The arrays of some rows, [rows, T], int32 but for columns."""
        planned = [self._plan.row(row) for row in rows]
        documents = self._documents(planned)
        shape = len(planned), self._plan.seq_len
        arrays = {name: np.zeros(shape, self._dtypes.get(name, np.int32)) for name in (*ARRAYS, *self._dtypes)}
        tokens, targets, positions, segment_ids = (arrays[name] for name in ARRAYS)
        for r, row in enumerate(planned):
            end = 0
            for segment, (document, start, stop) in enumerate(row.pieces, 1):
                first, end = end, end + stop - start
                ids, *columns = documents[row.corpus, document]
                tokens[r, first:end] = ids[start:stop]
                targets[r, first:end] = ids[start + 1 : stop + 1]
                positions[r, first:end] = np.arange(stop - start)
                segment_ids[r, first:end] = segment
                for name, values in zip(self._dtypes, columns, strict=True):
                    arrays[name][r, first:end] = values[start + 1 : stop + 1]
        return arrays

    def _documents(self, rows: Sequence[PackedRow]) -> dict[tuple[int, int], Document]:
        """The documents of some rows, by corpus and number, each read once."""
        found: dict[tuple[int, int], Document] = {}
        missing: dict[int, list[int]] = {}
        with self._lock:
            for key in dict.fromkeys((row.corpus, piece.document) for row in rows for piece in row.pieces):
                if key in self._long:
                    found[key] = self._long[key]
                    self._long.move_to_end(key)
                else:
                    missing.setdefault(key[0], []).append(key[1])
        for corpus, ids in missing.items():
            opened = self._plan.corpora[corpus]
            columns = [opened.read(ids), *(opened.read(ids, name) for name in self._dtypes)]
            for document, *arrays in zip(ids, *columns, strict=True):
                found[corpus, document] = tuple(arrays)
                if len(arrays[0]) > self._plan.seq_len + 1:
                    self._keep((corpus, document), tuple(arrays))
        return found

    def _keep(self, key: tuple[int, int], document: Document) -> None:
        with self._lock:
            if key not in self._long:
                self._long[key] = document
                self._room -= len(document[0])
            while self._room < 0 and len(self._long) > 1:
                self._room += len(self._long.popitem(last=False)[1][0])


def _dtype_of(plan: RowPlan | SequentialPlan, column: str) -> np.dtype:
    """A dtype that holds the numbers of a column in all corpora."""
    for corpus in plan.corpora:
        if column not in corpus.columns:
            raise ValueError(
                f"{corpus.path}: has no column {column!r}, which the objective needs; it has"
                f" {', '.join(corpus.columns) or 'tokens alone'}: prepare it again for this objective"
            )
    return np.result_type(*(corpus.columns[column] for corpus in plan.corpora))


class _Layout:
    """Where the rows of a step are placed, and which of them this process needs."""

    def __init__(self, schedule: BatchSchedule, stage: BatchStage, sharding: NamedSharding) -> None:
        self._split, self._sharding, self._shape = stage.split, sharding, schedule.shape(stage)
        try:
            sharding.shard_shape(self._shape)
        except ValueError as error:
            raise ValueError(
                f"batch schedule, stage from {stage.from_tokens} tokens: microbatches of {self._shape[1]} sequences of"
                f" {self._shape[2]} tokens do not divide among the devices of {sharding.spec} on mesh"
                f" {dict(sharding.mesh.shape)}: change rows, microbatches or the mesh"
            ) from error
        microbatches, sequences, self._length = self._shape
        self._sequence_MB = np.arange(microbatches * sequences).reshape(microbatches, sequences)
        indices = sharding.addressable_devices_indices_map(self._shape).values()
        self.rows = np.unique(np.concatenate([self._rows(index).ravel() for index in indices]))

    def place(self, read_RT: np.ndarray) -> jax.Array:
        """The global array [M, B, T] of the rows [rows, seq_len] that this process has read."""
        sequences_RST = read_RT.reshape(len(read_RT), self._split, self._length)

        def part(index: Any) -> np.ndarray:
            row_MB, place_MB = np.searchsorted(self.rows, self._rows(index)), self._sequence_MB[index[:2]] % self._split
            return sequences_RST[row_MB, place_MB][..., index[2]]

        return jax.make_array_from_callback(self._shape, self._sharding, part)

    def _rows(self, index: Any) -> np.ndarray:
        """The row, from 0, that each sequence of a part is from."""
        return self._sequence_MB[index[:2]] // self._split


class _Source:
    """The steps of a run as Grain reads them, by number."""

    def __init__(
        self, read: RowReader, runs: Sequence[StepRange], layouts: Mapping[BatchStage, _Layout], stop_row: int | None
    ) -> None:
        self._read, self._runs, self._layouts = read, runs, layouts
        self._first_steps = [run.step for run in runs]
        self._num_steps = sys.maxsize
        if stop_row is not None:
            last = runs[max(0, bisect.bisect_left([run.row for run in runs], stop_row) - 1)]
            self._num_steps = last.step + max(0, -((last.row - stop_row) // last.stage.rows))

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> tuple[int, BatchStage, dict[str, np.ndarray]]:
        step, row, stage = self._runs[bisect.bisect_right(self._first_steps, index) - 1]
        row += (index - step) * stage.rows
        return row, stage, self._read((row + self._layouts[stage].rows).tolist())


class Loader:
    """Iterates over the steps of a run.

    A context manager: leaving it ends its threads, as `close` and garbage collection do. What a thread raises, such as
    the ValueError of a damaged shard, is raised where the step was asked for, and closes the loader.

    Args:
      plan: the rows.
      schedule: how many rows a step takes.
      first_row: where to begin: the rows that the run has consumed before.
      stop_row: no step begins here or later; default: without end.
      sharding: of an array [M, B, T]; M is not divided.
      threads: that read.
      prefetch: steps that are read ahead, in the memory of the host.
      columns: of the corpora, to be in each batch beside the tokens.

    Raises:
      ValueError: plan and schedule differ in seq_len, a batch does not divide among the devices, or a corpus lacks a
        column.
    """

    def __init__(
        self,
        plan: RowPlan | SequentialPlan,
        schedule: BatchSchedule,
        *,
        first_row: int = 0,
        stop_row: int | None = None,
        sharding: NamedSharding,
        threads: int = 2,
        prefetch: int = 4,
        columns: Sequence[str] = (),
    ) -> None:
        import grain

        if plan.seq_len != schedule.seq_len:
            raise ValueError(f"rows of {plan.seq_len} tokens, but the batch schedule is for {schedule.seq_len}")
        runs = schedule.runs(first_row)
        self._layouts = {run.stage: _Layout(schedule, run.stage, sharding) for run in runs}
        source = _Source(RowReader(plan, columns), runs, self._layouts, stop_row)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch))
        self._closed = False
        self._steps = iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._closed:
            raise ValueError("the loader is closed: make another that begins at the row which the run has reached")
        before = time.perf_counter()
        try:
            row, stage, arrays = next(self._steps)
        except BaseException as error:
            if not isinstance(error, StopIteration):  # Grain would continue after it, without this step
                self.close()
            raise
        waited = time.perf_counter() - before
        layout = self._layouts[stage]
        return Step(row, stage.rows, {name: layout.place(array) for name, array in arrays.items()}, waited)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads, each after what it is reading; may be called twice."""
        self._closed = True
        self._steps.close()
