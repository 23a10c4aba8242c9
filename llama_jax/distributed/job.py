"""This process among the others, from the meeting on: what they tell each other, and how they end.

The connections of the meeting stay, with the operating system's keepalive. A process that fails says so, the end of one
that is killed closes its connection, and either ends all the others with its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import socket
import sys
import threading
import time
from typing import Any

import jax

from llama_jax.distributed.meeting import send
from llama_jax.libc import sleep_on_abort
from llama_jax.typing import JsonObject

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a machine that vanishes is noticed after 20 s
CAUSE_SECONDS = 5.0  # an error of XLA may follow from the end of another process: so long it may take to hear of that
RUNTIME_ERROR = re.compile(r"[A-Z_]{5,}: ")  # "UNKNOWN: Gloo AllGather failed", which may be a ValueError
ENDED = object()  # instead of a value


class ProcessGroup:
    """This process among the others, from the meeting on.

    Attributes:
      process: which one this is.
      hosts: of every process.
    """

    def __init__(self, process: int, hosts: list[str], connections: dict[int, socket.socket]):
        self.process, self.hosts, self._connections = process, hosts, connections
        self._inbox: dict[int, queue.SimpleQueue[Any]] = {i: queue.SimpleQueue() for i in connections}
        self._sending, self._ending = threading.Lock(), threading.Lock()
        self._done: set[int] = set()
        self._watchers = []
        hook = sys.excepthook

        def excepthook(kind: Any, error: BaseException, traceback: Any) -> None:
            self.wait_for_cause(error)
            hook(kind, error, traceback)
            self.fail(f"{kind.__name__}: {error}")

        sys.excepthook = excepthook
        # JAX's threads abort the process when they lose process 0, which they notice as soon as we do: this leaves
        # the watcher the time to say who it was.
        sleep_on_abort()
        for i, connection in connections.items():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            watcher = threading.Thread(target=self._watch, args=(i, connection), daemon=True, name=f"process {i}")
            self._watchers.append(watcher)
            watcher.start()

    def name(self, i: int) -> str:
        """As messages say it: "process 1 of 4 (host)"."""
        return f"process {i} of {len(self.hosts)} ({self.hosts[i]})"

    def send(self, message: JsonObject) -> None:
        """To all that this process is connected with."""
        with self._sending:
            for connection in self._connections.values():
                send(connection, message)

    def receive(self, i: int) -> Any:
        """The next value of a process, however long it takes."""
        value = self._inbox[i].get()
        if value is ENDED:
            raise RuntimeError(f"{self.name(i)} has ended, and this one waits for its next value")
        return value

    def finish(self) -> None:
        """Says that this process ends as it should."""
        self.send({"done": True})

    def fail(self, text: str, code: int = 1, *, of_all: bool = False) -> None:
        """Ends all processes because of this one; `of_all` is whether the text is as true of the others."""
        here = self.name(self.process)
        self._end(*((text, text) if of_all else (f"{here}: {text}", f"{here} failed: {text}")), code)

    def wait_for_cause(self, error: BaseException) -> None:
        """A JAX error may be caused by another process dying. Waits, so that the message names that process instead."""
        if isinstance(error, jax.errors.JaxRuntimeError) or RUNTIME_ERROR.match(str(error)):
            time.sleep(CAUSE_SECONDS)

    def _watch(self, i: int, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    match json.loads(line):
                        case {"value": value}:
                            self._inbox[i].put(value)
                        case {"error": text}:
                            self._end(text, text, 1)  # returns only if this process is ending already
                        case {"done": True}:
                            self._done.add(i)
                            self._inbox[i].put(ENDED)
        except (OSError, ValueError):  # keepalive found no machine there, or its last line is half a line
            pass
        if i not in self._done:
            text = f"{self.name(i)} ended without a word: killed, out of memory, or its machine is out of reach"
            self._end(text, text, 1)

    def _end(self, here: str, elsewhere: str, code: int) -> None:
        """Tells the others, prints, and ends this process at once: an orderly exit would wait for them."""
        if not self._ending.acquire(blocking=False):  # another thread does it
            if threading.current_thread() in self._watchers:
                return  # to read on: that thread waits for the others' ends
            threading.Event().wait()
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar may have hidden it
        os.write(2, f"{show_cursor}error: {here}\n".encode(errors="replace"))
        if self._sending.acquire(timeout=2):  # unless a process that takes nothing holds it up
            for connection in self._connections.values():
                send(connection, {"error": elsewhere})
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
        # They end first: if process 0 went before they have read this, JAX's threads in them would abort.
        deadline = time.monotonic() + 2
        for watcher in self._watchers:
            if watcher is not threading.current_thread():
                watcher.join(max(0, deadline - time.monotonic()))
        os._exit(code)
