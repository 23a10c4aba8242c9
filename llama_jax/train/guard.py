"""What a run is kept from: another run in its folder, and errors that do not say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock
import jax


def only_one(output: Path) -> filelock.BaseFileLock:
    """Keeps another run out of the folder.

    Raises:
      ValueError: one is there.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output / "lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(f"{output}: another run writes there; wait for it, or give another --output") from None
    return lock


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
