"""Which files are read: through links, once each, not the output; what is left out or may not be read is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.data.corpus import open_corpus
from llama_jax.data.manifest import UNFINISHED
from llama_jax.data.prepare.pieces import find_pieces
from llama_jax.data.prepare.prepare import make_request, prepare
from llama_jax.data.prepare.system import naming, told
from llama_jax.data.prepare.train_tokenizer import train_tokenizer
from llama_jax.data.prepare.walk import TWICE
from tests.data.inputs import texts, write
from tests.data.test_prepare import SCRIPT, make_texts, run_script


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


def test_a_prepared_corpus_is_no_input(tmp_path, vocabulary):
    write(tmp_path / "a.txt", b"some text")
    prepare(make_request([tmp_path / "a.txt"], tokenizer=vocabulary), tmp_path / "corpus", workers=0)
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    for name in ("corpus", "link"):
        with pytest.raises(
            FileNotFoundError, match=rf"{name}: has no file .*; left out: prepared corpora: 1, .*/{name}: "
        ):
            make_request([tmp_path / name], tokenizer=vocabulary)


def test_a_folder_deeper_than_python_recurses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(sys.getrecursionlimit() + 10):
        os.mkdir("a")
        os.chdir("a")
    write(Path("x.txt"), b"x")
    os.chdir(tmp_path)
    (piece,) = find_pieces(["a"])
    assert piece.path.endswith("/a/x.txt")
    subprocess.run(["rm", "-r", "a"], check=True)  # which shutil of some Pythons cannot


# Errors of the system

AS_OTHERS = ["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
TRY = """
import sys
from llama_jax.data.corpus import open_corpus
from llama_jax.data.prepare.pieces import find_pieces
from llama_jax.data.prepare.request import make_request
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
    assert told(own, "in.txt") is own


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
