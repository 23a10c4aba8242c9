"""What a run is kept from: another run in its folder, and errors that do not say what to do."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from llama_jax import distributed
from llama_jax.files import locked

SHARED_SECONDS = 90.0  # until network storage shows what another machine wrote: NFS remembers an absence for 60


@contextlib.contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Keeps another run out of the folder.

    Raises:
      ValueError: one is there.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{output}: it or a part of it is a file, not a folder: give another --output") from error
    busy = ValueError(f"{output}: another run writes there; wait for it, or give another --output")
    with locked(output / "lock", busy):
        yield


def check_output(output: Path, checkpoints: str, steps: int) -> None:
    """Returns if checkpoints can be written there, by all processes alike; all must call it.

    Raises:
      OSError: a file of a checkpoint's name cannot be written.
      ValueError: a process does not see what process 0 writes.
    """
    # As deep and as long as Orbax's own: a step's folder while it is written, a process's part, a data file.
    probe = output / checkpoints / f"probe-{steps}.orbax-checkpoint-tmp"
    token = output / distributed.broadcast(f"probe-{secrets.token_hex(8)}")
    if distributed.is_main():
        try:
            place = probe / "optimizer" / "ocdbt.process_000" / "d"
            place.mkdir(parents=True, exist_ok=True)
            (place / ("0" * 32 + ".partial")).write_bytes(b"")
            token.write_bytes(b"")
        except OSError as error:
            raise OSError(
                error.errno, f"checkpoints cannot be written to {output} ({error.strerror}): give another --output"
            ) from error
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    if distributed.process_count() == 1:
        token.unlink()
        return
    distributed.broadcast(None)  # it is written
    seen = distributed.gather(_appears(token))
    if distributed.is_main():
        token.unlink()
    if not all(seen):
        raise distributed.DisagreementError(
            f"process {seen.index(False)} does not see what process 0 writes to {output}: --output must be on storage"
            " that all processes share, under the same path"
        )


def _appears(file: Path) -> bool:
    """Whether a file is there, or comes within the time that network storage takes to show it."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextlib.contextmanager
def memory_in_words() -> Iterator[None]:
    """Says what to do where a device has too little memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        raise ValueError(
            f"the devices' memory does not hold this run ({text.splitlines()[0][:200]}): compute less at once"
            " (--batch.microbatches), keep less of each block (--remat full, offload), split the model over more"
            " devices (--mesh), or take a smaller --model or --batch.sequences"
        ) from error
