"""What a file is, its bytes say: compression, archives, encodings, lines that are not JSON; read rightly or refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llama_jax.data.prepare.documents import Reading
from llama_jax.data.prepare.prepare import make_request
from llama_jax.data.prepare.train_tokenizer import train_tokenizer
from tests.data.inputs import LINES, texts, write
from tests.data.test_prepare import make_texts


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder / "tokenizer.model", train_tokenizer(make_texts(20), 300))
    return folder


# Kinds, by bytes


def zstd_frame(data: bytes) -> bytes:
    """A Zstandard frame by RFC 8878: one raw block, and the content's size in one byte of its header."""
    assert len(data) < 256
    block = (len(data) << 3 | 1).to_bytes(3, "little")  # the last one, raw
    return b"\x28\xb5\x2f\xfd\x20" + bytes([len(data)]) + block + data


PACKED = {
    "gzip": gzip.compress(LINES),
    "gzip of two members": gzip.compress(LINES[:16]) + gzip.compress(LINES[16:]),
    "bz2": bz2.compress(LINES),
    "bz2 of two streams": bz2.compress(LINES[:16]) + bz2.compress(LINES[16:]),
    "bz2 of nothing and something": bz2.compress(b"") + bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "xz of two streams and padding": lzma.compress(LINES[:16]) + bytes(8) + lzma.compress(LINES[16:]) + bytes(4),
    "lzma": lzma.compress(LINES, lzma.FORMAT_ALONE),
    "gzip in bz2": bz2.compress(gzip.compress(LINES)),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.xz", "a.ndjson.bz2"])
@pytest.mark.parametrize("how", PACKED)
def test_compression_is_judged_by_bytes(tmp_path, how, name):
    path = write(tmp_path / name, PACKED[how])
    assert texts(path, cut=10) == ["one", "two"]  # not cut, whatever its name
    (tmp_path / name).rename(tmp_path / "b.txt")
    assert texts(tmp_path / "b.txt") == [LINES.decode()]


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, gzip.compress])
def test_large_compressed_files(tmp_path, pack):
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(30_000))
    assert texts(write(tmp_path / "a.jsonl", pack(lines))) == [str(i) for i in range(30_000)]


def test_zstandard(tmp_path):
    data = zstd_frame(LINES[:16]) + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstd_frame(LINES[16:])  # one to be skipped
    path = write(tmp_path / "a.jsonl", data)
    try:
        import zstandard  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(ValueError, match=r"a\.jsonl: needs the package zstandard: pip install zstandard"):
            texts(path)
        return
    assert texts(path) == ["one", "two"]
    with pytest.raises(ValueError, match=r"a\.jsonl: is damaged or truncated"):
        texts(write(path, data[:-9]))


DAMAGED = {
    "bz2 that breaks off": bz2.compress(LINES)[:-9],
    "xz that breaks off": lzma.compress(LINES)[:-9],
    "bz2 with a flipped byte": bytearray(bz2.compress(LINES)),
    "bz2 and then text": bz2.compress(LINES) + LINES,
    "gzip and then text": gzip.compress(LINES) + LINES,
}
DAMAGED["bz2 with a flipped byte"][25] ^= 1


@pytest.mark.parametrize("how", DAMAGED)
def test_damage_is_told(tmp_path, how):
    with pytest.raises(ValueError, match=r"a\.jsonl\.bz2: is damaged or truncated.*get it again"):
        texts(write(tmp_path / "a.jsonl.bz2", bytes(DAMAGED[how])))


def test_what_is_not_what_its_name_says(tmp_path, vocabulary, caplog):
    table = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": ["p"]}), table)
    write(tmp_path / "a.jsonl", table.getvalue())
    write(tmp_path / "b.jsonl.gz", LINES)
    write(tmp_path / "c.parquet", LINES)
    write(tmp_path / "d.txt", b"d" * 20)
    assert texts(tmp_path) == ["p", "one", "two", "one", "two", "d" * 20]
    make_request([tmp_path], tokenizer=vocabulary)
    assert sorted(line.partition(" (")[0] for line in caplog.messages) == [
        "note: files that are not what their names say",
        "note: files whose names say that they are compressed, which they are not",
    ]
    plain = write(tmp_path / "e.txt.gz", b"plain text")
    with pytest.raises(
        ValueError, match=r"e\.txt\.gz: is damaged or truncated, or was never compressed.*--format text"
    ):
        texts(plain)
    assert texts(plain, format="text") == ["plain text"]


def sqlite_bytes() -> bytes:
    with sqlite3.connect(":memory:") as database:
        database.execute("create table t (x)")
        data = database.serialize()
    database.close()
    return data


def made(write) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", LINES)


def tarred(file, mode="w"):
    with tarfile.open(fileobj=file, mode=mode) as archive:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(LINES)
        archive.addfile(member, io.BytesIO(LINES))


FOREIGN = {
    "a ZIP archive": made(zipped),
    "a tar archive": made(tarred),
    "a tar archive ": made(lambda file: tarred(file, "w:gz")),
    "an Arrow file": made(lambda file: pa.ipc.new_file(file, pa.schema([("text", pa.string())])).close()),
    "an SQLite database": sqlite_bytes(),
    "a Python pickle": pickle.dumps({"text": ["x"]}),
    "a NumPy array": made(lambda file: np.save(file, np.arange(9))),
    "a program": Path(sys.executable).resolve().read_bytes()[:4096],
    "UTF-16 text": "plain text".encode("utf-16"),
    "UTF-16 text ": b"\xfe\xff" + "plain text".encode("utf-16-be"),
    "UTF-32 text": "plain text".encode("utf-32"),
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
    "a PDF document ": b"%PDF-1.4\n1 0 obj << /Type /Catalog >> endobj\n",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "an image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "compressed by lz4": b"\x04\x22\x4d\x18\x64\x40\xa7\0\0\0\0",
    "a 7z archive": b"7z\xbc\xaf\x27\x1c\0\x04",
    "a GGUF file": b"GGUF\x03\0\0\0\0\0\0\0",
    "audio or video": b"OggS\0\x02\0\0\0\0\0\0",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_text_is_refused_by_what_it_is(tmp_path, what):
    words = rf"a: is {what.strip()}"
    path = write(tmp_path / "a", FOREIGN[what])
    for format in ("text", "jsonl"):
        for invalid in ("error", "replace"):
            with pytest.raises(ValueError, match=words):
                texts(path, format=format, reading=Reading(invalid_utf8=invalid))
    skipped = Counter()
    assert texts(path, format="text", reading=Reading(invalid_utf8="skip"), skipped=skipped) == []
    assert skipped == {"not_text": 1}
    if not what.startswith(("UTF", "a PDF", "a Git")):
        with pytest.raises(ValueError, match=words):
            texts(path)  # by a name that says nothing
    path = write(tmp_path / "a.parquet", FOREIGN[what])
    with pytest.raises(ValueError, match=r"a\.parquet: is (not a Parquet file|damaged)"):
        texts(path)


def test_text_that_begins_like_something_else_is_text(tmp_path):
    for text in ("GIF89a is a format", "BM", "PK", "ORC", "PAR1 is what Parquet begins with", "MZ\n", "<html>é", "]"):
        assert texts(write(tmp_path / "a.txt", text.encode())) == [text]


def test_pages_and_tables(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl: is a page of HTML or XML, not records"):
        texts(write(tmp_path / "a.jsonl", b"\n<!DOCTYPE html>\n<title>404</title>"))
    with pytest.raises(ValueError, match=r"a\.csv: its type is unknown .*commas is not read: write it as JSON lines"):
        texts(write(tmp_path / "a.csv", b"text\nx\n"))
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: has the field 'text' 2 times"):
        texts(tmp_path / "a.parquet")


def test_compressed_parquet(tmp_path):
    data = made(lambda file: pa.parquet.write_table(pa.table({"text": ["a", "b"]}), file))
    for pack in (gzip.compress, bz2.compress):
        assert texts(write(tmp_path / "a.parquet.gz", pack(data)), cut=10) == ["a", "b"]


# Encodings


def test_byte_order_marks_are_dropped(tmp_path):
    mark = b"\xef\xbb\xbf"
    assert texts(write(tmp_path / "a.txt", mark + b"hello \xef\xbb\xbfworld")) == ["hello \ufeffworld"]
    joined = write(tmp_path / "a.jsonl", mark + LINES + mark + LINES + mark + b"\n" + mark)
    assert texts(joined) == ["one", "two"] * 2  # of two files
    assert texts(joined, cut=7) == ["one", "two"] * 2
    with pytest.raises(ValueError, match=r"a\.txt: is not valid UTF-8 \(invalid start byte at byte 5\)"):
        texts(write(tmp_path / "a.txt", mark + b"ab\xff"))


NULS = {
    "utf16": ("plain text".encode("utf-16-le"), r"\(a NUL byte at byte 1, which no text has; UTF-16 has\)"),
    "utf32": ("plain".encode("utf-32-be"), r"\(a NUL byte at byte 0, which no text has; UTF-16 has\)"),
    "torn": (b"a written line\n" + bytes(4), r"\(a NUL byte at byte 15, which no text has\)"),
}


@pytest.mark.parametrize("case", NULS)
def test_nul_bytes_are_refused(tmp_path, case):
    data, words = NULS[case]
    path = write(tmp_path / "a.txt", data)
    with pytest.raises(ValueError, match=rf"a\.txt: is not valid UTF-8 {words}.*--invalid-utf8 skip"):
        texts(path)
    assert texts(path, reading=Reading(invalid_utf8="skip")) == []
    (text,) = texts(path, reading=Reading(invalid_utf8="replace"))
    assert text == data.decode().replace("\0", "\ufffd")
    torn = write(tmp_path / "a.jsonl", LINES + data.replace(b"\n", b""))
    with pytest.raises(ValueError, match=r"a\.jsonl:3: is not valid UTF-8 \(a NUL byte at byte \d+"):
        texts(torn)
    assert texts(write(tmp_path / "a.jsonl", b'{"text": "a\\u0000b"}\n')) == ["a\0b"]  # asked for by its writer


# JSON

JSON = {
    "deep": ('{"text": "x", "tree": ' + "[" * 100_000 + "]" * 100_000 + "}", "is JSON that is nested too deeply"),
    "surrogate": (r'{"text": "\ud800"}', r"is not valid UTF-8 \(surrogates not allowed"),
    "twice": ('{"text": "a", "text": "b"}', "has the field 'text' 2 times, with different values"),
    "twice, in escapes": (r'{"text": "a", "te\u0078t": "b"}', "has the field 'text' 2 times, with different values"),
    "twice, a quote": (r'{"te\"": 1, "text": "a", "\u0074ext": "b"}', "has the field 'text' 2 times, with different"),
    "number": ('{"text": ' + "9" * 5000 + "}", "its field 'text' is a float, not a text"),
    "nan": ('{"text": NaN}', "its field 'text' is a float, not a text"),
    "null": ('{"text": null}', "its field 'text' is a NoneType"),
    "string": ('"text"', "holds a JSON str: a file of JSON lines"),
    "array": ('[{"text": "x"},', r"is not JSON .*one array: `jq -c \.\[\]` makes lines"),
    "whole array": ('[{"text": "x"}]', r"holds a JSON list.*`jq -c \.\[\]` makes lines of an array"),
    "object": ("{", r"is not JSON .*an object on several lines: `jq -c \.` makes lines"),
    "comma": ('{"text": "x"},', r"is not JSON \(Extra data"),
    "python": ("{'text': 'x'}", "is not JSON .*double quotes"),
    "torn": ('{"text": "x', r"is not JSON \(Unterminated string"),
    "old Mac": ('{"text": "x"}\r{"text": "y"}', r"is not JSON \(Extra data"),
}


@pytest.mark.parametrize("case", JSON)
def test_bad_lines_are_named(tmp_path, case):
    line, words = JSON[case]
    path = write(tmp_path / "a.jsonl", LINES + line.encode() + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: {words}"):
        texts(path)
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: {words}"):
        texts(path, cut=20 if len(line) < 100 else 1 << 17)


def test_harmless_lines(tmp_path):
    lines = [
        '{"n": ' + "9" * 5000 + ', "text": "a"}',
        '{"x": NaN, "text": "b"}',
        '{"text": "c", "text": "c"}\r',
        '{"text": "d", "meta": {"text": 1, "more": [{"text": 2}]}}',
        '{"text": "\\"text\\" \\"text\\""}',
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode())
    assert texts(path) == ["a", "b", "c", "d", '"text" "text"']
