"""Prepares a corpus: text in, tokenised shards with a manifest out, in parallel and resumable."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from llama_jax.data.manifest import (
    INDEX_DTYPE,
    INPUTS,
    MANIFEST,
    UNFINISHED,
    Manifest,
    TokenColumn,
    content_of_both,
    is_corpus_file,
    read_manifest,
    shard_files,
    tokenizer_sha256,
)
from llama_jax.data.prepare import workers as worker_processes
from llama_jax.data.prepare.chat import ChatEncoder
from llama_jax.data.prepare.inputs import Record, changes, digest, listed
from llama_jax.data.prepare.request import Request, encoder_id, make_tasks, read_tokenizer, tokenizer_id
from llama_jax.data.prepare.request import make_request as make_request
from llama_jax.data.prepare.shards import (
    ROOM,
    Done,
    Encoder,
    ShardWork,
    Task,
    load_from_files,
)
from llama_jax.data.prepare.system import exists, told
from llama_jax.data.prepare.train_tokenizer import TrainingWork
from llama_jax.files import disk_full, is_full, locked, write_whole
from llama_jax.progress import progress
from llama_jax.text.base import TOKENIZER_FILES

log = logging.getLogger("llama_jax")


def prepare(
    request: Request, out: str | Path, *, workers: int | None = None, reference: Mapping[str, float] | None = None
) -> Manifest:
    """Prepares a corpus; after an interruption, the same call resumes.

    Args:
      request: what `make_request` returns.
      out: folder of the corpus: new, empty, or one where the same preparation has begun or is finished.
      workers: processes; None takes one for each CPU that this process may use, 0 works in this process.
      reference: for the manifest: bits per byte that something else needs for the texts, by its name.

    Returns:
      The manifest.

    Raises:
      FileExistsError: the folder holds something else, or another process is preparing it.
      OSError: the disk is full, or an input cannot be read.
      ValueError: a document cannot be read, or there is none.
    """

    def run(work: ShardWork, tasks: Sequence[Task]) -> Iterator[Done]:
        pipes = [task for task in tasks if any(piece.stream for piece in task.pieces)]
        files = [task for task in tasks if task not in pipes]
        with progress("Preparing", 0 if pipes else sum(task.nbytes for task in tasks)) as advance:
            yield from worker_processes.run(work, pipes, workers=0, advance=advance)  # this process has them open
            yield from worker_processes.run(work, files, workers=processes, advance=advance)

    processes = cpu_count() if workers is None else workers
    return prepare_with(run, request, out, reference=reference, training_workers=min(1, processes))


def prepare_with(
    run: Callable[[ShardWork, Sequence[Task]], Iterable[Done]],
    request: Request,
    out: str | Path,
    *,
    reference: Mapping[str, float] | None = None,
    training_workers: int = 1,
) -> Manifest:
    """Prepares a corpus with a given way to run the work for each shard; else as `prepare`."""
    if "://" in str(out):
        raise ValueError(f"{out}: is not on a disk of this machine: give a folder, or a runner of Beam (--runner)")
    out = Path(os.path.expanduser(out))
    tokenizer = tokenizer_id(request)
    wanted = request.fingerprint(tokenizer)
    try:
        if (manifest := _finished(out, request, tokenizer)) is not None:
            return manifest
        with _only_once(out, request), _only_one(out):
            if (manifest := _finished(out, request, tokenizer)) is not None:  # by another process meanwhile
                return manifest
            files = tokenizer_files(request, out / UNFINISHED, workers=training_workers)
            encoder = make_encoder(files, request)
            tasks = make_tasks(request, encoder_id(files, request))
            done = _resume(out, tasks, files, encoder.columns)
            work = ShardWork(out, encoder, request.reading)
            for result in run(work, [task for task in tasks if task.name not in done]):
                done[result.shard.name] = result
            manifest = make_manifest(encoder, tasks, done, reference or {}, wanted)
            digests = [one for task in tasks for one in done[task.name].digests or [None] * len(task.pieces)]
            record = Record(request.options(tokenizer), [piece for task in tasks for piece in task.pieces], digests)
            write_whole(out / INPUTS, record.to_json())
            write_whole(out / MANIFEST, manifest.to_json())
            shutil.rmtree(out / UNFINISHED)
            return manifest
    except OSError as error:
        if is_full(error):
            raise disk_full(out, ROOM) from error
        raise told(error, out, "write") from error


def make_encoder(files: Mapping[str, bytes], request: Request) -> Encoder:
    """Makes the encoder of a request's documents; raises ValueError where the tokenizer lacks BOS or EOS."""
    tokenizer = load_from_files(files)
    if request.bos and tokenizer.bos_id is None:
        raise ValueError("the tokenizer has no BOS: leave --bos out")
    bos = tokenizer.add_bos if request.bos is None else request.bos
    if request.reading.conversations:
        encoder: Encoder = ChatEncoder(files, bos, request.chat_format, request.max_tokens, request.reading.pairs)
    else:
        encoder = Encoder(files, bos)
    assert encoder.eos_id is not None  # raises where there is none, before any work
    return encoder


def make_manifest(
    encoder: Encoder,
    tasks: Sequence[Task],
    found: Mapping[str, Done],
    reference: Mapping[str, float],
    fingerprint: str,
) -> Manifest:
    """Puts the manifest together; raises ValueError if there is no document."""
    shards = [found[task.name] for task in tasks]
    skipped: Counter[str] = Counter()
    for done in shards:
        skipped.update(done.skipped)
    documents = sum(done.shard.documents for done in shards)
    if left_out := [source for done in shards for source in done.left_out]:
        log.warning("too long for max_tokens, and left out: %s ...", ", ".join(left_out[:5]))
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
        barren=_barren(tasks, found),
        columns=_columns(encoder, shards),
        facts=dict(sum((Counter(done.facts) for done in shards), Counter())),
    )


def _columns(encoder: Encoder, shards: Sequence[Done]) -> tuple[TokenColumn, ...]:
    found = []
    for i, (name, dtype) in enumerate(encoder.columns.items()):
        content = ""
        for done in shards:
            content = content_of_both(content, done.columns[i][2], done.shard.documents)
        found.append(TokenColumn(name, dtype, tuple(done.columns[i][1] for done in shards), content))
    return tuple(found)


def _barren(tasks: Sequence[Task], found: Mapping[str, Done]) -> tuple[str, ...]:
    """The inputs, as they were given, of which no document came."""
    documents: dict[str, int] = {}
    for task in tasks:
        counts = found[task.name].documents or [1] * len(task.pieces)  # an earlier version did not count
        for piece, count in zip(task.pieces, counts, strict=True):
            documents[piece.given] = documents.get(piece.given, 0) + count
    return tuple(given for given, count in documents.items() if not count)


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_same(manifest: Manifest, fingerprint: str, out: object, found: Sequence[str] = ()) -> Manifest:
    """Returns the manifest if it is of a finished preparation of the same; else raises FileExistsError.

    Args:
      manifest: of the folder.
      fingerprint: of what is asked for.
      out: the folder, for the message.
      found: what has changed, for the message.
    """
    if manifest.fingerprint != fingerprint:
        why = f" ({listed(found)})" if found else ""
        raise FileExistsError(
            f"{out}: holds a corpus that was prepared from other files or with other options{why}: give another folder,"
            " or remove it"
        )
    return manifest


def _finished(out: Path, request: Request, tokenizer: object) -> Manifest | None:
    """The manifest of a finished preparation of the same; refuses a folder with anything else."""
    if not exists(out):
        return None
    if not out.is_dir():
        raise FileExistsError(f"{out}: is a file: give a folder for the corpus")
    if exists(out / MANIFEST):
        manifest, fingerprint = read_manifest(out), request.fingerprint(tokenizer)
        if manifest.fingerprint == fingerprint or (record := Record.read(out)) is None:
            return check_same(manifest, fingerprint, out)
        # Parsed again, so that both sides are what JSON makes of them.
        options = json.loads(json.dumps(request.options(tokenizer)))
        if found := changes(record, options, request.pieces):
            check_same(manifest, fingerprint, out, found)
        return manifest
    other = sorted(path.name for path in out.iterdir() if not is_corpus_file(path.name))
    if other or (any(out.iterdir()) and not (out / UNFINISHED).is_dir()):
        raise FileExistsError(
            f"{out}: holds something else than a corpus{f', such as {other[0]}' if other else ''}: give a new folder"
        )
    return None


@contextlib.contextmanager
def _only_once(out: Path, request: Request) -> Iterator[None]:
    """Keeps a preparation of a pipe from resuming; one that fails in a new folder of its own leaves nothing behind."""
    if not any(piece.stream for piece in request.pieces):
        yield
        return
    if exists(out / UNFINISHED):
        raise FileExistsError(
            f"{out}: holds a preparation that was interrupted, and what comes from a pipe cannot be read again where it"
            " stopped: remove the folder, or give another one"
        )
    is_new = not exists(out)
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(out, ignore_errors=True)
        raise


@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Keeps other processes from preparing the same folder."""
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    busy = FileExistsError(f"{out}: another process is preparing this corpus: wait for it, or end it")
    with locked(out / UNFINISHED / "lock", busy):
        yield


def tokenizer_files(request: Request, scratch: Path, *, workers: int = 1) -> dict[str, bytes]:
    """Reads the tokenizer of a request, or trains it.

    Args:
      request: what `make_request` returns.
      scratch: a folder in which a trained one stays for the next call.
      workers: 0 trains in this process.

    Returns:
      The tokenizer's files, by name.
    """
    if request.tokenizer is not None:
        return read_tokenizer(request.tokenizer)
    assert request.vocab_size is not None
    trained = scratch / f"trained-{request.fingerprint(tokenizer_id(request))[:16]}.model"
    if not trained.exists():
        work = TrainingWork(request.vocab_size, request.reading, request.sample_bytes)
        with progress("Training the tokenizer: read") as advance:
            (model,) = worker_processes.run(work, [request.pieces], workers=workers, advance=advance)
        write_whole(trained, model)
    return {"tokenizer.model": trained.read_bytes()}


def _resume(
    out: Path, tasks: Sequence[Task], files: Mapping[str, bytes], columns: Iterable[str] = ()
) -> dict[str, Done]:
    """Keeps the shards of an earlier run that are finished and the same, and removes everything else."""
    done: dict[str, Done] = {}
    for task in tasks:
        mark = out / UNFINISHED / f"{task.name}.json"
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            result = Done.from_json(mark.read_bytes())
            records, index, _, *others = [(out / name).stat().st_size for name in shard_files(task.name, columns)]
            expected = result.shard.record_bytes, result.shard.documents * 2 * INDEX_DTYPE.itemsize
            same = others == [size for _, size, _ in result.columns]
            if (records, index) == expected and same and _is_same(result, task):
                done[task.name] = result
    kept = {name for task in done for name in shard_files(task, columns)}
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


def _is_same(result: Done, task: Task) -> bool:
    """Tells whether a finished shard is a task's: where only times are not as they were, the content decides."""
    if result.fingerprint == task.fingerprint:
        return True
    if not task.lasting or result.lasting != task.lasting or None in result.digests:
        return False
    return [*map(digest, task.pieces)] == [*result.digests]
