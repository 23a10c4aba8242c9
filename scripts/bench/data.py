"""How fast rows are read, and how full they are."""

from __future__ import annotations

import time

import jax
import numpy as np

from llama_jax.data.corpus import Corpus
from llama_jax.data.rows.loader import BatchSchedule, BatchStage, Loader
from llama_jax.data.rows.pack import count_rows
from llama_jax.data.rows.plan import RowPlan


def loader_speed(plan: RowPlan, *, rows: int, seconds: float = 5.0) -> float:
    """Tokens a second that a loader alone puts on the first device.

    Args:
      plan: what is read.
      rows: of a step.
      seconds: how long.
    """
    schedule = BatchSchedule(plan.seq_len, (BatchStage(0, rows),))
    sharding = jax.NamedSharding(jax.make_mesh((1,), ("all",), devices=jax.devices()[:1]), jax.P())
    with Loader(plan, schedule, sharding=sharding) as loader:
        jax.block_until_ready(next(loader).batch)  # plans a window, opens the shards
        tokens, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            step = next(loader)
            tokens += int(np.prod(step.batch["tokens"].shape))
        jax.block_until_ready(step.batch)
    return tokens / passed


def packing_efficiency(corpus: Corpus, seq_len: int) -> float:
    """The share of the slots of an epoch's rows that hold a token; of one window of documents at least."""
    pairs = np.maximum(np.asarray(corpus.lengths[:]) - 1, 0)
    return pairs.sum() / (count_rows(pairs, seq_len) * seq_len)
