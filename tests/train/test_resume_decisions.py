"""A run that was interrupted decides as one that was not: which checkpoints stay, and what it may not become."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from llama_jax import sharding
from llama_jax.checkpoint.keep import KeepRules, Validated
from llama_jax.checkpoint.run import run_steps
from llama_jax.config import RopeScaling
from llama_jax.train import loop, resume
from llama_jax.train import measure as measurements
from llama_jax.train.loop import train
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule, Stage, Validation
from llama_jax.train.report import METRICS, read_metrics
from tests.builders import tiny_config
from tests.train.corpora import random_documents, write_corpus
from tests.train.test_bad_runs import changed

# By step. Step 3 is the best, 7 and 8 are the newest.
LOSSES = [5.7, 4.8, 4.5, 4.7, 4.8, 4.7, 4.8, 4.7]
KEPT = [3, 7, 8]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    write_corpus(root / "train", random_documents(60))
    write_corpus(root / "validation", random_documents(4, seed=1))
    return root


@pytest.fixture
def recipe(corpora, tmp_path) -> Recipe:
    """Eight steps, validated and saved at each."""
    return Recipe(
        model=tiny_config(num_layers=1),
        data=Data(train=(str(corpora / "train"),), validation=(str(corpora / "validation"),)),
        batch=Batch(seq_len=32, sequences=4),
        optimizer=Optimizer(Schedule(peak=1e-3, steps=8)),
        checkpoints=Checkpoints(every=1, keep_last=2, keep_best=1),
        validation=Validation(every=1),
        tensorboard=False, output=str(tmp_path / "run"),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One device and no picture: a start takes a quarter of the time."""
    monkeypatch.setattr(loop, "draw_curves", lambda output: None)
    monkeypatch.setattr(loop.build, "mesh_of_recipe", lambda recipe, config: sharding.make_mesh(config))


@pytest.fixture
def losses(monkeypatch, tmp_path):
    """Validation measures `LOSSES`: what is tested is what follows from them."""

    def measure(model: Any) -> dict[str, float]:
        step = len(read_metrics(tmp_path / "run")) + 1
        return {"validation_loss": LOSSES[step - 1], "validation_bits_per_byte": LOSSES[step - 1]}

    monkeypatch.setattr(measurements, "Validator", lambda *args, **options: measure)


def kept(recipe: Recipe) -> list[int]:
    return run_steps(Path(recipe.output) / "checkpoints")


def again(recipe: Recipe, **changes: Any) -> Recipe:
    return changed(recipe, resume="auto", **changes)


class Killed(BaseException):
    """Nothing that is written for errors takes this."""


def test_rules_for_keeping():
    """Worked out by hand."""
    losses = {
        step: Validated(loss) for step, loss in enumerate([3.0, None, 1.0, None, 2.0, float("nan"), 1.0], start=1)
    }
    assert KeepRules(2, 0, 0).kept(losses, losses) == {6, 7}
    assert KeepRules(1, 3, 0).kept(losses, losses) == {3, 6, 7}
    assert KeepRules(1, 0, 1).kept(losses, losses) == {7}  # 3 has the same loss, and is older
    assert KeepRules(1, 0, 3).kept(losses, losses) == {3, 5, 7}
    assert KeepRules(1, 0, 9).kept(losses, losses) == {1, 3, 5, 7}
    assert KeepRules(1, 0, 1).kept([*losses, 8], losses) == {7, 8}
    assert KeepRules(1, 0, 1).kept([*losses, 0, 8], {**losses, 8: Validated()}) == {0, 7, 8}  # of 0 nothing is known
    other = {3: Validated(1.0, "a"), 4: Validated(0.1, "b"), 5: Validated(2.0, "b"), 6: Validated(1.5, "a")}
    assert KeepRules(1, 0, 1).kept(other, other) == {3, 4, 6}  # losses of two corpora are not compared
    assert KeepRules(1, 0, 1).kept([*other, 2], other | {2: Validated(0.5)}) == {2, 4, 6}  # of "a", as the newest


@pytest.mark.slow
def test_the_best_checkpoint_stays_over_restarts(recipe, losses):
    """Whole == stopped after 4 and after 6: the same checkpoints."""
    train(recipe)
    assert kept(recipe) == KEPT
    shutil.rmtree(recipe.output)
    for step in (4, 6):
        train(again(recipe, steps=step))
    assert kept(recipe) == [3, 5, 6]
    outcome = train(again(recipe))
    assert kept(recipe) == KEPT
    # All is done: what it says is what it said.
    same = train(again(recipe))
    assert (same.validation, same.loss, same.step) == (outcome.validation, outcome.loss, 8)
    assert same.validation["validation_loss"] == 4.7


@pytest.mark.slow
def test_killed_between_validation_and_save(recipe, losses, monkeypatch):
    """At the best of all steps; the save of the step before may not have come to its end."""
    save = loop.TrainingRun._save

    def die(run: Any) -> None:
        if run.step == 3:
            raise Killed
        save(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingRun, "_save", die)
        with pytest.raises(Killed):
            train(recipe)
    assert 3 not in kept(recipe)
    train(again(recipe))
    assert kept(recipe) == KEPT


@pytest.mark.slow
def test_killed_before_the_older_ones_were_deleted(recipe, losses, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.RunCheckpoints, "tidy", lambda self: None)
        train(recipe)
    assert kept(recipe) == [*range(1, 9)]
    train(again(recipe))
    assert kept(recipe) == KEPT


@pytest.mark.slow
def test_a_run_of_an_older_version(recipe, losses, caplog, monkeypatch):
    """It recorded no losses: they are read from its metrics; without these, what may be the best is kept."""
    train(changed(recipe, steps=6))
    output = Path(recipe.output)
    for file in output.rglob("run/validated.json"):
        file.unlink()
    train(again(recipe, steps=7))
    assert kept(recipe) == [3, 6, 7]
    assert not caplog.records
    for file in output.rglob("run/validated.json"):
        file.unlink()
    rows = read_metrics(output)
    (output / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] == 7))
    monkeypatch.setattr(sys.modules[__name__], "LOSSES", [0, 4.7])  # where `losses` looks for step 8
    train(again(recipe))
    assert kept(recipe) == [3, 6, 7, 8]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "of the checkpoints of steps 3, 6 it is not known how well they did on what is held out, so that they are kept:"
        " delete those that you do not need"
    ]


@pytest.mark.slow
def test_a_save_that_was_owed_is_owed_after_a_restart(recipe, monkeypatch):
    """Due at step 3, where the latest step was not finite, as after step 4: it comes at 5, with the next good one."""
    plain = changed(recipe, checkpoints=Checkpoints(every=3, keep_last=9), data__validation=(), steps=7)
    report = loop.TrainingRun._report

    def bad_at_3_and_4(run: Any, pending: Any) -> None:
        report(run, pending)
        run.last["skipped_in_a_row"] = {3: 1, 4: 2}.get(pending.step, 0)

    monkeypatch.setattr(loop.TrainingRun, "_report", bad_at_3_and_4)
    train(plain)
    assert kept(plain) == [5, 6, 7]
    stopped = changed(plain, output=plain.output + "2")
    train(changed(stopped, steps=4))  # the last step is saved all the same
    train(again(stopped))
    assert kept(stopped) == [4, 5, 6, 7]


def test_a_run_of_weights_and_biases_is_continued(recipe, monkeypatch):
    """The same id, as the package's `init` documents it."""
    asked = []

    def init(**options: Any) -> types.SimpleNamespace:
        asked.append(options["id"])
        nothing = lambda *args, **options: None  # noqa: E731
        return types.SimpleNamespace(id="abc123", log=nothing, finish=nothing)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        train(again(recipe, steps=step, wandb="project", data__validation=()))
    assert asked == [None, "abc123"]


# --- What may change ---


def test_what_changed_is_refused_with_both_values(recipe, losses):
    train(changed(recipe, steps=2))
    output = Path(recipe.output)
    more = {"steps": 3}
    refused = {
        r"model.rope_theta = 500000.0, it was 10000.0.*--allow-changes model.rope_theta": {
            "model": tiny_config(num_layers=1, rope_theta=5e5)
        },
        r"model.norm_eps = 0.01, it was 1e-05; model.rope_theta = 500000.0, it was": {
            "model": tiny_config(num_layers=1, rope_theta=5e5, norm_eps=1e-2)
        },
        r"model.rope_scaling = .*8.0.*, it was nothing": {
            "model": tiny_config(num_layers=1, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 256))
        },
        r"optimizer.b2 = 0.99, it was 0.95": {"optimizer__b2": 0.99},
        r"optimizer.weight_decay = 0.0, it was 0.1": {"optimizer__weight_decay": 0.0},
        r"dtype = bfloat16, it was auto": {"dtype": "bfloat16"},
        r"init_from = elsewhere, it was": {"init_from": "elsewhere"},
        r"allow_changes: there is no field 'model.rope_thetas'": {"allow_changes": ("model.rope_thetas",)},
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=message):
            train(again(recipe, **more, **changes))
    assert kept(recipe) == [1, 2]

    # Another spelling of the same is no change: on a CPU `auto` is float32.
    same = again(recipe, dtype="float32")
    assert (
        resume.changes({"dtype": "auto", "init_from": "runs/a"}, changed(same, init_from="./runs/b/../a"), same.model)
        == []
    )
    # The folder that a run began with may have another name by now; a second one is another.
    began = {"init_from": str(output.parent / "old name")}
    moved = changed(same, init_from=str(output))
    assert resume.changes(began, moved, same.model) == []
    (output.parent / "old name").mkdir()
    assert [change.field for change in resume.changes(began, moved, same.model)] == ["init_from"]

    # What the recipe was recorded without, an older version's, is not compared: but its configuration is.
    file = output / "checkpoints" / "2" / "recipe.json"
    whole = json.loads(file.read_text())
    del whole["optimizer"]["b2"]
    file.write_text(json.dumps(whole | {"a field of the future": 1}))
    train(again(recipe, steps=3, optimizer__b2=0.99))
    (output / "checkpoints" / "3" / "recipe.json").unlink()
    with pytest.raises(ValueError, match="model.rope_theta = 500000.0, it was 10000.0"):
        train(again(recipe, steps=4, model=tiny_config(num_layers=1, rope_theta=5e5)))
    train(again(recipe, steps=4))


def test_what_may_change_is_recorded(recipe, losses, capsys):
    train(changed(recipe, steps=1))
    train(again(recipe, steps=2, optimizer__schedule=Schedule(peak=2e-3, steps=8), batch__sequences=8))
    theta = {"model": tiny_config(num_layers=1, rope_theta=5e5), "allow_changes": ("model.rope_theta",)}
    train(again(recipe, steps=3, optimizer__schedule=Schedule(peak=2e-3, steps=8), batch__sequences=8, **theta))
    progress = json.loads((Path(recipe.output) / "checkpoints" / "3" / "run" / "progress.json").read_text())
    assert progress["rows"] == 4 + 8 + 8
    assert progress["changes"] == [
        {"step": 1, "field": "batch.sequences", "before": 4, "now": 8},
        {"step": 1, "field": "optimizer.schedule.peak", "before": 1e-3, "now": 2e-3},
        {"step": 2, "field": "model.rope_theta", "before": 1e4, "now": 5e5},
    ]
    assert "resumed with model.rope_theta = 500000.0, it was 10000.0" in capsys.readouterr().err
    config = json.loads((Path(recipe.output) / "checkpoints" / "3" / "config.json").read_text())
    assert config["rope_theta"] == 5e5


def test_every_field_has_its_verdict(recipe):
    """Each leaf of a recipe is changed alone: what is not in the list that is written down here is refused."""
    may = {
        "steps", "mesh", "remat", "attention", "compiler_options", "non_finite_limit", "tensorboard", "wandb", "output",
        "resume", "profile", "allow_changes", "batch.sequences", "batch.microbatches", "batch.stages",
        "data.threads", "data.prefetch", "data.validation",
        # What these mean for the rows is compared with the rows' own record.
        "seed", "batch.seq_len", "data.train", "data.weights",
    }  # fmt: skip
    prefixes = ("checkpoints.", "validation.", "samples.", "optimizer.schedule.")
    before = json.loads(json.dumps(dataclasses.asdict(recipe)))
    verdicts = {}

    def walk(part: Any, path: tuple[str, ...]) -> None:
        for field in dataclasses.fields(part):
            value, name = getattr(part, field.name), (*path, field.name)
            if dataclasses.is_dataclass(value):
                walk(value, name)
                continue
            other: Any = "another"
            if isinstance(value, bool):
                other = not value
            elif isinstance(value, (int, float)):
                other = value + 1
            elif isinstance(value, tuple):
                other = (*value, "more")
            words = refusal(resume.changes(replaced(before, name, other), recipe, recipe.model), recipe)
            assert not words or f"{'.'.join(name)} = " in words
            verdicts[".".join(name)] = not words

    walk(recipe, ())
    assert len(verdicts) > 50
    assert {name for name, may_change in verdicts.items() if may_change} == may | {
        name for name in verdicts if name.startswith(prefixes)
    }


def refusal(found: list[resume.Change], recipe: Recipe) -> str:
    try:
        resume.refuse(found, recipe)
    except ValueError as error:
        return str(error)
    return ""


def replaced(fields: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = path
    return {**fields, first: replaced(fields[first], tuple(rest), value) if rest else value}


def test_processes_may_differ_in_little(recipe):
    fields = resume.of_all_processes(changed(recipe, batch__stages=(Stage(100, 2),)))
    assert "output" not in fields
    assert fields["data"] == {"weights": ()}
    assert fields["optimizer"]["schedule"]["peak"] == 1e-3
    assert fields["batch"]["stages"] == ({"until_tokens": 100, "sequences": 2, "split": 1},)
