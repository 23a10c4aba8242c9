"""Many processes: they begin together, end together, and compute on arrays that lie on the devices of all.

Process 0 is the hub. Before JAX starts, it listens at the coordinator's address itself: every process connects, and
says its number, host and versions. When all are there, JAX takes the address over (its own wait ends in a C++ abort
that does not say who is missing). The connections stay, with the operating system's keepalive: a process that fails
says so, the end of one that is killed closes its connection, and either ends all the others with its name. They also
carry the values of `broadcast` and `gather`, which wait as long as it takes; XLA's collectives would give up while
somebody types.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import queue
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

log = logging.getLogger("llama_jax")

HEARTBEAT_TIMEOUT = 30  # seconds; JAX's own, which also notices a process that hangs
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a machine that vanishes is noticed after 20 s
SAY_SECONDS = 5.0  # of silence until somebody who waits for others says so; then four times as long
HELLO_SECONDS = 5.0  # what somebody who connects has to say who it is
CAUSE_SECONDS = 5.0  # an error of XLA may follow from the end of another process: so long it may take to hear of that
PORTS = range(61440, 65536)  # a launcher's job number chooses one of them, as in JAX
RUNTIME_ERROR = re.compile(r"[A-Z_]{5,}: ")  # "UNKNOWN: Gloo AllGather failed", which may be a ValueError
ENDED = object()  # instead of a value
PACKAGES = ("jax", "jaxlib", "flax", "libtpu")


class Place(NamedTuple):
    """This process's place among the others; `local_devices` None is all of this machine's."""

    address: str
    num_processes: int
    process_id: int
    local_devices: list[int] | None = None


# --- Beginning ---


def initialize(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300,
) -> None:
    """Joins the other processes; call it before anything that uses a device.

    Nothing needs to be passed on Cloud TPU (GCE and GKE), under SLURM's srun and Open MPI's mpirun; elsewhere all
    three, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment. Does nothing where there
    is one process, or when called again.

    Args:
      coordinator: "host:port" of process 0, the same on every process.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: the arguments are incomplete or wrong, a process did not arrive, or two run different versions. Every
        process that is there raises the same.
      RuntimeError: JAX has been used already.
    """
    global _job
    if _job or jax.distributed.is_initialized():
        return
    place = find_place(coordinator, num_processes, process_id, timeout)
    if place is None:
        return
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        raise RuntimeError("several processes must be joined before JAX is used: call distributed.initialize earlier")
    hosts, connections = _meet(place, versions(), timeout)
    _job = _Job(place.process_id, hosts, connections)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, and go on
    jax.distributed.initialize(
        place.address,
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=round(max(timeout, 1)),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    )
    atexit.register(_job.finish)  # runs before JAX's own shutdown, where all wait for all


def versions() -> dict[str, str]:
    """What must be the same on every process: interpreter, packages, and the sources of this one (a hash of them)."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    digest, root = hashlib.sha256(), Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found | {"llama_jax": f"sources {digest.hexdigest()[:12]}"}


def find_place(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> Place | None:
    """Where this process stands, by arguments, environment and launcher; None where it is the only one."""
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _from_environment("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _from_environment("JAX_PROCESS_ID") if process_id is None else process_id
    if num_processes == 1:
        return None
    given = (coordinator, num_processes, process_id)
    local_devices = None
    if None in given and (found := _detect(timeout if coordinator is None else None)):
        if found.num_processes == 1 and given == (None, None, None):
            return None
        coordinator = coordinator or found.address
        num_processes = found.num_processes if num_processes is None else num_processes
        process_id = found.process_id if process_id is None else process_id
        local_devices = None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else found.local_devices
    elif given == (None, None, None):
        return None
    if not coordinator or num_processes is None or process_id is None:
        raise ValueError(
            "several processes need --coordinator HOST:PORT, --num-processes N and --process-id I together (or"
            " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID); on Cloud TPU, under srun and mpirun, none"
        )
    if num_processes < 1:
        raise ValueError(f"--num-processes must be at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process-id must be from 0 to {num_processes - 1}, one for each process, got {process_id}")
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(
            "--coordinator must be HOST:PORT of process 0 with a port from 1 to 65535, such as 10.0.0.2:8482, got"
            f" {coordinator!r}"
        )
    if ":" in host.strip("[]") and not host.startswith("["):
        raise ValueError(f"--coordinator: write an IPv6 address in brackets: [{host}]:{port}, not {coordinator!r}")
    return Place(coordinator, num_processes, process_id, local_devices)


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}")
    return int(text) if text else None


def _detect(timeout: float | None) -> Place | None:
    """The place that the launcher gives, without its address where `timeout` is None; None where there is no launcher.

    Asks no network unless this is one of several Cloud TPU machines.
    """
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        return _open_mpi()
    tpu_hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    if tpu_hosts and "," not in tpu_hosts and "MEGASCALE_COORDINATOR_ADDRESS" not in os.environ:
        return None
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        # A Kubernetes pod that is no indexed job is alone, and JAX's question would be an error or a warning.
        alone = cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
        try:
            if not cluster.opt_in_only_method and not alone and cluster.is_env_present():
                return _detected(cluster, timeout)
        except OSError as error:  # a TPU, but no metadata server: not Google's cloud
            log.warning("%s does not answer (%s): this process runs alone", cluster.__name__, error)
            return None
    return None


def _detected(cluster: Any, timeout: float | None) -> Place:
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    try:
        count, process = cluster.get_process_count(), cluster.get_process_id()
        address = ""
        if timeout is not None and count > 1:
            address = cluster.get_coordinator_address(round(timeout), os.environ.get("JAX_COORDINATOR_PORT"))
        local = None if running_in_cloud_tpu_vm else cluster.get_local_process_id()
    except Exception as error:  # of HTTP, Kubernetes and DNS
        raise ValueError(
            f"{cluster.__name__} does not say which process this is ({error}): give --coordinator HOST:PORT,"
            " --num-processes N and --process-id I; --num-processes 1 runs this one alone"
        ) from error
    # "1(x4)", "8,4(x2)": tasks on each node. A task that has its node alone uses all of its GPUs.
    tasks = re.sub(r"\(x\d+\)", "", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Place(address, count, process, None if local is None or set(tasks.split(",")) == {"1"} else [local])


def _open_mpi() -> Place:
    """The place that Open MPI gives. JAX wants mpi4py for version 5, whose environment says enough.

    Process 0 runs where mpirun does, unless a host file says otherwise; then --coordinator must be given.
    """
    from jax._src.clusters.ompi_cluster import OmpiCluster

    size, rank, local = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK", "LOCAL_RANK"))
    local_size = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0))
    address = ""
    if "OMPI_MCA_orte_hnp_uri" in os.environ:  # version 4
        address = OmpiCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
    elif job := re.fullmatch(r"prterun-(.+)-(\d+)@\d+", os.environ.get("PMIX_NAMESPACE", "")):
        port = os.environ.get("JAX_COORDINATOR_PORT", PORTS[int(job[2]) % len(PORTS)])
        address = f"{'127.0.0.1' if local_size == size else job[1]}:{port}"
    return Place(address, size, rank, None if local_size == 1 else [local])


# --- Meeting ---


def _meet(place: Place, versions: dict[str, str], timeout: float) -> tuple[list[str], dict[int, socket.socket]]:
    """Waits until all are there, and compares versions.

    Returns:
      The host of every process, and connections: of process 0 to all the others, of these to process 0.
    """
    hello = {
        "process": place.process_id,
        "num_processes": place.num_processes,
        "host": socket.gethostname(),
        "versions": versions,
    }
    if place.process_id:
        return _go_to_hub(place, hello, timeout)
    connections: dict[int, socket.socket] = {}
    try:
        return _gather_all(place, hello, timeout, connections), connections
    except (ValueError, KeyboardInterrupt) as error:
        for connection in connections.values():
            _send(connection, {"error": str(error) or "process 0 was interrupted"})
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
            _send(connection, {"error": problem})
            connection.close()
            raise ValueError(problem)
    for i in sorted(hellos):
        _compare(place.num_processes, hello, hellos[i])
    hosts = [hellos[i]["host"] for i in range(place.num_processes)]
    for connection in connections.values():
        _send(connection, {"hosts": hosts})
    return hosts


@contextlib.contextmanager
def _arrivals(port: int) -> Iterator[queue.SimpleQueue[tuple[socket.socket, dict[str, Any]]]]:
    """Connections and who is at their other ends, as they come. Somebody who says nothing keeps nobody waiting."""
    arrived: queue.SimpleQueue[tuple[socket.socket, dict[str, Any]]] = queue.SimpleQueue()
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


def _read_hello(connection: socket.socket) -> dict[str, Any] | None:
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


def _go_to_hub(place: Place, hello: dict, timeout: float) -> tuple[list[str], dict[int, socket.socket]]:
    """The others: go to process 0 and wait for all, as it says."""
    host, _, port = place.address.rpartition(":")
    deadline, reason, say = time.monotonic() + timeout, "it did not answer", SAY_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        connection = None
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 10.0))
            _send(connection, hello)
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


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends a line; if the other process is gone, whoever watches it finds out."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _is_gone(connection: socket.socket) -> bool:
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable)  # it has nothing to say at this time: closed


# --- Running together ---


class _Job:
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
        # JAX's threads abort the process when they lose process 0, which they notice as soon as we do. C's `sleep` as
        # the handler of SIGABRT is called with the signal's number, 6: seconds for the watcher to say who it was.
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
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

    def send(self, message: dict[str, Any]) -> None:
        """To all that this process is connected with."""
        with self._sending:
            for connection in self._connections.values():
                _send(connection, message)

    def receive(self, i: int) -> Any:
        """The next value of a process, however long it takes."""
        value = self._inbox[i].get()
        if value is ENDED:
            raise RuntimeError(f"{self.name(i)} has ended, and this one waits for its next value")
        return value

    def finish(self) -> None:
        """Says that this process ends as it should."""
        self.send({"done": True})

    def fail(self, text: str, code: int = 1) -> None:
        """Ends all processes because of this one."""
        self._end(f"{self.name(self.process)}: {text}", f"{self.name(self.process)} failed: {text}", code)

    def wait_for_cause(self, error: BaseException) -> None:
        """An error of the runtime may follow from the end of another process, which then ends this one by name."""
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
                _send(connection, {"error": elsewhere})
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
        # They end first: if process 0 went before they have read this, JAX's threads in them would abort.
        deadline = time.monotonic() + 2
        for watcher in self._watchers:
            if watcher is not threading.current_thread():
                watcher.join(max(0, deadline - time.monotonic()))
        os._exit(code)


_job: _Job | None = None


def process_index() -> int:
    """Which process this is; 0 where there is one."""
    if _job:
        return _job.process
    return jax.process_index() if jax.distributed.is_initialized() else 0


def process_count() -> int:
    """How many processes there are."""
    if _job:
        return len(_job.hosts)
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, which reads and prints for all."""
    return process_index() == 0


def broadcast(value: Any) -> Any:
    """Returns process 0's value on every process; all must call it, as often, in the same order.

    Args:
      value: what JSON can hold; ignored on all processes but 0.
    """
    if process_count() == 1:
        return value
    job = _joined()
    if job.process:
        return job.receive(0)
    job.send({"value": value})
    return value


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in order, on every process; all must call it.

    Args:
      value: what JSON can hold.
    """
    if process_count() == 1:
        return [value]
    job = _joined()
    if job.process:
        job.send({"value": value})
        return broadcast(None)
    return broadcast([value, *(job.receive(i) for i in range(1, len(job.hosts)))])


def fail(error: BaseException | str, *, code: int = 1) -> None:
    """Ends every process, with an error that names this one. Does nothing where there is one process.

    Errors that nobody catches do the same.

    Args:
      error: why.
      code: exit code of this process; the others exit with 1.
    """
    if _job:
        if isinstance(error, BaseException):
            _job.wait_for_cause(error)
        _job.fail(str(error), code)


def shutdown() -> None:
    """Leaves the other processes in an orderly way, as the end of the program does by itself."""
    if _job:
        _job.finish()
    jax.distributed.shutdown()


def _joined() -> _Job:
    if _job is None:
        raise RuntimeError("start the processes with llama_jax.distributed.initialize, not jax.distributed.initialize")
    return _job


# --- Arrays ---


def put(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts an array of the host on the devices of all processes; each of them has the whole of the same `x`."""
    if process_count() == 1:
        return jax.device_put(x, sharding)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__, dtype=dtype)


def fetch(*arrays: jax.Array) -> tuple[np.ndarray, ...]:
    """Brings arrays of any sharding to the host of every process, whole; all processes must call it."""
    if not all(x.is_fully_addressable or x.is_fully_replicated for x in arrays):
        with jax.set_mesh(arrays[0].sharding.mesh):  # pyright: ignore[reportAttributeAccessIssue]
            arrays = _replicate(arrays)
    return tuple(np.asarray(x) for x in arrays)


@jax.jit
def _replicate(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jax.reshard(x, jax.P()) for x in arrays)
