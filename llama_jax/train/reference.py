"""What the model that a run begins with says of each token: the reference of DPO where all parameters train.

It is computed once, before the first step, and kept in the run's folder: a second model in memory would be as large as
the first. With an adapter there is nothing to keep: the model without it is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax import distributed
from llama_jax.data.corpus import Corpus
from llama_jax.data.rows.loader import BatchSchedule, BatchStage, Loader
from llama_jax.data.rows.plan import SequentialPlan
from llama_jax.model import Llama
from llama_jax.progress import progress
from llama_jax.sharding import pad_batch
from llama_jax.train.preferences import REFERENCE

ROWS = 8  # of a batch, or as many as the mesh has parts
FOLDER = "reference"


class ReferencedCorpus:
    """A corpus with the reference's log-probability of each token as one column more, float32, from a file beside.

    Args:
      corpus: the rest.
      file: of one number for each token, in order; it need not be there before the column is read.
    """

    def __init__(self, corpus: Corpus, file: Path):
        self._corpus, self.file = corpus, file
        lengths = corpus.lengths[np.arange(len(corpus))]
        self.first = np.concatenate([[0], np.cumsum(lengths)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._corpus, name)

    def __len__(self) -> int:
        return len(self._corpus)

    @property
    def columns(self) -> dict[str, np.dtype]:
        """Of the corpus, and the reference."""
        return {**self._corpus.columns, REFERENCE: np.dtype(np.float32)}

    def read(self, ids: Sequence[int] | np.ndarray, column: str | None = None) -> list[np.ndarray]:
        """As `Corpus.read`.

        Raises:
          ValueError: the file is not there, or is of another corpus.
        """
        if column != REFERENCE:
            return self._corpus.read(ids, column)
        try:
            values = np.load(self.file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.file}: the reference's log-probabilities cannot be read ({error}): begin the run again, in"
                " another --output"
            ) from error
        if values.shape != (self.first[-1],):
            raise ValueError(
                f"{self.file}: is of other documents than {self._corpus.path}: begin again in a new --output"
            )
        return [np.array(values[self.first[i] : self.first[i + 1]]) for i in np.asarray(ids).tolist()]


def referenced(corpora: Sequence[Corpus], folder: Path, name: str) -> list[Any]:
    """Returns the corpora with the column of the reference, whose files are in a run's folder."""

    def file(i: int, corpus: Corpus) -> Path:
        content = corpus.manifest.content or corpus.manifest.fingerprint
        return folder / FOLDER / f"{name}-{i}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.npy"

    return [ReferencedCorpus(corpus, file(i, corpus)) for i, corpus in enumerate(corpora)]


def keep_reference(
    model: Llama,
    corpora: Sequence[ReferencedCorpus],
    objective: Any,
    seq_len: int,
    mesh: jax.sharding.Mesh,
    *,
    began: bool = False,
) -> None:
    """Computes the files of the corpora; all processes must call it.

    Args:
      model: the reference.
      corpora: whose files are written.
      objective: a `PreferenceObjective`, which says how a row is read.
      seq_len: tokens in a row; no document is longer.
      mesh: the devices.
      began: whether the run has begun before: then nothing is computed, as the model is no more the reference.

    Raises:
      ValueError: a run that has begun reads a corpus of which the reference was not asked.
    """
    if began:
        for corpus in corpora:
            if not corpus.file.exists():
                raise ValueError(
                    f"{corpus.path}: what the reference says of it was not computed when the run began"
                    f" ({corpus.file.name} is not there): give the corpora that it began with, or begin a new run"
                )
        return
    program: Any = None
    total = sum(int(corpus.first[-1]) for corpus in corpora)
    with jax.set_mesh(mesh), progress("Reference", total, least=1 << 20) as advance:
        rows = pad_batch(ROWS)
        schedule = BatchSchedule(seq_len, (BatchStage(0, rows),))
        sharding = model.rules.sharding(("batch", "seq"), (rows, seq_len))
        sharding = jax.NamedSharding(sharding.mesh, jax.P(None, *sharding.spec))
        columns = [name for name in objective.columns if name != REFERENCE]
        compute = jax.jit(lambda model, batch: objective.log_probabilities(model, {k: x[0] for k, x in batch.items()}))
        for corpus in corpora:
            values = np.zeros(corpus.first[-1], np.float32)
            plan = SequentialPlan(corpus, seq_len=seq_len, whole=True)  # pyright: ignore[reportArgumentType]
            with Loader(plan, schedule, stop_row=len(plan), sharding=sharding, columns=columns) as loader:
                for step in loader:
                    if program is None:
                        program = distributed.compile_together(compute.lower(model, step.batch))
                    (found_BT,) = distributed.fetch(program(model, step.batch))
                    for place, part in _spans(plan, range(step.first_row, step.first_row + step.rows), corpus.first):
                        values[place] = found_BT[part]
                        advance(place.stop - place.start)
            if distributed.is_main():
                corpus.file.parent.mkdir(parents=True, exist_ok=True)
                partial = corpus.file.with_suffix(".partial.npy")
                np.save(partial, values)
                partial.replace(corpus.file)
    distributed.broadcast(None)  # the others wait for the files


def _spans(plan: SequentialPlan, rows: range, first: np.ndarray) -> Iterator[tuple[slice, tuple[int, slice]]]:
    """Where the targets of some rows are among all tokens, and where in the rows."""
    for r, row in enumerate(rows):
        end = 0
        for document, start, stop in plan.row(row).pieces:
            begin, end = end, end + stop - start
            at = int(first[document])
            yield slice(at + start + 1, at + stop + 1), (r, slice(begin, end))
