"""Many processes: they begin together, end together, and compute on arrays spread over all devices.

`place` finds out which process this is, `meeting` waits for the others, `job` is what they tell each other from then
on. `broadcast` and `gather` use its connections and wait as long as it takes; XLA's collectives would give up while
somebody types.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from llama_jax import _jax_internals
from llama_jax.distributed.agreement import SHOWN, DisagreementError, differences, message, settings
from llama_jax.distributed.job import ProcessGroup
from llama_jax.distributed.meeting import meet
from llama_jax.distributed.place import find_place
from llama_jax.typing import Fields, Foreign

HEARTBEAT_TIMEOUT = 30  # seconds; JAX's own, which also notices a process that hangs
T = TypeVar("T")
PACKAGES = ("jax", "jaxlib", "flax", "libtpu")

_job: ProcessGroup | None = None


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
      ValueError: the arguments are incomplete or wrong, a process did not arrive, or two have different versions or
        settings. Every process that is there raises the same.
      RuntimeError: JAX has been used already.
    """
    global _job
    if _job or jax.distributed.is_initialized():
        return
    place = find_place(coordinator, num_processes, process_id, timeout)
    if place is None:
        return
    if _jax_internals.backends_are_initialized():
        raise RuntimeError("several processes must be joined before JAX is used: call distributed.initialize earlier")
    hosts, connections = meet(place, versions(), timeout, settings())
    _job = ProcessGroup(place.process_id, hosts, connections)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, and continue
    jax.distributed.initialize(
        place.address,
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=round(max(timeout, 1)),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    )
    _jax_internals.cache_on_every_process()
    atexit.register(_job.finish)  # runs before JAX's own shutdown, where all wait for all


def versions() -> dict[str, str]:
    """What must be the same on every process: interpreter, packages, and the sources of this one (a hash of them)."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found | {"llama_jax": f"sources {digest.hexdigest()[:12]}"}


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


def gather(value: T) -> list[T]:
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


def compile_together(lowered: Foreign, compiler_options: Fields | None = None) -> Foreign:
    """Compiles a lowered program, and returns it when all processes have; all must call it.

    A collective of XLA would give up (on CPUs after 30 s) while another process still compiles.

    Args:
      lowered: of `jax.jit(...).lower`.
      compiler_options: of XLA.
    """
    program = lowered.compile(dict(compiler_options) if compiler_options else None)
    gather(None)
    return program


def agree(facts: Fields) -> None:
    """Returns if all processes pass equal facts; all must call it.

    Args:
      facts: what JSON can hold, in mappings of any depth; the names lead to what differs.

    Raises:
      DisagreementError: a process has others than process 0; the same on every process.
    """
    if process_count() == 1:
        return
    here = list(differences(facts, broadcast(facts)))[:SHOWN]
    for i, found in enumerate(gather(here)):
        if found:
            raise DisagreementError(message(i, _joined().hosts[i], found))


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
        _job.fail(str(error), code, of_all=isinstance(error, DisagreementError))


def shutdown() -> None:
    """Leaves the other processes in an orderly way, as the end of the program does by itself."""
    if _job:
        _job.finish()
    jax.distributed.shutdown()


def _joined() -> ProcessGroup:
    if _job is None:
        raise RuntimeError("start the processes with llama_jax.distributed.initialize, not jax.distributed.initialize")
    return _job


# --- Arrays ---


def put(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts an array of the host on the devices of all processes.

    Args:
      x: any shape; the same on every process, whole.
      sharding: over devices of any processes.
    """
    if process_count() == 1:
        return jax.device_put(x, sharding)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__, dtype=dtype)


def fetch(*arrays: jax.Array) -> tuple[np.ndarray, ...]:
    """Brings arrays to the host of every process, whole; all processes must call it.

    Args:
      *arrays: of any shape and sharding, on one mesh.
    """
    if not all(x.is_fully_addressable or x.is_fully_replicated for x in arrays):
        with jax.set_mesh(arrays[0].sharding.mesh):  # pyright: ignore[reportAttributeAccessIssue]
            arrays = _replicate(arrays)
    return tuple(np.asarray(x) for x in arrays)


@jax.jit
def _replicate(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jax.reshard(x, jax.P()) for x in arrays)
