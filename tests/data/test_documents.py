"""Documents out of files of every kind, whole and cut, and what is said about bad ones."""

from __future__ import annotations

import gzip
import json
import random
import sys
import types
from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest

from llama_jax.data.prepare.documents import Document, Reading, read_piece
from llama_jax.data.prepare.pieces import cut_pieces, find_pieces, group_pieces

TEXTS = ["first\n\n  text ", "zweiter Text: äöü", "三つ目 🦙\r\nend", "\ttab\0null", "x" * 5000, "last"]


def jsonl(texts, field="text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def read_all(inputs, reading=None, *, cut=1 << 62, skipped=None, **options) -> list[Document]:
    pieces = cut_pieces(find_pieces(inputs, **options), cut)
    return [document for piece in pieces for document in read_piece(piece, reading or Reading(), skipped)]


def write_parquet(path, texts, type=None, **options):
    pa.parquet.write_table(pa.table({"id": list(range(len(texts))), "body": pa.array(texts, type)}), path, **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.json.gz"])
def test_lines(tmp_path, name):
    data = jsonl(TEXTS).replace(b"\n", b"\n  \n", 1).removesuffix(b"\n")  # an empty line is none; the last needs no end
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    documents = read_all([path])
    assert [document.text for document in documents] == TEXTS
    assert [document.source for document in documents] == [f"{path}:{n}" for n in (1, 3, 4, 5, 6, 7)]


def test_cut_lines_are_the_same_documents(tmp_path):
    rng = random.Random(0)
    texts = [rng.choice(["a", "é", "🦙\n"]) * rng.randrange(300) for _ in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(texts))
    data = path.read_bytes()
    for cut in (1, 70, 700, 5000, len(data) - 1, len(data)):
        documents = read_all([path], cut=cut)
        assert [document.text for document in documents] == texts, cut
        if cut < len(data):
            starts = [int(document.source.rpartition("@")[2]) for document in documents]
            assert all(start == 0 or data[start - 1 : start] == b"\n" for start in starts)
    path.write_bytes(data + b'{"text": 5}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:61: its field 'text' is a int"):  # the line, not the byte
        read_all([path], cut=1000)


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()])
def test_parquet(tmp_path, type):
    texts, path = [*TEXTS, *map(str, range(3000))], tmp_path / "a.parquet"
    write_parquet(path, texts, type, row_group_size=100)
    for cut in (1 << 62, path.stat().st_size // 7):
        documents = read_all([path], Reading("body"), cut=cut)
        assert [document.text for document in documents] == texts
        assert [document.source for document in documents] == [f"{path}#{i}" for i in range(len(texts))]


def test_folders_are_walked_in_order(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.md", "c.txt.gz", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(name.encode()) if name.endswith("gz") else name.encode())
    assert [document.text for document in read_all([tmp_path])] == ["a.md", "c.txt.gz", "b/10.txt", "b/2.txt"]
    assert [document.text for document in read_all([tmp_path], glob="*.txt")] == ["b/10.txt", "b/2.txt"]
    (tmp_path / "z.py").write_text("code")
    with pytest.raises(ValueError, match=r"z\.py: its type is unknown .*--format text .*--glob"):
        read_all([tmp_path])
    assert read_all([tmp_path / "z.py"], format="text") == [Document("code", str(tmp_path / "z.py"))]


def test_pieces_are_grouped_in_order(tmp_path):
    for i, size in enumerate([5, 5, 100, 1, 1, 1, 9]):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * size)
    groups = group_pieces(find_pieces([tmp_path]), 10)
    assert [[piece.nbytes for piece in group] for group in groups] == [[5, 5], [100], [1, 1, 1, 9]]


BAD = {
    "utf8 text": ("a.txt", b"good \xff\xfe bad", r"a\.txt: is not valid UTF-8 \(invalid start byte at byte 5\).*skip"),
    "utf8 line": ("a.jsonl", jsonl(["x"]) + b'{"text": "\xe9"}\n', r":2: is not valid UTF-8.*--invalid-utf8 skip"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: is not valid UTF-8 \(surrogates not allowed"),
    "no field": ("a.jsonl", jsonl(["x"]) + jsonl(["y"], "body"), r":2: has no field 'text'.*--field.*'id', 'body'"),
    "null": ("a.jsonl", b'{"text": null}', r"a\.jsonl:1: its field 'text' is a NoneType, not a text.*--field"),
    "number": ("a.jsonl", b'\n{"text": 5}', r"a\.jsonl:2: its field 'text' is a int, not a text"),
    "list": ("a.json", b'["text"]', r"a\.json:1: holds a JSON list.*one object a line"),
    "pretty": ("a.json", b'{\n"text": "x"}', r"a\.json:1: is not JSON.*one object a line"),
    "gzip": ("a.jsonl.gz", gzip.compress(jsonl(["x" * 999]))[:-9], r"a\.jsonl\.gz: is damaged or truncated.*get"),
    "no gzip": ("a.txt.gz", b"text", r"a\.txt\.gz: is damaged or truncated"),
    "no parquet": ("a.parquet", b"PAR1", r"a\.parquet: is not a Parquet file, or is truncated.*get it again"),
    "type": ("a.docx", b"PK", r"a\.docx: its type is unknown \(\.txt, .*\.parquet are known\): give --format text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(tmp_path, case):
    name, data, words = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_all([tmp_path / name])


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [str(i) for i in range(9999)], compression="zstd")
    data = bytearray(path.read_bytes())
    page = pa.parquet.read_metadata(path).row_group(0).column(1).data_page_offset
    data[page + 60 : page + 460] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: is damaged or truncated"):
        read_all([path], Reading("body"))
    write_parquet(path, ["x", None])
    with pytest.raises(ValueError, match=r"a\.parquet: has no field 'text'.*it has 'id', 'body'"):
        read_all([path])
    with pytest.raises(ValueError, match=r"a\.parquet: its field 'id' is int64, not a text"):
        read_all([path], Reading("id"))
    with pytest.raises(ValueError, match=r"a\.parquet#1: its field 'body' is null"):
        read_all([path], Reading("body"))


def test_bad_inputs(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_pieces([tmp_path / "nope.txt"])
    with pytest.raises(FileNotFoundError, match="has no file that --glob"):
        find_pieces([tmp_path])
    with pytest.raises(ValueError, match="there is no input"):
        find_pieces([])
    with pytest.raises(ValueError, match="invalid_utf8 must be error, skip or replace, got 'ignore'"):
        Reading(invalid_utf8="ignore")


def test_invalid_utf8_is_skipped_or_replaced(tmp_path):
    lines, text = tmp_path / "a.jsonl", tmp_path / "b.txt"
    lines.write_bytes(b'{"text": "a\xffb"}\n{"text": "good"}\n{"text": "c\\ud800d\\ud83e\\udd99"}\n')
    text.write_bytes(b"\xc3")
    skipped = Counter()
    kept = read_all([lines, text], Reading(invalid_utf8="skip"), skipped=skipped)
    assert ([document.text for document in kept], dict(skipped)) == (["good"], {"invalid_utf8": 3})
    texts = [document.text for document in read_all([lines, text], Reading(invalid_utf8="replace"))]
    assert texts == ["a\ufffdb", "good", "c\ufffdd🦙", "\ufffd"]


def test_a_file_that_changes_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    (piece,) = find_pieces([tmp_path])
    (tmp_path / "a.txt").write_text("after it")
    with pytest.raises(ValueError, match=r"a\.txt: has changed since the preparation began: run it again"):
        list(read_piece(piece, Reading()))


class FakeDataset(list):
    num_shards = 3

    def shard(self, num_shards, index):
        return FakeDataset(self[index::num_shards])


def test_datasets_are_read_by_shards(monkeypatch):
    """The `datasets` package itself is used in test_beam.py, whose environment has it."""
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return FakeDataset([{"body": str(i)} for i in range(7)])

    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    documents = read_all(["hf:org/name:en:train"], Reading("body"))
    assert [document.text for document in documents] == ["0", "3", "6", "1", "4", "2", "5"]
    assert documents[4].source == "hf:org/name:en:train[1/3]#1"
    assert set(calls) == {("org/name", "en", "train", True)}
    with pytest.raises(ValueError, match=r"hf:org/name\[0/3\]#0: has no field 'text'.*it has 'body'"):
        read_all(["hf:org/name"])
