"""Progress on stderr: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

SMALL = 1 << 28  # bytes that take less than a second or two
EVERY = 10.0  # seconds between lines where stderr is a file


@contextlib.contextmanager
def progress(what: str, total: int = 0, *, least: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows bytes done, their rate and the time left; a line every `EVERY` seconds where stderr is not a terminal.

    Args:
      what: a verb, such as "Loading".
      total: bytes; 0 is unknown.
      least: totals below it are not worth a bar: nothing is shown.

    Yields:
      A function to call with the number of bytes just done.
    """
    if total < least:
        yield lambda done: None
    elif not sys.stderr.isatty():
        yield _lines(what, total)
    else:
        with rich_bar(what, "bar", "download", "speed", "left") as bar:
            task = bar.add_task(what, total=total or None)
            yield lambda done: bar.advance(task, done)


def _lines(what: str, total: int) -> Callable[[int], None]:
    start = last = time.monotonic()
    so_far = 0
    unit, digits, name = (1e9, 1, "GB") if total >= 1e9 else (1e6, 0, "MB")

    def advance(done: int) -> None:
        nonlocal last, so_far
        so_far += done
        now = time.monotonic()
        if now - last >= EVERY:
            last, rate = now, max(so_far, 1) / (now - start)
            of = f" of {total / unit:.{digits}f}" if total else ""
            left = f", {max(0, total - so_far) / rate:.0f} s left" if total else ""
            text = f"{what}: {so_far / unit:.{digits}f}{of} {name}, {rate / 1e6:.1f} MB/s{left}"
            print(text, file=sys.stderr, flush=True)

    return advance


@contextlib.contextmanager
def token_progress(most: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows tokens done, where stderr is a terminal.

    Args:
      most: tokens, if no row ends early.
      shown: False shows nothing, as on all processes but the first.

    Yields:
      A function to call with the number of tokens just done.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda done: None
        return
    with rich_bar("Generating", "bar", "count", "tokens", "elapsed") as bar:
        task = bar.add_task("", total=most)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """Shows what is being done: on a terminal with the time that it takes so far.

    Yields:
      A function to call with what begins.
    """
    if not sys.stderr.isatty():
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with rich_bar("spinner", "{task.description}", "elapsed") as bar:
        task = bar.add_task("", total=None)
        yield lambda text: bar.reset(task, description=text)


def rich_bar(*columns: str, transient: bool = True) -> Progress:
    """Returns a bar of rich on stderr.

    Args:
      columns: "bar", "count", "download", "elapsed", "left", "speed", "spinner", or else a text, perhaps with fields of
        the task.
      transient: whether it disappears at the end.
    """
    from rich import progress as parts
    from rich.console import Console

    kinds: dict[str, Callable[[], parts.ProgressColumn]] = {
        "bar": parts.BarColumn, "count": parts.MofNCompleteColumn, "download": parts.DownloadColumn,
        "elapsed": parts.TimeElapsedColumn, "left": parts.TimeRemainingColumn, "speed": parts.TransferSpeedColumn,
        "spinner": parts.SpinnerColumn,
    }  # fmt: skip
    made = [kinds[name]() if name in kinds else parts.TextColumn(name) for name in columns]
    return parts.Progress(*made, console=Console(stderr=True), transient=transient)
