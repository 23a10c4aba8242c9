"""Another objective, a column of the corpora and frozen parameters, from outside."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from llama_jax import sharding
from llama_jax.config import ModelConfig
from llama_jax.data.columns import write_column
from llama_jax.data.corpus import open_corpus
from llama_jax.data.rows.loader import BatchSchedule, BatchStage, Loader
from llama_jax.data.rows.plan import RowPlan
from llama_jax.model import Llama, random_keys
from llama_jax.train import objective
from llama_jax.train.loop import train
from llama_jax.train.losses import cross_entropy
from llama_jax.train.optim import adamw, learning_rate
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule
from llama_jax.train.report import read_metrics
from llama_jax.train.state import from_named_arrays, named_arrays, new_state
from llama_jax.train.step import compiled
from tests.builders import tiny_config
from tests.train.corpora import random_documents, write_corpus
from tests.train.test_loop import arrays_of

pytestmark = pytest.mark.unoptimized

DOCUMENTS = random_documents(120, seed=3)
MASKS = [np.random.default_rng(len(ids)).integers(0, 3, len(ids)).astype(np.uint8) for ids in DOCUMENTS]


@dataclasses.dataclass(frozen=True)
class Masked(objective.Pretrain):
    """Tokens count as often as their column says."""

    columns: tuple[str, ...] = ("loss_mask",)

    def count(self, batch):
        return batch["loss_mask"].sum(dtype=np.float32)

    def sums(self, model, batch):
        x_BTD, _ = model.hidden(batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"])
        return cross_entropy(model, x_BTD, batch["targets"], batch["loss_mask"])

    def metrics(self, sums, count):
        return super().metrics(sums, count) | {"masked": count}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = write_corpus(tmp_path_factory.mktemp("corpora") / "masked", DOCUMENTS)
    before = (path / "manifest.json").read_bytes()
    write_column(path, "loss_mask", MASKS)
    assert json.loads(before)["format"] == 1
    assert json.loads((path / "manifest.json").read_bytes())["format"] == 2
    return path


def test_a_column_stays_beside_its_tokens(corpus):
    """Through packing, cutting, shuffling, two sequences a row, eight devices, and from the middle of a run on."""
    opened = open_corpus(corpus)
    assert opened.columns == {"loss_mask": np.dtype("uint8")}
    read = (opened.read(range(120)), opened.read(range(120), "loss_mask"))
    for ids, mask, read_ids, read_mask in zip(DOCUMENTS, MASKS, *read, strict=True):
        np.testing.assert_array_equal(ids, read_ids)
        np.testing.assert_array_equal(mask, read_mask)
    plan = RowPlan([opened], seq_len=64, seed=5)
    schedule = BatchSchedule(64, (BatchStage(0, 8, split=2, microbatches=2),))
    mesh = sharding.make_mesh(tiny_config(), fsdp=4, context=2)
    where = jax.NamedSharding(mesh, jax.P(None, "fsdp", "context"))
    for first in (0, 16):
        with Loader(plan, schedule, first_row=first, sharding=where, columns=("loss_mask",)) as loader:
            for _, step in zip(range(3), loader, strict=False):
                found = np.asarray(step.batch["loss_mask"]).reshape(8, 64)
                targets = np.asarray(step.batch["targets"]).reshape(8, 64)
                assert found.dtype == np.uint8
                for r in range(8):
                    expected, end = np.zeros((2, 64), np.int64), 0
                    for piece in plan.row(step.first_row + r).pieces:
                        part = slice(piece.start + 1, piece.stop + 1)
                        first_slot, end = end, end + piece.stop - piece.start
                        expected[:, first_slot:end] = MASKS[piece.document][part], DOCUMENTS[piece.document][part]
                    np.testing.assert_array_equal([found[r], targets[r]], expected)


def test_a_corpus_without_the_column_is_named(tmp_path, corpus):
    plain = open_corpus(write_corpus(tmp_path / "plain", DOCUMENTS[:5]))
    plan = RowPlan([open_corpus(corpus), plain], seq_len=32, seed=0, weights=[1, 1])
    where = jax.NamedSharding(sharding.make_mesh(tiny_config()), jax.P())
    with pytest.raises(ValueError, match="plain: has no column 'loss_mask'.*it has tokens alone: prepare it again"):
        Loader(plan, BatchSchedule(32, (BatchStage(0, 8),)), sharding=where, columns=("loss_mask",))
    with pytest.raises(ValueError, match="column weight: numbers of shape .* for document 0, which has"):
        write_column(tmp_path / "plain", "weight", MASKS[1:])
    assert open_corpus(tmp_path / "plain").columns == {}


def recipe(corpus, output, **changes) -> Recipe:
    config = ModelConfig(**dataclasses.asdict(tiny_config(num_layers=1)))
    return Recipe(
        config, Data(train=(str(corpus),)), Batch(seq_len=32, sequences=8, microbatches=2),
        Optimizer(Schedule(peak=3e-3, steps=4)), checkpoints=Checkpoints(every=2), mesh="fsdp=4,tensor=2",
        objective="masked", tensorboard=False, output=str(output), **changes,
    )  # fmt: skip


def test_a_run_with_another_objective(corpus, tmp_path, monkeypatch):
    """Its count is that of its rows; resumed from its middle it is the same, to the last bit."""
    monkeypatch.setitem(objective.OBJECTIVES, "masked", lambda recipe: Masked())
    train(recipe(corpus, tmp_path / "whole"))
    train(recipe(corpus, tmp_path / "half", steps=2))
    train(recipe(corpus, tmp_path / "half", resume="auto"))
    rows, again = (read_metrics(tmp_path / name) for name in ("whole", "half"))
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    plan = RowPlan([open_corpus(corpus)], seq_len=32, seed=0)
    for i, row in enumerate(rows):
        pieces = [piece for r in range(8 * i, 8 * i + 8) for piece in plan.row(r).pieces]
        assert row["step_tokens"] == sum(int(MASKS[p.document][p.start + 1 : p.stop + 1].sum()) for p in pieces)
    one, two = (arrays_of(tmp_path / name, 4) for name in ("whole", "half"))
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], err_msg=name)
    with pytest.raises(ValueError, match="objective = pretrain, it was masked"):
        train(dataclasses.replace(recipe(corpus, tmp_path / "half", resume="auto", steps=3), objective="pretrain"))
    with pytest.raises(ValueError, match="objective 'nonsense' is unknown; there are pretrain"):
        train(dataclasses.replace(recipe(corpus, tmp_path / "new"), objective="nonsense"))


@pytest.mark.parametrize(
    ("M", "mesh"),
    [
        (1, "fsdp=4,tensor=2"), (2, "tensor=1"),
        pytest.param(1, "tensor=1", marks=pytest.mark.slow), pytest.param(2, "fsdp=4,tensor=2", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_frozen_parameters(mesh, M):
    """No gradient, no moments, no place in a checkpoint; they stay as they are, and the others train all the same."""
    config, optimizer = tiny_config(), adamw(Optimizer(Schedule(peak=1e-2, steps=10)))
    devices = sharding.make_mesh(config, **sharding.parse_mesh(mesh))
    random = np.random.default_rng(0)
    tokens = random.integers(0, 256, (M, 8 // M, 33)).astype(np.int32)
    arrays = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "segment_ids": np.ones((M, 8 // M, 32), np.int32)}
    arrays["positions"] = np.broadcast_to(np.arange(32, dtype=np.int32), (M, 8 // M, 32))
    program = compiled(optimizer, learning_rate(Schedule(peak=1e-2, steps=10)), objective.Pretrain())
    stop = np.zeros(devices.size, bool)
    with jax.set_mesh(devices):

        def norms(name):
            return "norm" in name

        @functools.partial(jax.jit, static_argnums=0)
        def new(trains=None):
            options = {"dtype": "bfloat16", "param_dtype": "float32", "stacked": True, "remat": "full"}
            return new_state(Llama(config, rngs=random_keys(0), **options), optimizer, trains)

        spec = new().model.rules.spec(("batch", "seq"), (8 // M, 32))
        batch = {name: jax.device_put(x, jax.NamedSharding(devices, jax.P(None, *spec))) for name, x in arrays.items()}
        state, whole = new(norms), new()
        frozen = [np.array(x) for x in jax.tree.leaves(state.frozen)]  # copies: the state is donated
        saved = named_arrays(state)
        assert set(saved["params"]) == {"blocks.attn_norm", "blocks.mlp_norm", "final_norm"}
        assert sum(x.size for x in saved["optimizer"].values() if x.ndim) == 2 * 5 * 64
        products = [program.lower(s, batch, stop).as_text().count("stablehlo.dot_general") for s in (state, whole)]
        assert products[0] < products[1] - 7  # no weight's own gradient
        losses = []
        for i in range(4):
            if i == 2:  # a checkpoint, and a new process that has read the frozen ones again
                kept, like = jax.tree.map(np.array, named_arrays(state)), new(norms)
                items = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding) + 0, kept, named_arrays(like))
                state = from_named_arrays(like, items)
            state, results = program(state, batch, stop)
            losses.append(float(results["loss"]))
        for x, expected in zip(jax.tree.leaves(state.frozen), frozen, strict=True):
            np.testing.assert_array_equal(x, expected)
        straight, at = new(norms), []
        for _ in range(4):
            straight, results = program(straight, batch, stop)
            at.append(float(results["loss"]))
    assert losses == at
    assert losses[-1] < losses[0]
