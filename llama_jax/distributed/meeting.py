"""How processes meet before JAX starts: at the coordinator's address, where process 0 listens itself.

Every process connects, and says its number, host, versions and settings. JAX's own wait ends in a C++ abort that does
not say who is missing.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Iterator

from llama_jax.distributed.agreement import SHOWN, differences, message
from llama_jax.distributed.place import Place
from llama_jax.typing import JsonObject

log = logging.getLogger("llama_jax")

SAY_SECONDS = 5.0  # without news before a waiting process prints a message; then four times as long
HELLO_SECONDS = 5.0  # that a new connection has to identify itself


def meet(
    place: Place, versions: dict[str, str], timeout: float, settings: dict[str, str] | None = None
) -> tuple[list[str], dict[int, socket.socket]]:
    """Waits until all are there, and compares versions and settings.

    Args:
      place: of this process.
      versions: of what is installed, which must be the same on every process.
      timeout: seconds to wait.
      settings: flags of the environment, which must be the same too.

    Returns:
      The host of every process, and connections: of process 0 to all the others, of these to process 0.

    Raises:
      ValueError: a process did not arrive, has other versions or settings, or a number that another has; every process
        that is there raises the same.
    """
    hello = {
        "process": place.process_id,
        "num_processes": place.num_processes,
        "host": socket.gethostname(),
        "versions": versions,
        "settings": settings or {},
    }
    if place.process_id:
        return _go_to_hub(place, hello, timeout)
    connections: dict[int, socket.socket] = {}
    try:
        return _gather_all(place, hello, timeout, connections), connections
    except (ValueError, KeyboardInterrupt) as error:
        for connection in connections.values():
            send(connection, {"error": str(error) or "process 0 was interrupted"})
            connection.close()
        raise


def _gather_all(place: Place, hello: dict, timeout: float, connections: dict[int, socket.socket]) -> list[str]:
    """Process 0: lets the others in, and tells them to go when all are there."""
    port, start, say = int(place.address.rpartition(":")[2]), time.monotonic(), SAY_SECONDS
    hellos = {0: hello}
    with _arrivals(port) as arrivals:
        while len(hellos) < place.num_processes:
            waited = time.monotonic() - start
            try:
                connection, other = arrivals.get(timeout=max(min(timeout, say) - waited, 0.001))
            except queue.Empty:
                missing = itertools.islice((i for i in range(place.num_processes) if i not in hellos), 20)
                if say < timeout:
                    names = f"{', '.join(map(str, missing))} of {place.num_processes}"
                    log.warning("waiting at %s for process %s, %g s at most", place.address, names, timeout)
                    say *= 4
                    continue
                arrived = ", ".join(f"{i} ({hellos[i]['host']})" for i in sorted(hellos))
                raise ValueError(
                    f"process {', '.join(map(str, missing))} of {place.num_processes} did not arrive at"
                    f" {place.address} within {timeout:g} s; arrived: {arrived}. {_remedy(port)}"
                ) from None
            i, known = other["process"], hellos.get(other["process"])
            if other["num_processes"] != place.num_processes:
                problem = (
                    f"process 0 ({hello['host']}) was started as one of {place.num_processes}, process {i}"
                    f" ({other['host']}) as one of {other['num_processes']}: give all the same --num-processes"
                )
            elif known and not (i in connections and _is_gone(connections[i])):
                problem = (
                    f"two processes say that they are process {i} of {place.num_processes}, on {known['host']} and on"
                    f" {other['host']}: give each its own --process-id"
                )
            else:
                if i in connections:
                    connections[i].close()
                connections[i], hellos[i] = connection, other
                continue
            send(connection, {"error": problem})
            connection.close()
            raise ValueError(problem)
    for i in sorted(hellos):
        _compare(place.num_processes, hello, hellos[i])
    hosts = [hellos[i]["host"] for i in range(place.num_processes)]
    for connection in connections.values():
        send(connection, {"hosts": hosts})
    return hosts


@contextlib.contextmanager
def _arrivals(port: int) -> Iterator[queue.SimpleQueue[tuple[socket.socket, JsonObject]]]:
    """Connections and who is at their other ends, as they come. Somebody who says nothing keeps nobody waiting."""
    arrived: queue.SimpleQueue[tuple[socket.socket, JsonObject]] = queue.SimpleQueue()
    closing = threading.Event()

    def greet(connection: socket.socket) -> None:
        hello = _read_hello(connection)
        if hello is None:
            connection.close()  # a port scanner, or a process that is gone
        else:
            arrived.put((connection, hello))

    def accept() -> None:
        while not closing.is_set():
            with contextlib.suppress(TimeoutError, ConnectionError):
                connection, _ = server.accept()
                threading.Thread(target=greet, args=(connection,), daemon=True).start()

    with _listen(port) as server:
        server.settimeout(0.1)
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield arrived
        finally:
            closing.set()
            thread.join()


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        remedy = "end the run that has it, or " if error.errno == errno.EADDRINUSE else ""
        raise ValueError(
            f"process 0 cannot listen on port {port} ({os.strerror(error.errno or 0)}): {remedy}choose another port"
            " with --coordinator"
        ) from None


def _read_hello(connection: socket.socket) -> JsonObject | None:
    """Who connected; None if it does not say so."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        match json.loads(_line(connection, HELLO_SECONDS)):
            case {"process": int(i), "num_processes": int(n), "host": str(), "versions": dict()} as hello if 0 < i < n:
                return hello
    return None


def _compare(num_processes: int, a: dict, b: dict) -> None:
    different = [name for name in a["versions"] if a["versions"][name] != b["versions"].get(name)]
    if different:
        runs = (
            f"process {x['process']} of {num_processes} ({x['host']}) runs "
            + ", ".join(f"{name} {x['versions'].get(name)}" for name in different)
            for x in (a, b)
        )
        raise ValueError(f"{' and '.join(runs)}: install the same on every machine, and start all again")
    if found := list(differences(b.get("settings", {}), a["settings"])):
        raise ValueError(message(b["process"], b["host"], found[:SHOWN]))


def _go_to_hub(place: Place, hello: dict, timeout: float) -> tuple[list[str], dict[int, socket.socket]]:
    """The others: go to process 0 and wait for all, as it says."""
    host, _, port = place.address.rpartition(":")
    deadline, reason, say = time.monotonic() + timeout, "it did not answer", SAY_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        connection = None
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 10.0))
            send(connection, hello)
            # Process 0 may have started to wait just now.
            answer = json.loads(_line(connection, timeout + HELLO_SECONDS))
            if not isinstance(answer, dict) or not answer.keys() & {"error", "hosts"}:
                raise ValueError
        except socket.gaierror:
            reason = f"the name {host!r} is not known here"
        except ConnectionRefusedError:
            reason = "nothing listens there"
        except TimeoutError:
            reason = "no answer, as where a firewall drops packets"
        except (OSError, ValueError, RecursionError):
            reason = "what answers there is not process 0 of this program, or it ended"
        else:
            if "error" in answer:
                connection.close()
                raise ValueError(answer["error"])
            return answer["hosts"], {0: connection}
        if connection:
            connection.close()
        if timeout - left > say:
            log.warning("waiting for process 0 at %s, %g s at most: %s", place.address, timeout, reason)
            say *= 4
        time.sleep(min(0.2, max(left, 0)))
    raise ValueError(
        f"process {place.process_id} of {place.num_processes} ({hello['host']}) waited {timeout:g} s for process 0 at"
        f" {place.address}: {reason}. {_remedy(int(port))}"
    )


def _remedy(port: int) -> str:
    return (
        "Start the same command on every machine (on a TPU slice with --worker=all, with srun or mpirun on a cluster;"
        f" elsewhere each with its own --process-id), and let TCP port {port} through the firewall between them;"
        " --num-processes 1 runs one alone"
    )


def _line(connection: socket.socket, seconds: float) -> bytes:
    """One line within so many seconds, byte by byte: what follows is for the watching thread to read."""
    line, deadline = b"", time.monotonic() + seconds
    while not line.endswith(b"\n") and len(line) < 1 << 20:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("the connection was closed")
        line += byte
    return line


def send(connection: socket.socket, message: JsonObject) -> None:
    """Sends a line; if the other process is gone, whoever watches it finds out."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _is_gone(connection: socket.socket) -> bool:
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable)  # it has nothing to say at this time: closed
