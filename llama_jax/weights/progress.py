"""Progress of long reads and writes, on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

SMALL = 1 << 28  # bytes that take less than a second or two
EVERY = 10.0  # seconds between lines where stderr is a file


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows bytes done, rate and time left where there is enough to wait for: a bar, or lines where stderr is a file.

    Args:
      what: a verb, such as "Loading".
      total: bytes.

    Yields:
      A function to call with the number of bytes just done.
    """
    if total < SMALL:
        yield lambda done: None
    elif not sys.stderr.isatty():
        yield _lines(what, total)
    else:
        with _bar(what, total) as advance:
            yield advance


def _lines(what: str, total: int) -> Callable[[int], None]:
    start = last = time.monotonic()
    so_far = 0

    def advance(done: int) -> None:
        nonlocal last, so_far
        so_far += done
        now = time.monotonic()
        if now - last >= EVERY:
            last, rate = now, so_far / (now - start)
            left = max(0, total - so_far) / rate
            text = f"{what}: {so_far / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    return advance


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
