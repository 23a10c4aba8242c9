"""What a stranger's folder holds: links, pipes, every encoding, compression and kind of file."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llama_jax.data.corpus import open_corpus
from llama_jax.data.documents import Reading, read_piece
from llama_jax.data.manifest import INPUTS, UNFINISHED
from llama_jax.data.pieces import cut_pieces, find_pieces
from llama_jax.data.prepare import make_request, prepare
from llama_jax.data.system import in_words, naming
from llama_jax.data.train_tokenizer import train_tokenizer
from llama_jax.data.walk import TWICE
from tests.data.test_prepare import SCRIPT, make_texts, run_script

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def texts(*inputs, cut=1 << 62, reading=None, skipped=None, **options) -> list[str]:
    pieces = cut_pieces(find_pieces(inputs, **options), cut)
    return [document.text for piece in pieces for document in read_piece(piece, reading or Reading(), skipped)]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder / "tokenizer.model", train_tokenizer(make_texts(20), 300))
    return folder


# Folders


def test_links_are_followed_and_what_is_left_out_is_said(tmp_path, vocabulary, caplog):
    root = tmp_path / "in"
    for name in ("in/a.txt", "disk/b.txt", "disk/deep/c.txt", "one/d.txt", "in/.hidden/e.txt", "in/.f.txt", "in/g.py"):
        write(tmp_path / name, name[-5:-4].encode())
    (root / "disk").symlink_to("../disk")
    (root / "file.txt").symlink_to(tmp_path / "one" / "d.txt")
    (tmp_path / "disk" / "back").symlink_to(root)  # a circle
    (root / "self").symlink_to(root / "self")
    (root / "broken.txt").symlink_to("nowhere")
    os.mkfifo(root / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "socket.txt"))
        request = make_request([root], tokenizer=vocabulary, glob="*.txt")
    assert texts(root, glob="*.txt") == ["a", "d", "b", "c"]
    assert [Path(piece.path).relative_to(root).as_posix() for piece in request.pieces] == [
        "a.txt", "file.txt", "disk/b.txt", "disk/deep/c.txt",
    ]  # fmt: skip
    assert sorted(line.partition(f"{root}/")[0] + line.partition(f"{root}/")[2] for line in caplog.messages) == [
        f"left out: {TWICE}: 1, disk/back",
        "left out: files that --glob does not match: 1, g.py",
        f"left out: hidden files and folders: 2, .f.txt, {root}/.hidden",
        f"left out: pipes, sockets and devices: 2, pipe.txt, {root}/socket.txt",
        f"left out: symbolic links that lead nowhere: 2, broken.txt, {root}/self",
    ]


def test_many_of_one_reason_are_one_line(tmp_path, vocabulary, caplog):
    for i in range(50):
        write(tmp_path / f".{i:02d}.txt", b"x")
    write(tmp_path / "a.txt", b"x")
    make_request([tmp_path], tokenizer=vocabulary)
    line = ", ".join(f"{tmp_path}/.{i:02d}.txt" for i in range(3))
    assert caplog.messages == [f"left out: hidden files and folders: 50, {line}, ..."]


def test_given_paths_that_give_nothing(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"link: is a symbolic link to gone, which is not there"):
        texts(tmp_path / "link")
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "p.jsonl")
    with pytest.raises(FileNotFoundError, match=r"has no file that --glob .*; left out: pipes, .*p\.jsonl: check"):
        texts(tmp_path / "in")
    write(tmp_path / "a.txt", b"a")
    with pytest.raises(FileNotFoundError, match=r"\*\.txt: no such file; it is a pattern"):
        texts(tmp_path / "*.txt")
    with pytest.raises(ValueError, match="/dev/null: is a socket or a device"):
        texts("/dev/null")


def test_each_file_is_read_once(tmp_path, vocabulary, caplog):
    a = write(tmp_path / "in" / "a.txt", b"a")
    (tmp_path / "link.txt").symlink_to(a)
    os.link(a, tmp_path / "in" / "hard.txt")
    assert texts(a, a, tmp_path / "in", tmp_path / "link.txt", tmp_path / "in" / ".." / "in") == ["a", "a"]
    make_request([a, a, tmp_path / "in"], tokenizer=vocabulary)
    assert [line.partition(": 1, ")[0] if "note" in line else line[:50] for line in caplog.messages] == [
        "left out: files and folders that are given twice or"[:50],
        "note: files that are hard links to others (each name is read)",
    ]


def test_the_output_in_the_input(tmp_path, vocabulary, caplog):
    write(tmp_path / "in" / "a.txt", b"some text")
    out = tmp_path / "in" / "corpus"
    for given in (out, None):  # the second: a prepared corpus is known by its files
        request = make_request([tmp_path / "in"], tokenizer=vocabulary, out=given)
        assert prepare(request, out, workers=0).documents == 1
    request = make_request([tmp_path / "in"], tokenizer=vocabulary, out=out)
    assert prepare(request, out, workers=0).documents == 1
    assert caplog.messages == [
        f"left out: prepared corpora: 1, {out}",
        f"left out: folders that the corpus is written to: 1, {out}",
    ]
    with pytest.raises(ValueError, match="in: is both an input and the folder of the corpus"):
        make_request([tmp_path / "in"], tokenizer=vocabulary, out=tmp_path / "corpus" / ".." / "in")


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


# Errors of the system

AS_OTHERS = ["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
TRY = """
import sys
from llama_jax.data.corpus import open_corpus
from llama_jax.data.pieces import find_pieces
from llama_jax.data.request import make_request
for path in sys.argv[1:]:
    try:
        corpus = open_corpus(path) if path.endswith("corpus") else None
        corpus.read([0]) if corpus else make_request([path], tokenizer=path) if "token" in path else find_pieces([path])
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_no_permission_is_told_as_it_is(tmp_path, vocabulary):
    """As root by setpriv (util-linux), which takes away root's privilege to read everything."""
    for name in ("file/a.txt", "folder/sub/a.txt", "closed/sub/a.txt"):
        write(tmp_path / name, b"text")
    prepare(make_request([tmp_path / "file"], tokenizer=vocabulary), tmp_path / "corpus", workers=0)
    for name in ("manifest.json", "00000-of-00001.index", "00000-of-00001.array_record"):
        shutil.copytree(tmp_path / "corpus", tmp_path / f"{name}-corpus")
        (tmp_path / f"{name}-corpus" / name).chmod(0)
    shutil.copytree(vocabulary, tmp_path / "closed" / "token")
    closed = [tmp_path / "file" / "a.txt", tmp_path / "folder" / "sub", tmp_path / "closed"]
    paths = [tmp_path / "file" / "a.txt", tmp_path / "file", tmp_path / "folder", tmp_path / "closed" / "sub" / "a.txt"]
    paths += [tmp_path / "closed" / "token", *sorted(tmp_path.glob("*-corpus"))]
    for path in closed:
        path.chmod(0)
    try:
        before = ["setpriv", *AS_OTHERS] if os.getuid() == 0 else []
        command = [*before, sys.executable, "-c", TRY, *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1])
    finally:
        for path in closed:
            path.chmod(0o755)
    words = "no permission to read it: ask its owner, or change it with chmod"
    lines = done.stdout.replace(f"{tmp_path}/", "").splitlines()
    assert lines == [
        f"PermissionError {name}: {words}"
        for name in (
            "file/a.txt", "file/a.txt", "folder/sub", "closed/sub/a.txt", "closed/token",
            "00000-of-00001.array_record-corpus/00000-of-00001.array_record",
            "00000-of-00001.index-corpus/00000-of-00001.index", "manifest.json-corpus/manifest.json",
        )
    ], done.stderr  # fmt: skip


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EMFILE, OSError, r"in\.txt: cannot be opened, .*`ulimit -n`"),
        (errno.EROFS, OSError, r"in\.txt: is on a file system that is read-only: give another folder"),
        (errno.EACCES, PermissionError, r"in\.txt: no permission to write it"),
        (errno.EFBIG, OSError, r"in\.txt: is larger than a file may be here \(`ulimit -f`.*: raise the limit"),
        (errno.ENOSPC, OSError, r"in\.txt: its disk is full: make room and run the same again"),
        (errno.ENOTTY, OSError, r"in\.txt: inappropriate ioctl"),
        (errno.EIO, OSError, r"in\.txt: the device failed to write it"),
    ],
)
def test_the_system_s_errors_name_the_file(number, kind, words):
    with pytest.raises(kind, match=words) as caught, naming("in.txt", "write"):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    own = FileExistsError("in.txt: says enough")
    assert in_words(own, "in.txt") is own


# Pipes


def test_standard_input_is_read_once(tmp_path, vocabulary):
    """`-`, /dev/stdin and <(...): the documents that the file has, and no second time."""
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in make_texts(20))
    path = write(tmp_path / "a.jsonl", lines)
    prepare(make_request([path], tokenizer=vocabulary), tmp_path / "file", workers=0)
    expected = [ids.tolist() for ids in open_corpus(tmp_path / "file").read(range(20))]
    script = f"{sys.executable} {SCRIPT}"
    end = f"--tokenizer {vocabulary} --format jsonl"
    commands = [
        f"gzip -c a.jsonl | {script} - out0 {end}",
        f"cat a.jsonl | {script} /dev/stdin out1 {end} --workers 2",
        f"{script} <(cat a.jsonl) out2 {end}",
        f"{script} - out3 {end} < a.jsonl",
        f"{script} - out4 {end} < /dev/null; test $? = 1 && test ! -e out4 && cat a.jsonl | {script} - out4 {end}",
    ]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    started = [
        subprocess.Popen(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    for i, process in enumerate(started):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        corpus = open_corpus(tmp_path / f"out{i}")
        assert [ids.tolist() for ids in corpus.read(range(len(corpus)))] == expected, commands[i]
    assert open_corpus(tmp_path / "out0").source(3) == "stdin:4"

    request = make_request(["-"], tokenizer=vocabulary, format="jsonl")
    with pytest.raises(FileExistsError, match=r"out0: .*\(stdin cannot be read again\): give another folder"):
        prepare(request, tmp_path / "out0")
    (tmp_path / "new" / UNFINISHED).mkdir(parents=True)
    with pytest.raises(FileExistsError, match="was interrupted, and what comes from a pipe cannot be read again"):
        prepare(request, tmp_path / "new")
    for words, options in {
        "-: has no name that says what it holds: give --format": {"tokenizer": vocabulary},
        "-: is a pipe, and Parquet is read from its end": {"tokenizer": vocabulary, "format": "parquet"},
        "-: can be read only once, and a vocabulary is trained before": {"vocab_size": 300, "format": "text"},
    }.items():
        with pytest.raises(ValueError, match=words):
            make_request(["-"], **options)
    with pytest.raises(ValueError, match="/dev/stdin: is given twice"):
        make_request(["-", "/dev/stdin"], tokenizer=vocabulary, format="text")


def test_an_input_that_gives_nothing_makes_the_script_fail(tmp_path, vocabulary):
    good, empty = write(tmp_path / "a.txt", b"text"), write(tmp_path / "b.jsonl", b"\n")
    for err in ("", f"{tmp_path}/out: was prepared already\n"):
        process = run_script(good, empty, tmp_path / "out", "--tokenizer", vocabulary, "--json")
        out, found = process.communicate()
        assert process.returncode == 1
        assert found == f"{err}error: {empty}: gave no document: check it, or leave it out\n"
        assert json.loads(out)["documents"] == 1
    assert len(open_corpus(tmp_path / "out")) == 1


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
