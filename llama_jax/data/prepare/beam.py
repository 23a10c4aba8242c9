"""The same preparation on Apache Beam, for a corpus that outgrows one machine: on Dataflow, Flink, Spark or locally.

A shard is one element of the pipeline and is written by the code that writes it locally, so that the corpora are the
same byte for byte. ArrayRecord's own sink for Beam is not used: it writes to local disks only, in no order, and makes
no index. Workers need llama_jax, and room for a shard where the corpus is on a cloud's storage.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_jax.data.manifest import MANIFEST, UNFINISHED, Manifest, is_corpus_file, shard_files
from llama_jax.data.prepare.prepare import check_same, make_encoder, make_manifest, prepare_with, tokenizer_files
from llama_jax.data.prepare.request import Request, encoder_id, make_tasks, tokenizer_id
from llama_jax.data.prepare.shards import Done, ShardWork, Task
from llama_jax.data.prepare.streams import beam_files
from llama_jax.typing import Foreign


def prepare_on_beam(
    request: Request,
    out: str | Path,
    *,
    runner: str = "DirectRunner",
    options: Sequence[str] = (),
    reference: Mapping[str, float] | None = None,
) -> Manifest:
    """Prepares a corpus on Apache Beam; after an interruption, the same call resumes.

    Args:
      request: what `make_request` returns; every worker must reach the input under the same paths.
      out: folder of the corpus, which all workers reach: on a shared disk, or `gs://...`.
      runner: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner or another one that Beam knows.
      options: of the runner and the pipeline, as `NAME=VALUE` or `NAME`.
      reference: for the manifest, as in `prepare`.

    Returns:
      The manifest.

    Raises:
      ValueError: apache Beam is not installed or does not know the runner, or as `prepare` raises.
      OSError: as `prepare` raises.
    """
    beam_files()  # says what to install
    if pipe := next((piece for piece in request.pieces if piece.stream), None):
        raise ValueError(f"{pipe.given}: is a pipe, which the workers of Beam cannot read: write it to a file first")
    flags = [f"--runner={runner}", *(f"--{option.removeprefix('--')}" for option in options)]
    if "://" in str(out):
        return _prepare_remote(request, str(out).rstrip("/"), flags, reference or {})

    def run(work: ShardWork, tasks: Sequence[Task]) -> list[Done]:
        _pipeline(flags, tasks, functools.partial(_write, work))
        return [Done.from_json((work.folder / UNFINISHED / f"{task.name}.json").read_bytes()) for task in tasks]

    return prepare_with(run, request, out, reference=reference)


def _prepare_remote(request: Request, out: str, flags: list[str], reference: Mapping[str, float]) -> Manifest:
    wanted = request.fingerprint(tokenizer_id(request))
    there = _list(out)
    if MANIFEST in there:
        return check_same(Manifest.from_json(_read(f"{out}/{MANIFEST}"), f"{out}/{MANIFEST}"), wanted, out)
    if other := [name for name in there if not is_corpus_file(name.partition("/")[0])]:
        raise FileExistsError(f"{out}: holds something else than a corpus, such as {other[0]}: give a new folder")
    with tempfile.TemporaryDirectory(prefix="llama_jax-") as scratch:
        files = tokenizer_files(request, Path(scratch))
    tasks = make_tasks(request, encoder_id(files, request))
    kept = _marks(out, tasks, there)
    encoder = make_encoder(files, request)
    current = {
        name for task in tasks for name in (*shard_files(task.name, encoder.columns), f"{UNFINISHED}/{task.name}.json")
    }
    if stale := [f"{out}/{name}" for name in there if name not in current]:
        beam_files().delete(stale)
    work = ShardWork(Path(), encoder, request.reading)  # each worker takes a folder of its own
    _pipeline(flags, [task for task in tasks if task.name not in kept], functools.partial(_write_remote, work, out))
    done = _marks(out, tasks, _list(out))
    manifest = make_manifest(encoder, tasks, done, reference, wanted)
    for name, data in files.items():
        _save(data, f"{out}/{name}")
    _save(manifest.to_json().encode(), f"{out}/{MANIFEST}")
    beam_files().delete([f"{out}/{UNFINISHED}/{task.name}.json" for task in tasks])
    return manifest


def _pipeline(flags: list[str], tasks: Sequence[Task], write: Foreign) -> None:
    """Runs a pipeline that writes shards, each of which leaves a mark when it is finished."""
    import apache_beam as beam  # pyright: ignore[reportMissingImports]
    from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]

    if tasks:
        with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            _ = pipeline | "Shards" >> beam.Create(list(tasks)) | beam.Reshuffle() | "Write" >> beam.Map(write)


def _write(work: ShardWork, task: Task) -> None:
    """Writes a shard; what a runner repeats has the same content."""
    work(task, lambda done: None)


def _write_remote(work: ShardWork, out: str, task: Task) -> None:
    with tempfile.TemporaryDirectory(prefix="llama_jax-") as folder:
        local = Path(folder)
        (local / UNFINISHED).mkdir()
        ShardWork(local, work.encoder, work.reading)(task, lambda done: None)
        for name in (*shard_files(task.name, work.encoder.columns), f"{UNFINISHED}/{task.name}.json"):  # the mark last
            with open(local / name, "rb") as source, _create(f"{out}/{name}") as destination:
                shutil.copyfileobj(source, destination, 1 << 24)


def _marks(out: str, tasks: Sequence[Task], there: Sequence[str]) -> dict[str, Done]:
    """The finished shards of these tasks, by name."""
    done: dict[str, Done] = {}
    for task in tasks:
        if (mark := f"{UNFINISHED}/{task.name}.json") in there:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                result = Done.from_json(_read(f"{out}/{mark}"))
                if result.fingerprint == task.fingerprint:
                    done[task.name] = result
    return done


def _list(out: str) -> list[str]:
    """Names all files below a folder, relative to it."""
    found = beam_files().match([f"{out}/**"])[0].metadata_list
    return sorted(file.path.removeprefix(f"{out}/") for file in found)


def _read(path: str) -> bytes:
    with beam_files().open(path, compression_type="uncompressed") as file:
        return file.read()


def _create(path: str) -> Foreign:
    return beam_files().create(path, compression_type="uncompressed")


def _save(data: bytes, path: str) -> None:
    with _create(path) as file:
        file.write(data)
