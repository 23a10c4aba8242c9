"""How fast a conversion is, against copying the same files, and how much memory it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llama_jax.config.hf import to_hf_config
from llama_jax.config.presets import PRESETS
from llama_jax.files import sync
from llama_jax.weights import params
from llama_jax.weights.checkpoint import DTYPES
from llama_jax.weights.safetensors import write_safetensors
from llama_jax.weights.sink import Entry

PERIOD = 0.02  # seconds between two samples of memory

_CONVERT = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
jnp.zeros(1).block_until_ready()
from scripts.bench.weights import peak_memory
from llama_jax.weights.save import convert
source, destination, to = sys.argv[1:]
with peak_memory() as memory:
    report = convert(source, destination, to=to)
print(json.dumps(dataclasses.asdict(report) | dataclasses.asdict(memory)))
"""


@dataclasses.dataclass
class Memory:
    """What a process held, in bytes: pages of its own (RssAnon + RssShmem), not those of mapped files.

    Attributes:
      before: when the measurement began.
      peak: at most, sampled every `PERIOD`.
    """

    before: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Conversion:
    """One conversion beside a copy of its input.

    Attributes:
      source: format of the input.
      to: format of the output.
      nbytes: of the output.
      largest: bytes of the largest tensor.
      copy_seconds: `cp --reflink=never` of the input, until it is on the disk.
      write_seconds: of the conversion, until it is on the disk.
      verify_seconds: of its verification.
      before: bytes held after `import jax`.
      peak: most bytes held, all in all.
    """

    source: str
    to: str
    nbytes: int
    largest: int
    copy_seconds: float
    write_seconds: float
    verify_seconds: float
    before: int
    peak: int


@contextlib.contextmanager
def peak_memory() -> Iterator[Memory]:
    """Samples what this process holds while the block runs (Linux)."""
    memory = Memory(_held(), 0)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(PERIOD):
            memory.peak = max(memory.peak, _held())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
        memory.peak = max(memory.peak, _held())


def _held() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def write_synthetic(folder: Path, preset: str) -> None:
    """A Hugging Face folder with a released model's shapes and random bfloat16 weights; no tokenizer."""
    config = PRESETS[preset]
    random = np.random.default_rng(0).standard_normal(1 << 23, np.float32).astype(DTYPES["bfloat16"])

    def pieces(count: int) -> Callable[[], Iterator[np.ndarray]]:
        return lambda: (random[: min(len(random), count - i)] for i in range(0, count, len(random)))

    entries = [
        Entry(name, shape, DTYPES["bfloat16"], pieces(math.prod(shape)))
        for name, shape in params.expected(config, "hf").items()
    ]
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", entries, lambda done: None, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hf_config(config, dtype="bfloat16")))
    sync(folder.iterdir())


def measure(folder: Path, preset: str, *, progress: Callable[[str], None]) -> list[Conversion]:
    """Converts a synthetic model HF -> Meta and Meta -> HF, each after a copy of the same input.

    Args:
      folder: an empty folder with room for four times the model.
      preset: a key of `PRESETS`.
      progress: called with a word about what is being done.
    """
    config = PRESETS[preset]
    largest = 2 * max(math.prod(shape) for shape in params.expected(config, "hf").values())
    progress(f"writing a synthetic {preset}")
    write_synthetic(folder / "hf", preset)
    results = []
    for source, to, path in (("hf", "meta", folder / "hf"), ("meta", "hf", folder / "meta")):
        progress(f"copying and converting {source} to {to}")
        _warm(path)
        copy, result = folder / "copy", folder / ("meta" if to == "meta" else "hf-again")
        start = time.perf_counter()
        subprocess.run(["cp", "--reflink=never", "-r", path, copy], check=True)
        sync(copy.iterdir())
        copied = time.perf_counter() - start
        shutil.rmtree(copy)
        _warm(path)
        command = [sys.executable, "-c", _CONVERT, str(path), str(result), to]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[2])
        report = json.loads(done.stdout)
        seconds = (report["write_seconds"], report["verify_seconds"])
        memory = (report["before"], report["peak"])
        results.append(Conversion(source, to, report["nbytes"], largest, copied, *seconds, *memory))
    return results


def _warm(folder: Path) -> None:
    """Brings the files of a folder into the system's page cache."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            while file.read(1 << 24):
                pass
