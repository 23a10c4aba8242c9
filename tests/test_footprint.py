"""What importing and loading cost, each in a process of its own."""

import json
import statistics
import subprocess
import sys
import time

import pytest

from tests.material import smollm2_gguf

HEAVY = ("orbax", "huggingface_hub", "gguf", "torch", "transformers")

LOAD = """
import json, sys, threading, time
import jax, jax.numpy as jnp

def held():  # kB of memory that is the process's own; pages of the mapped file are not
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))

jnp.zeros(1).block_until_ready()
peak = base = held()
done = threading.Event()

def sample():
    global peak
    while not done.wait(0.02):
        peak = max(peak, held())

thread = threading.Thread(target=sample)
thread.start()
import llama_jax
llama = llama_jax.load("smollm2-135m-instruct", dtype="float32")
jax.block_until_ready(llama.model)
done.set()
thread.join()
weights = sum(x.nbytes for x in jax.tree.leaves(llama.model))
print(json.dumps({"peak": (max(peak, held()) - base) * 1024, "weights": weights}))
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def seconds(code: str) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(code)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.mark.timing
def test_importing_costs_less_than_jax_and_leaves_the_heavy_packages_alone(timed):
    loaded = run("import llama_jax, sys; llama_jax.load; print(' '.join(sys.modules))").split()
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}
    if not timed:
        return
    nothing = seconds("pass")
    ours, jax = seconds("import llama_jax; llama_jax.load") - nothing, seconds("import jax") - nothing
    assert ours <= 0.8 * jax, f"{ours:.2f} s against {jax:.2f} s of jax"


def test_loading_holds_little_more_than_the_weights():
    smollm2_gguf()
    result = json.loads(run(LOAD))
    assert result["weights"] == 134_515_008 * 4
    assert result["peak"] <= 1.5 * result["weights"], f"{result['peak'] / result['weights']:.2f} times the weights"
