"""The epoch of a mixture: how often its slowest corpus has been read, counted row by row."""

from __future__ import annotations

import numpy as np
import pytest

from llama_jax.data.rows.plan import CorpusRows, RowPlan
from tests.data.test_plan import FakeCorpus


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.9, 0.1], [0.2, 0.0, 0.8], [0.0, 1.0]])
def test_the_epoch_is_that_of_the_slowest_corpus(weights):
    corpora = [FakeCorpus(np.full(count, 17), f"corpus {count}") for count in (40, 900, 7)][: len(weights)]
    plan = RowPlan(corpora, weights=weights, seq_len=16, seed=3)  # each document is a row
    seen, found = np.zeros(len(weights), int), []
    used = [i for i, weight in enumerate(weights) if weight]
    for r in range(9500):
        if r % 7 == 0:
            expected = min(seen[i] // len(corpora[i].lengths) for i in used)
            found.append((plan.epoch(r), expected))
        seen[plan.row(r).corpus] += 1
    epochs = [epoch for epoch, _ in found]
    assert epochs == [expected for _, expected in found]
    assert epochs == sorted(epochs)
    assert epochs[-1] > 0


def test_one_corpus_counts_its_own_epochs():
    plan = RowPlan([FakeCorpus(np.full(40, 17))], seq_len=16, seed=3)
    rows = CorpusRows(np.full(40, 17), 16, seed=3)
    assert [plan.epoch(r) for r in (0, 39, 40, 4000)] == [rows.epoch(r) for r in (0, 39, 40, 4000)] == [0, 0, 1, 100]
