"""The loss on documents that are held out, in nats a token and in bits a byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np

from llama_jax import distributed
from llama_jax.data.corpus import Corpus
from llama_jax.data.rows.loader import BatchSchedule, BatchStage, Loader
from llama_jax.data.rows.plan import SequentialPlan
from llama_jax.model import Llama
from llama_jax.sharding import pad_batch
from llama_jax.text.base import Tokenizer
from llama_jax.train.objective import Objective
from llama_jax.typing import PyTree

ROWS = 8  # of a batch, or as many as the mesh has parts
READ = 256  # documents at a time


class Validator:
    """Measures a model on the first documents of some corpora, packed as in training but in order.

    Args:
      corpora: what is held out.
      objective: whose sums are taken.
      seq_len: tokens in a sequence; a longer document is cut, and a few that would fit are, to fill the rows.
      documents: how many of each corpus; 0 is all.
      mesh: the devices.
      rows: sequences of a batch; at least as many as the mesh divides a batch into.

    Raises:
      ValueError: a corpus has nothing to predict.
    """

    def __init__(
        self, corpora: Sequence[Corpus], *, objective: Objective, seq_len: int, documents: int,
        mesh: jax.sharding.Mesh, rows: int = ROWS,
    ):  # fmt: skip
        self._columns, self._whole = objective.columns, objective.whole
        self._corpora, self._seq_len, self._documents, self._mesh = corpora, seq_len, documents, mesh
        self._plans = [self._plan(corpus) for corpus in corpora]
        # Bits a byte are of texts whose every token counts.
        self._bytes = [
            0.0 if self._columns else _predicted_bytes(corpus, len(plan.documents))
            for corpus, plan in zip(corpora, self._plans, strict=True)
        ]
        with jax.set_mesh(mesh):
            self._rows = pad_batch(rows)

        def sums(model: Llama, batch: dict[str, jax.Array]) -> tuple[PyTree, PyTree]:
            return objective.sums(model, {name: x[0] for name, x in batch.items()}), objective.count(batch)

        self._objective, self._sums, self._program = objective, jax.jit(sums), None

    def __call__(self, model: Llama) -> dict[str, float]:
        """`validation_loss` (nats a token) and `validation_bits_per_byte`, and of each of several corpora by name.

        A byte is one of the documents' UTF-8; what ends a document counts as loss, not as a byte. Where no BOS begins
        a document, its first token is not predicted, and its bytes do not count; where none is left, there are no bits
        a byte.
        """
        found, each = {}, []
        for corpus, plan, nbytes in zip(self._corpora, self._plans, self._bytes, strict=True):
            each.append((*self._of(model, plan), nbytes))
            if len(self._corpora) > 1:
                found |= {f"{name}/{corpus.name}": value for name, value in self._values(*each[-1]).items()}
        return self._values(*jax.tree.map(lambda *x: math.fsum(x), *each)) | found

    def _values(self, sums: PyTree, count: PyTree, nbytes: float) -> dict[str, float]:
        bits = {"validation_bits_per_byte": sums.nll / math.log(2) / nbytes} if nbytes else {}
        more = self._objective.metrics(sums, jax.tree.map(lambda x: max(x, 1.0), count))
        loss = float(more["loss"])
        more = {f"validation_{k}": float(x) for k, x in more.items() if k not in ("loss", "tokens", "pairs")}
        return {"validation_loss": loss} | bits | more

    def _plan(self, corpus: Corpus) -> SequentialPlan:
        count = min(self._documents or len(corpus), len(corpus))
        try:
            return SequentialPlan(corpus, seq_len=self._seq_len, documents=range(count), whole=self._whole)
        except ValueError as error:
            raise ValueError(f"{corpus.path}, for validation: {error}") from None

    def _of(self, model: Llama, plan: SequentialPlan) -> tuple[PyTree, PyTree]:
        """The objective's sums and count."""
        schedule = BatchSchedule(self._seq_len, (BatchStage(0, self._rows),))
        sums = []
        with jax.set_mesh(self._mesh):
            sharding = model.rules.sharding(("batch", "seq"), (self._rows, self._seq_len))
            sharding = jax.NamedSharding(sharding.mesh, jax.P(None, *sharding.spec))
            with Loader(plan, schedule, stop_row=len(plan), sharding=sharding, columns=self._columns) as loader:
                for step in loader:
                    if self._program is None:  # all batches have one shape
                        self._program = distributed.compile_together(self._sums.lower(model, step.batch))
                    sums.append(self._program(model, step.batch))
                    if len(sums) % 16 == 0:
                        jax.block_until_ready(sums[-1])  # so that batches do not pile up on the devices
            structure = jax.tree.structure(sums[0])
            columns = zip(*(_host(jax.tree.leaves(one)) for one in sums), strict=True)
        return jax.tree.unflatten(structure, [math.fsum(column) for column in columns])


def _predicted_bytes(corpus: Corpus, count: int) -> float:
    """Bytes of the first documents' texts that some token predicts: all, or without BOS all but the first token's."""
    if corpus.manifest.bos:
        return float(corpus.nbytes[:count].sum())
    counted = _PredictedBytes(corpus.tokenizer())
    total = 0.0
    for start in range(0, count, READ):
        documents = range(start, min(start + READ, count))
        total += sum(map(counted, corpus.nbytes[documents].tolist(), corpus.read(documents)))
    return total


class _PredictedBytes:
    """Counts the bytes of a document's text that its tokens after the first stand for."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
        self._unknown = (" ⁇ ".encode(), tokenizer.special_tokens.get("unk_token", "<unk>").encode())  # as it is spelt

    def __call__(self, nbytes: int, ids: np.ndarray) -> int:
        if not len(ids):
            return nbytes
        first, rest = self._tokenizer.token_bytes(int(ids[0])), int(self._sizes[ids[1:]].sum())
        space = first.startswith(b" ")  # which may be the tokenizer's, not the text's
        if first in self._unknown or rest + len(first) - nbytes in ((0, 1) if space else (0,)):
            predicted = rest
        else:  # a text that the tokenizer changes, or with unknown tokens: its own bytes without the first token's
            predicted = nbytes - len(first) + (space and self._tokenizer.drops_space)
        return min(max(predicted, 0), nbytes)


def _host(scalars: list[jax.Array]) -> tuple[float, ...]:
    return tuple(float(x) for x in distributed.fetch(*scalars))
