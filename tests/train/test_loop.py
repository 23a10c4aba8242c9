"""A run that is killed goes on as if nothing had happened: the same documents, and the same numbers to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import open_arrays, run_steps
from llama_jax.train.report import read_metrics
from tests.test_distributed import ROOT, Start, outputs, start  # noqa: F401 (fixture)
from tests.test_scripts import environment  # noqa: F401 (fixture)
from tests.train.corpora import random_documents, write_corpus

STEPS, ROWS = 20, 8  # of the recipe

RECIPE = """
from llama_jax.config import ModelConfig
from llama_jax.train.recipe import *

def recipe():
    return Recipe(
        model=ModelConfig(
            vocab_size=256, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
            norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_seq_len=512, tie_embeddings=True),
        data=Data(train=({train!r}, {other!r}), weights=(0.7, 0.3), validation=({validation!r},)),
        batch=Batch(seq_len=64, sequences=8, microbatches=2),
        optimizer=Optimizer(Schedule(peak=3e-3, steps=20, warmup_steps=3)),
        checkpoints=Checkpoints(every=5, keep_last=2, keep_best=1),
        validation=Validation(every=10),
        tensorboard=False,
    )
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe of 20 steps, which save every 5."""
    root = tmp_path_factory.mktemp("recipe")
    folders = {
        name: str(write_corpus(root / name, random_documents(count, seed=seed), reference={"gzip": 3.0}))
        for name, count, seed in (("train", 200, 0), ("other", 60, 1), ("validation", 10, 2))
    }
    path = root / "tiny.py"
    path.write_text(RECIPE.format(**folders))
    return path


@pytest.fixture
def train(recipe, environment, tmp_path):  # noqa: F811
    """Starts scripts/train.py on the recipe, with an output folder of that name."""
    processes = []

    def train(name: str, *options: str, devices: int = 1, wait: bool = True, limit: int | None = None) -> Any:
        command = [sys.executable, "scripts/train.py", recipe, "--output", tmp_path / name, "--json", *options]
        variables = environment | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        if limit:  # bytes of a file
            command = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "bash", *command]
        process = subprocess.Popen(command, env=variables, cwd=ROOT, text=True, **pipes)
        processes.append(process)
        if not wait:
            return process
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    yield train
    for process in processes:
        process.kill()
        process.communicate()


def steps_of(output: Path) -> list[tuple[Any, ...]]:
    """What must be the same in every run: of each step its number, its rows, and its numbers to the last bit."""
    rows = read_metrics(output)
    return [tuple(row[key] for key in ("step", "rows", "loss", "grad_norm", "learning_rate")) for row in rows]


def arrays_of(output: Path, step: int) -> dict[str, np.ndarray]:
    """Parameters and optimizer state."""
    found = {}
    for item in ("params", "optimizer"):
        for name, array in open_arrays(output / "checkpoints" / str(step) / item).items():
            found[f"{item}/{name}"] = array.read((slice(None),) * len(array.shape))
    return found


def assert_same_run(output: Path, other: Path) -> None:
    assert steps_of(output) == steps_of(other)
    assert [row[:2] for row in steps_of(output)] == [(i, i * ROWS) for i in range(1, STEPS + 1)]
    one, two = arrays_of(output, STEPS), arrays_of(other, STEPS)
    assert one.keys() == two.keys()
    assert len(one) > 20
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes(), name


def wait_for_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while len(read_metrics(output)) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_runs_are_the_same_whole_killed_or_asked_to_stop(train, tmp_path):
    """20 steps == 20 steps == 7 + SIGTERM + 13 == 7 + kill -9 + 15 from the checkpoint at 5."""
    code, out, err = train("whole")
    assert code == 0, err
    outcome = json.loads(out)
    assert outcome["step"] == STEPS
    assert outcome["reference"] == {"gzip": 3.0}
    assert outcome["validation"]["validation_loss"] < 5.5
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 10_000
    assert train("again")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "again")

    for name, number, saved in (("terminated", signal.SIGTERM, None), ("killed", signal.SIGKILL, 5)):
        process = train(name, wait=False)
        wait_for_step(tmp_path / name, 7)
        if saved:
            deadline = time.monotonic() + 30
            while not run_steps(tmp_path / name / "checkpoints") and time.monotonic() < deadline:
                time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (0 if number == signal.SIGTERM else -number), err
        code, _, err = train(name, "--resume", "auto")
        assert code == 0, err
        assert "from step" in err
        assert_same_run(tmp_path / "whole", tmp_path / name)

    # A checkpoint is a model: the folder of the run, and of one step.
    llama = llama_jax.load(tmp_path / "whole", mesh=None)
    assert llama_jax.generate(llama, ["ab"], max_new_tokens=4)[0].tokens
    report = llama_jax.convert(tmp_path / "whole" / "checkpoints" / str(STEPS), tmp_path / "hf", to="hf")
    assert report.dtype == "float32"
    # Nothing is overwritten by accident.
    code, _, err = train("whole")
    assert code == 1
    assert "holds a run, saved at step 20: go on with it by --resume auto" in err


def test_ten_kills_at_random_moments(train, tmp_path):
    """However often: every checkpoint that is there loads, and no document is lost or repeated."""
    assert train("whole", "--checkpoints.every", "1")[0] == 0
    rng, name, resumed = random.Random(0), "killed", 0
    output = tmp_path / name
    for _ in range(10):
        process = train(name, "--resume", "auto", "--checkpoints.every", "1", wait=False)
        before = len(steps_of(output))
        deadline = time.monotonic() + 60
        while len(steps_of(output)) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.15)
        process.kill()
        process.communicate()
        steps = run_steps(output / "checkpoints")
        resumed += bool(steps)
        for step in steps:
            assert len(arrays_of(output, step)) > 20
            assert json.loads((output / "checkpoints" / str(step) / "run" / "progress.json").read_text())["rows"] == (
                step * ROWS
            )
    assert resumed
    code, _, err = train(name, "--resume", "auto", "--checkpoints.every", "1")
    assert code == 0, err
    assert_same_run(tmp_path / "whole", output)
