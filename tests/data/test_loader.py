"""The loader's batches: right, the same on any mesh and after any interruption, and no thread outlives them."""

from __future__ import annotations

import gc
import itertools
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config.presets import PRESETS
from llama_jax.data.corpus import INDEX_DTYPE, Manifest, Shard, open_corpus
from llama_jax.data.rows.loader import BatchSchedule, BatchStage, Loader, RowReader, _Layout
from llama_jax.data.rows.plan import RowPlan, SequentialPlan
from llama_jax.sharding import make_mesh

SEQ_LEN = 24


class FakeCorpus:
    """Documents whose tokens tell where they are from: 1000 * document + position."""

    path = "fake"

    def __init__(self, lengths):
        self.lengths, self.reads = np.asarray(lengths), []

    def read(self, documents):
        self.reads += documents
        return [1000 * d + np.arange(self.lengths[d], dtype=np.int32) for d in documents]

    def source(self, document):
        return f"document {document}"


def fake_plan(seed=0):
    rng = np.random.default_rng(0)
    corpora = [FakeCorpus(rng.integers(1, 60, 150)), FakeCorpus([500, *rng.integers(1, 60, 30)])]
    return RowPlan(corpora, weights=[2, 1], seq_len=SEQ_LEN, seed=seed, window=40)


def sharding(**axes):
    return NamedSharding(make_mesh(next(iter(PRESETS.values())), **axes), P(None, ("data", "fsdp"), "context"))


def expected(plan, rows):
    """Token by token, as the note on the loader says."""
    batch = {name: [] for name in ("tokens", "targets", "positions", "segment_ids")}
    for row in map(plan.row, rows):
        slots = []
        for segment, (document, start, stop) in enumerate(row.pieces):
            for i in range(start, stop):
                slots.append((1000 * document + i, 1000 * document + i + 1, i - start, segment + 1))
        slots += [(0, 0, 0, 0)] * (plan.seq_len - len(slots))
        for values, column in zip(batch.values(), zip(*slots, strict=True), strict=True):
            values.append(column)
    return {name: np.array(values) for name, values in batch.items()}


def take(loader, steps):
    with loader:
        return [
            (step.first_row, step.rows, {name: np.asarray(x) for name, x in step.batch.items()})
            for step in itertools.islice(loader, steps)
        ]


SCHEDULE = BatchSchedule(
    SEQ_LEN,
    (
        BatchStage(0, rows=4, split=2),
        BatchStage(30 * SEQ_LEN - 5, rows=8, microbatches=1),
        BatchStage(70 * SEQ_LEN, rows=16, split=3, microbatches=3),
        BatchStage(71 * SEQ_LEN, rows=32, microbatches=2),  # the step before it ends far behind its beginning
        BatchStage(300 * SEQ_LEN, rows=64, microbatches=8),
    ),
)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}])
def test_batches(axes):
    plan, at = fake_plan(), sharding(**axes)
    for first_row, rows, batch in take(Loader(plan, SCHEDULE, sharding=at), 24):
        stage = SCHEDULE.stage_at(first_row)
        assert rows == stage.rows
        for name, values in expected(plan, range(first_row, first_row + rows)).items():
            shape = (stage.microbatches, rows * stage.split // stage.microbatches, SEQ_LEN // stage.split)
            assert batch[name].dtype == np.int32
            np.testing.assert_array_equal(batch[name], values.reshape(shape))


def test_a_process_reads_the_rows_of_its_devices():
    """Two processes of four devices; a row that is cut in two may lie on both."""
    at, schedule = sharding(fsdp=8), BatchSchedule(SEQ_LEN, (BatchStage(0, rows=24, split=2, microbatches=2),))

    def rows_of(devices):
        class Process:
            shard_shape = at.shard_shape

            def addressable_devices_indices_map(self, shape):
                return {device: index for device, index in at.devices_indices_map(shape).items() if device in devices}

        return _Layout(schedule, schedule.stages[0], Process()).rows.tolist()

    devices = [*at.mesh.devices.flat]
    assert rows_of(devices[:4]) == [*range(6), *range(12, 18)]
    assert rows_of(devices[4:]) == [*range(6, 12), *range(18, 24)]
    assert rows_of(devices[1:2]) == [1, 2, 13, 14]


def test_an_interrupted_run_loses_nothing():
    """From any step on, on another mesh, the same steps follow, each where the one before ended."""
    whole = take(Loader(fake_plan(), SCHEDULE, sharding=sharding()), 24)
    assert [first for first, _, _ in whole[1:]] == [first + rows for first, rows, _ in whole[:-1]]
    assert [rows for _, rows, _ in whole] == [4] * 8 + [8] * 5 + [32] * 8 + [64] * 3
    for n in (1, 7, 8, 12, 13, 20, 23):
        loader = Loader(fake_plan(), SCHEDULE, first_row=whole[n][0], sharding=sharding(fsdp=8))
        for (row, rows, batch), (row_2, rows_2, batch_2) in zip(whole[n:], take(loader, 24 - n), strict=True):
            assert (row, rows) == (row_2, rows_2)
            jax.tree.map(np.testing.assert_array_equal, batch, batch_2)


def test_schedule_of_llama3():
    """4M tokens at 4096, 8M at 8192 after 252M tokens, 16M after 2.87T."""
    stages = (
        BatchStage(0, 512, split=2),
        BatchStage(252_000_000, 1024, microbatches=4),
        BatchStage(2_870_000_000_000, 2048),
    )
    schedule = BatchSchedule(8192, stages)
    assert [schedule.shape(stage) for stage in stages] == [(1, 1024, 4096), (4, 256, 8192), (1, 2048, 8192)]
    for first_row in (0, 77, 512 * 60, 512 * 61, 350_340_000):
        # The closed form against a walk.
        runs = schedule.runs(first_row)
        row = first_row
        for step in range(200):
            first_step, run_row, stage = next(run for run in reversed(runs) if run[0] <= step)
            assert (run_row + (step - first_step) * stage.rows, stage) == (row, schedule.stage_at(row))
            row += stage.rows
    _, last, _ = schedule.runs(0)[-1]
    assert 2_870_000_000_000 <= last * 8192 < 2_870_000_000_000 + 1024 * 8192


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "must begin at 0 tokens"),
        ([BatchStage(5, 4)], "must begin at 0 tokens"),
        ([BatchStage(0, 4), BatchStage(9, 4), BatchStage(9, 8)], r"ascend, they begin at \[0, 9, 9\]"),
        ([BatchStage(0, 4), BatchStage(9, 0)], "stage from 9 tokens: rows, split and microbatches must be 1 or more"),
        ([BatchStage(0, 4, split=5)], "rows of 24 tokens do not divide into 5 sequences"),
        ([BatchStage(0, 3, split=2, microbatches=4)], "6 sequences do not divide into 4 microbatches"),
        ([BatchStage(0, 8), BatchStage(9, 6)], r"stage from 9 tokens: microbatches of 6 sequences .* 'fsdp': 4"),
    ],
)
def test_wrong_schedules(stages, words):
    with pytest.raises(ValueError, match=words):
        Loader(fake_plan(), BatchSchedule(SEQ_LEN, tuple(stages)), sharding=sharding(fsdp=4))


def test_another_row_length():
    with pytest.raises(ValueError, match="rows of 24 tokens, but the batch schedule is for 48"):
        Loader(fake_plan(), BatchSchedule(48, (BatchStage(0, 4),)), sharding=sharding())


def test_evaluation_ends():
    plan = SequentialPlan(FakeCorpus([30, 40, 1, 9]), seq_len=SEQ_LEN)
    loader = Loader(plan, BatchSchedule(SEQ_LEN, (BatchStage(0, 2),)), stop_row=len(plan), sharding=sharding(fsdp=2))
    steps = take(loader, 100)
    assert len(plan) == 4
    assert len(steps) == 2
    assert sum((batch["segment_ids"] > 0).sum() for _, _, batch in steps) == 29 + 39 + 8
    for first_row, rows, batch in steps:
        for name, values in expected(plan, range(first_row, first_row + rows)).items():
            np.testing.assert_array_equal(batch[name][0], values)


def test_long_documents_are_read_once():
    corpus = FakeCorpus([900, 800, 10, 10])
    plan = RowPlan([corpus], seq_len=SEQ_LEN, seed=0)
    read = RowReader(plan)
    for row in range(60):
        read([row])
    assert corpus.reads.count(0) == corpus.reads.count(1) == 1
    # Where there is no room, the last one stays.
    read = RowReader(plan, cached_tokens=100)
    corpus.reads.clear()
    for row in range(60):
        read([row])
    assert 10 < corpus.reads.count(0) + corpus.reads.count(1) < 60


# On disk


def write_corpus(path, documents, shards=2):
    """A prepared corpus of given token ids, without a tokenizer."""
    from array_record.python.array_record_module import ArrayRecordWriter

    parts = []
    for n, part in enumerate(np.array_split(np.arange(len(documents)), shards)):
        name = f"{n:05}-of-{shards:05}"
        record_file = path / f"{name}.array_record"
        writer = ArrayRecordWriter(str(record_file), "group_size:1")
        for i in part:
            writer.write(documents[i].astype("<u2").tobytes())
        writer.close()
        index = np.array([[len(documents[i])] * 2 for i in part], INDEX_DTYPE)
        index.tofile(path / f"{name}.index")
        (path / f"{name}.sources").write_text("".join(f"file{i}\n" for i in part))
        total = int(index[:, 0].sum())
        parts.append(Shard(name, len(part), total, total, record_file.stat().st_size))
    total = sum(shard.tokens for shard in parts)
    manifest = Manifest(
        1000, True, 2, "tokenizer.model", "0" * 64, "uint16", len(documents), total, total, tuple(parts)
    )
    (path / "manifest.json").write_text(manifest.to_json())
    return open_corpus(path)


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 1000, n) for n in np.exp(rng.normal(6, 1, 1000)).astype(int) + 2]


def wait_for_no_threads():
    deadline = time.monotonic() + 10
    while reading := [thread for thread in threading.enumerate() if "grain" in thread.name]:
        assert time.monotonic() < deadline, reading
        time.sleep(0.01)


@pytest.mark.timing
def test_speed(tmp_path, documents, within):
    """Alone, with batches of 16 x 256 from disk: 2 million tokens a second on one core."""
    plan = RowPlan([write_corpus(tmp_path, documents)], seq_len=256, seed=0)
    with Loader(plan, BatchSchedule(256, (BatchStage(0, 16),)), sharding=sharding()) as loader:
        first = next(loader)
        (piece, *_) = plan.row(0).pieces
        ids = documents[piece.document][piece.start : piece.stop]
        np.testing.assert_array_equal(first.batch["tokens"][0, 0, : len(ids)], ids)
        with within(100 * 16 * 256 / 100_000):
            for _ in itertools.islice(loader, 100):
                pass
        assert loader is iter(loader)


def test_a_damaged_shard_is_an_error_that_names_it(tmp_path, documents):
    corpus = write_corpus(tmp_path, documents)
    with (tmp_path / "00001-of-00002.array_record").open("r+b") as file:
        file.seek(200_000)
        file.write(b"\x55" * 100_000)
    loader = Loader(
        RowPlan([corpus], seq_len=256, seed=0), BatchSchedule(256, (BatchStage(0, 16),)), sharding=sharding()
    )
    with pytest.raises(ValueError, match="00001-of-00002.array_record"):
        for _ in itertools.islice(loader, 1000):
            pass
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)
    wait_for_no_threads()


def test_threads_end():
    wait_for_no_threads()
    loaders = [Loader(fake_plan(), SCHEDULE, sharding=sharding()) for _ in range(3)]
    for loader in loaders:
        next(loader)
    assert any("grain" in thread.name for thread in threading.enumerate())
    loaders.pop().close()
    with loaders.pop():
        pass
    del loaders, loader
    gc.collect()
    wait_for_no_threads()


@pytest.mark.timing
def test_ctrl_c(tmp_path, within):
    """While a thread reads from a slow disk: the program ends soon, and nothing else is written."""
    program = textwrap.dedent("""
        import sys, time
        import jax, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from llama_jax.data.rows.loader import BatchSchedule, BatchStage, Loader
        from llama_jax.data.rows.plan import RowPlan

        class Slow:
            path, lengths, reads = "slow", np.full(1000, 50), 0
            def read(self, documents):
                Slow.reads += 1
                if Slow.reads > 4:
                    time.sleep(0.5)
                return [np.zeros(50, np.int32) for _ in documents]

        sharding = NamedSharding(Mesh(jax.devices()[:1], ("fsdp",)), PartitionSpec())
        plan = RowPlan([Slow()], seq_len=49, seed=0)
        loader = Loader(plan, BatchSchedule(49, (BatchStage(0, 2),)), sharding=sharding)
        for step in loader:
            if step.first_row == 4:
                print("reading", flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.3)
    with within(5):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert errors.startswith("Traceback")
    assert errors.endswith("KeyboardInterrupt\n")
