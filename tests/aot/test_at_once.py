"""Two plans at once; the first of these tests, as a process that has used libtpu keeps it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.test_scripts import ROOT


@pytest.mark.tpu_compiler
def test_two_plans_at_once():
    """The second waits, and says for what."""
    command = [sys.executable, "scripts/plan.py", "--model", "llama3.2-1b", "--machine", "v5litepod-4", "--json"]
    command += ["--mode", "decode", "--no-floor"]
    start = time.monotonic()
    running = []
    for _ in range(2):
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        time.sleep(6)
    done = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    first, second = (json.loads(out) for out, _ in done)
    assert first["peak_bytes"] == second["peak_bytes"]
    if "Waiting" not in done[1][1]:  # the first was through already
        assert time.monotonic() - start < 12
    else:
        assert f"process {running[0].pid} uses libtpu" in done[1][1]
