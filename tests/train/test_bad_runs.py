"""What a run refuses, and in which words; the last good checkpoint stays."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest

from llama_jax.checkpoint.run import RunCheckpoints, run_steps
from llama_jax.train import samples
from llama_jax.train.loop import train
from llama_jax.train.optim import adamw, learning_rate
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Samples, Schedule, Stage
from llama_jax.train.report import finite_or_none
from tests.builders import tiny_config
from tests.train.corpora import random_documents, write_corpus
from tests.train.test_loop import arrays_of


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    write_corpus(root / "train", random_documents(60))
    write_corpus(root / "other", random_documents(20, seed=1))
    return root


@pytest.fixture
def recipe(corpora, tmp_path) -> Recipe:
    """Three steps on two of eight devices' rows."""
    return Recipe(
        model=tiny_config(num_layers=1),
        data=Data(train=(str(corpora / "train"),)),
        batch=Batch(seq_len=32, sequences=4),
        optimizer=Optimizer(Schedule(peak=1e-3, steps=3)),
        checkpoints=Checkpoints(every=2),
        mesh="fsdp=2,tensor=4", tensorboard=False, output=str(tmp_path / "run"),
    )  # fmt: skip


def changed(recipe: Recipe, **changes) -> Recipe:
    """`data__train=...` changes a part's field."""
    for name, value in changes.items():
        part, _, field = name.partition("__")
        value = dataclasses.replace(getattr(recipe, part), **{field: value}) if field else value
        recipe = dataclasses.replace(recipe, **{part: value})
    return recipe


def test_what_a_run_is_refused_for(recipe, corpora, tmp_path):
    other = write_corpus(tmp_path / "another_tokenizer", random_documents(5))
    path = other / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64}))
    two = (str(corpora / "train"), str(corpora / "other"))
    cases = {
        "data.train is empty": {"data__train": ()},
        "nowhere: no such corpus; make it with scripts/prepare_data.py": {"data__train": (str(tmp_path / "nowhere"),)},
        "mixing weight -1.0 of .*other: it must be 0": {"data__train": two, "data__weights": (1.0, -1.0)},
        "data.weights has 1 numbers for 2 corpora": {"data__train": two, "data__weights": (1.0,)},
        "another_tokenizer: was prepared with another tokenizer": {"data__validation": (str(other),)},
        "its tokenizer has 256 ids, the model has room for 128": {"model": tiny_config(vocab_size=128)},
        "microbatch of 4 sequences does not divide among 8 devices": {"mesh": "auto"},
        "batch schedule.*4 sequences do not divide into 3 microbatches": {"batch__microbatches": 3},
        "batch schedule.*stages must begin at 0 tokens and ascend": {"batch__stages": (Stage(0, 2),)},
        r"warmup_steps \(3\) must be from 0 to less than steps \(3\)": {
            "optimizer": Optimizer(Schedule(1e-3, 3, warmup_steps=3))
        },
        "peak must be a number above 0": {"optimizer": Optimizer(Schedule(-1e-3, 3))},
        "optimizer.b2 must be from 0 to less than 1": {"optimizer__b2": 1.0},
        "optimizer.weight_decay must be a number that is not negative": {"optimizer__weight_decay": -0.1},
        "profile must be FIRST:LAST": {"profile": "7"},
        "batch.seq_len must be at least 1, got -4": {"batch__seq_len": -4},
        "steps must be at least 0, got -5": {"steps": -5},
        r"seq_len \(1024\) is more than the model's max_seq_len \(512\)": {"batch__seq_len": 1024},
        "temperature": {"samples": Samples(prompts=("a",), temperature=-1.0)},
        "samples.prompts '' is empty": {"samples": Samples(prompts=("",))},
        "are 601, more than the model's max_seq_len": {"samples": Samples(prompts=("a",), new_tokens=600)},
        "nothing: no such file": {"init_from": str(tmp_path / "nothing")},
        "is a file, not a folder: give another --output": {"output": __file__},
        "stdlib: and the size of its vocabulary": {"data__train": ("stdlib:many",)},
    }  # fmt: skip
    for message, changes in cases.items():
        with pytest.raises((ValueError, OSError), match=message):
            train(changed(recipe, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_is_not_continued_as_another(recipe, corpora, tmp_path):
    train(recipe)
    before = arrays_of(tmp_path / "run", 3)
    more = {"resume": "auto", "steps": 5}
    cases = {
        "another shape: 'blocks.mlp.w_down' is": {"model": tiny_config(num_layers=1, mlp_dim=96)},
        "another model or optimizer: 'lm_head' is only in the checkpoint": {
            "model": tiny_config(num_layers=1, tie_embeddings=True)
        },
        "rows were counted with seed = 0, and now it is 1": {"seed": 1},
        "rows were counted with seq_len = 32, and now it is 16": {"batch__seq_len": 16},
        "rows were counted with corpora": {"data__train": (str(corpora / "other"),)},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            train(changed(recipe, **changes, **more))
    for name, array in arrays_of(tmp_path / "run", 3).items():
        np.testing.assert_array_equal(array, before[name])
    outcome = train(changed(recipe, **more))
    assert outcome.step == 5
    # From its weights, a new run may be of anything.
    fresh = {"init_from": str(tmp_path / "run"), "output": str(tmp_path / "new"), "seed": 1, "steps": 1}
    assert train(changed(recipe, **fresh)).step == 1


def test_losses_that_are_not_finite_end_the_run(recipe, tmp_path):
    """With the batch's source; what was saved before is as it was."""
    with pytest.raises(
        ValueError, match=r"step \d+: loss or gradient was not finite 5 times in a row.*text:\d+ \[tokens"
    ):
        train(changed(recipe, optimizer=Optimizer(Schedule(1e30, 50), clip_norm=0.0)))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows[-5:]] == [1, 2, 3, 4, 5]
    assert [row["finite"] for row in rows[-5:]] == [False] * 5
    assert not [*(tmp_path / "run" / "checkpoints").glob("[0-9]*")]  # its parameters were infinite after one step
    assert [finite_or_none(x) for x in (float("nan"), float("inf"), 1.5, 3)] == [None, None, 1.5, 3]  # JSON has no NaN


def test_a_disk_too_full_for_a_checkpoint(recipe, tmp_path, monkeypatch):
    train(changed(recipe, steps=2))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(
            OSError, match=r"checkpoints/3: .*not be saved \(the disk is full: it needs .* of step 2, and"
        ):
            train(changed(recipe, resume="auto"))
    assert run_steps(tmp_path / "run" / "checkpoints") == [2]
    assert train(changed(recipe, resume="auto")).step == 3


def test_a_damaged_checkpoint(recipe, tmp_path):
    train(recipe)
    for file in (tmp_path / "run" / "checkpoints" / "3" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match="checkpoints/3/params: .*cannot be read|not a checkpoint that Orbax can read"):
        train(changed(recipe, resume="auto", steps=5))
    assert run_steps(tmp_path / "run" / "checkpoints") == [2, 3]


def test_which_checkpoints_are_kept(tmp_path):
    """The newest, those of every so many steps, and the best."""
    kept = RunCheckpoints(tmp_path / "c", keep_last=2, keep_every=4, keep_best=1, stacked=lambda name: False)
    mesh = jax.make_mesh((8,), ("x",))
    array = jax.device_put(np.arange(16.0), jax.NamedSharding(mesh, jax.P("x")))
    for step, loss in enumerate([3.0, None, 1.0, None, 2.0, None, None, None, 2.5, None], start=1):
        kept.save(step, {"params": {"a": array + step}}, {"step": step}, {"config.json": b"{}"}, loss=loss)
    kept.wait()
    assert kept.steps() == [3, 4, 8, 9, 10]
    like = {"params": {"a": jax.ShapeDtypeStruct((16,), array.dtype, sharding=jax.NamedSharding(mesh, jax.P()))}}
    np.testing.assert_array_equal(kept.restore(3, like)["params"]["a"], np.arange(16.0) + 3)
    assert kept.progress(3) == {"step": 3}
    kept.close()


def test_schedules():
    """Worked out by hand: update 0 has the first rate above 0, the last one the lowest."""

    def rates(**options) -> list[float]:
        rate = learning_rate(Schedule(peak=1.0, **options))
        return [round(float(rate(i)), 4) for i in range(options["steps"] + 1)]

    assert rates(steps=4, kind="linear", final=0.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates(steps=6, kind="linear", final=0.5, warmup_steps=2) == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5]
    assert rates(steps=4, kind="cosine", final=0.1) == [1.0, 0.8682, 0.55, 0.2318, 0.1]
    assert rates(steps=6, kind="wsd", final=0.0, warmup_steps=1, decay_steps=2) == [1.0] * 5 + [0.5, 0.0]
    assert rates(steps=3, kind="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]
    assert adamw(Optimizer(Schedule(1.0, 3)))


def test_two_runs_in_one_folder(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    words = "another run writes there; wait for it, or give another --output"
    with filelock.FileLock(tmp_path / "run" / "lock"), pytest.raises(ValueError, match=words):
        train(recipe)
    assert train(recipe).step == 3


def test_a_checkpoint_that_is_no_more_whole_is_passed_over(recipe, tmp_path):
    train(recipe)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3" / "run")
    assert train(changed(recipe, resume="auto")).step == 3
    assert run_steps(tmp_path / "run" / "checkpoints") == [2, 3]


def test_what_only_looks_on_loses_nothing(recipe, tmp_path, monkeypatch):
    """An error while samples are written comes after the state is saved."""

    def fail(*args, **options):
        raise ValueError("no paper")

    monkeypatch.setattr(samples, "generate", fail)
    with pytest.raises(ValueError, match="no paper"):
        train(changed(recipe, samples=Samples(prompts=("a",), every=1)))
    assert run_steps(tmp_path / "run" / "checkpoints") == [1]
