"""Scripts and workers as processes of their own."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHORT = ("--max-new-tokens", "8")
HOST = socket.gethostname()
Start = Callable[..., list[subprocess.Popen[str]]]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def worker(start: Start, task: str, *args: str | Path, **options) -> list[subprocess.Popen[str]]:
    return start("-m", "tests.distributed_worker", task, *args, **options)


def outputs(processes: list[subprocess.Popen[str]], *, stdin: str = "", code: int = 0) -> list[tuple[str, str]]:
    """What each printed on stdout and on stderr; process 0 gets the input."""
    found = []
    for i, process in enumerate(processes):
        found.append(process.communicate("" if i else stdin, timeout=120))
        assert process.returncode == code, found[-1][1]
    return found


def said(process: subprocess.Popen[str]) -> Any:
    """The next thing that a worker says, between lines of XLA's."""
    assert process.stdout
    line = next(line for line in process.stdout if line.startswith("said "))
    return json.loads(line.removeprefix("said "))
