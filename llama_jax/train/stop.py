"""Being asked to stop: SIGTERM (a preempted machine) and Ctrl-C end a run after its step, with its state saved."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


class StopRequest:
    """What this process has been asked.

    Attributes:
      signal: by which it was asked to stop; None until then.
      nothing_to_lose: whether it may end at once: it is alone, and has done no step since the last checkpoint.
    """

    signal: int | None = None
    nothing_to_lose: bool = False


@contextlib.contextmanager
def on_request() -> Iterator[StopRequest]:
    """Takes SIGTERM and Ctrl-C as requests. A second Ctrl-C raises KeyboardInterrupt at once."""
    request = StopRequest()

    def take(number: int, frame: object) -> None:
        if number == signal.SIGINT and request.signal is not None:
            raise KeyboardInterrupt
        request.signal = number
        asked = "asked to stop (SIGTERM)" if number == signal.SIGTERM else "interrupted"
        if request.nothing_to_lose:  # a compilation would take longer than a preempted machine has
            os.write(2, f"\n{asked}: nothing is lost\n".encode())
            os._exit(0 if number == signal.SIGTERM else 130)
        again = " (again: stop at once)" if number == signal.SIGINT else ""
        os.write(2, f"\n{asked}: saving after this step{again}\n".encode())

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, take)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
