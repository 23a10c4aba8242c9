"""Eight simulated CPU devices for every test; `make_mesh(config)` without sizes takes one of them. Shared fixtures."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also where an accelerator, or only its compiler, is installed

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.builders import tiny_config, write_hf
from tests.processes import ROOT, Start, free_port
from tests.train.forks import Forks

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device

CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs home to the hills",
    "system user assistant what is the name of the river? it is a long story, said the wolf.",
]
# No line ends: an answer is one line.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A random model of one layer whose tokenizer knows two sentences, in a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    write_hf(folder, tiny_config(num_layers=1, vocab_size=tokenizer.get_vocab_size(), max_seq_len=256), std=0.3)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation(request) -> Iterator[None]:
    """Where a module is marked so: the same program, and LLVM takes a third less time for it."""
    quick = request.node.get_closest_marker("unoptimized") is not None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """One device; the commands of all workers share one cache of compiled programs, the smallest too."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "PYTHONPATH": str(ROOT),
        "LLAMA_JAX_CACHE": str(tmp_path_factory.mktemp("cache")),
        "JAX_COMPILATION_CACHE_DIR": str(shared / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_NUM_CPU_DEVICES": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONIOENCODING": "utf-8:strict",  # as in most locales; Python is lenient in C.UTF-8
    }


@pytest.fixture(scope="session")
def run(environment):
    """Runs a script; what it does well, it does without a word on stderr."""

    def run(script: str, *args: str | Path, stdin: str = "", devices: int = 1, code: int = 0, quiet: bool = True):
        command = [sys.executable, ROOT / "scripts" / script, *args]
        variables = environment | {"JAX_NUM_CPU_DEVICES": str(devices)}
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, errors="surrogateescape", env=variables,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        if code == 0 and quiet:
            assert done.stderr == ""
        return done

    return run


@pytest.fixture
def start(environment) -> Iterator[Start]:
    """Starts a command as so many processes; what is left of them at the end of the test is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(*command: str | Path, count: int = 2, devices: int = 1, without: int | None = None):
        address = f"127.0.0.1:{free_port()}"
        new = []
        for i in set(range(count)) - {without}:
            joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
            quick = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
            variables = environment | joined | quick
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            new.append(subprocess.Popen([sys.executable, *command], env=variables, cwd=ROOT, text=True, **pipes))
        processes.extend(new)
        return new

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def timed(request) -> bool:
    """Whether wall-clock times are asserted: with `-m timing` alone, on a machine that does nothing else."""
    return "timing" in request.config.getoption("markexpr")


@pytest.fixture
def within(timed):
    """A part of a test that takes less than so many seconds."""

    @contextlib.contextmanager
    def within(seconds: float) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        taken = time.perf_counter() - begin
        assert not timed or taken < seconds, f"{taken:.2f} s"

    return within


@pytest.fixture(scope="session")
def forks(environment) -> Iterator[Forks]:
    forks = Forks(ROOT, environment | {"JAX_PLATFORMS": "cpu"})
    yield forks
    forks.close()
