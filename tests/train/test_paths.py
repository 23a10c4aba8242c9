"""Names that mean something else to a library, and a save that counts when it has been opened again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore

import llama_jax
from llama_jax.checkpoint.arrays import DamagedError, check_saved, open_arrays, save_arrays
from llama_jax.checkpoint.paths import local_folder, plain
from llama_jax.checkpoint.run import RunCheckpoints, run_steps
from llama_jax.train.loop import train
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule
from tests.builders import tiny_config
from tests.train.corpora import random_documents, write_corpus
from tests.train.test_bad_runs import changed
from tests.train.test_loop import arrays_of
from tests.train.test_resume_decisions import quick  # noqa: F401 (fixture)

# Orbax cannot read what it writes below the first six; the others mean something to globs, URLs or shells.
NAMES = (
    "lr[1e-3]", "[!a]", "**", "a\\b", "gs:", "bytes \udcff", "a*b", "a?b", "a{b}", "100%", "a%20b", "a#b", "a b",
    "snow 雪", "~x", "a:b", "s3:", "new\nline", "-x", "it's", "a&b|c;$d", "a..", "x" * 250,
)  # fmt: skip


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    write_corpus(tmp_path / "corpus [1]", random_documents(60))
    return Recipe(
        model=tiny_config(num_layers=1), data=Data(train=(str(tmp_path / "corpus [1]"),)),
        batch=Batch(seq_len=32, sequences=4), optimizer=Optimizer(Schedule(peak=1e-3, steps=3)),
        checkpoints=Checkpoints(every=2, keep_last=1), tensorboard=False,
        output=str(tmp_path / "runs" / "lr[1e-3] *?%"),
    )  # fmt: skip


def saved(folder: Path) -> dict[str, np.ndarray]:
    """What `folder/params` holds after arrays were saved there."""
    arrays = {"blocks.a": jax.numpy.arange(24.0).reshape(3, 2, 4), "b": jax.numpy.zeros((5,)), "c": jax.numpy.int32(7)}
    save_arrays(folder / "params", arrays, stacked=lambda name: name.startswith("blocks"))
    return {name: np.asarray(x) for name, x in arrays.items()}


def test_any_name_can_be_written_to(tmp_path):
    """Beside a folder that the name matches as a pattern; and what is read is what NumPy has."""
    (tmp_path / "a-b").mkdir()
    (tmp_path / "lr1").mkdir()
    for name in NAMES:
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        expected = saved(folder)
        for key, array in open_arrays(folder / "params").items():
            np.testing.assert_array_equal(array.read((slice(None),) * len(array.shape)), expected[key])
        assert sorted(os.listdir(tmp_path / name)) == ["run"]


def test_plain_names_are_left_alone(tmp_path, monkeypatch):
    assert plain(tmp_path / "a-b_c.d=1,2@x~") == tmp_path / "a-b_c.d=1,2@x~"
    monkeypatch.chdir(tmp_path)
    assert plain(Path("x/../y")) == tmp_path / "y"
    (tmp_path / "a[b]").mkdir()
    link = plain(tmp_path / "a[b]" / "params")
    assert link.name == "params"
    assert os.path.samefile(link.parent, tmp_path / "a[b]")
    assert not set("[]") & set(str(link))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gs://bucket/run", "gs:// is none: mount the bucket"),
        ("s3://bucket/run", "s3:// is none: mount the bucket"),
        ("~nosuchuser/run", "a folder named so is given as ./~nosuchuser/run"),
    ],
)
def test_what_is_no_folder_of_this_machine_is_refused(recipe, name, words):
    with pytest.raises(ValueError, match=words):
        train(changed(recipe, output=name))
    assert not Path(name).exists()
    assert local_folder("./gs:/x") == Path("gs:/x")


def test_a_name_too_long_for_checkpoints_is_refused_before_training(recipe, tmp_path):
    """The folder itself can be made; the files of a checkpoint in it could not."""
    deep = tmp_path
    while (left := 4030 - len(str(deep))) > 1:  # of the 4095 that Linux takes
        deep = deep / ("x" * min(100, left - 1))
    with pytest.raises(OSError, match=r"checkpoints cannot be written to .* \(File name too long\): give another"):
        train(changed(recipe, output=str(deep)))
    shutil.rmtree(tmp_path / ("x" * 100))


@pytest.mark.usefixtures("quick")
def test_a_run_with_an_odd_name(recipe, tmp_path):
    """Trained, resumed, loaded, converted to an odd name again: the same parameters as under a plain name."""
    output = Path(recipe.output)
    train(changed(recipe, steps=2))
    assert train(changed(recipe, resume="auto")).step == 3
    assert run_steps(output / "checkpoints") == [3]
    train(changed(recipe, output=str(tmp_path / "plain")))
    expected = arrays_of(tmp_path / "plain", 3)
    for name, array in arrays_of(output, 3).items():
        np.testing.assert_array_equal(array, expected[name])
    llama_jax.convert(output, tmp_path / "native [x]", to="native")
    llama = llama_jax.load(tmp_path / "native [x]", mesh="fsdp=8")
    np.testing.assert_array_equal(llama.model.embed.get_value(), expected["params/embed"])
    assert str(output) in str(train(changed(recipe, resume="auto")))


# --- Opened again ---


def test_a_chunk_that_is_missing_is_noticed(tmp_path):
    """Its key is taken out of the store by tensorstore itself."""
    arrays = saved(tmp_path)
    shapes = {name: (x.shape, x.dtype) for name, x in arrays.items()}
    check_saved(tmp_path / "params", shapes)
    for wrong, words in (
        (shapes | {"d": ((1,), np.dtype("f4"))}, "'d' is missing"),
        ({name: shapes[name] for name in ("b", "c")}, "'blocks.a' is there, and was not saved"),
        (shapes | {"b": ((6,), np.dtype("f4"))}, r"'b' is float32\[5\] after it was saved as float32\[6\]"),
    ):
        with pytest.raises(DamagedError, match=words):
            check_saved(tmp_path / "params", wrong)
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": (tmp_path / "params").as_uri()}).result()
    (key,) = (key for key in store.list().result() if key.startswith(b"b/c"))  # of zeros alone
    store.delete_range(tensorstore.KvStore.KeyRange(key, key + b"\0")).result()
    with pytest.raises(DamagedError, match="1 chunks of 'b' are missing"):
        check_saved(tmp_path / "params", shapes)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("lost", ["optimizer/manifest.ocdbt", "config.json"])
def test_a_save_that_cannot_be_opened_deletes_nothing(recipe, monkeypatch, lost):
    """The storage loses a file of the newest: the one before stays, and the run ends with an error."""
    settle = RunCheckpoints._settle

    def lose(self: RunCheckpoints) -> None:
        if self._expected and self._expected.step == 3:
            (self.folder / "3" / lost).unlink()
        settle(self)

    words = r"checkpoints/3: .*could not be saved \(what was written cannot be opened.* of step 2"
    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "_settle", lose)
        with pytest.raises(OSError, match=words):
            train(recipe)
    folder = Path(recipe.output) / "checkpoints"
    assert run_steps(folder) == [2]
    assert (folder / "3.unreadable").is_dir()
    assert train(changed(recipe, resume="auto")).step == 3
    assert run_steps(folder) == [3]
