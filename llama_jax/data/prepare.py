"""Prepares a corpus: text in, tokenised shards with a manifest out, in parallel and resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from llama_jax.data import workers as worker_processes
from llama_jax.data.corpus import (
    FORMAT,
    MANIFEST,
    UNFINISHED,
    Manifest,
    is_corpus_file,
    read_manifest,
    shard_files,
    tokenizer_sha256,
)
from llama_jax.data.documents import Format, InvalidUtf8, Piece, Reading, find_pieces, group_pieces
from llama_jax.data.shards import Done, Encoder, ShardWork, Task, disk_full, is_full, load_from_files, write_whole
from llama_jax.data.train_tokenizer import SAMPLE_BYTES, sample_texts, train_tokenizer
from llama_jax.text.tokenizer import TOKENIZER_FILES, VOCABULARY_FILES, read_files

SHARDS = 256  # about as many, unless that makes them smaller or larger than these:
SMALLEST_SHARD, LARGEST_SHARD = 1 << 24, 1 << 30  # bytes of input
REPORT_EVERY = 10.0  # seconds between lines where stderr is a file


@dataclasses.dataclass(frozen=True)
class Request:
    """What a corpus is made from, and how.

    Attributes:
        pieces: Of the input.
        shard_bytes: About how much input makes a shard.
        reading: How documents are read.
        tokenizer: Folder or vocabulary file of the tokenizer; None trains one.
        vocab_size: Of the tokenizer to train.
        sample_bytes: About how much text to train it on.
        bos: Whether BOS begins each document; None as the tokenizer says.
    """

    pieces: Sequence[Piece]
    shard_bytes: int
    reading: Reading = Reading()
    tokenizer: Path | None = None
    vocab_size: int | None = None
    sample_bytes: int = SAMPLE_BYTES
    bos: bool | None = None

    def __post_init__(self):
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError("give either a tokenizer or the size of a vocabulary to train (--tokenizer, --train-tokenizer)")

    def fingerprint(self, *more: object) -> str:
        """Hashes all that the corpus depends on; of the input, names, sizes and times of the last change."""
        pieces = [[piece.kind, piece.name, piece.start, piece.stop, piece.version] for piece in self.pieces]
        return _hash(FORMAT, pieces, self.shard_bytes, dataclasses.astuple(self.reading), self.bos, *more)


def make_request(
    inputs: Iterable[str | Path],
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    sample_bytes: int = SAMPLE_BYTES,
    field: str = "text",
    format: Format = "auto",
    glob: str = "*",
    invalid_utf8: InvalidUtf8 = "error",
    shard_bytes: int | None = None,
    bos: bool | None = None,
) -> Request:
    """Looks at the input, without reading it.

    Args:
        inputs: Files, folders and `hf:` datasets, as `documents.find_pieces` takes.
        tokenizer: A folder with a tokenizer, such as a checkpoint, or its `tokenizer.json` or `tokenizer.model`.
        vocab_size: Instead of a tokenizer: train one of this size on the input.
        sample_bytes: About how much of the input it is trained on.
        field: Which field of JSON lines, Parquet files and datasets holds the text.
        format: Of the files; `auto` goes by their names.
        glob: Which files of a folder.
        invalid_utf8: What to do with a document that is not valid UTF-8: error, skip or replace.
        shard_bytes: About how much input makes a shard; None makes some 256 shards of 16 MiB to 1 GiB.
        bos: Whether BOS begins each document; None as the tokenizer says.

    Raises:
        FileNotFoundError: An input is not there.
        ValueError: An input's type is unknown, or options contradict each other.
    """
    inputs = list(inputs)
    pieces = find_pieces(inputs, format=format, glob=glob)
    if shard_bytes is None:
        shard_bytes = min(max(sum(piece.nbytes for piece in pieces) // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    if shard_bytes < 1:
        raise ValueError(f"a shard needs at least one byte of input, got {shard_bytes}")
    pieces = find_pieces(inputs, format=format, glob=glob, cut_bytes=shard_bytes)
    return Request(
        pieces,
        shard_bytes,
        Reading(field, invalid_utf8),
        None if tokenizer is None else Path(tokenizer).expanduser(),
        vocab_size,
        sample_bytes,
        bos,
    )


def prepare(
    request: Request, out: str | Path, *, workers: int | None = None, reference: Mapping[str, float] | None = None
) -> Manifest:
    """Prepares a corpus; after an interruption, the same call goes on where it was.

    Args:
        request: What `make_request` returns.
        out: Folder of the corpus: new, empty, or one where the same preparation has begun or is finished.
        workers: Processes; None takes one for each CPU that this process may use.
        reference: For the manifest: bits per byte that something else needs for the texts, by its name.

    Returns:
        The manifest.

    Raises:
        FileExistsError: The folder holds something else, or another process is preparing it.
        OSError: The disk is full, or an input cannot be read.
        ValueError: A document cannot be read, or there is none.
    """

    def run(work: ShardWork, tasks: Sequence[Task]) -> Iterator[Done]:
        with _progress("Preparing", sum(task.nbytes for task in tasks)) as advance:
            yield from worker_processes.run(work, tasks, workers=workers or cpu_count(), advance=advance)

    return prepare_with(run, request, out, reference=reference)


def prepare_with(
    run: Callable[[ShardWork, Sequence[Task]], Iterable[Done]],
    request: Request,
    out: str | Path,
    *,
    reference: Mapping[str, float] | None = None,
) -> Manifest:
    """Prepares a corpus with a given way to run the work for each shard; else as `prepare`."""
    out = Path(out).expanduser()
    wanted = request.fingerprint(_tokenizer_id(request))
    if (manifest := _finished(out, wanted)) is not None:
        return manifest
    try:
        with _only_one(out):
            if (manifest := _finished(out, wanted)) is not None:  # by another process meanwhile
                return manifest
            files = _tokenizer_files(request, out)
            encoder = make_encoder(files, request)
            tasks = make_tasks(request, tokenizer_sha256(files)[1])
            done = _resume(out, tasks, files)
            work = ShardWork(out, encoder, request.reading)
            for result in run(work, [task for task in tasks if task.name not in done]):
                done[result.shard.name] = result
            manifest = make_manifest(encoder, [done[task.name] for task in tasks], reference or {}, wanted)
            write_whole(out / MANIFEST, manifest.to_json())
            shutil.rmtree(out / UNFINISHED)
            return manifest
    except OSError as error:
        if is_full(error):
            raise disk_full(out) from error
        raise


def make_encoder(files: Mapping[str, bytes], request: Request) -> Encoder:
    """Makes the encoder of a request's documents; raises ValueError where the tokenizer lacks BOS or EOS."""
    tokenizer = load_from_files(files)
    if request.bos and tokenizer.bos_id is None:
        raise ValueError("the tokenizer has no BOS: leave --bos out")
    encoder = Encoder(files, tokenizer.add_bos if request.bos is None else request.bos)
    assert encoder.eos_id is not None  # raises where there is none, before any work
    return encoder


def make_tasks(request: Request, sha256: str) -> list[Task]:
    """Divides a request into shards; the tokenizer's SHA-256 is part of their fingerprints."""
    groups = group_pieces(list(request.pieces), request.shard_bytes)
    return [
        Task(
            f"{i:05d}-of-{len(groups):05d}",
            group,
            dataclasses.replace(request, pieces=group).fingerprint(sha256, i, len(groups)),
        )
        for i, group in enumerate(groups)
    ]


def make_manifest(
    encoder: Encoder, shards: Sequence[Done], reference: Mapping[str, float], fingerprint: str
) -> Manifest:
    """Puts the manifest together; raises ValueError if there is no document."""
    skipped: Counter[str] = Counter()
    for done in shards:
        skipped.update(done.skipped)
    documents = sum(done.shard.documents for done in shards)
    if not documents:
        left_out = "".join(f"; {count} {why} were left out" for why, count in skipped.items())
        raise ValueError(f"there is no document with text in the input{left_out}: check the files")
    name, sha256 = tokenizer_sha256(encoder.files)
    return Manifest(
        vocab_size=encoder.tokenizer.vocab_size,
        bos=encoder.bos,
        eos_id=encoder.eos_id,
        tokenizer_file=name,
        tokenizer_sha256=sha256,
        token_dtype="uint16" if encoder.dtype.itemsize == 2 else "uint32",
        documents=documents,
        tokens=sum(done.shard.tokens for done in shards),
        bytes=sum(done.shard.bytes for done in shards),
        shards=tuple(done.shard for done in shards),
        skipped=dict(skipped),
        reference=reference,
        fingerprint=fingerprint,
    )


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finished(out: Path, fingerprint: str) -> Manifest | None:
    """The manifest of a finished preparation of the same; refuses a folder with anything else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise FileExistsError(f"{out}: is a file: give a folder for the corpus")
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if manifest.fingerprint != fingerprint:
            raise FileExistsError(
                f"{out}: holds a corpus that was prepared from other files or with other options: give another folder, or"
                " remove it"
            )
        return manifest
    other = sorted(path.name for path in out.iterdir() if not is_corpus_file(path.name))
    if other or (any(out.iterdir()) and not (out / UNFINISHED).is_dir()):
        raise FileExistsError(
            f"{out}: holds something else than a corpus{f', such as {other[0]}' if other else ''}: give a new folder"
        )
    return None


@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Keeps other processes from preparing the same folder."""
    import filelock

    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / UNFINISHED / "lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise FileExistsError(f"{out}: another process is preparing this corpus: wait for it, or end it") from error


def _tokenizer_id(request: Request) -> object:
    if request.tokenizer is None:
        return [request.vocab_size, request.sample_bytes]
    return tokenizer_sha256(read_tokenizer(request.tokenizer))[1]


def read_tokenizer(path: Path) -> dict[str, bytes]:
    """Reads the files of a tokenizer.

    Args:
        path: A folder, or the vocabulary's file in one.

    Raises:
        FileNotFoundError: There is none.
    """
    files = read_files(path if path.is_dir() else path.parent)
    if path.is_file():  # whatever its name, and of two vocabularies in a folder this one
        name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
        files = {other: data for other, data in files.items() if other not in VOCABULARY_FILES}
        files[name] = path.read_bytes()
    if not any(name in files for name in VOCABULARY_FILES):
        raise FileNotFoundError(
            f"{path}: has no tokenizer.json or tokenizer.model: give a checkpoint's folder or such a file, or train one"
            " with --train-tokenizer"
        )
    return files


def _tokenizer_files(request: Request, out: Path) -> dict[str, bytes]:
    if request.tokenizer is not None:
        return read_tokenizer(request.tokenizer)
    assert request.vocab_size is not None
    trained = out / UNFINISHED / f"trained-{request.fingerprint(_tokenizer_id(request))[:16]}.model"
    if not trained.exists():
        texts = sample_texts(request.pieces, request.reading, request.sample_bytes)
        with _progress("Training the tokenizer: reading", 0) as advance:
            model = train_tokenizer(_counted(texts, advance), request.vocab_size)
        write_whole(trained, model)
    return {"tokenizer.model": trained.read_bytes()}


def _counted(texts: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    for text in texts:
        yield text
        advance(len(text))


def _resume(out: Path, tasks: Sequence[Task], files: Mapping[str, bytes]) -> dict[str, Done]:
    """Keeps the shards of an earlier run that are finished and the same, and removes everything else."""
    done: dict[str, Done] = {}
    for task in tasks:
        mark = out / UNFINISHED / f"{task.name}.json"
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            result = Done.from_json(mark.read_bytes())
            size = (out / shard_files(task.name)[0]).stat().st_size
            if result.fingerprint == task.fingerprint and size == result.shard.record_bytes:
                done[task.name] = result
    kept = {name for task in done for name in shard_files(task)}
    for path in out.iterdir():
        if path.name not in kept and path.is_file():
            path.unlink()
    for path in (out / UNFINISHED).iterdir():
        if path.stem not in done and path.name != "lock" and not path.name.startswith("trained-"):
            path.unlink()
    for name, data in files.items():
        if name in TOKENIZER_FILES:
            write_whole(out / name, data)
    if done:
        print(f"{out}: {len(done)} of {len(tasks)} shards are there from an earlier run", file=sys.stderr)
    return done


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode("utf-8", "surrogatepass")).hexdigest()


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how much is done: a bar, or a line now and then where stderr is a file; total 0 is unknown."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total or None)
            yield lambda done: bar.advance(task, done)
        return
    start = last = time.monotonic()
    so_far = 0

    def advance(done: int) -> None:
        nonlocal last, so_far
        so_far += done
        now = time.monotonic()
        if now - last >= REPORT_EVERY:
            last, rate = now, max(so_far, 1) / (now - start)
            end = f" of {total / 1e6:.0f} MB, {max(0, total - so_far) / rate:.0f} s left" if total else " MB"
            print(f"{what}: {so_far / 1e6:.0f}{end}, {rate / 1e6:.1f} MB/s", file=sys.stderr, flush=True)

    yield advance
