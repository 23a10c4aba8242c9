"""Where this process stands among the others: by arguments, environment and launcher."""

from __future__ import annotations

import logging
import os
import re
from typing import NamedTuple

from llama_jax import _jax_internals
from llama_jax.typing import Foreign

log = logging.getLogger("llama_jax")

PORTS = range(61440, 65536)  # a launcher's job number chooses one of them, as in JAX


class Place(NamedTuple):
    """This process's place among the others.

    Attributes:
      address: "host:port" of process 0.
      num_processes: how many there are.
      process_id: which one this is.
      local_devices: numbers of the devices that are its own; None is all of this machine's.
    """

    address: str
    num_processes: int
    process_id: int
    local_devices: list[int] | None = None


def find_place(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> Place | None:
    """Where this process stands, by arguments, environment and launcher; None where it is the only one.

    Args:
      coordinator: as of `initialize`, like the following ones.
      num_processes: see `initialize`.
      process_id: see `initialize`.
      timeout: seconds that a launcher's coordinator may take to have a name.

    Raises:
      ValueError: they are incomplete or wrong, or the launcher does not answer.
    """
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
    _check(coordinator, num_processes, process_id)
    return Place(coordinator, num_processes, process_id, local_devices)


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
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
    for cluster in _jax_internals.cluster_types():
        # A Kubernetes pod that is no indexed job is alone, and JAX's question would be an error or a warning.
        alone = cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
        try:
            if not cluster.opt_in_only_method and not alone and cluster.is_env_present():
                return _detected(cluster, timeout)
        except OSError as error:  # a TPU, but no metadata server: not Google's cloud
            log.warning("%s does not answer (%s): this process runs alone", cluster.__name__, error)
            return None
    return None


def _detected(cluster: Foreign, timeout: float | None) -> Place:
    try:
        count, process = cluster.get_process_count(), cluster.get_process_id()
        address = ""
        if timeout is not None and count > 1:
            address = cluster.get_coordinator_address(round(timeout), os.environ.get("JAX_COORDINATOR_PORT"))
        local = None if _jax_internals.on_cloud_tpu() else cluster.get_local_process_id()
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
    size, rank, local = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK", "LOCAL_RANK"))
    local_size = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0))
    address = ""
    if "OMPI_MCA_orte_hnp_uri" in os.environ:  # version 4
        address = _jax_internals.open_mpi_address()
    elif job := re.fullmatch(r"prterun-(.+)-(\d+)@\d+", os.environ.get("PMIX_NAMESPACE", "")):
        port = os.environ.get("JAX_COORDINATOR_PORT", PORTS[int(job[2]) % len(PORTS)])
        address = f"{'127.0.0.1' if local_size == size else job[1]}:{port}"
    return Place(address, size, rank, None if local_size == 1 else [local])
