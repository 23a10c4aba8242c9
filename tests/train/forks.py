"""Runs scripts in forks of one process that has imported everything already: a start takes one second instead of six.

Reads one JSON object a line: {"command": [...], "environment": {...}, "out": path, "err": path} starts one and prints
its process id; {"wait": pid} waits for it and prints its exit code.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


def serve() -> None:
    import grain  # noqa: F401
    import jax
    import matplotlib.figure  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tyro  # noqa: F401

    import llama_jax.train.loop  # noqa: F401

    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            print(os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(task[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(task["environment"])
        if limit := task["environment"].get("LARGEST_FILE"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        jax.config.update("jax_num_cpu_devices", int(task["environment"]["JAX_NUM_CPU_DEVICES"]))
        sys.argv = task["command"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return


class Forks:
    """The process that forks, and its forks."""

    def __init__(self, root: Path, environment: Mapping[str, str]):
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.train.forks"], env=environment, cwd=root, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._environment = environment

    def start(self, command: list[str], folder: Path, **environment: str) -> Fork:
        """Starts a script of the repository with its options; `folder` gets what it prints."""
        out, err = folder / f"{time.monotonic_ns()}.out", folder / f"{time.monotonic_ns()}.err"
        out.touch()
        err.touch()
        variables = {**self._environment, **environment}
        task = {"command": command, "environment": variables, "out": str(out), "err": str(err)}
        return Fork(self, self.ask(task), out, err)

    def ask(self, task: dict) -> int:
        assert self._server.stdin
        assert self._server.stdout
        print(json.dumps(task), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


class Fork:
    """One script that runs."""

    def __init__(self, forks: Forks, pid: int, out: Path, err: Path):
        self._forks, self.pid, self.out, self.err = forks, pid, out, err

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str, str]:
        """Exit code (negative: a signal), standard output and error."""
        return self._forks.ask({"wait": self.pid}), self.out.read_text(), self.err.read_text()


if __name__ == "__main__":
    serve()
