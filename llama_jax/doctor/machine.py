"""Checks of one machine without JAX: packages, accelerators, folders, memory. None of them can hang."""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import os
import platform
import queue
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama_jax.doctor.finding import Finding, fine, one_line, problem, warning

PACKAGES = (
    "llama_jax", "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "libtpu", "jax-cuda12-plugin",
    "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip
CUDA = ("jax-cuda12-plugin", "jax-cuda13-plugin")
EXTRAS = ("", "tpu", "cuda12", "cuda13", "with-cuda", "with_cuda")
TPU_PCI_DEVICES = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # v2 and v3, ..., 7x
GIB = 1 << 30


def local_findings(checkpoint_dir: str | None, timeout: float) -> Iterator[Finding]:
    """Checks Python, packages, accelerators, folders and memory."""
    from llama_jax.files import cache_folder

    installed = versions()
    yield fine("python", f"{platform.python_version()} on {platform.machine()}, {socket.gethostname()}")
    yield fine("versions", ", ".join(f"{name} {version}" for name, version in installed.items()))
    yield from pairs(installed)
    yield from accelerators(installed)
    cache = cache_folder()
    yield writable("cache folder", str(cache), timeout, "set LLAMA_JAX_CACHE to a folder that is writable")
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if compiled:
        yield writable("compile cache", compiled, timeout, "set JAX_COMPILATION_CACHE_DIR to a folder that is writable")
    if checkpoint_dir:
        yield writable("checkpoint folder", checkpoint_dir, timeout, "give --checkpoint-dir a folder that is writable")
    yield from memory()
    yield from disks(cache)


def versions() -> dict[str, str]:
    """Returns the installed version of each package that matters."""
    found = {}
    for name in PACKAGES:
        if name.startswith("nvidia-") and not any(plugin in found for plugin in CUDA):
            continue  # torch brings these too, for itself
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def pairs(installed: dict[str, str]) -> Iterator[Finding]:
    """Finds packages that do not work together."""
    from packaging.version import Version

    jax, flax = (Version(installed.get(name, "0")) for name in ("jax", "flax"))
    if jax >= Version("0.11.1") and flax < Version("0.12.9"):
        yield problem("versions", f"flax {flax} cannot import flax.nnx with jax {jax}", 'pip install -U "flax>=0.12.9"')
    for name, wanted in unmet(installed):
        yield problem(
            "versions",
            f"{name} {installed[name]} needs {wanted}, but {installed.get(wanted.name, 'none')} is installed",
            f'pip install -U "{wanted.name}{wanted.specifier}", or make a new virtual environment',
        )


def unmet(installed: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yields (package, requirement) for each requirement among these packages that is not met."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    names = {canonicalize_name(name): name for name in installed}
    for name in installed:
        seen = set()
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            marker, other = requirement.marker, names.get(canonicalize_name(requirement.name))
            wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in EXTRAS)
            if not (other and wanted) or (other, str(requirement.specifier)) in seen:
                continue
            seen.add((other, str(requirement.specifier)))
            if not requirement.specifier.contains(installed[other], prereleases=True):
                requirement.name = other
                yield name, requirement


def accelerators(installed: dict[str, str]) -> Iterator[Finding]:
    """Finds accelerators that JAX cannot use because a package is missing."""
    tpus, gpus = tpu_chips(), nvidia_gpus()
    if tpus and "libtpu" not in installed:
        yield problem("accelerator", f"{tpus} TPU chips, but libtpu is not installed", 'pip install -e ".[tpu]"')
    if gpus and not any(name in installed for name in CUDA):
        yield problem("accelerator", f"{gpus} NVIDIA GPUs, but JAX has no CUDA plugin", 'pip install -e ".[cuda]"')


def tpu_chips() -> int:
    """Returns the number of TPU chips on the PCI bus."""

    def read(path: str) -> str:
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
        return ""

    google = (path for path in glob.glob("/sys/bus/pci/devices/*/vendor") if read(path) == "0x1ae0")
    return sum(read(f"{os.path.dirname(path)}/device") in TPU_PCI_DEVICES for path in google)


def nvidia_gpus() -> int:
    """Returns the number of NVIDIA GPUs that this process could open."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def writable(check: str, folder: str, timeout: float, remedy: str) -> Finding:
    """Checks that a file can be written in a folder, or where the folder would be made. Leaves nothing behind."""
    remote = "://" in folder

    def attempt() -> str:
        if remote:
            from etils import epath  # as Orbax and JAX's compilation cache do it

            probe = epath.Path(folder) / f".llama_jax-doctor-{socket.gethostname()}-{os.getpid()}"
            probe.write_text("doctor")
            probe.unlink()
            return f"{folder} is writable"
        place = Path(os.path.expanduser(folder)).absolute()
        existing = next(p for p in (place, *place.parents) if p.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
        return f"{place} is writable{'' if existing == place else ' (will be made)'}"

    try:
        return fine(check, within(timeout, attempt))
    except TimeoutError:
        what = "the storage" if remote else "the file system"
        return problem(check, f"{folder}: no answer in {timeout:g} s", f"{what} hangs: check its mount")
    except ImportError as error:
        package = {"gs": "gcsfs", "s3": "s3fs"}.get(folder.partition("://")[0], "gcsfs")
        return problem(check, f"{folder} cannot be checked or used ({error})", f"pip install {package}")
    except Exception as error:  # storage libraries raise many kinds
        if remote:
            remedy = "the bucket must exist, and this machine's service account needs roles/storage.objectAdmin on it"
        return problem(check, f"{folder} is not writable ({one_line(error)})", remedy)


def within(timeout: float, work: Callable[[], Any]) -> Any:
    """Returns the result of `work`, run in a thread that is abandoned if it takes too long."""
    results: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def run() -> None:
        try:
            results.put((True, work()))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        good, value = results.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError from None
    if not good:
        raise value
    return value


def proxies(coordinator: str) -> list[Finding]:
    """Finds a proxy that gRPC, and so JAX's distributed start, would use for the coordinator."""
    host = coordinator.rpartition(":")[0].strip("[]")
    names = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")]
    if not names or any(host in os.environ.get(name, "").split(",") for name in ("no_proxy", "NO_PROXY")):
        return []
    return [warning("processes", f"{', '.join(names)} set: JAX may wait for {host} in vain", f"export no_proxy={host}")]


def memory() -> Iterator[Finding]:
    """Checks host memory: of the machine, or of the container if it may use less."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return
    with contextlib.suppress(OSError, ValueError):  # "max" is not a number
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(limit - used, 0))
    value = f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"
    # Less than JAX, its compiler (1.7 GB at most, measured) and the largest tensor of a 70B model (2.1 GB) take.
    if free < 4 * GIB:
        yield warning("host memory", value, "end other programs: large models need 4 GiB while they load")
    else:
        yield fine("host memory", value)


def disks(cache: Path) -> Iterator[Finding]:
    """Checks the room for fetched checkpoints, and shared memory for NCCL."""
    with contextlib.suppress(OSError, StopIteration):
        existing = next(p for p in (cache.absolute(), *cache.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        value = f"{free / GIB:.0f} GiB free at {existing}"
        if free < GIB:
            yield warning("disk", value, "make room, or set LLAMA_JAX_CACHE to a larger disk")
        else:
            yield fine("disk", value)
    with contextlib.suppress(OSError):
        size = shutil.disk_usage("/dev/shm").total
        if size < GIB and nvidia_gpus() > 1:
            yield warning("/dev/shm", f"{size / GIB:.2f} GiB", "NCCL shares memory there: docker run --shm-size=16g")
        else:
            yield fine("/dev/shm", f"{size / GIB:.2f} GiB")
