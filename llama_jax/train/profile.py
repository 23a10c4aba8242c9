"""A trace of some steps, for xprof and Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax


def window(text: str) -> tuple[int, int]:
    """The first and the last step to trace; (-1, -1) is none."""
    if not text:
        return -1, -1
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not 0 < int(parts[0]) <= int(parts[1]):
        raise ValueError(f"profile must be FIRST:LAST, two steps such as 10:13, got {text!r}")
    return int(parts[0]), int(parts[1])


@contextlib.contextmanager
def tracing(steps: tuple[int, int], output: Path) -> Iterator[Callable[[int, object], None]]:
    """Traces steps into OUTPUT/profile.

    Gives a function to call before each step with the number of those done and the state.
    """
    (first, last), running = steps, False

    def before(step: int, state: object) -> None:
        nonlocal running
        if not running and first <= step + 1 <= last:
            jax.profiler.start_trace(str(output.absolute() / "profile"))
            running = True
        elif running and step == last:
            jax.block_until_ready(state)  # the last step may only have been begun
            jax.profiler.stop_trace()
            running = False

    try:
        yield before
    finally:
        if running:
            jax.profiler.stop_trace()
