"""Progress of long reads and writes, on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

SMALL = 1 << 30  # bytes that take a second or two


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows bytes done, rate and time left where stderr is a terminal and there is enough to wait for.

    Args:
      what: a verb, such as "Loading".
      total: bytes.

    Yields:
      A function to call with the number of bytes just done.
    """
    if total < SMALL or not sys.stderr.isatty():
        yield lambda done: None
        return
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
