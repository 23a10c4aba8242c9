"""Worker processes for long independent tasks: none outlives its parent, and none dies in silence.

They are new interpreters that import what their work needs and nothing else: `multiprocessing` would fork this process
with its threads, or run the caller's main module again in each worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

Task = TypeVar("Task", contravariant=True)
Result = TypeVar("Result", covariant=True)
Advance = Callable[[int], None]
REPORT_EVERY = 0.2  # seconds
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from llama_jax.data.prepare.workers import serve; serve(int(sys.argv[2]))"
)


class Work(Protocol[Task, Result]):
    """What a worker does; it is pickled, and so are tasks and results."""

    def __call__(self, task: Task, advance: Advance) -> Result:
        """Does one task, and calls `advance` with how much it has just done as it goes."""
        ...


def run(work: Work[Task, Result], tasks: Sequence[Task], *, workers: int, advance: Advance) -> Iterator[Result]:
    """Does tasks in parallel.

    Closing the iterator, an error or Ctrl-C ends the workers at once. They ignore Ctrl-C themselves.

    Args:
      work: what to do.
      tasks: what to do it with, begun in this order.
      workers: most processes; 0 does everything in this one, where a long call out of Python does not hear Ctrl-C.
      advance: called here with what the workers' `advance` is called with, summed up over a moment.

    Yields:
      The results, as they come.

    Raises:
      OSError: a worker was killed.
      Exception: what `work` raises.
    """
    if workers <= 0:
        for task in tasks:
            yield work(task, advance)
        return
    waiting = list(reversed(tasks))
    processes: dict[Connection, subprocess.Popen[bytes]] = {}
    try:
        for _ in range(min(workers, len(tasks))):
            connection, process = _start()
            processes[connection] = process
            _send(connection, work)
            _send(connection, waiting.pop())
        while processes:
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise OSError(
                        f"a worker process ended with code {processes[connection].wait()}; if the machine ran out of"
                        " memory, take fewer --workers; what is finished is kept"
                    ) from error
                if kind == "advance":
                    advance(value)
                elif kind == "error":
                    raise value
                else:
                    if waiting:
                        _send(connection, waiting.pop())
                    else:
                        _end(connection, processes.pop(connection))
                    yield value
    finally:
        for connection, process in processes.items():
            process.kill()
            _end(connection, process)


def serve(number: int) -> None:
    """Does the tasks that come over a connection: the main function of a worker.

    Args:
      number: file descriptor of the connection.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(number)
    pending, last = 0, time.monotonic()

    def advance(done: int, *, now: bool = False) -> None:
        nonlocal pending, last
        pending += done
        if now or time.monotonic() - last >= REPORT_EVERY:
            connection.send(("advance", pending))
            pending, last = 0, time.monotonic()

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # no more to do, or no parent any more
        work: Work[Any, Any] = connection.recv()
        while True:
            task = connection.recv()
            try:
                result = work(task, advance)
            except Exception as error:
                connection.send(("error", _portable(error)))
                return
            advance(0, now=True)
            connection.send(("result", result))


def _start() -> tuple[Connection, subprocess.Popen[bytes]]:
    """Starts a worker; its standard input ends with this process, however that ends."""
    ours, theirs = Pipe()
    command = [sys.executable, "-c", START, json.dumps(sys.path), str(theirs.fileno())]
    with theirs, _interrupts_held():
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()])
    return ours, process


def _end(connection: Connection, process: subprocess.Popen[bytes]) -> None:
    connection.close()
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _send(connection: Connection, value: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # that the worker has ended is seen where it is heard
        connection.send(value)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds Ctrl-C back; a process that starts meanwhile never gets it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    while os.read(0, 1):  # nothing is ever written; it ends with the parent
        pass
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """Replaces an error that cannot be pickled, as some libraries' own cannot."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return OSError(f"{type(error).__name__}: {error}")
    return error
