"""The rows of a run: every pair of every document once an epoch, the same in whatever order they are asked for."""

from __future__ import annotations

import collections
import itertools
import sysconfig
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.rows.pack import pack
from llama_jax.data.rows.plan import CorpusRows, Mixture, PackedRow, RowPlan, SequentialPlan, sources
from llama_jax.data.rows.shuffle import Permutation

LLAMA1 = {
    "CommonCrawl": 67.0, "C4": 15.0, "GitHub": 4.5, "Wikipedia": 4.5, "Books": 4.5, "ArXiv": 2.5, "StackExchange": 2.0,
}  # fmt: skip


class FakeCorpus:
    def __init__(self, lengths, path="a/corpus"):
        self.lengths, self.path = np.asarray(lengths, np.uint32), path

    def read(self, documents):
        raise AssertionError("a plan is made from lengths alone")

    def source(self, document):
        return f"file{document}.py"


# Shuffle


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 64, 65, 65_537])
def test_shuffle_is_a_permutation(n):
    shuffle = Permutation(n, 7, "documents")
    elements = shuffle.many(np.arange(n))
    np.testing.assert_array_equal(np.sort(elements), np.arange(n))
    assert [shuffle(i) for i in range(min(n, 300))] == elements[:300].tolist()


@pytest.mark.parametrize("n", [10**9, 2**32, 2**32 + 1, 15 * 10**9])
def test_shuffle_of_very_many(n):
    shuffle = Permutation(n, 7)
    positions = np.concatenate([np.arange(50_000), np.arange(n - 50_000, n)])
    elements = shuffle.many(positions)
    assert len(np.unique(elements)) == len(positions)
    assert 0 <= elements.min() < elements.max() < n
    assert [shuffle(int(i)) for i in positions[-100:]] == elements[-100:].tolist()
    # Uniform, also in its steps: neighbours go to places that have nothing to do with each other.
    tenths = np.bincount(elements * 10 // n, minlength=10)
    steps = np.bincount(np.diff(elements) % n * 10 // n, minlength=10)
    assert np.abs(np.stack([tenths, steps]) - 10_000).max() < 500  # five standard deviations


def test_every_order_is_as_likely():
    """All 24 orders of four, within five standard deviations."""
    counts = collections.Counter(tuple(Permutation(4, key).many(np.arange(4))) for key in range(6000))
    assert len(counts) == 24
    assert max(abs(count - 250) for count in counts.values()) < 80


def test_the_plan_never_changes():
    """Runs that are resumed with a later version of anything depend on these numbers."""
    shuffle = Permutation(1000, np.int64(0), "documents", 1)
    assert shuffle.many(np.arange(6)).tolist() == [18, 42, 156, 157, 889, 718]
    rows = CorpusRows(np.arange(1, 200), 16, seed=3, window=50)
    pieces = [tuple(piece) for k in (0, 100, 2000) for piece in rows.pieces(k)]
    assert pieces == [(73, 48, 64), (92, 48, 64), (174, 112, 128)]
    mixture = Mixture([3, 1], seed=5)
    assert [mixture.locate(r) for r in (0, 1, 2, 3, 10_000)] == [(0, 0), (0, 1), (0, 2), (1, 0), (0, 7504)]


# Rows of one corpus


def epoch_pairs(rows, ks):
    """Document -> its pairs that appear in some rows, as often as they do."""
    found = collections.defaultdict(list)
    for k in ks:
        for document, start, stop in rows.pieces(k):
            assert start < stop
            found[document] += range(start, stop)
    return {document: sorted(pairs) for document, pairs in found.items()}


@st.composite
def corpora(draw):
    seq_len = draw(st.integers(1, 12))
    length = st.sampled_from([1, 2, seq_len, seq_len + 1, seq_len + 2, 9 * seq_len + 1, 20 * seq_len]) | st.integers(
        1, 30
    )
    lengths = draw(st.lists(length, min_size=1, max_size=40).filter(lambda lengths: max(lengths) > 1))
    return lengths, seq_len, draw(st.integers(1, 45)), draw(st.integers(-3, 2**70))


@settings(max_examples=100, deadline=None)
@given(corpora(), st.randoms(use_true_random=False))
def test_an_epoch_has_every_pair_once(corpus, random):
    lengths, seq_len, window, seed = corpus
    rows = CorpusRows(np.array(lengths), seq_len, seed=seed, window=window)
    k = 0
    for epoch in range(3):
        end = next(k for k in itertools.count(k) if rows.epoch(k) > epoch)
        ks = range(k, end)
        expected = {document: [*range(length - 1)] for document, length in enumerate(lengths) if length > 1}
        assert epoch_pairs(rows, ks) == expected
        sizes = [sum(stop - start for _, start, stop in rows.pieces(k)) for k in ks]
        windows = -(-len(lengths) // window)
        assert max(sizes) <= seq_len
        assert sum(size < seq_len for size in sizes) <= windows
        assert len(ks) == (sum(lengths) - len(lengths) + sum(seq_len - size for size in sizes)) // seq_len
        k = end
    # In any order, from an object that has seen nothing: the same.
    again, ks = CorpusRows(np.array(lengths), seq_len, seed=seed, window=window), [*range(k)]
    random.shuffle(ks)
    assert {k: again.pieces(k) for k in ks} == {k: rows.pieces(k) for k in ks}


def test_seeds_epochs_and_corpora_differ():
    lengths = np.random.default_rng(0).integers(1, 300, 500)

    def first(epoch=0, **key):
        rows = CorpusRows(lengths, 64, **{"seed": 1, "window": 500, **key})
        n = -(-int((lengths - 1).sum()) // 64)
        return tuple(tuple(rows.pieces(k)) for k in range(epoch * n, epoch * n + 20))

    orders = [first(), first(1), first(2), first(seed=2), first(seed=-1), first(corpus=1), first(window=100)]
    assert len(set(orders)) == len(orders)
    assert first() == first()


@pytest.mark.timing
def test_documents_stay_whole(within):
    """Of 65,536 documents like the web's, fewer than 1 in 500 that fit into a row are cut; the plan takes no time."""
    pairs = np.exp(np.random.default_rng(0).normal(6, 1.2, 65_536)).astype(np.int64)
    for seq_len in (256, 2048, 8192):
        with within(1):  # 0.04 s
            packed = pack(np.arange(len(pairs)), pairs, seq_len)
        pieces = np.bincount(packed.index, minlength=len(pairs))
        assert (pieces[pairs < seq_len] > 1).mean() < 0.002


def test_rows_of_the_standard_library_are_full():
    files = [path for path in Path(sysconfig.get_path("stdlib")).rglob("*.py") if "site-packages" not in path.parts]
    lengths = np.array([path.stat().st_size // 3 + 2 for path in files])
    for seq_len in (256, 2048):
        plan = SequentialPlan(FakeCorpus(lengths), seq_len=seq_len)
        assert (lengths - 1).sum() / (len(plan) * seq_len) > 0.999


def test_a_plan_of_15_trillion_tokens_is_small():
    class Lengths:
        asked = 0

        def __len__(self):
            return 15 * 10**9

        def __getitem__(self, documents):
            self.asked += len(documents)
            return 1 + documents * 2654435761 % 2000

    lengths = Lengths()
    tracemalloc.start()
    rows = CorpusRows(lengths, 8192, seed=0)
    k = 10 * 65_536 * 1000 // 8192  # in window 10
    assert sum(stop - start for _, start, stop in rows.pieces(k)) == 8192
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert lengths.asked < 20 * 65_536
    assert rows.epoch(k) == 0


def test_nothing_to_predict():
    for lengths in ([], [1], [1] * 100):
        with pytest.raises(ValueError, match="a/corpus: no document has two tokens"):
            RowPlan([FakeCorpus(lengths)], seq_len=8, seed=0, window=7)
    assert RowPlan([FakeCorpus([1] * 100 + [2])], seq_len=8, seed=0, window=7).row(0).pieces == [(100, 0, 1)]


def test_evaluation_reads_documents_once():
    corpus = FakeCorpus([5, 1, 40, 7, 8, 9, 16, 3])
    plan = SequentialPlan(corpus, seq_len=8, documents=[6, 0, 2, 1], window=2)
    rows = [plan.row(r) for r in range(len(plan) + 3)]
    assert all(not row.pieces for row in rows[len(plan) :])
    assert epoch_pairs(plan, range(len(plan))) == {6: [*range(15)], 0: [*range(4)], 2: [*range(39)]}
    assert [piece.document for piece in rows[0].pieces] == [6]
    assert len(SequentialPlan(corpus, seq_len=8)) == 11


# Several corpora


def test_shares_are_exact():
    mixture = Mixture([*LLAMA1.values()], seed=0)
    shares = np.array([*LLAMA1.values()]) / 100
    corpora, ks = map(np.array, zip(*map(mixture.locate, range(1_000_000)), strict=True))
    counts = np.cumsum([corpora == i for i in range(len(shares))], axis=1)
    np.testing.assert_allclose(counts[:, -1] / 1e6, shares, atol=1e-4)
    # To one row at the end of every block, and the rows of each corpus come in order, none left out.
    ends = np.arange(mixture.block, 1_000_000, mixture.block)
    assert np.abs(counts[:, ends - 1] - shares[:, None] * ends).max() < 1
    for i in range(len(shares)):
        np.testing.assert_array_equal(ks[corpora == i], np.arange(counts[i, -1]))
    # Within a block they are mixed.
    assert np.abs(counts[:, mixture.block // 2] - shares * mixture.block / 2).max() < 150
    other = Mixture([*LLAMA1.values()], seed=1)
    assert [other.locate(r) for r in range(100)] != [mixture.locate(r) for r in range(100)]


def test_a_rare_corpus_appears():
    mixture = Mixture([1, 2e-5, 0], seed=0)
    blocks = [mixture.used(n * mixture.block) for n in range(100)]
    quotas = np.diff(blocks, axis=0)
    assert quotas[:, 1].min() >= 1
    assert not quotas[:, 2].any()
    assert np.abs(np.array(blocks)[:, 1] - np.arange(100) * mixture.block * 2e-5 / 1.00002).max() < 1.0001


def test_one_corpus_is_not_mixed():
    plan = RowPlan([FakeCorpus([], "unused"), FakeCorpus(range(1, 100))], weights=[0, 0.5], seq_len=16, seed=0)
    rows = CorpusRows(np.arange(1, 100), 16, seed=0, corpus=1)
    assert all(plan.row(r) == PackedRow(1, rows.pieces(r)) for r in (0, 3, 5000))
    assert plan.epoch(5000) == rows.epoch(5000) == 5000 // 304


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, -0.5], "mixing weight -0.5 of b: it must be 0"),
        ([float("nan"), 1], "mixing weight nan of a"),
        ([1, float("inf")], "mixing weight inf of b"),
        ([0, 0.0], "all mixing weights are 0"),
        ([1, 1e-9], "mixing weight 1e-09 of b is less than a millionth"),
        ([1], "2 corpora and 1 mixing weights"),
        (None, "2 corpora and 0 mixing weights"),
    ],
)
def test_wrong_weights(weights, words):
    with pytest.raises(ValueError, match=words):
        RowPlan([FakeCorpus([9], "a"), FakeCorpus([9], "b")], weights=weights, seq_len=8, seed=0)


def test_sources_name_documents_and_ranges():
    plan = RowPlan([FakeCorpus([20])], seq_len=8, seed=0)
    names = [name for row in range(3) for name in sources(plan, [row])]
    assert sorted(names) == ["file0.py [tokens 0:9]", "file0.py [tokens 16:20]", "file0.py [tokens 8:17]"]
