"""A corpus that needs no download: the source code of the standard library of the Python that runs this.

About 30 MB in 1,700 files. Some packages are held out for validation, each with its own tests, so that no file of a
package is trained on and another one validated on.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from llama_jax.data.manifest import MANIFEST
from llama_jax.data.prepare.pieces import InputSlice
from llama_jax.data.prepare.prepare import prepare
from llama_jax.data.prepare.request import Request
from llama_jax.files import cache_folder, locked

VOCAB_SIZE = 4096
HELD_OUT = 0.04  # of the bytes, at least
LARGEST_HELD_OUT = 0.01  # of the bytes: a larger package is trained on
SMALLEST = 1 << 20  # bytes; with less there is no source code, as in embedded Pythons
SHARD_BYTES = 1 << 22
VERSION = 1  # of this file's choices: another number prepares anew
GZIP_ALONE, GZIP_JOINED = "gzip -9, each file alone", "gzip -9, all files joined"


def stdlib_corpus(
    folder: str | Path | None = None, vocab_size: int = VOCAB_SIZE, *, workers: int | None = None
) -> tuple[Path, Path]:
    """Prepares the standard library as two corpora, or finds them where they were prepared before.

    Each has a folder of its own for each version of Python and each size of the vocabulary.

    The validation corpus's manifest has `reference`: bits per byte that gzip -9 needs for its files, each on its own
    and all of them joined.

    Args:
      folder: where that folder is made; None takes the cache's `data`.
      vocab_size: of the tokenizer, which is trained on the training corpus.
      workers: processes; None takes one for each CPU.

    Returns:
      The folders of the training and the validation corpus.

    Raises:
      ValueError: this Python has no source code of its standard library.
    """
    train, validation = split(find_sources())
    key = "\n".join([f"{VERSION} {vocab_size}", *(f"{piece.name} {piece.version}" for piece in train + validation)])
    parent = cache_folder() / "data" if folder is None else Path(os.path.expanduser(folder))
    folder = parent / f"stdlib-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):  # of several processes of a run, one prepares
        request = Request(train, SHARD_BYTES, vocab_size=vocab_size)
        prepare(request, folder / "train", workers=workers)
        request = Request(validation, SHARD_BYTES, tokenizer=folder / "train")
        reference = {} if (folder / "validation" / MANIFEST).exists() else gzip_bits_per_byte(validation)
        prepare(request, folder / "validation", workers=workers, reference=reference)
    return folder / "train", folder / "validation"


def find_sources() -> list[InputSlice]:
    """Finds the source files that are UTF-8, in the order of their names; some of the tests' files are not."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
        for path in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            data = path.read_bytes()
            try:
                data.decode()
            except UnicodeDecodeError:
                continue
            if data:
                version = (len(data), path.stat().st_mtime_ns)
                name = path.relative_to(root).as_posix()
                pieces.append(InputSlice("text", str(path), name, nbytes=len(data), version=version))
    if sum(piece.nbytes for piece in pieces) < SMALLEST:
        raise ValueError(
            f"{root}: has no source code of the standard library: use a complete Python, such as python.org's"
        )
    return sorted(pieces, key=lambda piece: piece.name)


def split(pieces: Sequence[InputSlice]) -> tuple[list[InputSlice], list[InputSlice]]:
    """Divides the files into training and validation, by package, in an order that the packages' names decide."""
    names = {_top(piece.name) for piece in pieces}
    packages: dict[str, int] = {}
    for piece in pieces:
        package = _package(piece.name, names)
        packages[package] = packages.get(package, 0) + piece.nbytes
    total, held_out, nbytes = sum(packages.values()), set(), 0
    for package in sorted(packages, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if nbytes < HELD_OUT * total and packages[package] <= LARGEST_HELD_OUT * total:
            held_out.add(package)
            nbytes += packages[package]
    parts: tuple[list[InputSlice], list[InputSlice]] = ([], [])
    for piece in pieces:
        parts[_package(piece.name, names) in held_out].append(piece)
    return parts


def _top(name: str) -> str:
    return name.partition("/")[0].removesuffix(".py")


def _package(name: str, names: set[str]) -> str:
    """Names the package of a file: json for json/decoder.py, _json.py, test/test_json.py and test/test_json/x.py."""
    tests = re.match(r"test/(?:test_)?(\w+)", name)
    own = tests[1] if tests and tests[1] in names else _top(name)
    return own.lstrip("_") or own


def gzip_bits_per_byte(pieces: Sequence[InputSlice]) -> dict[str, float]:
    """Returns what gzip -9 needs, in bits per byte of text: each file on its own, and all of them joined."""
    files = [Path(piece.path).read_bytes() for piece in pieces]
    nbytes = sum(map(len, files))
    alone = sum(len(gzip.compress(data, 9, mtime=0)) for data in files)
    joined = len(gzip.compress(b"".join(files), 9, mtime=0))
    return {GZIP_ALONE: 8 * alone / nbytes, GZIP_JOINED: 8 * joined / nbytes}
