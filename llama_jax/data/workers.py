"""Worker processes for long independent tasks: none outlives its parent, and none dies in silence."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

Task = TypeVar("Task", contravariant=True)
Result = TypeVar("Result", covariant=True)
Advance = Callable[[int], None]
REPORT_EVERY = 0.2  # seconds


class Work(Protocol[Task, Result]):
    """What a worker does; it is pickled once for each worker."""

    def __call__(self, task: Task, advance: Advance) -> Result:
        """Does one task, and calls `advance` with how much it has just done as it goes."""
        ...


def run(work: Work[Task, Result], tasks: Sequence[Task], *, workers: int, advance: Advance) -> Iterator[Result]:
    """Does tasks in parallel.

    Closing the iterator, an error or Ctrl-C ends the workers at once. They ignore Ctrl-C themselves.

    Args:
        work: What to do.
        tasks: What to do it with, begun in this order.
        workers: Most processes; 0 does everything in this one, which a long call out of Python keeps from Ctrl-C.
        advance: Called here with what the workers' `advance` is called with, summed up over a moment.

    Yields:
        The results, as they come.

    Raises:
        OSError: A worker was killed.
        Exception: What `work` raises.
    """
    if workers <= 0:
        for task in tasks:
            yield work(task, advance)
        return
    context = multiprocessing.get_context("spawn")  # threads of this process, such as JAX's, forbid a fork
    waiting = list(reversed(tasks))
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            with _interrupts_held():
                process.start()
            theirs.close()
            processes[ours] = process
            _send(ours, waiting.pop())
        while processes:
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    process = processes[connection]
                    process.join()
                    raise OSError(
                        f"a worker process ended with code {process.exitcode}; if the machine ran out of memory, take"
                        " fewer --workers; what is finished is kept"
                    ) from error
                if kind == "advance":
                    advance(value)
                    continue
                if kind == "error":
                    raise value
                if waiting:
                    _send(connection, waiting.pop())
                else:
                    _send(connection, None)
                    processes.pop(connection).join()
                yield value
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _send(connection: Connection, task: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # that the worker has ended is seen where it is heard
        connection.send(task)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds Ctrl-C back; a process that starts meanwhile never gets it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, work: Work[Any, Any]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pending, last = 0, time.monotonic()

    def advance(done: int, *, now: bool = False) -> None:
        nonlocal pending, last
        pending += done
        if now or time.monotonic() - last >= REPORT_EVERY:
            connection.send(("advance", pending))
            pending, last = 0, time.monotonic()

    while (task := connection.recv()) is not None:
        try:
            result = work(task, advance)
            advance(0, now=True)
            connection.send(("result", result))
        except Exception as error:
            connection.send(("error", error))
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
