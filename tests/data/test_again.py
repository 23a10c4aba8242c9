"""The same command again: files of the same content are the same, whatever their times; others are named."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from llama_jax.data.corpus import open_corpus
from llama_jax.data.manifest import INPUTS
from llama_jax.data.prepare.prepare import make_request, prepare
from llama_jax.data.prepare.train_tokenizer import train_tokenizer
from tests.data.inputs import write
from tests.data.test_prepare import make_texts


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder / "tokenizer.model", train_tokenizer(make_texts(20), 300))
    return folder


# The same files again


def later(path: Path) -> None:
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 10**9))


def test_a_touched_file_is_the_same_file(tmp_path, vocabulary):
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in make_texts(20))
    files = [write(tmp_path / "in" / "a.txt", b"some text"), write(tmp_path / "in" / "b.jsonl", lines),
             write(tmp_path / "in" / "c.jsonl", gzip.compress(lines)), tmp_path / "in" / "d.parquet"]  # fmt: skip
    table = pa.table({"text": make_texts(40), "other": make_texts(40)})
    pa.parquet.write_table(table, files[3], row_group_size=10)

    def run(**options):
        request = make_request([tmp_path / "in"], tokenizer=vocabulary, shard_bytes=4000, **options)
        return prepare(request, tmp_path / "out", workers=0)

    manifest = run()
    assert len(manifest.shards) > 4
    for file in files:
        later(file)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run() == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before

    name = str(tmp_path / "in")
    changed = lines.replace(b"return", b"retorn", 1)
    end = ": give another folder, or remove it"
    for file, data, words in (
        (files[1], changed, f"the content of {name}/b.jsonl is another one"),
        (files[3], files[3].read_bytes().replace(b"def", b"DEF"), f"the content of {name}/d.parquet is another one"),
        (files[0], b"more text", f"the content of {name}/a.txt is another one"),
        (files[0], b"longer text", f"{name}/a.txt had 9 bytes and now has 11"),
        (files[0], None, f"{name}/a.txt is not an input any more"),
    ):
        kept = file.read_bytes()
        file.unlink() if data is None else file.write_bytes(data)
        with pytest.raises(FileExistsError) as caught:
            run()
        assert str(caught.value).endswith(f"from other files or with other options ({words}){end}")
        file.write_bytes(kept)
        later(file)
    write(tmp_path / "in" / "z.txt", b"new")
    with pytest.raises(FileExistsError, match=r"\(.*/in/z\.txt is new\)"):
        run()
    (tmp_path / "in" / "z.txt").unlink()
    with pytest.raises(FileExistsError, match=r"\(bos was left out, now False\)"):
        run(bos=False)
    assert run() == manifest
    (tmp_path / "out" / INPUTS).unlink()  # as an earlier version left it
    with pytest.raises(FileExistsError, match="with other options: give another folder"):
        run()


def test_a_touched_file_of_an_interrupted_preparation(tmp_path, vocabulary):
    for i in range(3):
        write(tmp_path / "in" / f"{i}.txt", b"text " * 1000)
    write(tmp_path / "in" / "3.txt", b"\xff" * 5000)

    def run():
        return prepare(
            make_request([tmp_path / "in"], tokenizer=vocabulary, shard_bytes=4000), tmp_path / "out", workers=0
        )

    with pytest.raises(ValueError, match=r"3\.txt: is not valid UTF-8"):
        run()
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.array_record"))}
    later(tmp_path / "in" / "0.txt")
    write(tmp_path / "in" / "1.txt", b"TEXT " * 1000)  # as long as before
    write(tmp_path / "in" / "3.txt", b"good " * 1000)
    run()
    assert [path.stat().st_mtime_ns == at for path, at in before.items()] == [True, False, True]
    corpus = open_corpus(tmp_path / "out")
    assert [corpus.tokenizer().decode(ids)[:4] for ids in corpus.read(range(4))] == ["text", "TEXT", "text", "good"]


def test_the_content_is_the_same_however_it_is_cut(tmp_path, vocabulary):
    """Into other shards, of other files; another order of the documents is another content."""
    lines = [json.dumps({"text": f"text number {i} of some"}).encode() + b"\n" for i in range(30)]
    parts = {"a": lines, "b": lines[:11], "c": lines[11:], "d": lines[::-1]}
    files = {name: write(tmp_path / f"{name}.jsonl", b"".join(part)) for name, part in parts.items()}

    def content(names: str, **cut) -> str:
        folder = tmp_path / f"{names}{len(cut)}"
        prepare(make_request([files[n] for n in names], tokenizer=vocabulary, **cut), folder, workers=0)
        manifest = open_corpus(folder).manifest
        assert (len(manifest.shards) > 1) == bool(cut)
        return manifest.content

    assert content("a") == content("bc") == content("a", shard_bytes=200) != content("d")
