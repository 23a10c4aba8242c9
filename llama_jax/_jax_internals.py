"""Every private name of JAX that this package uses, in one place: what to look at when JAX changes."""

from __future__ import annotations

import inspect
import logging
import os

import jax

from llama_jax.typing import Foreign

log = logging.getLogger("llama_jax")

_PARAMETERS = ["cache_key", "compile_time_secs", "module_name", "backend", "executable", "host_callbacks"]


def backends_are_initialized() -> bool:
    """Returns whether a device has been used already."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def cluster_types() -> list[Foreign]:
    """Returns the launchers that JAX knows, in the order in which it asks them."""
    from jax._src.clusters import ClusterEnv

    return ClusterEnv._cluster_types


def on_cloud_tpu() -> bool:
    """Returns whether this machine is a Cloud TPU VM."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    return running_in_cloud_tpu_vm


def open_mpi_address() -> str:
    """Returns "host:port" of process 0, as Open MPI 4 gives it."""
    from jax._src.clusters.ompi_cluster import OmpiCluster

    return OmpiCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))


def cache_on_every_process() -> None:
    """Lets each process write its programs for CPUs to JAX's compilation cache.

    JAX writes those of process 0 alone, which the others find too: on TPUs and GPUs. On CPUs a program's key depends on
    the process, so that the others would compile all of them at every start, while process 0 waits in a collective.
    """
    from jax._src import compilation_cache, compiler

    original = getattr(compiler, "_cache_write", None)
    if original is None or list(inspect.signature(original).parameters) != _PARAMETERS:
        log.debug("this version of JAX writes its compilation cache otherwise: left as it is")
        return

    def write(
        cache_key: str,
        compile_time_secs: float,
        module_name: str,
        backend: Foreign,
        executable: Foreign,
        host_callbacks: Foreign,
    ) -> None:
        least: float = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore
        if jax.process_index() == 0 or backend.platform != "cpu":
            original(cache_key, compile_time_secs, module_name, backend, executable, host_callbacks)
        elif compile_time_secs >= least and not host_callbacks:
            try:
                compilation_cache.put_executable_and_time(
                    cache_key, module_name, executable, backend, int(compile_time_secs)
                )
            except Exception as error:  # as JAX: a cache that cannot be written costs time alone
                log.debug("not written to the compilation cache: %s", error)

    compiler._cache_write = write
