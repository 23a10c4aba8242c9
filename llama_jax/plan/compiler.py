"""The compilers of machines that are not there: libtpu for TPUs, the CUDA plugin for NVIDIA's GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from llama_jax.costs.machines import Machine, available_bytes
from llama_jax.plan.program import Lowered
from llama_jax.typing import Fields, Foreign, JsonObject

LOCK = Path("/tmp/libtpu_lockfile")
WAIT = 2.0  # seconds between two tries
_NAMES = {"7x": "tpu7x"}

# What XLA knows of a GPU (`GpuTargetConfigProto`); the numbers are those of its own target files.
_GPU = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
shared_memory_per_block_optin: {optin} cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536
registers_per_block_limit: 65536 }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
_HOPPER = {"shared": 233472, "cores": 132, "fpus": 128, "l2": 52428800, "clock": 1.98, "optin": 232448, "major": 9}
_GPUS = {
    "a100": {"shared": 167936, "cores": 108, "fpus": 64, "l2": 41943040, "clock": 1.41, "optin": 166912, "major": 8,
             "bandwidth": 2039040000000, "name": "NVIDIA A100-SXM4-80GB"},
    "h100": {**_HOPPER, "bandwidth": 3352320000000, "name": "NVIDIA H100 80GB HBM3"},
    "h100pcie": {**_HOPPER, "cores": 114, "clock": 1.755, "bandwidth": 2039000000000, "name": "NVIDIA H100 PCIe"},
    "h200": {**_HOPPER, "l2": 62914560, "bandwidth": 4800000000000, "name": "NVIDIA H200"},
    "b200": {**_HOPPER, "cores": 148, "l2": 132644864, "clock": 1.965, "major": 10, "bandwidth": 7672320000000,
             "name": "NVIDIA B200"},
}  # fmt: skip


class NoCompiler(Exception):
    """The compiler of a machine is not installed; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says of a program, in bytes of each device.

    Attributes:
      fits: whether it accepted the program.
      argument_bytes: of its arguments.
      output_bytes: of its results.
      alias_bytes: of results in the memory of donated arguments.
      temporary_bytes: of everything else in the device's memory.
      host_bytes: of the host's memory.
      text: the optimized program; empty where it did not fit.
      seconds: how long it took.
      message: of the compiler, where it did not fit.
      largest: the largest buffers in words, where it did not fit.
    """

    fits: bool
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    host_bytes: int
    text: str
    seconds: float
    message: str = ""
    largest: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Arguments, results in memory of their own, and temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes


def is_installed(machine: Machine) -> bool:
    """Whether the compiler of a machine is here."""
    if machine.chip.platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    plugins = importlib.util.find_spec("jax_plugins")
    return plugins is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") is not None for version in (12, 13)
    )


def versions(machine: Machine) -> dict[str, str]:
    """The versions that a plan depends on."""
    names = ("libtpu",) if machine.chip.platform == "tpu" else ("jax-cuda12-plugin", "jax-cuda13-plugin")
    found = {"jax": jax.__version__}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def devices(machine: Machine, *, say: Callable[[str], None]) -> list[Foreign]:
    """The devices of a machine, to lower and compile for.

    Args:
      machine: need not be there.
      say: is told what is waited for.

    Raises:
      NoCompiler: its compiler is not installed.
      ValueError: the compiler does not know such a machine.
    """
    if not is_installed(machine):
        extra, what = ("tpu", "libtpu") if machine.chip.platform == "tpu" else ("cuda", "the CUDA plugin of JAX")
        raise NoCompiler(f'{what} is not installed: pip install -e ".[{extra}]" gives the compiler of {machine.name}')
    return _tpus(machine, say) if machine.chip.platform == "tpu" else _gpus(machine)


def _tpus(machine: Machine, say: Callable[[str], None]) -> list[Foreign]:
    from jax.experimental import topologies

    kind = _NAMES.get(machine.chip.name, machine.chip.name)
    os.environ["TPU_ACCELERATOR_TYPE"] = dataclasses.replace(machine, slices=1).cloud_name
    options: JsonObject = {"num_slices": machine.slices} if machine.slices > 1 else {}
    if machine.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # else the two cores of a chip are two devices
    waiting = False
    while True:
        try:
            return topologies.get_topology_desc(f"{kind}:{machine.topology}", platform="tpu", **options).devices
        except Exception as error:
            if "lockfile" not in str(error):
                raise ValueError(f"libtpu does not know {machine.name}: {_first_line(error)}") from None
        if not waiting:
            say(
                f"Waiting: {_holder()} uses libtpu, which serves one process at a time (Ctrl-C gives up;"
                " plan.py --compile 0 does without)"
            )
            waiting = True
        time.sleep(WAIT)


def _holder() -> str:
    """Who holds libtpu's lock, in words."""
    with contextlib.suppress(OSError):
        inode = LOCK.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "POSIX" and words[5].rpartition(":")[2] == str(inode):
                return f"process {words[4]}"
    return "another process"


def _gpus(machine: Machine) -> list[Foreign]:
    from jax.experimental import topologies

    chip = machine.chip
    target = _GPU.format(memory=chip.memory, **_GPUS[chip.name])
    shape = f"1x{machine.slices}x{machine.topology}"  # of slices, machines and GPUs
    try:
        return topologies.get_topology_desc(chip.name, platform="cuda", topology=shape, target_config=target).devices
    except Exception as error:
        raise ValueError(f"the CUDA plugin does not know {machine.name}: {_first_line(error)}") from None


def compile(program: Lowered, machine: Machine, options: Fields) -> Compiled:
    """Compiles a program.

    Args:
      program: lowered on devices of the machine.
      machine: what it is compiled for.
      options: of the compiler.

    Raises:
      ValueError: the compiler refuses it for another reason than memory.
    """
    if machine.chip.platform == "cuda":
        return _for_gpu(program, machine, {"xla_gpu_autotune_level": 0, **options})
    with tempfile.TemporaryDirectory(prefix="llama_jax_plan_") as folder:
        return _for_tpu(program, {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **options}, Path(folder))


def _for_tpu(program: Lowered, options: JsonObject, folder: Path) -> Compiled:
    """The compiler's own report is read, and not `memory_analysis` alone: that of libtpu 0.0.42 and 0.0.50 says 6.7 GB
    of temporaries where its buffers take 5.0, and the text of newer ones is more than an older JAX can parse."""
    start = time.perf_counter()
    try:
        compiled = program.lowered.compile(options)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ValueError(f"the compiler refuses this program: {_first_line(error)}") from error
        spaces, largest = _usage(folder)
        total = spaces.get("default", 0)
        temporary = max(0, total - program.argument_bytes)
        return Compiled(
            False, program.argument_bytes, 0, 0, temporary, spaces.get("host", 0), "", time.perf_counter() - start,
            _first_line(error), largest,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    arguments, outputs, alias = (
        int(getattr(memory, f"{name}_size_in_bytes")) for name in ("argument", "output", "alias")
    )
    host = memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes + memory.host_temp_size_in_bytes
    spaces, _ = _usage(folder)
    temporary = int(memory.temp_size_in_bytes)
    if "default" in spaces:
        temporary = max(0, spaces["default"] - arguments - outputs + alias)
    found = _newest(folder, "*after_codegen.txt")
    text = found.read_text() if found else compiled.as_text()
    return Compiled(
        True, arguments, outputs, alias, temporary, int(host - memory.host_alias_size_in_bytes), text, seconds
    )


def _for_gpu(program: Lowered, machine: Machine, options: JsonObject) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = program.lowered.compile(options)
    except Exception as error:
        raise ValueError(f"the compiler refuses this program: {_first_line(error)}") from error
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    arguments, outputs, alias, temporary = (
        int(getattr(memory, f"{name}_size_in_bytes")) for name in ("argument", "output", "alias", "temp")
    )
    host = memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes + memory.host_temp_size_in_bytes
    host -= memory.host_alias_size_in_bytes
    found = Compiled(True, arguments, outputs, alias, temporary, int(host), compiled.as_text(), seconds)
    if found.peak_bytes > available_bytes(machine):
        return dataclasses.replace(found, fits=False, message="more than XLA_PYTHON_CLIENT_MEM_FRACTION allows")
    return found


_SPACE = re.compile(r"Memory Space: (\w+) \(color=(\d+)\)\nTotal bytes: (\d+)")
# Arguments and results of computations that run aside, such as libtpu 0.0.52's gathers: counted, though they are the
# caller's own buffers (0.7 GB of 4.0 in a prefill of Llama 3.2 3B).
_ASIDE = re.compile(r"^allocation \d+: size (\d+), (?:page \d+, )?thread-local", re.MULTILINE)
_BUFFER = re.compile(r"\(\s*\d+%\);\s*([\d.]+[KMG]iB);\s*\d+;\s*\d+; (.*)")


def _usage(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Bytes in each memory space by the compiler's report, and its largest buffers."""
    report = _newest(folder, "*memory-usage-report.txt")
    if report is None:
        return {}, ()
    text = report.read_text()
    spaces = {}
    for name, color, size in _SPACE.findall(text):
        spaces["host" if color in ("4", "5") else name] = spaces.get("host" if color in ("4", "5") else name, 0) + int(
            size
        )
    assignment = _newest(folder, "*buffer-assignment.txt")
    if assignment and "default" in spaces:
        spaces["default"] -= sum(map(int, _ASIDE.findall(assignment.read_text())))
    largest = tuple(f"{size}: {shapes}" for size, shapes in _BUFFER.findall(text)[:8])
    return spaces, largest


def _newest(folder: Path, pattern: str) -> Path | None:
    """Of the main program: the largest file, as small programs are dumped too."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size, default=None)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
