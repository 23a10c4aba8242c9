"""Apache Beam's local runner prepares the same corpus, byte for byte; run with: python -m pytest -m beam.

Needs the `beam` extra; the Hugging Face `datasets` package and zstandard are tried here too.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from llama_jax.data.corpus import open_corpus
from llama_jax.data.manifest import UNFINISHED
from llama_jax.data.prepare.prepare import make_request, prepare
from llama_jax.data.prepare.train_tokenizer import train_tokenizer
from tests.data.test_prepare import content, make_texts, write_lines

pytestmark = [
    pytest.mark.beam,
    pytest.mark.filterwarnings("default"),  # of Beam and what it imports
]


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(train_tokenizer(make_texts(50), 500))
    return tmp_path / "tokenizer"


@pytest.fixture
def inputs(tmp_path) -> Path:
    """Files of every kind; two are cut into pieces."""
    import pyarrow as pa
    import pyarrow.parquet
    import zstandard

    folder, texts = tmp_path / "input", make_texts(300)
    folder.mkdir()
    write_lines(folder / "a.jsonl", texts[:100])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[100:150]).encode()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines[:9000]) + zstandard.compress(lines[9000:]))
    pa.parquet.write_table(pa.table({"text": texts[150:250]}), folder / "d.parquet", row_group_size=10)
    for i, text in enumerate(texts[250:]):
        (folder / f"e{i:02d}.txt").write_text(text, newline="")
    (folder / "f.txt").write_text("")
    return folder


def test_the_same_corpus(tmp_path, inputs, vocabulary):
    from llama_jax.data.prepare.beam import prepare_on_beam

    request = make_request([inputs], tokenizer=vocabulary, shard_bytes=20_000)
    manifest = prepare_on_beam(request, tmp_path / "beam")
    assert prepare(request, tmp_path / "local", workers=2) == manifest
    assert content(tmp_path / "beam") == content(tmp_path / "local")
    assert (manifest.documents, manifest.skipped) == (350, {"empty": 1})
    assert len(manifest.shards) > 10
    local, beam = open_corpus(tmp_path / "local"), open_corpus(tmp_path / "beam")
    for i, (a, b) in enumerate(zip(local.read(range(350)), beam.read(range(350)), strict=True)):
        assert a.tolist() == b.tolist()
        assert local.source(i) == beam.source(i)


def test_a_bad_document_ends_it_and_it_resumes(tmp_path, inputs, vocabulary):
    from llama_jax.data.prepare.beam import prepare_on_beam

    write_lines(inputs / "g.jsonl", ["x"], field="body")
    options = {"tokenizer": vocabulary, "shard_bytes": 20_000}
    with pytest.raises(ValueError, match=r"g\.jsonl:1: has no field 'text'"):
        prepare_on_beam(make_request([inputs], **options), tmp_path / "beam")
    marks = list((tmp_path / "beam" / UNFINISHED).glob("*.json"))
    assert marks
    kept = (tmp_path / "beam" / marks[0].stem).with_suffix(".array_record")
    before = kept.stat().st_mtime_ns
    write_lines(inputs / "g.jsonl", ["x"])
    prepare_on_beam(make_request([inputs], **options), tmp_path / "beam")
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="Unexpected pipeline runner"):
        prepare_on_beam(make_request([inputs], **options), tmp_path / "other", runner="AbacusRunner")


def test_storage_that_is_no_disk(tmp_path, inputs, vocabulary):
    """Input and output by Beam's file systems, as with gs://; here one of test:// that leads to a folder."""
    from apache_beam.io.filesystem import FileMetadata
    from apache_beam.io.localfilesystem import LocalFileSystem

    from llama_jax.data.prepare.beam import prepare_on_beam

    class TestFileSystem(LocalFileSystem):
        """Object storage has no folders: they are made as they are needed, and none is listed."""

        @classmethod
        def scheme(cls):
            return "test"

        def _real(self, path):
            return str(tmp_path) + path.removeprefix("test:/")

        def _list(self, prefix):
            for file in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
                if (name := f"test://{file.relative_to(tmp_path)}").startswith(prefix):
                    yield self.metadata(name)

        def exists(self, path):
            return Path(self._real(path)).is_file()

        def metadata(self, path):
            stat = Path(self._real(path)).stat()
            return FileMetadata(path, stat.st_size, stat.st_mtime)

        def has_dirs(self):
            return False

        def create(self, path, mime_type="", compression_type="auto"):
            Path(self._real(path)).parent.mkdir(parents=True, exist_ok=True)
            return super().create(self._real(path), mime_type, compression_type)

        def open(self, path, mime_type="", compression_type="auto"):
            return super().open(self._real(path), mime_type, compression_type)

        def delete(self, paths):
            for path in paths:
                Path(self._real(path)).unlink()

    def request(place):
        return make_request([place], tokenizer=vocabulary, shard_bytes=20_000)

    write_lines(inputs / "g.jsonl", ["x"], field="body")
    with pytest.raises(ValueError, match=r"test://input/g\.jsonl:1: has no field 'text'"):
        prepare_on_beam(request("test://input/"), "test://remote")
    finished = len(list((tmp_path / "remote" / UNFINISHED).glob("*.json")))
    write_lines(inputs / "g.jsonl", ["x"])
    manifest = prepare_on_beam(request("test://input/"), "test://remote")
    assert finished
    assert prepare_on_beam(request("test://input/"), "test://remote") == manifest
    with pytest.raises(FileExistsError, match="prepared from other files"):
        prepare_on_beam(make_request(["test://input/g.jsonl"], tokenizer=vocabulary), "test://remote")
    with pytest.raises(FileExistsError, match="holds something else than a corpus"):
        prepare_on_beam(request("test://input/"), "test://input")
    with pytest.raises(FileNotFoundError, match="test://nothing/: no such file"):
        request("test://nothing/")

    prepare(request(inputs), tmp_path / "local", workers=2)
    remote, local = open_corpus(tmp_path / "remote"), open_corpus(tmp_path / "local")
    assert len(remote) == len(local) == 351
    for i, (a, b) in enumerate(zip(remote.read(range(351)), local.read(range(351)), strict=True)):
        assert a.tolist() == b.tolist()
        assert remote.source(i) == local.source(i).replace(f"{tmp_path}/", "test://")
    assert not list((tmp_path / "remote" / UNFINISHED).glob("*.json"))


def test_a_hugging_face_dataset(tmp_path, vocabulary):
    """A folder of JSON lines is a dataset too; three files make three shards."""
    texts = make_texts(90)
    (tmp_path / "dataset").mkdir()
    for i in range(3):
        write_lines(tmp_path / "dataset" / f"train-{i}.jsonl", texts[i::3], field="body")
    request = make_request([f"hf:{tmp_path}/dataset:train"], tokenizer=vocabulary, field="body")
    manifest = prepare(request, tmp_path / "corpus", workers=2)
    corpus = open_corpus(tmp_path / "corpus")
    assert [shard.documents for shard in manifest.shards] == [30, 30, 30]
    decode = corpus.tokenizer().decode
    assert [decode(ids) for ids in corpus.read(range(90))] == [*texts[0::3], *texts[1::3], *texts[2::3]]
    assert corpus.source(31) == f"hf:{tmp_path}/dataset:train[1/3]#1"
