"""Two plans at once; the first of these tests, as a process that has used libtpu keeps it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.tpu_compiler
def test_two_plans_at_once():
    """One waits, and says for which process."""
    command = [sys.executable, "scripts/plan.py", "--model", "llama3.2-1b", "--machine", "v5litepod-4", "--json"]
    command += ["--mode", "decode", "--no-floor"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    done = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    first, second = (json.loads(out) for out, _ in done)
    assert first["peak_bytes"] == second["peak_bytes"]
    (waited,) = (i for i in (0, 1) if "Waiting" in done[i][1])
    assert f"process {running[1 - waited].pid} uses libtpu" in done[waited][1]
