"""A run resumes on a corpus of the same content, whenever it was prepared, and says which one has changed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from llama_jax.data.prepare.prepare import make_request, prepare
from llama_jax.data.prepare.train_tokenizer import train_tokenizer
from llama_jax.train.corpora import changed_reads, open_corpora, what_is_read
from llama_jax.train.recipe import Batch, Data, Optimizer, Recipe, Schedule
from tests.builders import tiny_config
from tests.data.test_prepare import make_texts


@pytest.fixture
def read(tmp_path):
    """Prepares a file into a folder, and gives what a run would record of it."""
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(make_texts(20), 300))

    def read(file: Path, folder: str, **changes):
        prepare(make_request([file], tokenizer=tmp_path / "tokenizer.model"), tmp_path / folder, workers=0)
        data = Data(train=(str(tmp_path / folder),))
        recipe = Recipe(tiny_config(), data=data, batch=Batch(32, 4), optimizer=Optimizer(Schedule(1e-3, 9)), **changes)
        return recipe, open_corpora(recipe, tmp_path)

    return read


def test_what_is_the_same_and_what_is_not(tmp_path, read):
    file = tmp_path / "a.txt"
    file.write_text("some text or other")
    before = json.loads(json.dumps(what_is_read(*read(file, "a"))))
    earlier = json.loads(json.dumps(before))
    del earlier["corpora"][0]["content"]  # of a checkpoint that knew the fingerprint alone
    assert changed_reads(before, *read(file, "a")) == changed_reads(earlier, *read(file, "a")) == []

    os.utime(file, ns=(1, 1))
    touched = read(file, "b")
    assert before["corpora"][0]["fingerprint"] != touched[1].train[0].manifest.fingerprint
    assert changed_reads(before, *touched) == []
    (phrase,) = changed_reads(earlier, *touched)
    assert phrase.startswith(f"corpora of other content: {tmp_path}/b has as many documents and tokens, but")

    recipe, corpora = touched
    for weights in ((1.0,), (5.0,)):  # of one corpus, no weight matters
        weighted = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, weights=weights))
        assert changed_reads(before, weighted, corpora) == []

    file.write_text("some txet or other")
    (phrase,) = changed_reads(before, *read(file, "c"))
    assert phrase.startswith(f"corpora of other content: {tmp_path}/c has ")
    assert "{" not in phrase
    file.write_text("some text or other, and more")
    found = changed_reads(before, *read(file, "d", seed=1))
    tokens = before["corpora"][0]["tokens"]
    assert found[0] == "seed = 0, and now it is 1"
    assert found[1].startswith(f"corpora of other content: {tmp_path}/d has {tokens} tokens, now ")
