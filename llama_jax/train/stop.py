"""Being asked to stop: SIGTERM (a preempted machine) and Ctrl-C end a run after its step, with its state saved."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


class StopRequest:
    """Which signal has asked this process to stop, if any; None until then."""

    signal: int | None = None


@contextlib.contextmanager
def on_request() -> Iterator[StopRequest]:
    """Takes SIGTERM and Ctrl-C as requests. A second Ctrl-C raises KeyboardInterrupt at once."""
    request = StopRequest()

    def take(number: int, frame: object) -> None:
        if number == signal.SIGINT and request.signal is not None:
            raise KeyboardInterrupt
        request.signal = number
        asked = "asked to stop (SIGTERM)" if number == signal.SIGTERM else "interrupted; again to stop at once"
        os.write(2, f"\n{asked}: saving after this step\n".encode())

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, take)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
