"""Runs all checks, each with a time limit, and always returns a report.

JAX and the accelerator may hang or crash, so they run in a child process: JAX ends its process when the distributed
start fails, and a runtime that waits for a device cannot be interrupted. JAX is not imported here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from llama_jax.doctor.finding import OK, PROBLEM, Finding, between, one_line, problem
from llama_jax.doctor.machine import local_findings, proxies
from llama_jax.typing import JsonObject

PROBE = "import sys; from llama_jax.doctor.probe import probe; probe(sys.argv[1])"

# Messages of runtimes that fail, and the remedy; the first match counts.
KNOWN = (
    (r"ended without a word|process \d+ of \d+ \(.*\) failed", "the output of that process says why"),
    (r"multi-process lockfile|already in use by process|[Dd]evice or resource busy",
     "another process holds the TPU: `sudo lsof -w /dev/accel* /dev/vfio/*` names it, end it; if there is none,"
     " `sudo rm /tmp/libtpu_lockfile`"),
    (r"[Aa]ddress already in use|Failed to bind|bind.*failed",
     "another program has the coordinator's port: give --coordinator another one, the same on every process"),
    (r"driver version is insufficient|CUDA_ERROR_SYSTEM_|CUDA_ERROR_NO_DEVICE|no CUDA-capable device|cuInit",
     "the NVIDIA driver is missing, too old for this CUDA or not passed into the container: compare `nvidia-smi` with"
     " `pip show jax-cuda12-plugin`; containers need --gpus all"),
    (r"NCCL|ncclRemoteError|ncclSystemError",
     "run again with NCCL_DEBUG=INFO; name the network with NCCL_SOCKET_IFNAME, and give containers --shm-size=16g"),
    (r"RESOURCE_EXHAUSTED|[Oo]ut of memory",
     "another program uses the device's memory: end it (`nvidia-smi` lists them), or set"
     " XLA_PYTHON_CLIENT_MEM_FRACTION=0.5"),
    (r"signal SIGKILL", "killed by hand, or by the system for lack of memory: `sudo dmesg | tail` shows which"),
)  # fmt: skip

# Stages of the child: the name in the table, the remedy when it is silent, the remedy when it fails.
STAGES = {
    "start": (
        "start of JAX",
        "`python -c 'import jax'` must end; on Cloud TPU the metadata server (metadata.google.internal) must answer",
        "correct the options, or the error of `python -c 'import jax'`",
    ),
    "connect": (
        "processes",
        "export no_proxy for the coordinator's address, or give --coordinator another port",
        "docs/cloud-tpu.md and docs/gpu.md have the commands",
    ),
    "rows": (
        "processes",
        "one of them waits: its own output says for what",
        "one of them ended meanwhile: its own output says why",
    ),
    "devices": (
        "devices",
        "the runtime waits: each host of a TPU slice must run this command, and nothing else may use the devices",
        'unset JAX_PLATFORMS, or install what the device needs: pip install -e ".[tpu]" or ".[cuda]"',
    ),
    "matmul": (
        "matmul",
        "the device does not answer: restart the machine",
        "end what else uses the device, or restart the machine",
    ),
    "all-reduce": (
        "all-reduce",
        "the devices do not reach each other: open all ports between the machines; for GPUs NCCL_DEBUG=INFO says more,"
        " and NCCL_SOCKET_IFNAME names the network",
        "open all ports between the machines; for GPUs NCCL_DEBUG=INFO says more",
    ),
    "end": (
        "processes",
        "one of them waits: its own output says for what",
        "one of them ended before the others: its own output says why",
    ),
}


@dataclasses.dataclass(frozen=True)
class MachineReport:
    """The findings of one process.

    Attributes:
      process: its index.
      processes: how many there should be.
      findings: of this process, and those received from the others.
      shared: whether process 0 has them all, and prints them.
    """

    process: int
    processes: int
    findings: list[Finding]
    shared: bool

    @property
    def ok(self) -> bool:
        """Whether there is no problem. Warnings are not problems."""
        return all(f.status != PROBLEM for f in self.findings)


def examine(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    checkpoint_dir: str | None = None,
    timeout: float = 120,
    say: Callable[[str], None] = lambda text: None,
) -> MachineReport:
    """Checks this process and, with the others, the connections between them. Takes a few times `timeout` at most.

    Args:
      coordinator: address and port of process 0; default: from Cloud TPU, SLURM or Open MPI, else one process.
      num_processes: how many processes there are.
      process_id: which one this is.
      checkpoint_dir: a folder, or gs://..., that must be writable.
      timeout: seconds that any one step may take.
      say: called with each step.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    child, patience = Child(given | {"timeout": timeout}), 0
    try:
        report = _examine(child, list(local_findings(checkpoint_dir, min(timeout, 30))), timeout, say)
        patience = 10 if report.shared else 0  # a process that leaves early would end the others
        return report
    finally:
        child.end(patience)


def _examine(child: Child, found: list[Finding], timeout: float, say: Callable[[str], None]) -> MachineReport:
    answer = child.listen("start", max(timeout, 60))
    if isinstance(answer, Finding):
        return MachineReport(0, 1, [*found, answer], False)
    coordinator, process, processes = answer["coordinator"], answer["process"], answer["processes"]
    if processes > 1:
        say(f"process {process} of {processes}: waiting {timeout:g} s at most for all to meet at {coordinator}")
        found += proxies(coordinator)
    found = [dataclasses.replace(f, process=process) for f in found]
    child.tell([dataclasses.asdict(f) for f in found])
    mine: list[Finding] = []
    for stage in ("connect", "rows", "devices", "matmul", "all-reduce", "end"):
        # The meeting has its own limit, and a better message.
        answer = child.listen(stage, timeout + (30 if stage == "connect" else 0))
        if isinstance(answer, Finding):
            return MachineReport(
                process, processes, [*found, *mine, dataclasses.replace(answer, process=process)], False
            )
        if stage == "connect" and processes > 1:
            found.append(Finding("processes", OK, f"all {processes} met at {coordinator}", process=process))
        if stage == "rows":
            others = [Finding(**f) for f in answer["all"] if f["process"] != process]
            found += [*others, *between([*found, *others])]
        mine += [Finding(**f) for f in answer.get("found", ())]
    return MachineReport(process, processes, [*found, *(Finding(**f) for f in answer["all"])], True)


class Child:
    """The process that runs JAX; `listen` returns its answer for each stage."""

    def __init__(self, arguments: JsonObject):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROBE, json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.decode())
        self._lines.put(None)

    def tell(self, value: Any) -> None:
        """Sends a value to the child, as a line of JSON."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()

    def listen(self, stage: str, timeout: float) -> JsonObject | Finding:
        """Returns the child's answer for a stage, or the problem that prevented one."""
        check, when_silent, when_failed = STAGES[stage]
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return problem(check, f"no answer in {timeout:g} s", when_silent)
        answer = json.loads(line) if line is not None else {"error": self._last_words()}
        if "error" not in answer:
            return answer
        value = answer["error"]
        remedy = next((remedy for pattern, remedy in KNOWN if re.search(pattern, value)), when_failed)
        if advice := re.match(r"(.+?)\. ([A-Z].+)", value):  # the error has its own remedy
            value, remedy = advice[1], f"{advice[2]} ({remedy})"
        return problem(check, value, remedy)

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        how = f"exit code {code}" if code is None or code >= 0 else f"signal {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if re.match(r"error: |F\d{4} |\S*Error: ", line)] or lines or ["no message"]
        return f"its JAX process ended ({how}): {one_line(telling[-1])}"

    def end(self, patience: float) -> None:
        """Ends the child. `patience` is the number of seconds it has to leave the other processes in order."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in filter(None, (self._process.stdin, self._process.stdout, self._errors)):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
