"""A prepared corpus holds the documents' tokens in order, whatever happens to its preparation."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_jax.data.corpus import check_tokenizer, open_corpus
from llama_jax.data.manifest import MANIFEST, UNFINISHED
from llama_jax.data.prepare import stdlib, workers
from llama_jax.data.prepare.prepare import make_request, prepare
from llama_jax.data.prepare.train_tokenizer import train_tokenizer
from llama_jax.text.facts import Facts
from llama_jax.text.spm import SentencePieceTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
WORDS = ["def", "return", "self", "naïve", "三つ目", "\n    ", "\t", " = ", "(x, y):\n", "1234", "🦙"]


def make_texts(count: int, words: int = 200) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choice(WORDS) + rng.choice(["", " "]) for _ in range(words)) for _ in range(count)]


def write_lines(path: Path, texts, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(make_texts(50), 500))
    return folder


@pytest.fixture
def make(tmp_path, vocabulary):
    """Prepares what lies in tmp_path/input, by default in this process."""

    def make(out="corpus", *, workers=0, **options):
        options = {"tokenizer": vocabulary, "shard_bytes": 4000} | options
        return prepare(make_request([tmp_path / "input"], **options), tmp_path / out, workers=workers)

    (tmp_path / "input").mkdir()
    return make


def test_the_tokens_of_all_documents_in_order(tmp_path, make, vocabulary):
    texts = make_texts(60)
    write_lines(tmp_path / "input" / "a.jsonl", texts[:50])
    for i, text in enumerate(texts[50:]):
        (tmp_path / "input" / f"b\n{i}.txt").write_text(text, newline="")
    manifest = make()
    assert manifest == make()  # finished already
    make("parallel", workers=2)
    assert content(tmp_path / "corpus") == content(tmp_path / "parallel")

    corpus = open_corpus(tmp_path / "corpus")
    tokenizer = corpus.tokenizer()
    expected = [[1, *tokenizer.encode(text), 2] for text in texts]
    assert len(manifest.shards) > 10
    assert (manifest.bos, manifest.eos_id, manifest.vocab_size, manifest.token_dtype) == (True, 2, 500, "uint16")
    assert (manifest.documents, manifest.tokens) == (60, sum(map(len, expected)))
    assert manifest.bytes == sum(len(text.encode()) for text in texts)
    order = np.random.default_rng(0).permutation(60)
    for copy in (corpus, pickle.loads(pickle.dumps(corpus))):
        for i, document in zip(order, copy.read(order), strict=True):
            assert document.dtype == np.int32
            assert document.tolist() == expected[i]
    assert tokenizer.decode(corpus.read([3])[0]) == texts[3]
    assert np.array_equal(corpus.lengths[order.reshape(6, 10)].ravel(), [len(expected[i]) for i in order])
    assert np.array_equal(corpus.nbytes[5:60:7], [len(text.encode()) for text in texts[5::7]])
    assert corpus.lengths[59] == len(expected[59])
    assert corpus.source(0) == f"{tmp_path}/input/a.jsonl@0"
    assert corpus.source(51) == f"{tmp_path}/input/b\\n1.txt"
    assert content(tmp_path / "corpus")["tokenizer.model"] == (vocabulary / "tokenizer.model").read_bytes()
    with pytest.raises(IndexError, match="documents are numbered 0 to 59, asked for 60 to 60"):
        corpus.read([60])


def test_bos_and_large_vocabularies(tmp_path, make):
    """A tokenizer.json of 70,000 tokens, without BOS, that ends documents by <|endoftext|> and turns by its EOS."""
    import tokenizers

    words = {"[UNK]": 0, "a": 1, "b": 69_997, "<|endoftext|>": 69_998, "<|im_end|>": 69_999}
    words |= {f"w{i}": i for i in range(2, 69_997)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (tmp_path / "input" / "a.txt").write_text("a b <|im_end|> a")
    manifest = make(tokenizer=tmp_path / "tokenizer")
    assert (manifest.bos, manifest.token_dtype, manifest.tokenizer_file) == (False, "uint32", "tokenizer.json")
    (document,) = open_corpus(tmp_path / "corpus").read([0])
    assert document[:2].tolist() == [1, 69_997]
    assert document[-2:].tolist() == [1, 69_998]
    assert 69_999 not in document
    with pytest.raises(ValueError, match="the tokenizer has no BOS"):
        make("other", tokenizer=tmp_path / "tokenizer", bos=True)


def test_a_trained_tokenizer_keeps_every_character(tmp_path, make):
    write_lines(tmp_path / "input" / "a.jsonl", make_texts(50))
    manifest = make(tokenizer=None, vocab_size=400)
    make("again", tokenizer=None, vocab_size=400, workers=1)
    assert content(tmp_path / "corpus") == content(tmp_path / "again")
    tokenizer = SentencePieceTokenizer(
        (tmp_path / "corpus" / "tokenizer.model").read_bytes(), Facts(), source="trained"
    )
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids, manifest.vocab_size) == (400, 1, (2,), 400)
    assert [tokenizer.token_bytes(i)[0] for i in range(3, 259)] == list(range(256))
    assert len(tokenizer.encode("1234567")) == 8  # each digit, and the space before
    for text in ("", " ", "  two  \n\n\tx ", "\r\n\0", "é🦙 unseen: ß", "def f(x):\n        return 1\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # A sample: it is less than everything, and the same each time.
    sampled = [make(f"s{i}", tokenizer=None, vocab_size=300, sample_bytes=9000) for i in range(2)]
    assert sampled[0] == sampled[1]
    with pytest.raises(ValueError, match="no vocabulary of 9000 tokens can be learned from 50 documents .*smaller"):
        make("large", tokenizer=None, vocab_size=9000)
    with pytest.raises(ValueError, match="a vocabulary needs at least 260 tokens"):
        make("small", tokenizer=None, vocab_size=100)
    with pytest.raises(ValueError, match="give either a tokenizer or the size of a vocabulary"):
        make("both", vocab_size=400)


def test_empty_documents(tmp_path, make):
    (tmp_path / "input" / "empty.txt").write_text("")
    write_lines(tmp_path / "input" / "empty.jsonl", [])
    with pytest.raises(ValueError, match="there is no document with text in the input; 1 empty were left out"):
        make()
    write_lines(tmp_path / "input" / "some.jsonl", ["", "x", ""])
    manifest = make("some", shard_bytes=1)  # a shard may be without any document
    assert (manifest.documents, manifest.skipped) == (1, {"empty": 3})
    assert 0 in [shard.documents for shard in manifest.shards]
    corpus = open_corpus(tmp_path / "some")
    assert [len(document) for document in corpus.read([0])] == corpus.lengths[:].tolist()


def run_script(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C"])
def test_an_interrupted_preparation_resumes(tmp_path, make, vocabulary, how):
    write_lines(tmp_path / "input" / "a.jsonl", make_texts(800))
    options = {"shard_bytes": 25_000}
    make("whole", workers=2, **options)
    out = tmp_path / "corpus"
    arguments = [tmp_path / "input", out, "--tokenizer", vocabulary, "--shard-bytes", options["shard_bytes"]]
    process = run_script(*arguments, "--workers", 2, start_new_session=True)
    while len(list((out / UNFINISHED).glob("*.json"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    started = children(process.pid)
    assert len(started) >= 2
    if how == "kill -9":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == ((-9, "") if how == "kill -9" else (130, "interrupted\n"))
    deadline = time.monotonic() + 10
    while any(map(is_running, started)):
        assert time.monotonic() < deadline, "the workers outlive their parent"
        time.sleep(0.01)

    with pytest.raises(ValueError, match="its preparation did not finish: run scripts/prepare_data.py again"):
        open_corpus(out)
    finished = [path.stem for path in (out / UNFINISHED).glob("*.json")]
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name.partition(".")[0] in finished}
    assert 3 <= len(finished) < len(list((tmp_path / "whole").glob("*.index")))
    _, err = run_script(*arguments).communicate()
    assert f"{len(finished)} of" in err
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert content(out) == content(tmp_path / "whole")


def test_only_what_has_changed_is_done_again(tmp_path, make):
    for i in range(4):
        (tmp_path / "input" / f"{i}.txt").write_text(f"text {i} " * 2000)
    (tmp_path / "input" / "4.txt").write_bytes(b"\xff" * 9000)
    with pytest.raises(ValueError, match=r"4\.txt: is not valid UTF-8"):
        make()
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "corpus").glob("*.array_record"))}
    assert len(before) == 4
    (tmp_path / "corpus" / "00003-of-00005.index").write_bytes(b"")
    (tmp_path / "input" / "1.txt").write_text("other " * 2000)
    (tmp_path / "input" / "4.txt").write_text("good " * 2000)
    make()
    assert [path.stat().st_mtime_ns == at for path, at in before.items()] == [True, False, True, False]
    corpus = open_corpus(tmp_path / "corpus")
    assert [corpus.tokenizer().decode(ids)[:6] for ids in corpus.read(range(5))] == [
        "text 0", "other ", "text 2", "text 3", "good g",
    ]  # fmt: skip


def test_a_full_disk(tmp_path, make):
    """A limit on the size of files stands in for it: ArrayRecord tells of both in the same way."""
    for i in range(3):
        text = bytes(random.Random(i).choices(range(33, 127), k=200_000 if i == 1 else 2000)).decode()
        (tmp_path / "input" / f"{i}.txt").write_text(text)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"corpus: the disk is full \(.* GB free\): make room and run the same again"):
            make(shard_bytes=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = {path.name for path in (tmp_path / "corpus").rglob("0*")}
    assert names == {f"00000-of-00003.{kind}" for kind in ("array_record", "index", "sources", "json")}
    make(shard_bytes=1000)
    make("whole", shard_bytes=1000)
    assert content(tmp_path / "corpus") == content(tmp_path / "whole")


def test_folders_that_hold_something_else(tmp_path, make, vocabulary):
    import filelock

    (tmp_path / "input" / "a.txt").write_text("text")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("work of years")
    with pytest.raises(FileExistsError, match=r"mine: holds something else than a corpus, such as thesis\.tex"):
        make("mine")
    with pytest.raises(FileExistsError, match=r"input/a\.txt: is a file: give a folder"):
        make("input/a.txt")
    with pytest.raises(FileExistsError, match="holds something else than a corpus"):
        shutil.copytree(vocabulary, tmp_path / "tokenizer") and make("tokenizer")
    make()
    with pytest.raises(FileExistsError, match="prepared from other files or with other options"):
        make(bos=False)
    (tmp_path / "busy" / UNFINISHED).mkdir(parents=True)
    with (
        filelock.FileLock(tmp_path / "busy" / UNFINISHED / "lock"),
        pytest.raises(FileExistsError, match="another process is preparing this corpus"),
    ):
        make("busy")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json or tokenizer\.model"):
        make("new", tokenizer=tmp_path / "mine")


def test_damaged_corpora(tmp_path, make):
    write_lines(tmp_path / "input" / "a.jsonl", make_texts(40))
    make()
    good = tmp_path / "corpus"
    records, index = (sorted(path.name for path in good.glob(f"*.{kind}"))[1] for kind in ("array_record", "index"))

    def damaged(name, change):
        shutil.copytree(good, tmp_path / "bad", dirs_exist_ok=True)
        (tmp_path / "bad" / name).write_bytes(change((good / name).read_bytes()))
        return open_corpus(tmp_path / "bad")

    with pytest.raises(ValueError, match=rf"{records}: has 1000 bytes, not \d+: it is truncated"):
        damaged(records, lambda data: data[:1000])
    with pytest.raises(ValueError, match=rf"{index}: has \d+ bytes, not \d+: it is truncated"):
        damaged(index, lambda data: data[:-8])
    with pytest.raises(ValueError, match=rf"{MANIFEST}: is not the manifest .* the shards have"):
        damaged(MANIFEST, lambda data: data.replace(b'"documents": 40', b'"documents": 41'))
    with pytest.raises(ValueError, match=rf"{MANIFEST}: is not the manifest .* this llama_jax reads formats 1 and 2"):
        damaged(MANIFEST, lambda data: data.replace(b'"format": 1', b'"format": 3'))
    with pytest.raises(ValueError, match=rf"{records}: is damaged .* prepare the corpus again"):
        damaged(records, lambda data: data[:150] + bytes(100) + data[250:]).read(range(40))
    with pytest.raises(ValueError, match=rf"{records}: document \d+ has \d+ bytes, the index says \d+ tokens"):
        damaged(index, lambda data: bytes([data[0] ^ 1, *data[1:]])).read(range(40))
    (tmp_path / "bad" / index).unlink()
    with pytest.raises(ValueError, match=f"{index}: is missing"):
        open_corpus(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"input: has no manifest\.json: give a folder that"):
        open_corpus(tmp_path / "input")
    with pytest.raises(FileNotFoundError, match="no such corpus"):
        open_corpus(tmp_path / "nowhere")


def test_another_tokenizer(tmp_path, make):
    (tmp_path / "input" / "a.txt").write_text("text")
    make()
    corpus = open_corpus(tmp_path / "corpus")
    check_tokenizer(corpus, sha256=corpus.manifest.tokenizer_sha256, vocab_size=512)
    with pytest.raises(ValueError, match=r"prepared with another tokenizer .* --tokenizer"):
        check_tokenizer(corpus, sha256="0" * 64)
    with pytest.raises(ValueError, match="its tokenizer has 500 ids, the model has room for 499"):
        check_tokenizer(corpus, vocab_size=499)


def test_the_script(tmp_path, vocabulary):
    text = tmp_path / "a.txt"
    text.write_bytes(b"")
    arguments = [text, tmp_path / "corpus", "--tokenizer", vocabulary, "--json"]
    process = run_script(*arguments)
    out, err = process.communicate()
    assert (out, process.returncode) == ("", 1)
    assert err == "error: there is no document with text in the input; 1 empty were left out: check the files\n"
    text.write_text("text")
    out, err = run_script(*arguments).communicate()
    assert json.loads(out)["documents"] == 1, err


def test_a_killed_worker_is_told():
    with pytest.raises(OSError, match=r"a worker process ended with code -9; if the machine ran out of memory"):
        list(workers.run(kill_me, [1, 2, 3], workers=2, advance=lambda done: None))


def kill_me(task, advance):
    advance(task)
    os.kill(os.getpid(), signal.SIGKILL)


def test_standard_library(tmp_path, monkeypatch):
    sources = stdlib.find_sources()
    train, validation = stdlib.split(sources)
    assert sorted([*train, *validation], key=lambda piece: piece.name) == sources
    nbytes = sum(piece.nbytes for piece in sources)
    assert nbytes > 5e6
    assert 0.03 < sum(piece.nbytes for piece in validation) / nbytes < 0.06
    held_out = {piece.name.partition("/")[0].removesuffix(".py").lstrip("_") for piece in validation} - {"test"}
    for piece in train:  # neither a package held out nor its tests
        top, _, rest = piece.name.removesuffix(".py").partition("/")
        assert top.lstrip("_") not in held_out, piece.name
        assert rest.partition("/")[0].removeprefix("test_") not in held_out or top != "test", piece.name

    some = [piece for piece in sources if piece.name.startswith(("j", "q", "co", "test/test_j", "test/test_q"))]
    monkeypatch.setattr(stdlib, "find_sources", lambda: some)
    monkeypatch.setattr(stdlib, "split", lambda pieces: (pieces[:-9], pieces[-9:]))
    folders = [stdlib.stdlib_corpus(tmp_path / name, 700, workers=workers) for name, workers in (("a", 2), ("b", 0))]
    for a, b in zip(*folders, strict=True):
        assert content(a) == content(b)
    assert folders[0] == stdlib.stdlib_corpus(tmp_path / "a", 700)
    train, validation = map(open_corpus, folders[0])
    assert len(train) == len(some) - 9
    check_tokenizer(validation, sha256=train.manifest.tokenizer_sha256)
    assert [validation.source(i) for i in range(9)] == [piece.name for piece in some[-9:]]
    assert train.tokenizer().decode(train.read([5])[0]) == Path(some[5].path).read_bytes().decode()
    alone, joined = (validation.manifest.reference[name] for name in (stdlib.GZIP_ALONE, stdlib.GZIP_JOINED))
    assert 1 < joined < alone < 4
